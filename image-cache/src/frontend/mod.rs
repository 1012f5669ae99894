//! CRIU restores from us: the unix sockets, one file per dialect, and which sessions each
//! socket is about. The frontends know the store and nothing of the link.

mod criu_log;
mod idle_readers;
pub mod pump;
pub mod remote;
mod restored_tasks;
pub mod service;
pub mod stream;
pub mod verdict;

use std::collections::HashMap;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use image_common::control::hold::{Held, Hold, HoldTls};
use image_common::control::CACHE_CONTROL_SOCKET;
use image_common::criu::{remote as remote_bytes, stream as stream_bytes};
use image_common::criu_io::session_dirs::SessionDir;
use image_common::criu_io::socket_dir::{DirError, SocketDir};
use image_common::criu_io::sockets::{self, BindError, BoundSocket, Listener};
use image_common::daemon::shutdown::Shutdown;
use image_common::error_chain::chain;
use image_common::image::SessionName;
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use verdict::Restore;

use crate::cli::RemoteDialect;
use crate::frontend::service::Service;
use crate::store::sockets::SessionSockets;
use crate::store::{Scope, Store};

/// The sockets that the directory of a session has.
const SOCKETS: [&str; 3] = [
    remote_bytes::CACHE_SOCKET,
    stream_bytes::SERVE_SOCKET,
    CACHE_CONTROL_SOCKET,
];

/// Serves a connection to the control socket in the directory of a session.
pub type ServeControl =
    fn(UnixStream, Arc<Store>, Arc<Frontends>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

/// What does not change between the scripts that hold.
pub struct HoldPlace {
    pub dir: PathBuf,
    pub listen: SocketAddr,
    pub insecure_listen: bool,
    pub allow_uid: Vec<u32>,
    pub tls: Option<HoldTls>,
}

/// All the sockets by which a restore finds this cache.
pub struct Frontends {
    dirs: Vec<SocketDir>,
    dialect: RemoteDialect,
    shutdown: Shutdown,
    restores: Arc<verdict::Restores>,
    remote_restores: Arc<Mutex<Vec<Arc<Restore>>>>,
    sessions: Mutex<Sessions>,
    control: ServeControl,
    /// Where a script that holds listens, and what it needs for that.
    pub holding: OnceLock<HoldPlace>,
    /// Where restores are served: not on the thread of the link that a session came by.
    runtime: Handle,
}

/// The directories of the sessions: `sessions/NAME/` in each images directory.
#[derive(Default)]
struct Sessions {
    listening: HashMap<SessionName, Listening>,
    /// `sessions`, made for the first one.
    above: Vec<SocketDir>,
}

/// Sockets in one or more directories; closing them is dropping this. The files go before their directories, which must be
/// empty to go.
struct Listening {
    sockets: Vec<BoundSocket>,
    _subdirs: Vec<SessionDir>,
    _tasks: DropGuard,
}

/// The sockets in the images directories, and at their end all others too.
pub struct Served {
    _listening: Listening,
    frontends: Arc<Frontends>,
}

impl Drop for Served {
    fn drop(&mut self) {
        let sessions = std::mem::take(&mut *self.frontends.sessions());
        drop(sessions.listening);
        for above in sessions.above {
            above.remove_sessions();
        }
    }
}

/// A `sun_path` has room for so much of a directory beside the names of CRIU's sockets; CRIU cuts what is longer.
const MAX_DIR_BYTES: usize = image_common::daemon::MAX_DIR_BYTES;

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot make the session's directory in {path}")]
    Directory {
        path: std::path::PathBuf,
        #[source]
        source: DirError,
    },
}

impl Frontends {
    pub fn new(
        dirs: Vec<SocketDir>,
        dialect: RemoteDialect,
        shutdown: Shutdown,
        control: ServeControl,
    ) -> Arc<Self> {
        Arc::new(Self {
            dirs,
            dialect,
            shutdown,
            restores: Arc::default(),
            remote_restores: Arc::default(),
            sessions: Mutex::default(),
            control,
            holding: OnceLock::new(),
            runtime: Handle::current(),
        })
    }

    pub fn restores(&self) -> Arc<verdict::Restores> {
        self.restores.clone()
    }

    /// What the script of a restore that holds is told.
    pub fn hold(&self, restore: &Restore) -> Hold {
        let (session, set) = (&restore.session, &restore.set);
        let held = Held {
            id: session.id.to_string(),
            session: session.name.to_string(),
            snapshot: set.snapshot.to_string(),
            set: set.number.0,
            key: session.key,
            proxy: session.opener().proxy,
            peer: session.peer.clone(),
        };
        // A daemon sets it before it serves.
        let place = self.holding.get();
        Hold {
            held,
            dir: place.map(|place| place.dir.clone()).unwrap_or_default(),
            listen: place.map_or_else(|| SocketAddr::from(([0; 4], 0)), |place| place.listen),
            insecure_listen: place.is_some_and(|place| place.insecure_listen),
            allow_uid: place
                .map(|place| place.allow_uid.clone())
                .unwrap_or_default(),
            tls: place.and_then(|place| place.tls.clone()),
        }
    }

    /// What a connection of these sessions is served with.
    pub fn service(&self, store: &Arc<Store>, scope: Scope) -> Service {
        Service {
            store: store.clone(),
            scope,
            dialect: self.dialect,
            shutdown: self.shutdown.clone(),
            restores: self.restores.clone(),
            remote_restores: self.remote_restores.clone(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the sockets in the images directories. They, and those of sessions, live until the value is dropped.
    pub fn serve_dirs(self: &Arc<Self>, store: &Arc<Store>) -> Result<Served, ServeError> {
        let service = self.service(store, Scope::Any);
        Ok(Served {
            _listening: listen(&self.dirs, Vec::new(), &service, None)?,
            frontends: self.clone(),
        })
    }

    /// Opens the sockets in `DIR/sessions/NAME/` unless they are there.
    pub fn serve_session(
        self: &Arc<Self>,
        store: &Arc<Store>,
        name: &SessionName,
    ) -> Result<(), ServeError> {
        let mut sessions = self.sessions();
        if sessions.listening.contains_key(name) {
            return Ok(());
        }
        let _serving = self.runtime.enter();
        if sessions.above.is_empty() {
            let above = self.dirs.iter().map(|dir| {
                // It may have been deleted a moment ago.
                dir.look_if_gone();
                dir.sessions(&SOCKETS)
                    .map_err(|source| ServeError::Directory {
                        path: dir.path().to_owned(),
                        source,
                    })
            });
            sessions.above = above.collect::<Result<_, _>>()?;
        }
        let mut dirs = Vec::new();
        let mut subdirs = Vec::new();
        for (dir, above) in self.dirs.iter().zip(&sessions.above) {
            dir.look_if_gone();
            above.look_if_gone();
            let subdir = above
                .session(name)
                .map_err(|source| ServeError::Directory {
                    path: above.path().to_owned(),
                    source,
                })?;
            let path = subdir.path();
            if path.as_os_str().len() > MAX_DIR_BYTES {
                tracing::warn!(
                    session = %name,
                    "{} has more than the {MAX_DIR_BYTES} characters that CRIU can connect to: restore with a shorter, relative -D, or from {}",
                    path.display(),
                    dir.path().display()
                );
            }
            dirs.push(SocketDir::clone(&subdir));
            subdirs.push(subdir);
        }
        let service = self.service(store, Scope::Session(name.clone()));
        let control = Some(Arc::downgrade(self));
        let listening = listen(&dirs, subdirs, &service, control)?;
        sessions.listening.insert(name.clone(), listening);
        Ok(())
    }

    /// Tasks that wait for the end of a restore's CRIU: of `--remote` restores that are remembered, and of restores
    /// that have no verdict yet.
    pub fn watched(&self) -> usize {
        let remote = self.remote_restores.lock();
        let remote = remote.unwrap_or_else(PoisonError::into_inner);
        let watched = remote.iter().filter(|r| r.is_watched()).count();
        watched + self.restores.undecided()
    }

    /// Closes the sockets of sessions that are gone, and forgets their restores.
    pub fn reconcile(&self, store: &Store) {
        let mut sessions = self.sessions();
        let mut remote = self
            .remote_restores
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // A restore that still runs keeps its session's sockets: CRIU takes a missing socket
        // for a missing image.
        remote.retain(|r| store.holds(&r.session) || r.goes_on());
        let read = |name: &SessionName| remote.iter().any(|r| r.session.name == *name);
        let listening = &mut sessions.listening;
        listening.retain(|name, _| store.has_session_named(name) || read(name));
    }

    /// Closes them whenever a session goes.
    pub async fn follow(self: Arc<Self>, store: Arc<Store>) {
        let mut changes = store.session_changes.subscribe();
        while changes.changed().await.is_ok() {
            self.reconcile(&store);
        }
    }
}

impl SessionSockets for Frontends {
    fn open(self: Arc<Self>, store: &Arc<Store>, session: &SessionName) -> Result<(), String> {
        self.serve_session(store, session).map_err(|e| chain(&e))
    }

    fn reconcile(&self, store: &Store) {
        Frontends::reconcile(self, store);
    }
}

/// `control`: a restore's script looks for the control socket in CRIU's images directory, which is that of a session.
fn listen(
    dirs: &[SocketDir],
    subdirs: Vec<SessionDir>,
    service: &Service,
    control: Option<Weak<Frontends>>,
) -> Result<Listening, ServeError> {
    let stop = CancellationToken::new();
    let mut listening = Listening {
        sockets: Vec::new(),
        _subdirs: subdirs,
        _tasks: stop.clone().drop_guard(),
    };
    for dir in dirs {
        let (socket, listener) = BoundSocket::bind(dir, remote_bytes::CACHE_SOCKET)?;
        listening.sockets.push(socket);
        let s = service.clone();
        tokio::spawn(accept(listener, stop.clone(), move |c| {
            remote::serve(c, s.clone())
        }));

        let (socket, listener) = BoundSocket::bind(dir, stream_bytes::SERVE_SOCKET)?;
        listening.sockets.push(socket);
        let s = service.clone();
        tokio::spawn(accept(listener, stop.clone(), move |c| {
            stream::serve(c, s.clone())
        }));

        if let Some(frontends) = &control {
            let (socket, listener) = BoundSocket::bind(dir, CACHE_CONTROL_SOCKET)?;
            listening.sockets.push(socket);
            let (store, frontends) = (service.store.clone(), frontends.clone());
            tokio::spawn(accept(listener, stop.clone(), move |c| {
                let (store, frontends) = (store.clone(), frontends.upgrade());
                async move {
                    if let Some(frontends) = frontends {
                        (frontends.control)(c, store, frontends.clone()).await;
                    }
                }
            }));
        }
    }
    Ok(listening)
}

/// Accepts until `stop`; connections outlive it.
pub async fn accept<F, T>(listener: Listener, stop: CancellationToken, serve: F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    sockets::accept(&listener, &stop, &serve).await;
}
