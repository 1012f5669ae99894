//! CRIU restores from us: the unix sockets, one file per dialect, and which sessions each
//! socket is about. The frontends know the store and nothing of the link.

mod attention;
pub mod pump;
pub mod remote;
pub mod restores;
pub mod stream;
mod tasks;

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::criu::{remote as remote_bytes, stream as stream_bytes};
use image_common::image::SessionName;
use image_common::shutdown::Shutdown;
use image_common::sockets::{self, BindError, BoundSocket, DirError, Listener, SocketDir};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio_util::sync::{CancellationToken, DropGuard};

use restores::Restore;

use crate::config::RemoteDialect;
use crate::store::{Scope, Store};

/// Everything a frontend's connection needs.
#[derive(Clone)]
pub struct Service {
    pub store: Arc<Store>,
    pub scope: Scope,
    pub dialect: RemoteDialect,
    pub shutdown: Shutdown,
    pub restores: Arc<restores::Restores>,
    /// `--remote` restores have no connection that holds them.
    remote_restores: Arc<Mutex<Vec<Arc<Restore>>>>,
}

impl Service {
    pub fn remote_restores(&self) -> MutexGuard<'_, Vec<Arc<Restore>>> {
        self.remote_restores
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// All the sockets that restore finds us by.
pub struct Frontends {
    dirs: Vec<SocketDir>,
    dialect: RemoteDialect,
    shutdown: Shutdown,
    restores: Arc<restores::Restores>,
    remote_restores: Arc<Mutex<Vec<Arc<Restore>>>>,
    sessions: Mutex<HashMap<SessionName, Listening>>,
    /// Where restores are served: not on the thread of the link that a session came by.
    runtime: Handle,
}

/// Sockets in one or more directories; closing them is dropping this.
struct Listening {
    sockets: Vec<BoundSocket>,
    subdirs: Vec<(SocketDir, SessionName)>,
    _tasks: DropGuard,
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("cannot make the directory {path}")]
    Directory {
        path: std::path::PathBuf,
        #[source]
        source: DirError,
    },
}

impl Frontends {
    pub fn new(dirs: Vec<SocketDir>, dialect: RemoteDialect, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self {
            dirs,
            dialect,
            shutdown,
            restores: Arc::default(),
            remote_restores: Arc::default(),
            sessions: Mutex::default(),
            runtime: Handle::current(),
        })
    }

    pub fn restores(&self) -> Arc<restores::Restores> {
        self.restores.clone()
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

    /// Opens the sockets in the images directories. They live until the value is dropped.
    pub fn serve_dirs(&self, store: &Arc<Store>) -> Result<impl Sized, ServeError> {
        listen(&self.dirs, Vec::new(), self.service(store, Scope::Any))
    }

    /// Opens the sockets in `DIR/NAME/` unless they are there.
    pub fn serve_session(&self, store: &Arc<Store>, name: &SessionName) -> Result<(), ServeError> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        if sessions.contains_key(name) {
            return Ok(());
        }
        let mut dirs = Vec::new();
        let mut subdirs = Vec::new();
        for dir in &self.dirs {
            let subdir = dir
                .subdir(name.as_str())
                .map_err(|source| ServeError::Directory {
                    path: dir.path().join(name.as_str()),
                    source,
                })?;
            dirs.push(subdir);
            subdirs.push((dir.clone(), name.clone()));
        }
        let service = self.service(store, Scope::Session(name.clone()));
        let _serving = self.runtime.enter();
        sessions.insert(name.clone(), listen(&dirs, subdirs, service)?);
        Ok(())
    }

    /// Restores of `--remote` that are remembered and have a task that waits for their CRIU's end.
    pub fn watched(&self) -> usize {
        let remote = self.remote_restores.lock();
        let remote = remote.unwrap_or_else(PoisonError::into_inner);
        remote.iter().filter(|r| r.is_watched()).count()
    }

    /// Closes the sockets of sessions that are gone, and forgets their restores.
    pub fn reconcile(&self, store: &Store) {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut remote = self
            .remote_restores
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // A restore that still runs keeps its session's sockets: CRIU takes a missing socket
        // for a missing image.
        remote.retain(|r| store.holds(&r.session) || r.goes_on());
        let read = |name: &SessionName| remote.iter().any(|r| r.session.name == *name);
        sessions.retain(|name, _| store.has_session_named(name) || read(name));
    }

    /// Closes them whenever a session goes.
    pub async fn follow(self: Arc<Self>, store: Arc<Store>) {
        let mut changes = store.session_changes.subscribe();
        while changes.changed().await.is_ok() {
            self.reconcile(&store);
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.sockets.clear(); // the files first: a directory must be empty to go
        for (dir, name) in &self.subdirs {
            dir.remove_subdir(name.as_str());
        }
    }
}

fn listen(
    dirs: &[SocketDir],
    subdirs: Vec<(SocketDir, SessionName)>,
    service: Service,
) -> Result<Listening, ServeError> {
    let stop = CancellationToken::new();
    let mut listening = Listening {
        sockets: Vec::new(),
        subdirs,
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
