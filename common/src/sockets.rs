//! The unix sockets in the images directories.
//!
//! CRIU resolves their names against directories of its own (`-D`, `-W`), so a daemon listens
//! in each directory it was given. A socket is bound under a temporary name and renamed: a
//! CRIU never finds one that does not accept, and a stale file is replaced in one step.
//!
//! Who talks to these sockets takes part in a process's memory. So a directory that others can
//! write is refused, whatever its sticky bit says: a name there can be taken before we come. The
//! directory is opened once, and all names are relative to that. Its ancestors matter as far as
//! somebody may put another directory in its place: not for us, who have it open, but CRIU would
//! look there. That is warned of and not refused, since it is CRIU's path, not ours.

use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::net::SocketFlags;
use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::peers::Peers;

/// Connections not yet accepted: CRIU opens many images one after the other.
const BACKLOG: i32 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{0} is in use: another daemon listens there")]
    InUse(PathBuf),
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    #[error("cannot listen on {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why a directory gets no sockets.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it belongs to uid {owner}, who could put sockets of their own there; it must belong to root or to uid {ours}")]
    Owner { owner: u32, ours: u32 },
    #[error(
        "others can write there (mode {0:04o}) and could put sockets of their own; chmod go-w"
    )]
    Writable(u32),
}

/// A directory that sockets are put into, opened once: renaming the directory or planting a
/// link in its path later changes nothing.
#[derive(Debug, Clone)]
pub struct SocketDir {
    path: PathBuf,
    fd: Arc<OwnedFd>,
    peers: Arc<Peers>,
}

impl SocketDir {
    /// `path` is absolute and has no links in it. In its sockets `peers` are served.
    pub fn open(path: &Path, peers: &Arc<Peers>) -> Result<Self, DirError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(io::Error::from)?;
        Self::checked(path.to_owned(), fd, peers)
    }

    fn checked(path: PathBuf, fd: OwnedFd, peers: &Arc<Peers>) -> Result<Self, DirError> {
        let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
        if !is_ours(&stat) {
            let ours = geteuid().as_raw();
            return Err(DirError::Owner {
                owner: stat.st_uid,
                ours,
            });
        }
        match writable_by_others(&stat) {
            true => Err(DirError::Writable(stat.st_mode & 0o7777)),
            false => Ok(Self {
                path,
                fd: Arc::new(fd),
                peers: peers.clone(),
            }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directories above in which others could put another one in its place.
    pub fn unsafe_ancestors(&self) -> Vec<PathBuf> {
        let ancestors = self.path.ancestors().skip(1);
        let replaceable = |dir: &&Path| {
            let stat = rustix::fs::stat(*dir);
            // In a sticky directory nobody renames what is not theirs.
            stat.is_ok_and(|s| {
                !is_ours(&s)
                    || (writable_by_others(&s) && s.st_mode & Mode::SVTX.as_raw_mode() == 0)
            })
        };
        ancestors.filter(replaceable).map(Path::to_owned).collect()
    }

    /// Makes (or finds) a subdirectory, never following a link. Nobody else can look into it,
    /// but for those who are allowed to connect there.
    pub fn subdir(&self, name: &str) -> Result<Self, DirError> {
        match rustix::fs::mkdirat(&*self.fd, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(io::Error::from(e).into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd =
            rustix::fs::openat(&*self.fd, name, flags, Mode::empty()).map_err(io::Error::from)?;
        let subdir = Self::checked(self.path.join(name), fd, &self.peers)?;
        let others = match self.peers.has_others() {
            true => Mode::XGRP | Mode::XOTH,
            false => Mode::empty(),
        };
        // Behind our own descriptor: what is at `name` by now does not matter.
        rustix::fs::chmod(subdir.through_fd("."), Mode::RWXU | others).map_err(io::Error::from)?;
        Ok(subdir)
    }

    /// Removes a subdirectory if it is empty: what else is in it is not ours.
    pub fn remove_subdir(&self, name: &str) {
        let _ = rustix::fs::unlinkat(&*self.fd, name, AtFlags::REMOVEDIR);
    }

    /// Same directory under another name?
    pub fn same(&self, other: &Self) -> bool {
        match (rustix::fs::fstat(&*self.fd), rustix::fs::fstat(&*other.fd)) {
            (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
            _ => false,
        }
    }

    /// A path through our descriptor: as short as sun_path wants it, whatever the directory's
    /// own length.
    fn through_fd(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()).into()
    }
}

/// A listening socket that we made.
#[derive(Debug)]
pub struct BoundSocket {
    dir: SocketDir,
    name: String,
    /// Of our socket file, so that we remove no other one.
    inode: u64,
}

impl BoundSocket {
    /// Listens on `name` in `dir`, with mode 0600; 0666 if there are users who are allowed in
    /// besides us, since then it is their uid that decides.
    pub fn bind(dir: &SocketDir, name: &str) -> Result<(Self, Listener), BindError> {
        let path = dir.path.join(name);
        let io_error = |source: io::Error| BindError::Io {
            path: path.clone(),
            source,
        };
        match rustix::fs::statat(&*dir.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(io_error(e.into())),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(BindError::NotASocket(path));
            }
            Ok(_) => match StdStream::connect(dir.through_fd(name)) {
                Ok(_) => return Err(BindError::InUse(path)),
                // Stale, or gone just now: the rename below replaces it.
                Err(e)
                    if matches!(
                        e.kind(),
                        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
                    ) => {}
                // Not "nobody listens": that cannot be known.
                Err(e) => return Err(io_error(e)),
            },
        }
        let temporary = format!(".{name}.{}", std::process::id());
        let _ = rustix::fs::unlinkat(&*dir.fd, &temporary, AtFlags::empty());
        let bound = || -> io::Result<(u64, Listener)> {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // A bound file gets the mode of its socket: there is no moment with another one.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            socket.bind(&SockAddr::unix(dir.through_fd(&temporary))?)?;
            if dir.peers.has_others() {
                let all = Mode::from_raw_mode(0o666);
                rustix::fs::chmodat(&*dir.fd, &temporary, all, AtFlags::empty())?;
            }
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            let inode = rustix::fs::statat(&*dir.fd, &temporary, AtFlags::SYMLINK_NOFOLLOW)?.st_ino;
            rustix::fs::renameat(&*dir.fd, &temporary, &*dir.fd, name)?;
            let listener = Listener {
                inner: UnixListener::from_std(StdListener::from(OwnedFd::from(socket)))?,
                peers: dir.peers.clone(),
                path: path.clone(),
            };
            Ok((inode, listener))
        };
        let (inode, listener) = bound().map_err(|e| {
            let _ = rustix::fs::unlinkat(&*dir.fd, &temporary, AtFlags::empty());
            io_error(e)
        })?;
        Ok((
            Self {
                dir: dir.clone(),
                name: name.to_owned(),
                inode,
            },
            listener,
        ))
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let stat = rustix::fs::statat(&*self.dir.fd, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|s| s.st_ino == self.inode) {
            let _ = rustix::fs::unlinkat(&*self.dir.fd, &self.name, AtFlags::empty());
        }
    }
}

fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == geteuid().as_raw()
}

fn writable_by_others(stat: &Stat) -> bool {
    stat.st_mode & (Mode::WGRP | Mode::WOTH).as_raw_mode() != 0
}

/// Accepts from those who are allowed to connect; others are closed unheard, and logged.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    peers: Arc<Peers>,
    path: PathBuf,
}

impl Listener {
    /// Cancel safe.
    async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.inner.accept().await?;
            if self.peers.admit(&stream, &self.path) {
                return Ok(stream);
            }
        }
    }

    /// A connection that waits already.
    fn accept_waiting(&self) -> Option<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let fd = rustix::net::accept_with(&self.inner, flags).ok()?;
            let stream = UnixStream::from_std(fd.into()).ok()?;
            if self.peers.admit(&stream, &self.path) {
                return Some(stream);
            }
        }
    }
}

/// A failing accept (out of descriptors) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until `stop`; connections outlive it, and each is served by a task of its own. `serve`
/// is called in the order of their arrival.
pub async fn accept<F, T>(listener: &Listener, stop: &CancellationToken, serve: &F)
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
                listener.peers.cannot_accept(&listener.path, &e);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves those who are connected already, and would be reset when the listener goes.
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
    tokio::spawn(serve(connection).instrument(span));
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}

/// Whether a connection waits to be accepted.
pub fn has_backlog(listener: impl AsFd) -> bool {
    use rustix::event::{poll, PollFd, PollFlags, Timespec};
    let mut fds = [PollFd::new(&listener, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn bind_refuse_replace_remove() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let dir = SocketDir::open(&deep, &Peers::new(&[])).unwrap();
        let path = deep.join("x.sock");

        let (bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            BoundSocket::bind(&dir, "x.sock"),
            Err(BindError::InUse(_))
        ));
        assert!(has_backlog(&listener), "the probe of the second bind");

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
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let (first, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(listener);
        let (_second, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(first);
        assert!(temp.path().join("x.sock").exists());
    }

    #[test]
    fn a_subdirectory_is_never_a_link() {
        let temp = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/tmp", temp.path().join("planted")).unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        assert!(dir.subdir("planted").is_err());
        assert!(dir.subdir("web").unwrap().path().is_dir());
        dir.remove_subdir("web");
        assert!(!temp.path().join("web").exists());
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let open = || SocketDir::open(temp.path(), &Peers::new(&[]));
        for mode in [0o700, 0o755, 0o1755] {
            chmod(temp.path(), mode);
            open().unwrap();
        }
        for mode in [0o720, 0o702, 0o777, 0o1777] {
            chmod(temp.path(), mode);
            let Err(DirError::Writable(found)) = open() else {
                panic!("{mode:o} was taken");
            };
            assert_eq!(found, mode);
        }
    }

    #[test]
    fn a_link_is_no_directory() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(temp.path(), &link).unwrap();
        let refused = SocketDir::open(&link, &Peers::new(&[]));
        assert!(matches!(refused, Err(DirError::Io(_))), "{refused:?}");
    }

    #[test]
    fn ancestors_in_which_it_can_be_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let of = || SocketDir::open(&deep, &Peers::new(&[])).unwrap();
        let a = temp.path().join("a");
        assert!(!of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o777);
        assert!(of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o1777);
        assert!(!of().unsafe_ancestors().contains(&a));
    }

    #[tokio::test]
    async fn modes_with_and_without_other_users() {
        for (allowed, socket_mode, dir_mode) in [(&[][..], 0o600, 0o700), (&[12345], 0o666, 0o711)]
        {
            let temp = tempfile::tempdir().unwrap();
            let dir = SocketDir::open(temp.path(), &Peers::new(allowed)).unwrap();
            // Left by somebody, with another mode.
            std::fs::create_dir(temp.path().join("web")).unwrap();
            chmod(&temp.path().join("web"), 0o755);
            let subdir = dir.subdir("web").unwrap();
            let (_bound, _listener) = BoundSocket::bind(&subdir, "x.sock").unwrap();
            assert_eq!(mode_of(&temp.path().join("web")), dir_mode);
            assert_eq!(mode_of(&temp.path().join("web/x.sock")), socket_mode);
        }
    }

    /// A link at the temporary name must not lead the socket elsewhere, nor at its own.
    #[tokio::test]
    async fn planted_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
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
