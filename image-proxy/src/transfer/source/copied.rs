//! The pages of a dump without script, copied out of CRIU's pipe while its tasks are frozen.
//!
//! CRIU puts pages into the pipe by reference. With a script the tasks stay frozen until all have arrived; without,
//! CRIU may let them go (`--leave-running`) when its last byte is in the pipe, and what is there still would change.
//! So CRIU's pipe is made as small as it can be, one page, and pages are copied out as they come; when CRIU has closed its
//! end that page is copied out at once, however slow the link is.
//!
//! One thread reads and another one writes, because a write waits while the link takes bytes out of the same pipe. The
//! reading thread runs before all others of the host where the proxy may ask for that.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::event::{eventfd, poll, EventfdFlags, PollFd, PollFlags};

/// How many bytes may be copied and not yet written, as long as CRIU writes.
const COPIED_BYTES: usize = 256 << 10;

/// So many of them wait; as many are being written.
const QUEUE_BYTES: usize = COPIED_BYTES / 2;

/// Carries `from`, which does not block, to its end into the pipe `into`, which does not either. Calls `emptied` when
/// `from` is empty and closed. For a thread that may block.
pub fn copy(from: OwnedFd, into: &File, emptied: impl FnOnce()) -> io::Result<()> {
    let copies = CopyQueue {
        queue: Mutex::default(),
        filled: Condvar::new(),
        woken: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
    };
    std::thread::scope(|scope| {
        let writing = std::thread::Builder::new()
            .name("copied pages".into())
            .spawn_scoped(scope, || copies.write_out(into))?;
        let read = {
            // Also after a panic: the other thread waits for it.
            let _ends = Ends(&copies);
            copies.read_all(File::from(from), into, emptied)
        };
        let written = match writing.join() {
            Ok(written) => written,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        read.and(written)
    })
}

/// What was copied out of CRIU's pipe and not written yet.
struct CopyQueue {
    queue: Mutex<Queue>,
    filled: Condvar,
    /// Readable when the queue may have space again, or the image is not wanted any more.
    woken: OwnedFd,
}

/// Nothing comes any more when this is dropped.
struct Ends<'a>(&'a CopyQueue);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.queue().ended = true;
        self.0.filled.notify_one();
    }
}

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// CRIU's pipe is at its end.
    ended: bool,
    /// The other pipe has lost its reader, or cannot be written to.
    abandoned: bool,
}

impl CopyQueue {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what comes. After CRIU has closed its end, the queue has no limit.
    fn read_all(&self, mut from: File, into: &File, emptied: impl FnOnce()) -> io::Result<()> {
        let _urgent = Urgent::begin();
        let (mut small, mut closed) = (shrink(&from), false);
        let mut buffer = vec![0; COPIED_BYTES];
        loop {
            let space = {
                let queue = self.queue();
                if queue.abandoned {
                    return Ok(());
                }
                QUEUE_BYTES.saturating_sub(queue.bytes.len())
            };
            // The end of CRIU's side is told in any case.
            let wants = match closed || space > 0 {
                true => PollFlags::IN,
                false => PollFlags::empty(),
            };
            let mut fds = [
                PollFd::new(&from, wants),
                PollFd::new(&self.woken, PollFlags::IN),
                PollFd::new(into, PollFlags::empty()),
            ];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                polled => polled?,
            };
            let (news, woken) = (fds[0].revents(), fds[1].revents());
            if fds[2].revents().contains(PollFlags::ERR) {
                return Ok(()); // the image is not wanted any more
            }
            if woken.contains(PollFlags::IN) {
                let _ = rustix::io::read(&self.woken, &mut [0; 8]);
            }
            closed |= news.contains(PollFlags::HUP);
            if !closed && !news.contains(PollFlags::IN) {
                continue;
            }
            let most = match closed {
                true => buffer.len(),
                false => space,
            };
            match from.read(&mut buffer[..most]) {
                Ok(0) => {
                    emptied();
                    return Ok(());
                }
                Ok(n) => {
                    small = small || shrink(&from);
                    self.queue().bytes.extend_from_slice(&buffer[..n]);
                    self.filled.notify_one();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Writes what was copied, to the end.
    fn write_out(&self, into: &File) -> io::Result<()> {
        let mut bytes = Vec::new();
        let written = loop {
            bytes.clear();
            {
                let mut queue = self
                    .filled
                    .wait_while(self.queue(), |q| q.bytes.is_empty() && !q.ended)
                    .unwrap_or_else(PoisonError::into_inner);
                std::mem::swap(&mut bytes, &mut queue.bytes);
            }
            if bytes.is_empty() {
                break Ok(());
            }
            self.wake_reader();
            match write_all(into, &bytes) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                Err(e) => break Err(e),
            }
        };
        self.queue().abandoned = true;
        self.wake_reader();
        written
    }

    /// Wakes the reading thread. The counter is reset by each wake-up, and cannot overflow.
    fn wake_reader(&self) {
        let _ = rustix::io::write(&self.woken, &1u64.to_ne_bytes());
    }
}

/// `false`: the pipe has no reader any more, so the image is not wanted.
fn write_all(mut into: &File, mut bytes: &[u8]) -> io::Result<bool> {
    while !bytes.is_empty() {
        let mut fds = [PollFd::new(into, PollFlags::OUT)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        if fds[0].revents().contains(PollFlags::ERR) {
            return Ok(false);
        }
        match into.write(bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(false),
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// The thread runs before all that is not of real time, until this is dropped. Without the right to that
/// (`CAP_SYS_NICE`, `RLIMIT_RTPRIO`) the thread stays as it is.
struct Urgent(bool);

impl Urgent {
    fn begin() -> Self {
        Self(schedule(libc::SCHED_FIFO, 1))
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if self.0 {
            schedule(libc::SCHED_OTHER, 0);
        }
    }
}

fn schedule(policy: libc::c_int, priority: libc::c_int) -> bool {
    let parameters = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the parameters live until the call returns, and the kernel only reads them; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, policy, &parameters) == 0 }
}

/// `false`: there is more in it. CRIU waits for each page then, so the last one alone is in the pipe when it goes on.
fn shrink(pipe: &File) -> bool {
    let page = rustix::param::page_size();
    rustix::pipe::fcntl_setpipe_size(pipe, page).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{pipe_with, PipeFlags};

    #[test]
    fn the_rest_is_copied_out_although_it_is_not_read() {
        let (reader, mut writer) = pipe();
        let (ours, into) = pipe();
        let bytes: Vec<u8> = (0..60_000u32)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        // More than the other pipe takes.
        let filled = bytes.repeat(3);
        let (tx, rx) = std::sync::mpsc::sync_channel(1);
        let copying =
            std::thread::spawn(move || copy(reader.into(), &into, move || tx.send(()).unwrap()));
        let writing = filled.clone();
        let written = std::thread::spawn(move || {
            let mut left = &writing[..];
            while !left.is_empty() {
                match writer.write(left) {
                    Ok(n) => left = &left[n..],
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                    Err(e) => panic!("{e}"),
                }
            }
        });
        written.join().unwrap();
        rx.recv_timeout(std::time::Duration::from_secs(20))
            .expect("all is out of the first pipe");
        let mut got = Vec::new();
        let mut ours = ours;
        let mut piece = [0; 4096];
        loop {
            match ours.read(&mut piece) {
                Ok(0) => break,
                Ok(n) => got.extend_from_slice(&piece[..n]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(e) => panic!("{e}"),
            }
        }
        assert!(got == filled);
        copying.join().unwrap().unwrap();
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        (reader.into(), writer.into())
    }
}
