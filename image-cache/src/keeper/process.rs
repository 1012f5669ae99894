//! The keeper: a process that does nothing but hold the descriptors of an image-cache, so that its memory is there when that
//! process is not.
//!
//! It is small and knows neither sets nor journals, so a later version of image-cache finds what an earlier one gave it.
//! It answers on `image-cache-keeper.sock`, a byte each way:
//!
//! | asked | with | answer |
//! | --- | --- | --- |
//! | `K` | arena and journal | `k`: they are kept, instead of what was |
//! | `G` | | `g` with both, or `n`: there are none |
//! | `E` | | `e`, and it ends: nothing is to be kept |
//!
//! Only root and its own user are answered. The connection that has given it something, or got it, is that of its image-cache:
//! as long as that is there, no other is answered. It ends by itself when nothing can reach it any more: no image-cache is
//! connected, and it keeps nothing, or its socket is not in its directory.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use image_common::control::trust::peer_uid;
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::Stat;
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::keeper::fds;

pub const SOCKET: &str = "image-cache-keeper.sock";

pub const KEEP: u8 = b'K';
pub const KEPT: u8 = b'k';
pub const GIVE: u8 = b'G';
pub const GIVEN: u8 = b'g';
pub const NONE: u8 = b'n';
pub const END: u8 = b'E';
pub const ENDS: u8 = b'e';

/// How often it looks whether its socket is there, when no image-cache is.
const LOOK: Timespec = Timespec {
    tv_sec: 2,
    tv_nsec: 0,
};

/// More than there are daemons and commands at once.
const MOST_CONNECTIONS: usize = 16;

/// Keeps what it is given, by the listening socket that is its standard input. It is started in the directory of that.
pub fn run() -> io::Result<u8> {
    give_up_rights()?;
    // Leave the terminal and the group of the daemon: what stops these is not for us.
    let _ = rustix::process::setsid();
    let listener: UnixListener = rustix::io::dup(rustix::stdio::stdin())?.into();
    listener.set_nonblocking(true)?;
    let own = rustix::fs::stat(SOCKET).ok();
    let mut keeper = Keeper {
        kept: None,
        connections: Vec::new(),
    };
    loop {
        ignore_sigterm(!keeper.connections.is_empty());
        if keeper.wait(&listener)? {
            keeper.accept(&listener);
        }
        if keeper.serve() {
            if is_own(own.as_ref()) {
                let _ = rustix::fs::unlink(SOCKET);
            }
            return Ok(0);
        }
        if keeper.connections.is_empty() && (keeper.kept.is_none() || !is_own(own.as_ref())) {
            return Ok(0);
        }
    }
}

struct Keeper {
    kept: Option<[OwnedFd; 2]>,
    connections: Vec<Connection>,
}

struct Connection {
    stream: UnixStream,
    /// It is the image-cache whose memory is kept.
    is_owner: bool,
}

impl Keeper {
    /// Waits for anything to happen; `true`: a connection comes.
    fn wait(&self, listener: &UnixListener) -> io::Result<bool> {
        let all = self.connections.iter().map(|c| c.stream.as_fd());
        let all = std::iter::once(listener.as_fd()).chain(all);
        let mut all: Vec<_> = all
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        let limit = self.connections.is_empty().then_some(&LOOK);
        match poll(&mut all, limit) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(!all[0].revents().is_empty()),
            Err(e) => Err(e.into()),
        }
    }

    fn accept(&mut self, listener: &UnixListener) {
        let Ok((stream, _)) = listener.accept() else {
            return;
        };
        let own = rustix::process::geteuid().as_raw();
        let allowed = peer_uid(&stream).is_ok_and(|uid| uid == 0 || uid == own);
        if allowed && self.connections.len() < MOST_CONNECTIONS {
            self.connections.push(Connection {
                stream,
                is_owner: false,
            });
        }
    }

    /// Answers what was asked; `true`: it is to end.
    fn serve(&mut self) -> bool {
        let mut ends = false;
        let kept = &mut self.kept;
        let mut owned = self.connections.iter().any(|c| c.is_owner);
        self.connections.retain_mut(|connection| {
            let Connection { stream, is_owner } = connection;
            let (asked, fds) = match fds::receive(&*stream, false) {
                Ok(Some(asked)) => asked,
                Ok(None) => return false,
                Err(e) => return e.kind() == io::ErrorKind::WouldBlock,
            };
            if owned && !*is_owner {
                return false;
            }
            (owned, *is_owner) = (true, true);
            let answered = match (asked, <[OwnedFd; 2]>::try_from(fds)) {
                (KEEP, Ok(fds)) => {
                    *kept = Some(fds);
                    fds::send(&*stream, KEPT, &[])
                }
                (GIVE, _) => match &*kept {
                    Some([arena, journal]) => {
                        fds::send(&*stream, GIVEN, &[arena.as_fd(), journal.as_fd()])
                    }
                    None => fds::send(&*stream, NONE, &[]),
                },
                (END, _) => {
                    ends = true;
                    *kept = None;
                    fds::send(&*stream, ENDS, &[])
                }
                _ => return false,
            };
            answered.is_ok()
        });
        ends
    }
}

/// Whether the socket that leads here is still in the directory.
fn is_own(own: Option<&Stat>) -> bool {
    let now = rustix::fs::stat(SOCKET);
    matches!((own, now), (Some(own), Ok(now)) if (own.st_dev, own.st_ino) == (now.st_dev, now.st_ino))
}

/// It needs none, and its descriptors are the memory of processes.
fn give_up_rights() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, none)?)
}

/// `pkill image-cache` stops the daemon, which says itself whether something is to be kept. One without a daemon it ends.
fn ignore_sigterm(ignore: bool) {
    let handler = if ignore { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: no code of ours runs for the signal, and this process has one thread.
    unsafe { libc::signal(libc::SIGTERM, handler) };
}
