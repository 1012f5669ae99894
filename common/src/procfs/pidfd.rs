//! Pidfds that tell a process in another pid namespace, where numbers do not.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;
use rustix::process::{Pid, PidfdFlags};

/// `PID_FS_MAGIC` of `linux/magic.h`: pidfds are files of a file system of their own since Linux 6.9.
const PID_FS_MAGIC: i64 = 0x5049_4446;

/// A pidfd of the process that connected, wherever it is (`SO_PEERPIDFD`, Linux 6.5).
pub fn of_peer(stream: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len: libc::socklen_t = 4;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `fd`, and the length to
    // `len`; both live until the call returns.
    let asked = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    match asked {
        // SAFETY: the call has succeeded, so `fd` is a new descriptor that nothing else owns.
        0 if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        0 => Err(io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether both are pidfds of the same process. `false` also where the kernel does not tell (before 6.9).
pub fn same_process(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    let number = |fd| {
        let on_pidfs = i128::from(rustix::fs::fstatfs(fd).ok()?.f_type) == i128::from(PID_FS_MAGIC);
        // Never used again as long as the system runs.
        rustix::fs::fstat(fd).ok().filter(|_| on_pidfs)
    };
    let (Some(a), Some(b)) = (number(a), number(b)) else {
        return false;
    };
    (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
}

/// The number of the process, as far as it has one in our pid namespace, and has not been reaped.
pub fn number_of(pidfd: BorrowedFd<'_>) -> Option<i32> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let number = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    number.trim().parse().ok().filter(|&pid| pid > 0)
}

/// The parent of this process, and a pidfd of it. `None` if it cannot be had, or the parent has died.
pub fn of_parent() -> Option<(i32, OwnedFd)> {
    let parent = rustix::process::getppid()?;
    let pidfd = rustix::process::pidfd_open(parent, PidfdFlags::empty()).ok()?;
    // While it is the parent the number is its own.
    let same = rustix::process::getppid() == Some(parent);
    same.then(|| (Pid::as_raw(Some(parent)), pidfd))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_process_is_told_from_another() {
        let open = |pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let (me, again) = (rustix::process::getpid(), open(rustix::process::getpid()));
        let me = open(me);
        let parent = open(rustix::process::getppid().unwrap());
        // No pidfd, and equal to itself alone.
        let other = std::fs::File::open("/").unwrap();
        assert!(!same_process(other.as_fd(), other.as_fd()));
        assert!(!same_process(me.as_fd(), parent.as_fd()));
        assert_eq!(
            number_of(me.as_fd()),
            i32::try_from(std::process::id()).ok()
        );
        assert_eq!(number_of(other.as_fd()), None);
        if !same_process(me.as_fd(), again.as_fd()) {
            return; // before Linux 6.9
        }
        let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(same_process(of_peer(&ours).unwrap().as_fd(), me.as_fd()));
        let (number, parents) = of_parent().unwrap();
        assert_eq!(
            number,
            rustix::process::getppid().unwrap().as_raw_nonzero().get()
        );
        assert!(same_process(parents.as_fd(), parent.as_fd()));
    }
}
