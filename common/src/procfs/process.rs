//! What can be known about the process at the other end of a unix socket.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::procfs::exit_status::{exit_status, exit_status_now, ExitStatus, StatusWatch};
use crate::procfs::pidfd;

/// The process that connected, held by a pidfd so that a reused number cannot be mistaken
/// for it.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: AsyncFd<OwnedFd>,
    status: StatusWatch,
}

impl Process {
    /// `None` if it lives in a pid namespace that we cannot see, or has exited already and the kernel is older than
    /// Linux 6.16.
    pub fn of_peer(stream: &UnixStream) -> Option<Self> {
        let pid = peer_pid(stream)?;
        match pidfd::of_peer(stream).ok() {
            Some(pidfd) => Self::of_pidfd(pid, pidfd),
            None => Self::open(pid),
        }
    }

    /// Follows the process that has this pid now. `None`: there is none, or it cannot be watched.
    pub fn open(pid: i32) -> Option<Self> {
        // A script may say anything; rustix has no negative ones.
        let number = Pid::from_raw(pid.max(0))?;
        let pidfd = match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return None,
            // No descriptors left, or a kernel or a filter without pidfds: it may well be there.
            Err(e) => {
                tracing::error!(
                    pid,
                    "cannot open a pidfd of this process, so it counts as unknown: {e}"
                );
                return None;
            }
        };
        Self::of_pidfd(pid, pidfd)
    }

    /// The process that connected, also if it lives in a pid namespace that we cannot see: then its
    /// number is 0 ([`Self::is_visible`]). Before Linux 6.5 as [`Self::of_peer`].
    pub fn of_any_peer(stream: &UnixStream) -> Option<Self> {
        match pidfd::of_peer(stream) {
            Ok(pidfd) => Self::of_pidfd(peer_pid(stream).unwrap_or(0), pidfd),
            Err(_) => Self::of_peer(stream),
        }
    }

    /// `pid`: its number, or 0 if it has none here.
    pub fn of_pidfd(pid: i32, pidfd: OwnedFd) -> Option<Self> {
        // SAFETY: the AsyncFd owns the pidfd, which stays the same open descriptor until the
        // AsyncFd is dropped; `OwnedFd` has no way to close or replace it in between.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.ok()?;
        let status = StatusWatch::default();
        Some(Self { pid, pidfd, status })
    }

    /// Has the kernel keep how it ends, where that must be asked for while it lives (Linux before 6.15).
    #[must_use]
    pub fn with_status(mut self) -> Self {
        if self.is_visible() {
            self.status = StatusWatch::of(self.pid);
        }
        self
    }

    /// Whether it has a number in our pid namespace, by which `/proc` tells of it.
    pub fn is_visible(&self) -> bool {
        self.pid > 0
    }

    /// Whether `pidfd` is of this process too, as far as the kernel tells.
    pub fn is(&self, pidfd: BorrowedFd<'_>) -> bool {
        pidfd::same_process(self.pidfd.as_fd(), pidfd)
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Resolves when the process has exited.
    pub async fn exited(&self) {
        // An error of epoll leaves us without the event; the callers have other ones too.
        let _ = self.pidfd.readable().await;
    }

    /// Waits until the process has exited, and gives how. `None`: the kernel does not tell. Before Linux
    /// 6.15 it tells of a process that was opened [`Self::with_status`], or is a zombie still.
    pub async fn exit_status(&self) -> Option<ExitStatus> {
        self.exited().await;
        if !self.is_visible() {
            return None; // the kernel tells that within its own pid namespaces
        }
        exit_status(self.pid, self.pidfd.as_fd(), &self.status).await
    }

    /// Whether the process has exited, without waiting.
    pub fn has_exited(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.get_ref(), PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&Timespec::default())).map_or(true, |ready| ready > 0)
    }

    /// Whether the kernel will tell how the process has ended, also when its parent has reaped it.
    pub fn tells_status(&self) -> bool {
        self.status.tells()
    }

    /// Sends a signal. To this process and to no other one, whatever becomes of its number.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(rustix::process::pidfd_send_signal(
            self.pidfd.get_ref(),
            signal,
        )?)
    }

    /// How the process has ended, if the kernel tells that now.
    pub fn exit_status_now(&self) -> Option<ExitStatus> {
        self.has_exited()
            .then(|| exit_status_now(self.pid, self.pidfd.as_fd(), &self.status))
            .flatten()
    }

    /// The process that has it stopped, or follows it (`ptrace`): a CRIU from its freezing to the kill. `None` also
    /// if that is in a pid namespace that we cannot see.
    pub fn tracer(&self) -> Option<i32> {
        // As long as it has not exited, the number is its own.
        tracer_of(self.pid).filter(|_| !self.has_exited())
    }

    /// Whether the process has exited, or does so now: SIGKILL waits for each of its threads, or they exit. What is
    /// dying runs no instruction of its program any more.
    pub fn is_dying(&self) -> bool {
        let dying = self.has_exited() || threads_are_dying(self.pid);
        // What was read may be of another process that has the number by now.
        dying || self.has_exited()
    }

    /// Whether the process still has its address space. The kernel takes that away
    /// (`exit_mm`) before it closes the descriptors (`exit_files`), so at the moment when a
    /// socket closes this tells "closed it and goes on" from "is exiting".
    pub fn has_memory(&self) -> bool {
        // Any user may read that, also of a process that may not be looked at.
        let statm = std::fs::read_to_string(format!("/proc/{}/statm", self.pid));
        statm.is_ok_and(|statm| !statm.starts_with("0 ")) && !self.has_exited()
    }

    /// The executable, as the kernel names it. `None` if it is exiting, or may not be looked at.
    pub fn executable(&self) -> Option<PathBuf> {
        executable_of(self.pid)
    }

    /// Whether the executable contains `text`, e.g. one of CRIU's messages. `None` if it
    /// cannot be read.
    pub fn executable_contains(&self, text: &[u8]) -> Option<bool> {
        let file = File::open(format!("/proc/{}/exe", self.pid)).ok()?;
        contains(file, text).ok()
    }
}

/// The pid of the process that connected, as this process sees it.
pub fn peer_pid(stream: &UnixStream) -> Option<i32> {
    stream.peer_cred().ok()?.pid().filter(|&pid| pid > 0)
}

/// The process that has `pid` stopped, or follows it.
pub fn tracer_of(pid: i32) -> Option<i32> {
    let tracer = number_in(pid, "TracerPid:").filter(|&pid| pid > 0)?;
    // It is a thread that traces.
    Some(number_in(tracer, "Tgid:").unwrap_or(tracer))
}

/// The parent of a process, from `/proc/PID/stat`.
pub fn parent_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    // "pid (comm) state ppid ...": comm may contain anything, so from its last bracket on.
    let after = &stat[stat.rfind(')')? + 1..];
    after.split_whitespace().nth(1)?.parse().ok()
}

/// The script has another parent now, which has nothing to do with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the CRIU that started this script has died")]
pub struct Orphaned;

/// The process that started the script at the other end, in the numbers of our own pid namespace. The script says
/// that its parent was `said`, in the numbers of its own. `None`: the kernel does not tell, and the
/// script's word is all there is.
pub fn starter_of(script: &UnixStream, said: i32) -> Result<Option<i32>, Orphaned> {
    let Some(parent) = peer_pid(script).and_then(parent_of) else {
        return Ok(None);
    };
    let Some(numbers) = numbers_of(parent) else {
        return Ok(Some(parent));
    };
    // An orphan's new parent is mostly the first process of a pid namespace, and already was if
    // the other one died before the script could look. A CRIU in a container may be such a one.
    let is_criu = || {
        let executable = executable_of(parent);
        let name = executable.as_deref().and_then(std::path::Path::file_name);
        name.is_none_or(|name| name.to_string_lossy().contains("criu"))
    };
    let adopts = parent == 1 || (numbers.last() == Some(&1) && !is_criu());
    match numbers.contains(&said) && !adopts {
        true => Ok(Some(parent)),
        false => Err(Orphaned),
    }
}

/// The process that started the script, as [`starter_of`] finds it, held: its end does not go unnoticed, and its number
/// stays its own. It may be that it cannot be held, for want of descriptors.
pub fn hold_starter(
    script: &UnixStream,
    said: i32,
) -> Result<Option<(i32, Option<Process>)>, Orphaned> {
    let Some(pid) = starter_of(script, said)? else {
        return Ok(None);
    };
    let process = Process::open(pid);
    // It is the parent still, so it was when it was opened.
    match starter_of(script, said)? == Some(pid) {
        true => Ok(Some((pid, process))),
        false => Err(Orphaned),
    }
}

/// The numbers of a process in its pid namespaces, from ours inwards.
fn numbers_of(pid: i32) -> Option<Vec<i32>> {
    status_field(pid, "NSpid:")?
        .split_whitespace()
        .map(|number| number.parse().ok())
        .collect()
}

/// What is behind `field` in `/proc/PID/status`.
fn status_field(pid: i32, field: &str) -> Option<String> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    field_of(&status, field).map(str::to_owned)
}

fn number_in(pid: i32, field: &str) -> Option<i32> {
    status_field(pid, field)?.trim().parse().ok()
}

fn field_of<'a>(status: &'a str, field: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(field))
}

/// `false` if that cannot be seen.
pub fn threads_are_dying(pid: i32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().all(|thread| {
        let read = |name: &str| std::fs::read_to_string(thread.path().join(name));
        // In this order: the kernel takes SIGKILL away from what waits, and then sets the flag.
        match (read("status"), read("stat")) {
            (Ok(status), Ok(stat)) => thread_is_dying(&status, &stat),
            _ => true, // it has gone
        }
    })
}

/// Whether SIGKILL waits for a thread, by its `/proc/PID/status`. `None`: that does not say.
pub fn sigkill_is_pending(status: &str) -> Option<bool> {
    const SIGKILL: u64 = 1 << 8;
    let pending = |field| u64::from_str_radix(field_of(status, field)?.trim(), 16).ok();
    Some((pending("SigPnd:")? | pending("ShdPnd:")?) & SIGKILL != 0)
}

/// By `/proc/PID/status` and `/proc/PID/stat` of a thread.
fn thread_is_dying(status: &str, stat: &str) -> bool {
    /// `linux/sched.h`: it exits; a signal has ended it.
    const PF_EXITING: u64 = 0x4;
    const PF_SIGNALED: u64 = 0x400;
    let killed = sigkill_is_pending(status).unwrap_or(false);
    let exited = field_of(status, "State:").is_some_and(|s| s.trim_start().starts_with(['Z', 'X']));
    // "pid (comm) state ppid pgrp session tty tpgid flags ...": comm may contain anything.
    let after = stat.rfind(')').map_or("", |at| &stat[at + 1..]);
    let flags = after
        .split_ascii_whitespace()
        .nth(6)
        .and_then(|f| f.parse::<u64>().ok());
    killed || exited || flags.is_some_and(|f| f & (PF_EXITING | PF_SIGNALED) != 0)
}

fn executable_of(pid: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/exe")).ok()
}

/// Whether one of two processes descends from the other, or they are the same: a CRIU, its
/// children that open images, the script that it runs, and a shell around it.
pub fn related(a: i32, b: i32) -> bool {
    descends(a, b) || descends(b, a)
}

/// Whether a process is another one, or descends from it.
pub fn descends(pid: i32, from: i32) -> bool {
    // The process that asks is mostly the same for each image; `successors` would look at its parent already.
    pid == from || ancestors(pid).any(|p| p == from)
}

/// A process, its parent, and so on, as far as one of them may be the CRIU of another.
pub fn ancestors(pid: i32) -> impl Iterator<Item = i32> {
    /// CRIU's own helpers are one or two generations away, a wrapper adds as much.
    const GENERATIONS: usize = 5;
    let parent = |pid: &i32| parent_of(*pid).filter(|&p| p > 1);
    std::iter::successors(Some(pid), parent).take(GENERATIONS)
}

fn contains(mut file: impl Read, text: &[u8]) -> io::Result<bool> {
    let mut buffer = vec![0; 1 << 20];
    let mut kept = 0;
    loop {
        let n = file.read(&mut buffer[kept..])?;
        if n == 0 {
            return Ok(false);
        }
        let have = &buffer[..kept + n];
        if memchr::memmem::find(have, text).is_some() {
            return Ok(true);
        }
        // What could be the first part of a match goes to the front.
        kept = have.len().min(text.len() - 1);
        let start = have.len() - kept;
        buffer.copy_within(start..start + kept, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents() {
        let me = i32::try_from(std::process::id()).unwrap();
        let expected = rustix::process::getppid().map(Pid::as_raw_nonzero).unwrap();
        assert_eq!(parent_of(me), Some(expected.get()));
        assert_eq!(parent_of(-1), None);
    }

    /// EACCES is not "it has none": a daemon without CAP_SYS_PTRACE may not look at another user's CRIU.
    #[tokio::test]
    async fn a_process_that_may_not_be_looked_at_has_memory() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        let lived = std::thread::scope(|scope| {
            let looks = || {
                if rustix::process::geteuid().is_root() {
                    let uid = rustix::process::Uid::from_raw(61_303);
                    // Of this thread alone. Its capabilities go with it.
                    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
                    let refused = std::fs::read_link(format!("/proc/{}/exe", process.pid()));
                    let refused = refused.unwrap_err().kind();
                    assert_eq!(refused, io::ErrorKind::PermissionDenied);
                }
                process.has_memory()
            };
            scope.spawn(looks).join().unwrap()
        });
        assert!(lived);
        child.kill().unwrap();
        process.exited().await;
        assert!(!process.has_memory(), "a zombie has none");
        child.wait().unwrap();
    }

    #[test]
    fn relations() {
        let me = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let child_pid = i32::try_from(child.id()).unwrap();
        assert!(related(me, me) && related(me, child_pid) && related(child_pid, me));
        assert!(descends(child_pid, me) && !descends(me, child_pid) && descends(me, me));
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        assert!(
            !related(child_pid, i32::try_from(other.id()).unwrap()),
            "siblings"
        );
        for process in [&mut child, &mut other] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    #[tokio::test]
    async fn who_started_a_script() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        // This process is at both ends, so its own parent is found.
        let _ours = UnixStream::connect(&path).await.unwrap();
        let (script, _) = listener.accept().await.unwrap();
        let parent = parent_of(me).unwrap();
        assert_eq!(numbers_of(me).unwrap().first(), Some(&me));
        match parent {
            1 => assert_eq!(starter_of(&script, 1), Err(Orphaned)),
            _ => {
                assert_eq!(starter_of(&script, parent), Ok(Some(parent)));
                let (pid, held) = hold_starter(&script, parent).unwrap().unwrap();
                assert_eq!((pid, held.map(|p| p.pid())), (parent, Some(parent)));
            }
        }
        assert_eq!(hold_starter(&script, me).map(|_| ()), Err(Orphaned));
        // It had another parent when it looked.
        assert_eq!(starter_of(&script, me), Err(Orphaned));
    }

    #[test]
    fn a_thread_that_dies_is_told_from_one_that_runs() {
        let status = |state: &str, pending: &str| {
            format!("Name:\tx\nState:\t{state}\nSigPnd:\t{pending}\nShdPnd:\t0000000000000000\n")
        };
        let stat = |flags: u32| format!("12 (a) b) S 1 12 12 0 -1 {flags} 0 0");
        let (runs, killed) = (
            status("S (sleeping)", "0000000000000000"),
            status("t", "0000000000000100"),
        );
        assert!(!thread_is_dying(&runs, &stat(0x0040_0000)));
        assert!(thread_is_dying(&killed, &stat(0x0040_0000)));
        assert!(thread_is_dying(&runs, &stat(0x0040_0404)));
        assert!(thread_is_dying(&status("Z (zombie)", "0"), &stat(0)));
        // SIGTERM that waits is no end.
        assert!(!thread_is_dying(&status("T", "0000000000004000"), &stat(0)));
        assert!(!thread_is_dying("", ""));
    }

    #[test]
    fn a_text_is_found_across_reads() {
        let text = b"needle";
        for at in [0, 1, (1 << 20) - 3, (1 << 20) + 5] {
            let mut hay = vec![b'x'; (1 << 20) + 100];
            hay[at..at + text.len()].copy_from_slice(text);
            assert!(contains(&hay[..], text).unwrap(), "at {at}");
        }
        assert!(!contains(&vec![b'n'; 3 << 20][..], text).unwrap());
    }

    #[tokio::test]
    async fn exit_is_an_event() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::open(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.has_memory() && !process.has_exited() && !process.is_dying());
        for nobody in [0, -1, i32::MIN] {
            assert!(Process::open(nobody).is_none());
        }
        child.kill().unwrap();
        process.exited().await;
        assert!(!process.has_memory() && process.has_exited() && process.is_dying());
        assert!(process.exit_status_now().unwrap().is_killed());
        child.wait().unwrap();
    }
}
