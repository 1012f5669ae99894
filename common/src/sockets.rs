//! The unix sockets in the images directories.
//!
//! CRIU resolves their names against directories of its own (`-D`, `-W`), so a daemon listens
//! in each directory it was given. A socket is bound under a temporary name and renamed: a
//! CRIU never finds one that does not accept, and a stale file is replaced in one step.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use tokio::net::UnixListener;

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

/// A directory that sockets are put into, opened once: renaming the directory or planting a
/// link in its path later changes nothing.
#[derive(Debug, Clone)]
pub struct SocketDir {
    path: PathBuf,
    fd: Arc<OwnedFd>,
}

impl SocketDir {
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self {
            path: path.to_owned(),
            fd: Arc::new(fd),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes (or finds) a subdirectory, never following a link.
    pub fn subdir(&self, name: &str) -> io::Result<Self> {
        match rustix::fs::mkdirat(&*self.fd, name, Mode::RWXU) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(&*self.fd, name, flags, Mode::empty())?;
        Ok(Self {
            path: self.path.join(name),
            fd: Arc::new(fd),
        })
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
    /// Listens on `name` in `dir`, with mode 0600.
    pub fn bind(dir: &SocketDir, name: &str) -> Result<(Self, UnixListener), BindError> {
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
            Ok(_) if StdStream::connect(dir.through_fd(name)).is_ok() => {
                return Err(BindError::InUse(path));
            }
            Ok(_) => {} // stale: the rename below replaces it
        }
        let temporary = format!(".{name}.{}", std::process::id());
        let _ = rustix::fs::unlinkat(&*dir.fd, &temporary, AtFlags::empty());
        let bound = || -> io::Result<(u64, UnixListener)> {
            let listener = StdListener::bind(dir.through_fd(&temporary))?;
            rustix::fs::chmodat(
                &*dir.fd,
                &temporary,
                Mode::RUSR | Mode::WUSR,
                AtFlags::empty(),
            )?;
            listener.set_nonblocking(true)?;
            let inode = rustix::fs::statat(&*dir.fd, &temporary, AtFlags::SYMLINK_NOFOLLOW)?.st_ino;
            rustix::fs::renameat(&*dir.fd, &temporary, &*dir.fd, name)?;
            Ok((inode, UnixListener::from_std(listener)?))
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
        let dir = SocketDir::open(&deep).unwrap();
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
        let dir = SocketDir::open(temp.path()).unwrap();
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
        let dir = SocketDir::open(temp.path()).unwrap();
        assert!(dir.subdir("planted").is_err());
        assert!(dir.subdir("web").unwrap().path().is_dir());
        dir.remove_subdir("web");
        assert!(!temp.path().join("web").exists());
    }
}
