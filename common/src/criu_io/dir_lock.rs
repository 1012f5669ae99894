//! A directory is one daemon's. Two that are started at once would both find the sockets of neither, and each would put its own
//! over the other's: so the daemon that has the lock has the directory, and the kernel takes it back at the end of the process,
//! whatever that was.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};

/// Held for as long as this lives.
#[derive(Debug)]
pub struct DirLock {
    dir: OwnedFd,
    name: String,
    file: File,
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another {program}{pid} uses it, and a directory serves one {program}: stop that one, or give another -D")]
    Taken { program: String, pid: String },
    #[error("cannot lock {0} there")]
    Io(String, #[source] io::Error),
}

impl DirLock {
    /// Locks the directory for `program`, or says which process has it. Does not wait.
    pub fn take(dir: &OwnedFd, program: &str) -> Result<Self, LockError> {
        let name = format!(".{program}.lock");
        let take = || -> io::Result<Option<File>> {
            loop {
                let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                let flags = flags | OFlags::NONBLOCK;
                let fd = rustix::fs::openat(dir, &name, flags, Mode::RUSR | Mode::WUSR)?;
                match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                    Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                    locked => locked?,
                }
                // The one before may have removed it between our opening and our locking.
                if is_at(dir, &name, &fd)? {
                    return Ok(Some(fd.into()));
                }
            }
        };
        let error = |e| LockError::Io(name.clone(), e);
        match take().map_err(error)? {
            Some(file) => {
                let dir = dir.try_clone().map_err(error)?;
                let lock = Self { dir, name, file };
                lock.names_holder();
                Ok(lock)
            }
            None => Err(LockError::Taken {
                program: program.to_owned(),
                pid: holder(dir, &name),
            }),
        }
    }
}

impl DirLock {
    /// For people, and for the message of the next one; nothing depends on it.
    pub fn names_holder(&self) {
        let _ = self.file.set_len(0);
        let _ = self
            .file
            .write_all_at(std::process::id().to_string().as_bytes(), 0);
    }
}

impl DirLock {
    /// Called while this daemon has the lock: the next daemon makes its own file. One that has opened ours already looks again.
    pub fn remove_file(&self) {
        if is_at(&self.dir, &self.name, &self.file).unwrap_or(false) {
            let _ = rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// Whether the file that we have is the one of this name.
fn is_at(dir: &OwnedFd, name: &str, fd: impl AsFd) -> io::Result<bool> {
    let own = rustix::fs::fstat(fd)?;
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// As far as it has said.
fn holder(dir: &OwnedFd, name: &str) -> String {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let mut pid = String::new();
    if let Ok(fd) = rustix::fs::openat(dir, name, flags, Mode::empty()) {
        let _ = File::from(fd).take(16).read_to_string(&mut pid);
    }
    match pid.parse::<u32>() {
        Ok(pid) => format!(" (process {pid})"),
        Err(_) => String::new(),
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        self.remove_file();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn open(dir: &std::path::Path) -> OwnedFd {
        File::open(dir).unwrap().into()
    }

    #[test]
    fn one_has_it_and_the_next_one_gets_it() {
        let temp = tempfile::tempdir().unwrap();
        let dir = open(temp.path());
        let first = DirLock::take(&dir, "image-cache").unwrap();
        let refused = DirLock::take(&dir, "image-cache").unwrap_err().to_string();
        let own = format!(
            "another image-cache (process {}) uses it",
            std::process::id()
        );
        assert!(refused.starts_with(&own), "{refused}");
        let _other = DirLock::take(&dir, "image-proxy").unwrap();
        drop(first);
        assert!(!temp.path().join(".image-cache.lock").exists());
        // One that was killed leaves its file.
        std::fs::write(temp.path().join(".image-cache.lock"), "1").unwrap();
        DirLock::take(&dir, "image-cache").unwrap();
    }

    /// Also while locks are given back and their files vanish.
    #[test]
    fn never_two_at_once() {
        let temp = tempfile::tempdir().unwrap();
        let (have, most, got) = (
            AtomicUsize::new(0),
            AtomicUsize::new(0),
            AtomicUsize::new(0),
        );
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let dir = open(temp.path());
                    for _ in 0..2000 {
                        let Ok(lock) = DirLock::take(&dir, "x") else {
                            continue;
                        };
                        most.fetch_max(have.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        have.fetch_sub(1, Ordering::SeqCst);
                        got.fetch_add(1, Ordering::SeqCst);
                        drop(lock);
                    }
                });
            }
        });
        assert_eq!(most.into_inner(), 1);
        assert!(got.into_inner() > 0);
    }
}
