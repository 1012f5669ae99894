//! The sending half of a connection that outlives its sockets.
//!
//! What is sent is kept in the [`RetransmitBuffer`] until the cache acknowledges it. When the socket breaks, the sender
//! waits for the next one, sends on it what the cache does not have, and goes on.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use image_common::link::resumable::{ResumableStream, StreamState};
use image_common::net::socket::WriteHalf;
use rustix::net::{send, SendFlags};
use rustix::pipe::{splice, SpliceFlags};
use tokio::sync::watch;

use crate::link::retransmit::{discard, Cursor, RetransmitBuffer, TeeOutcome, Unacknowledged};

pub struct ResumableSender {
    wire: Arc<ResumableStream>,
    changes: watch::Receiver<StreamState>,
    /// The socket that everything before `sending` was sent on.
    half: Arc<WriteHalf>,
    generation: u64,
    /// All unacknowledged bytes were sent on it.
    caught_up: bool,
    /// What is being sent, and kept if anything is. It stays here if the task that sends it stops waiting.
    sending: Bytes,
    /// `None`: the link ends with its socket.
    retransmit: Option<RetransmitBuffer>,
}

impl ResumableSender {
    /// For a connection that was just made. With a `retransmit_buffer` it outlives its sockets.
    pub fn new(wire: Arc<ResumableStream>, retransmit_buffer: Option<usize>) -> io::Result<Self> {
        let changes = wire.watch();
        let StreamState {
            half, generation, ..
        } = wire.state();
        let half = half.ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self {
            wire,
            changes,
            half,
            generation,
            caught_up: true,
            sending: Bytes::new(),
            retransmit: retransmit_buffer.map(RetransmitBuffer::new),
        })
    }

    #[cfg(test)]
    pub fn keep_in(&mut self, retransmit: RetransmitBuffer) {
        self.retransmit = Some(retransmit);
    }

    /// A buffer whose bytes are all acknowledged, if there is one.
    pub fn spare_buffer(&mut self) -> Option<BytesMut> {
        self.retransmit.as_mut().and_then(RetransmitBuffer::spare)
    }

    /// How long a spliced frame had better be at most, if that matters.
    pub fn frame_bytes(&self) -> Option<usize> {
        self.retransmit.as_ref().map(RetransmitBuffer::frame_bytes)
    }

    /// Whether pages that come next have to be copied, as there is no pipe to keep them in.
    pub fn only_copies(&self) -> bool {
        let retransmit = self.retransmit.as_ref();
        retransmit.is_some_and(RetransmitBuffer::only_copies)
    }

    /// Keeps up to `want` bytes that are in `pipe`, if anything is kept. They stay there, for [`Self::splice`].
    pub fn tee(&mut self, pipe: BorrowedFd<'_>, want: usize) -> io::Result<TeeOutcome> {
        match &mut self.retransmit {
            None => Ok(TeeOutcome::Kept(want)),
            Some(retransmit) => retransmit.tee(pipe, want),
        }
    }

    /// Sends bytes for which there is space, and keeps them if anything is kept. The bytes before them must have been
    /// sent: [`Self::finish`].
    pub async fn send(&mut self, bytes: Bytes, flags: SendFlags) -> io::Result<()> {
        debug_assert!(self.sending.is_empty());
        self.sending = bytes;
        if let Some(retransmit) = &mut self.retransmit {
            retransmit.keep(self.sending.clone());
        }
        self.finish(flags).await
    }

    /// Sends zeros instead of bytes that are kept and were lost on their way to the socket.
    pub async fn pad(&mut self, missing: usize) -> io::Result<()> {
        self.sending = Bytes::from(vec![0; missing]);
        self.finish(SendFlags::MORE).await
    }

    /// Waits for a new socket, on which what is kept is to be sent. Cancel safe.
    pub async fn resumed(&mut self) -> io::Result<()> {
        loop {
            let state = self.changes.borrow_and_update().clone();
            if let Some(retransmit) = &mut self.retransmit {
                retransmit.acknowledged(state.acknowledged)?;
            }
            if state.half.is_some() && state.generation != self.generation {
                return Ok(());
            }
            self.changed().await?;
        }
    }

    /// Waits until the cache has acknowledged so much that this many more can be kept: bytes that are copied, and pages.
    pub async fn make_space(&mut self, copies: usize, pages: usize) -> io::Result<()> {
        loop {
            let state = self.changes.borrow_and_update().clone();
            let Some(retransmit) = &mut self.retransmit else {
                return Ok(());
            };
            retransmit.acknowledged(state.acknowledged)?;
            if retransmit.has_space(copies, pages) {
                return Ok(());
            }
            match state.half {
                Some(_) if state.generation == self.generation => self.changed().await?,
                _ => drop(self.socket().await?),
            }
        }
    }

    async fn changed(&mut self) -> io::Result<()> {
        let changed = self.changes.changed().await;
        changed.map_err(|_| io::ErrorKind::NotConnected.into())
    }

    /// Waits for a socket on which everything kept was sent. `true`: it was sent just now.
    async fn socket(&mut self) -> io::Result<bool> {
        let mut anew = false;
        loop {
            let state = self.changes.borrow_and_update().clone();
            match state.half {
                Some(_) if state.generation == self.generation => {
                    match self.caught_up {
                        true => return Ok(anew),
                        // The task that began to send what is kept stopped waiting midway.
                        false => {
                            let why = io::Error::other("the retransmission stopped midway; the socket is of no use any more");
                            self.wire.lost(self.generation, why);
                        }
                    }
                }
                Some(half) => {
                    (self.half, self.generation) = (half, state.generation);
                    self.caught_up = false;
                    if let Some(retransmit) = &mut self.retransmit {
                        retransmit.resume(state.resumed_at)?;
                    }
                    anew = true;
                    match self.send_unacknowledged().await? {
                        Ok(()) => self.caught_up = true,
                        Err(e) => self.wire.lost(self.generation, e),
                    }
                }
                None => self.changed().await?,
            }
        }
    }

    /// Sends what is kept on a new socket. The outer error is about what is kept, the inner one
    /// about the socket.
    async fn send_unacknowledged(&mut self) -> io::Result<io::Result<()>> {
        let half = &self.half;
        let Some(retransmit) = &mut self.retransmit else {
            return Ok(Ok(()));
        };
        // It is in the retransmit buffer as well.
        self.sending = Bytes::new();
        let mut cursor = Cursor::default();
        while let Some(copy) = retransmit.next_unacknowledged(&mut cursor)? {
            let sent = match copy {
                Unacknowledged::Bytes(bytes) => send_copy(half, bytes).await,
                Unacknowledged::Pages(pipe, n) => splice_copy(half, pipe, n).await,
            };
            if let Err(e) = sent {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    }

    /// Sends what is left over of what was being sent; on a new socket what is kept comes first. Cancel safe, as long as
    /// the socket lasts.
    pub async fn finish(&mut self, flags: SendFlags) -> io::Result<()> {
        loop {
            self.socket().await?;
            loop {
                if self.sending.is_empty() {
                    // Not even a reference: what it was in is used again.
                    self.sending = Bytes::new();
                    return Ok(());
                }
                let tried = match try_send(&self.half, &self.sending, flags) {
                    Ok(n) => {
                        self.sending.advance(n);
                        Ok(())
                    }
                    Err(e) => blocked(&self.half, e).await,
                };
                if let Err(e) = tried {
                    self.wire.lost(self.generation, e);
                    break;
                }
            }
        }
    }

    /// Moves `n` bytes, which are kept if anything is, from the pipe into the socket. Gives how
    /// many of them are missing.
    pub async fn splice(&mut self, pipe: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
        let mut left = n;
        loop {
            if self.socket().await? && self.retransmit.is_some() {
                // They have gone out of what is kept.
                let null = File::options().write(true).open("/dev/null")?;
                discard(pipe, &null, left)?;
                return Ok(0);
            }
            loop {
                if left == 0 {
                    return Ok(0);
                }
                let tried = match try_splice(&self.half, pipe, left) {
                    Ok(0) => return Ok(left),
                    Ok(n) => {
                        left -= n;
                        Ok(())
                    }
                    // EAGAIN is the socket's, which has no space, unless the pipe lost its bytes.
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        let in_pipe = rustix::io::ioctl_fionread(pipe).unwrap_or(0);
                        if in_pipe < left as u64 {
                            return Ok(left);
                        }
                        self.half.writable().await
                    }
                    Err(e) => blocked(&self.half, e).await,
                };
                if let Err(e) = tried {
                    self.wire.lost(self.generation, e);
                    break;
                }
            }
        }
    }
}

fn try_send(half: &WriteHalf, bytes: &[u8], flags: SendFlags) -> io::Result<usize> {
    let flags = flags | SendFlags::NOSIGNAL;
    half.try_io(|socket| Ok(send(socket, bytes, flags)?))
}

fn try_splice(half: &WriteHalf, pipe: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
    let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
    half.try_io(|socket| Ok(splice(pipe, None, socket, None, n, flags)?))
}

/// Waits until the socket may take more; any other error is the socket's end.
async fn blocked(half: &WriteHalf, e: io::Error) -> io::Result<()> {
    match e.kind() {
        io::ErrorKind::WouldBlock => half.writable().await,
        io::ErrorKind::Interrupted => Ok(()),
        _ => Err(e),
    }
}

async fn send_copy(half: &WriteHalf, mut bytes: Bytes) -> io::Result<()> {
    while !bytes.is_empty() {
        match try_send(half, &bytes, SendFlags::empty()) {
            Ok(n) => bytes.advance(n),
            Err(e) => blocked(half, e).await?,
        }
    }
    Ok(())
}

async fn splice_copy(half: &WriteHalf, pipe: BorrowedFd<'_>, mut left: usize) -> io::Result<()> {
    while left > 0 {
        match try_splice(half, pipe, left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => left -= n,
            Err(e) => blocked(half, e).await?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::writer::testing::{put, read, socket, writer};
    use std::time::Duration;

    /// A task that stops to wait leaves nothing half sent behind: the next one goes on with it.
    #[tokio::test]
    async fn a_stopped_flush_leaves_the_stream_whole() {
        for resumable in [false, true] {
            let (mut writer, _wire, mut theirs) = writer(resumable);
            let mut sent = Vec::new();
            // More than the socket takes, less than what may be kept unacknowledged.
            for number in 0..10 {
                put(&mut writer, number, &mut sent);
            }
            let stopped = tokio::time::timeout(Duration::from_millis(50), writer.flush()).await;
            assert!(stopped.is_err());
            put(&mut writer, 10, &mut sent);
            let (flushed, got) = tokio::join!(writer.flush(), read(&mut theirs, sent.len()));
            flushed.unwrap();
            assert!(got == sent, "{resumable}");
        }
    }

    /// The same while the unacknowledged bytes are sent on another socket: on that nothing can follow.
    #[tokio::test]
    async fn stopped_while_what_is_kept_is_sent_again() {
        let (mut writer, wire, mut theirs) = writer(true);
        let mut sent = Vec::new();
        for number in 0..20 {
            put(&mut writer, number, &mut sent);
        }
        let (flushed, got) = tokio::join!(writer.flush(), read(&mut theirs, sent.len()));
        flushed.unwrap();
        assert!(got == sent);

        // It says that half of it has not arrived.
        let half = sent.len() / 2;
        wire.detach(io::ErrorKind::ConnectionReset.into());
        let (again, _second) = socket();
        wire.attach(again, half as u64);
        let stopped = tokio::time::timeout(Duration::from_millis(50), writer.flush()).await;
        assert!(stopped.is_err());
        put(&mut writer, 20, &mut sent);
        let third = async {
            let mut changes = wire.watch();
            changes
                .wait_for(|state| state.half.is_none())
                .await
                .unwrap();
            let (third, mut theirs) = socket();
            wire.attach(third, half as u64);
            read(&mut theirs, sent.len() - half).await
        };
        let (flushed, got) = tokio::join!(writer.flush(), third);
        flushed.unwrap();
        assert!(got == sent[half..]);
    }
}
