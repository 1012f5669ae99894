//! The unix sockets in the images directories.
//!
//! A socket is bound under a temporary name and renamed: a CRIU never finds one that does not accept, and a stale file is
//! replaced in one step.

use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, FileType, Mode, Stat};
use rustix::net::SocketFlags;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::criu_io::allowed_uids::AllowedUids;
use crate::criu_io::socket_dir::{id_of, lock, Id, Opened, SocketDir, Watched};
use crate::error_chain::chain;
use crate::tasks;

/// Connections not yet accepted: CRIU opens many images one after the other.
const BACKLOG: i32 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{0} is in use: another daemon listens there; stop it, or give another -D")]
    InUse(PathBuf),
    #[error("{0} exists and is not a socket: remove or rename it")]
    NotASocket(PathBuf),
    #[error("cannot listen on {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A listening socket that we made; its file goes when this is dropped.
#[derive(Debug)]
pub struct BoundSocket(Arc<Bound>);

/// A name in a directory, and what listens there.
#[derive(Debug)]
struct Bound {
    dir: SocketDir,
    name: String,
    now: watch::Sender<Arc<Listening>>,
    /// Those that listened before, until no client waits there any more.
    retired: Mutex<Vec<Arc<Listening>>>,
    /// Its file is not looked after (any more).
    left_alone: AtomicBool,
    /// What was wrong at the last look.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Listening {
    inner: UnixListener,
    /// Of our socket file, so that we remove no other one.
    file: Id,
    /// Where that is.
    dir: Arc<Opened>,
}

impl BoundSocket {
    /// Listens on `name` in `dir`, with mode 0600; 0666 if other users are
    /// allowed in, since then the uid decides.
    pub fn bind(dir: &SocketDir, name: &str) -> Result<(Self, Listener), BindError> {
        let listening = Listening::bind(dir, name)?;
        let bound = Arc::new(Bound {
            dir: dir.clone(),
            name: name.to_owned(),
            now: watch::Sender::new(Arc::new(listening)),
            retired: Mutex::default(),
            left_alone: AtomicBool::new(false),
            trouble: Mutex::default(),
        });
        let mut sockets = lock(&dir.0.sockets);
        sockets.retain(|bound| bound.strong_count() > 0);
        let watched: Arc<dyn Watched> = bound.clone();
        sockets.push(Arc::downgrade(&watched));
        drop(sockets);
        let listener = Listener {
            bound: bound.clone(),
            allowed: dir.0.allowed.clone(),
            path: dir.0.path.join(name),
        };
        Ok((Self(bound), listener))
    }
}

impl Listening {
    fn bind(dir: &SocketDir, name: &str) -> Result<Self, BindError> {
        let path = dir.0.path.join(name);
        let io_error = |source: io::Error| BindError::Io {
            path: path.clone(),
            source,
        };
        let opened = dir.opened();
        match opened.lstat(name) {
            Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(io_error(e.into())),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(BindError::NotASocket(path));
            }
            Ok(_) => match is_listening(&opened.through_fd(name)) {
                Ok(true) => return Err(BindError::InUse(path)),
                Ok(false) => {} // the rename below replaces it
                Err(e) => return Err(io_error(e)),
            },
        }
        let temporary = format!(".{name}.{}", std::process::id());
        let _ = rustix::fs::unlinkat(&opened.fd, &temporary, AtFlags::empty());
        let bound = || -> io::Result<(Id, UnixListener)> {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // A bound file gets the mode of its socket: there is no moment with another one.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            socket.bind(&SockAddr::unix(opened.through_fd(&temporary))?)?;
            if dir.0.allowed.has_others() {
                let all = Mode::from_raw_mode(0o666);
                rustix::fs::chmodat(&opened.fd, &temporary, all, AtFlags::empty())?;
            }
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            let file = id_of(&opened.lstat(&temporary)?);
            rustix::fs::renameat(&opened.fd, &temporary, &opened.fd, name)?;
            let inner = UnixListener::from_std(StdListener::from(OwnedFd::from(socket)))?;
            Ok((file, inner))
        };
        let (file, inner) = bound().map_err(|e| {
            let _ = rustix::fs::unlinkat(&opened.fd, &temporary, AtFlags::empty());
            io_error(e)
        })?;
        Ok(Self {
            inner,
            file,
            dir: opened,
        })
    }
}

/// Whether a process listens on the socket, or only its file is left. Does not wait for an accept.
fn is_listening(path: &Path) -> io::Result<bool> {
    let connected = || -> io::Result<()> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match connected().map_err(|e| (e.kind(), e)) {
        Ok(()) => Ok(true),
        // It listens, and has not accepted those that are connected.
        Err((io::ErrorKind::WouldBlock, _)) => Ok(true),
        // Stale, or gone just now.
        Err((io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound, _)) => Ok(false),
        // Whether a daemon listens cannot be known.
        Err((_, e)) => Err(e),
    }
}

impl Watched for Bound {
    /// Whether the file is still the one that we made; if not, listens anew.
    fn look(&self) {
        if self.left_alone.load(Ordering::Acquire) {
            return;
        }
        let now = self.now.borrow().clone();
        let (there, path) = (self.dir.opened(), self.dir.0.path.join(&self.name));
        let is_ours = |stat: Stat| id_of(&stat) == now.file;
        if there.id == now.dir.id && there.lstat(&self.name).is_ok_and(is_ours) {
            return;
        }
        let mut trouble = lock(&self.trouble);
        match Listening::bind(&self.dir, &self.name) {
            Ok(listening) => {
                lock(&self.retired).push(now);
                self.now.send_replace(Arc::new(listening));
                *trouble = None;
                tracing::error!(
                    "{} was removed while this daemon was running; the daemon made it again and listens there",
                    path.display()
                );
            }
            Err(e) => {
                let text = chain(&e);
                if trouble.as_ref() != Some(&text) {
                    tracing::error!(
                        "{} was removed while this daemon was running, and cannot be made again: {text}. The daemon tries again every second",
                        path.display()
                    );
                }
                *trouble = Some(text);
            }
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let bound = &self.0;
        // A look that has begun must not make it again.
        let looks = lock(&bound.dir.0.look);
        bound.left_alone.store(true, Ordering::Release);
        drop(looks);
        let now = bound.now.borrow().clone();
        if now
            .dir
            .lstat(&bound.name)
            .is_ok_and(|s| id_of(&s) == now.file)
        {
            let _ = rustix::fs::unlinkat(&now.dir.fd, &bound.name, AtFlags::empty());
        }
    }
}

/// Accepts from the users that are allowed to connect. Connections of others are closed unread, and logged.
#[derive(Debug)]
pub struct Listener {
    bound: Arc<Bound>,
    allowed: Arc<AllowedUids>,
    path: PathBuf,
}

impl Listener {
    /// Cancel safe.
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        let mut now = self.bound.now.subscribe();
        loop {
            // Clients that had connected before another socket took its place.
            if let Some(stream) = self.accept_retired() {
                return Ok(stream);
            }
            let listening = now.borrow_and_update().clone();
            let (stream, _) = tokio::select! {
                accepted = listening.inner.accept() => accepted?,
                _ = now.changed() => continue,
            };
            if self.allowed.admit(&stream, &self.path) {
                return Ok(stream);
            }
        }
    }

    fn accept_retired(&self) -> Option<UnixStream> {
        let mut retired = lock(&self.bound.retired);
        while let Some(listening) = retired.last() {
            match self.accept_waiting_at(listening) {
                Some(stream) => return Some(stream),
                None => drop(retired.pop()),
            }
        }
        None
    }

    /// A connection that waits already.
    fn accept_waiting(&self) -> Option<UnixStream> {
        let retired = self.accept_retired();
        retired.or_else(|| self.accept_waiting_at(&self.bound.now.borrow().clone()))
    }

    fn accept_waiting_at(&self, listening: &Listening) -> Option<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let fd = rustix::net::accept_with(&listening.inner, flags).ok()?;
            let stream = UnixStream::from_std(fd.into()).ok()?;
            if self.allowed.admit(&stream, &self.path) {
                return Some(stream);
            }
        }
    }

    /// From now on connect() says ECONNREFUSED, and the file stays; what is connected already can be accepted.
    pub fn refuse(&self) {
        self.bound.left_alone.store(true, Ordering::Release);
        let now = self.bound.now.borrow().clone();
        let _ = rustix::net::shutdown(&now.inner, rustix::net::Shutdown::Read);
    }

    /// Whether a connection waits to be accepted.
    pub fn has_backlog(&self) -> bool {
        let waits = |listening: &Listening| {
            let mut fds = [PollFd::new(&listening.inner, PollFlags::IN)];
            matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
        };
        waits(&self.bound.now.borrow()) || lock(&self.bound.retired).iter().any(|l| waits(l))
    }
}

impl Drop for Listener {
    /// No task accepts any more, so no client shall wait for that.
    fn drop(&mut self) {
        self.refuse();
    }
}

/// A failing accept (out of descriptors) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until `stop`; connections outlive it, and each is served by a task of its own. `serve`
/// is called in the order of their arrival. A panic ends neither this nor another connection.
pub async fn accept<F, T>(listener: &Listener, stop: &CancellationToken, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    tasks::lasting("accepting connections", || {
        accept_until(listener, stop, serve)
    })
    .await;
}

async fn accept_until<F, T>(listener: &Listener, stop: &CancellationToken, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok(connection) => spawn(connection, serve),
            Err(e) => {
                listener.allowed.cannot_accept(&listener.path, &e);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves the clients that are connected already, which would be reset when the listener goes.
pub fn accept_waiting<F, T>(listener: &Listener, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    while let Some(connection) = listener.accept_waiting() {
        spawn(connection, serve);
    }
}

/// What is logged of a connection says whose it is.
fn spawn<F, T>(connection: UnixStream, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    let peer = connection.peer_cred().ok();
    let pid = peer.as_ref().and_then(UCred::pid).unwrap_or(0);
    // At the level of errors, so that it is there whatever is logged.
    let span = tracing::error_span!("local", pid, uid = peer.map(|peer| peer.uid()));
    // The client learns of a panic by the end of the connection, or by what the task holds.
    tasks::spawn("a connection", serve(connection).instrument(span), |_| {});
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    async fn accepts(path: &Path, listener: &Listener) -> bool {
        let connected = UnixStream::connect(path).await.is_ok();
        let accepted = tokio::time::timeout(Duration::from_secs(20), listener.accept());
        connected && accepted.await.is_ok_and(|accepted| accepted.is_ok())
    }

    #[tokio::test]
    async fn bind_refuse_replace_remove() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let dir = SocketDir::open(&deep, &AllowedUids::new(&[])).unwrap();
        let path = deep.join("x.sock");

        let (bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            BoundSocket::bind(&dir, "x.sock"),
            Err(BindError::InUse(_))
        ));
        assert!(listener.has_backlog(), "the probe of the second bind");

        // A daemon that was killed leaves its file behind.
        std::mem::forget(bound);
        drop(listener);
        let (bound, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(bound);
        assert!(!path.exists());

        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            BoundSocket::bind(&dir, "x.sock"),
            Err(BindError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(
            std::fs::read_dir(&deep).unwrap().count(),
            1,
            "no temporary is left"
        );
    }

    #[tokio::test]
    async fn another_daemons_socket_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let (first, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(listener);
        let (_second, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(first);
        assert!(temp.path().join("x.sock").exists());
    }

    #[tokio::test]
    async fn a_socket_that_was_removed_or_replaced_comes_back() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let path = temp.path().join("x.sock");
        let (bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        std::fs::remove_file(&path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        // A stale one, over ours.
        drop(StdListener::bind(temp.path().join("stale")).unwrap());
        std::fs::rename(temp.path().join("stale"), &path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        // A file that another user put there stays.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        dir.look();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        drop(bound);
        dir.look();
        assert!(!path.exists(), "one that was closed stays away");
    }

    #[tokio::test]
    async fn a_panic_ends_one_connection_alone() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let (_bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let path = temp.path().join("x.sock");
        let (served, mut serves) = tokio::sync::mpsc::channel(4);
        let count = std::sync::atomic::AtomicUsize::new(0);
        let serve = move |_: UnixStream| {
            let nth = count.fetch_add(1, Ordering::Relaxed);
            assert_ne!(nth, 0, "on purpose, in the loop");
            let served = served.clone();
            async move {
                assert_ne!(nth, 1, "on purpose, in the task");
                served.send(nth).await.unwrap();
            }
        };
        let stop = CancellationToken::new();
        let accepting = accept(&listener, &stop, &serve);
        let connecting = async {
            for _ in 0..3 {
                let _ = UnixStream::connect(&path).await.unwrap();
            }
            serves.recv().await
        };
        tokio::select! {
            () = accepting => panic!("it accepts no more"),
            nth = connecting => assert_eq!(nth, Some(2)),
        }
    }

    /// A link at the temporary name must not lead the socket elsewhere, nor at its own.
    #[tokio::test]
    async fn planted_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let temporary = format!(".x.sock.{}", std::process::id());
        let target = elsewhere.path().join("planted");
        std::os::unix::fs::symlink(&target, temp.path().join(temporary)).unwrap();
        let (_bound, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        std::os::unix::fs::symlink(&target, temp.path().join("y.sock")).unwrap();
        let refused = BoundSocket::bind(&dir, "y.sock");
        assert!(
            matches!(refused, Err(BindError::NotASocket(_))),
            "{refused:?}"
        );
        assert!(!target.exists());
    }
}
