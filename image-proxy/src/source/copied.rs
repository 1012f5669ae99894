//! The pages of a dump without script, copied out of CRIU's pipe while its tasks are frozen.
//!
//! CRIU puts pages into the pipe by reference. With a script the tasks stay frozen until all have arrived; without,
//! CRIU may let them go (`--leave-running`) when its last byte is in the pipe, and what is there still would change.
//! So CRIU's pipe is made as small as it can be, one page, and pages are taken out as they come; when CRIU has closed its
//! end that page is taken out at once, however slow the link is.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use rustix::event::{poll, PollFd, PollFlags};

/// Copied and not passed on, as long as CRIU writes.
const AHEAD_BYTES: usize = 256 << 10;

/// Carries `from`, which does not block, to its end into the pipe `into`, which does not either. Calls `taken` when
/// nothing is left in `from`. For a thread that may block.
pub fn copy(from: OwnedFd, mut into: &File, taken: impl FnOnce()) -> io::Result<()> {
    let mut from = File::from(from);
    let mut small = shrink(&from);
    let (mut taken, mut open, mut closed) = (Some(taken), true, false);
    let mut buffer = vec![0; AHEAD_BYTES];
    let (mut rest, mut at) = (Vec::new(), 0);
    while open || at < rest.len() {
        // The end of CRIU's side is told in any case.
        let has_room = rest.len() - at < AHEAD_BYTES;
        let wants = match open && (has_room || closed) {
            true => PollFlags::IN,
            false => PollFlags::empty(),
        };
        let has = match at < rest.len() {
            true => PollFlags::OUT,
            false => PollFlags::empty(),
        };
        let mut fds = match open {
            true => vec![PollFd::new(into, has), PollFd::new(&from, wants)],
            false => vec![PollFd::new(into, has)],
        };
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        let (ready, news) = (fds[0].revents(), fds.get(1).map(PollFd::revents));
        if ready.contains(PollFlags::ERR) {
            return Ok(()); // the image is not wanted any more
        }
        if let Some(news) = news {
            closed |= news.contains(PollFlags::HUP);
            if closed || (news.contains(PollFlags::IN) && has_room) {
                match from.read(&mut buffer) {
                    Ok(0) => {
                        open = false;
                        if let Some(taken) = taken.take() {
                            taken();
                        }
                    }
                    Ok(n) => {
                        small = small || shrink(&from);
                        // What was passed on goes, so that this stays as large as what is ahead.
                        rest.drain(..at);
                        at = 0;
                        rest.extend_from_slice(&buffer[..n]);
                    }
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(e) => return Err(e),
                }
            }
        }
        if at < rest.len() {
            match into.write(&rest[at..]) {
                Ok(n) => at += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
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
    fn the_rest_is_taken_out_although_nobody_reads_it() {
        let (reader, mut writer) = pipe();
        let (ours, into) = pipe();
        let bytes: Vec<u8> = (0..60_000u32)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        // More than the other pipe takes.
        let filled = bytes.repeat(3);
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let copying =
            std::thread::spawn(move || copy(reader.into(), &into, move || tell.send(()).unwrap()));
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
        told.recv_timeout(std::time::Duration::from_secs(20))
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
