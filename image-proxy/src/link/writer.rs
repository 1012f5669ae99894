//! The sending half of a connection: frames into its socket, image data by `splice`.
//!
//! Whoever holds the writer sends whole frames; a frame that has begun is finished, or the link
//! is dead. Small frames are gathered and sent together by the flusher. When the socket breaks,
//! whoever holds the writer waits for the next one, sends again what the cache has not, and goes
//! on: see [`crate::link::retransmit`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use image_common::link::codec::{head_bytes, seal, Header, Message, StreamNumber, HEADER_BYTES};
use image_common::link::digest::Digest;
use image_common::link::resumable::{State, Wire};
use image_common::link::MAX_DATA_BYTES;
use image_common::net::socket::{Socket, WriteHalf};
use rustix::net::{send, SendFlags};
use rustix::pipe::{splice, SpliceFlags};
use tokio::sync::watch;

use crate::link::retransmit::{
    discard, Copy, Cursor, RetransmitBuffer, Teed, BUFFER_BYTES, COPIED_FRAME_BYTES,
};
use crate::transfer::source::Source;

/// Gathered bytes beyond this are sent by whoever gathers. What is kept of them keeps its whole buffer.
const GATHER_BYTES: usize = 64 << 10;

/// Longest data frame that is read and copied instead of spliced.
const FEW_BYTES: usize = 64 << 10;

/// What is left of a buffer is read into unless it is less than this.
const LEAST_READ: usize = 64 << 10;

pub struct Writer {
    wire: Arc<Wire>,
    changes: watch::Receiver<State>,
    /// The socket that everything before `out` was sent on.
    half: Arc<WriteHalf>,
    generation: u64,
    /// All that is kept was sent on it.
    caught_up: bool,
    out: BytesMut,
    /// What is being sent, and kept if anything is. It stays here if whoever sends stops to wait.
    sending: Bytes,
    /// `None`: the link ends with its socket.
    retransmit: Option<RetransmitBuffer>,
    /// Each frame has checksums, so it is read and copied.
    checks: bool,
}

/// What a try to take a few bytes gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Took {
    Bytes(usize),
    Nothing,
    End,
}

/// The link broke, or the pipe did something that no pipe of CRIU's does.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("sending on the link")]
    Link(#[source] io::Error),
    #[error("reading the image from CRIU")]
    Source(#[source] io::Error),
    #[error("the link is closed")]
    Down,
    #[error("somebody else reads CRIU's pipe: bytes that were announced are gone")]
    Stolen,
}

/// A data frame that was sent.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    pub bytes: usize,
    /// With checksums.
    pub digest: Option<Digest>,
}

impl Writer {
    /// For a connection that was just made. With a `retransmit_buffer` it survives its sockets.
    pub fn new(
        wire: Arc<Wire>,
        retransmit_buffer: Option<usize>,
        checks: bool,
    ) -> io::Result<Self> {
        let changes = wire.watch();
        let State {
            half, generation, ..
        } = wire.state();
        let half = half.ok_or(io::ErrorKind::NotConnected)?;
        Ok(Self {
            wire,
            changes,
            half,
            generation,
            caught_up: true,
            out: BytesMut::new(),
            sending: Bytes::new(),
            retransmit: retransmit_buffer.map(RetransmitBuffer::new),
            checks,
        })
    }

    pub fn put(&mut self, message: &Message) {
        message.encode_with(&mut self.out, self.checks);
    }

    /// A data frame of a round, of bytes that are in memory already, at most
    /// [`MAX_DATA_BYTES`]. Pages of rounds are not numbered: they stay on this connection.
    pub fn put_data(&mut self, stream: StreamNumber, bytes: &[u8]) {
        let start = self.begin_frame();
        self.out.extend_from_slice(bytes);
        self.end_frame(start, stream, 0);
    }

    /// If nothing is gathered, and what is left of the buffer is too short for a frame with `least` bytes:
    /// another one, such as was in use before.
    fn renew(&mut self, least: usize) {
        let least = least + head_bytes(self.checks);
        if self.out.is_empty() && self.out.capacity() < least {
            let spare = self.retransmit.as_mut().and_then(RetransmitBuffer::spare);
            let spare = spare.filter(|buffer| buffer.capacity() >= least);
            self.out = spare.unwrap_or_else(|| BytesMut::with_capacity(BUFFER_BYTES.max(least)));
        }
    }

    /// Makes room for the head of a frame whose payload is put behind it.
    fn begin_frame(&mut self) -> usize {
        let start = self.out.len();
        self.out.put_bytes(0, head_bytes(self.checks));
        start
    }

    /// Writes the head of the data frame that is in the buffer.
    fn end_frame(&mut self, start: usize, stream: StreamNumber, sequence: u32) {
        let payload = start + head_bytes(self.checks);
        let length = u32::try_from(self.out.len() - payload).unwrap_or(u32::MAX);
        debug_assert!(length <= MAX_DATA_BYTES);
        let mut header = BytesMut::with_capacity(payload - start);
        Header::data(stream, sequence, length).encode(&mut header);
        self.out[start..start + header.len()].copy_from_slice(&header);
        if self.checks {
            seal(&mut self.out[start..]);
        }
    }

    /// So much more can be gathered without the buffer growing: what is kept of it takes no more
    /// memory than it has bytes.
    pub fn has_room(&self, more: usize) -> bool {
        let room = self.out.capacity() - self.out.len();
        self.out.is_empty() || room >= more + head_bytes(self.checks)
    }

    /// More is gathered than should be.
    pub fn is_full(&self) -> bool {
        self.out.len() >= GATHER_BYTES
    }

    /// Reads what there is of a small image, or the small rest of a large one, into the
    /// gathered frames. Also into `keep`, where a later read-back needs it.
    pub fn take_few(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        source: &Source,
        keep: Option<&mut Vec<u8>>,
    ) -> Result<(Took, Option<Digest>), SendError> {
        let (read, n) = self.gather(stream, sequence, FEW_BYTES, |out| source.read(out));
        let took = match read.map_err(SendError::Source)? {
            Some(0) => return Ok((Took::End, None)),
            None => return Ok((Took::Nothing, None)),
            Some(n) => Took::Bytes(n),
        };
        let taken = &self.out[self.out.len() - n..];
        if let Some(keep) = keep {
            keep.extend_from_slice(taken);
        }
        Ok((took, self.checks.then(|| Digest::of(taken))))
    }

    /// The same with what CRIU has sent to the page server, at most `most` bytes of it, in a frame
    /// of a round; gives them, too. `None`: there is nothing now. No bytes: it has ended.
    pub fn take_round(
        &mut self,
        stream: StreamNumber,
        mut most: usize,
        criu: &Socket,
    ) -> io::Result<Option<&[u8]>> {
        if self.out.is_empty() {
            self.renew(LEAST_READ);
            most = most.min(self.out.capacity() - head_bytes(self.checks));
        }
        let (read, n) = self.gather(stream, 0, most, |out| {
            match criu.try_read_buf(&mut out.limit(most)) {
                Ok(n) => Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(e) => Err(e),
            }
        });
        Ok(read?.map(|_| &self.out[self.out.len() - n..]))
    }

    /// Makes a frame of what is read, which is then at the end of the buffer: so many bytes.
    fn gather<R>(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        most: usize,
        read: impl FnOnce(&mut BytesMut) -> R,
    ) -> (R, usize) {
        let start = self.begin_frame();
        let payload = self.out.len();
        self.out.reserve(most);
        let mut behind = self.out.split_off(payload);
        let read = read(&mut behind);
        let n = behind.len();
        self.out.unsplit(behind);
        match n {
            0 => self.out.truncate(start),
            _ => self.end_frame(start, stream, sequence),
        }
        (read, n)
    }

    /// Sends one data frame of `n` bytes from the pipe, but no more than [`MAX_DATA_BYTES`]. Not
    /// cancel safe: half a frame ends the link.
    pub async fn splice_numbered(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        pipe: impl AsFd,
        n: usize,
    ) -> Result<Sent, SendError> {
        let pipe = pipe.as_fd();
        let most = self
            .retransmit
            .as_ref()
            .map_or(n, RetransmitBuffer::frame_bytes);
        let length = u32::try_from(n.min(most))
            .unwrap_or(u32::MAX)
            .min(MAX_DATA_BYTES);
        if self.checks {
            return self.copy_frame(stream, sequence, pipe, length).await;
        }
        let mut left = length as usize;
        let room = self.make_room(self.out.len() + HEADER_BYTES, left).await;
        room.map_err(SendError::Link)?;
        if self
            .retransmit
            .as_ref()
            .is_some_and(RetransmitBuffer::only_copies)
        {
            // What is copied anyhow goes with its header, in as much as one buffer has.
            let length = length.min(COPIED_FRAME_BYTES);
            return self.copy_frame(stream, sequence, pipe, length).await;
        }
        Header::data(stream, sequence, length).encode(&mut self.out);
        self.send_gathered(SendFlags::MORE)
            .await
            .map_err(SendError::Link)?;
        while left > 0 {
            let teed = match &mut self.retransmit {
                None => Teed::Kept(left),
                // Within a frame, whose end nobody could find any more.
                Some(retransmit) => retransmit.tee(pipe, left).map_err(SendError::Link)?,
            };
            left -= match teed {
                Teed::Kept(n) => match self.splice(pipe, n).await.map_err(SendError::Link)? {
                    0 => n,
                    // What is kept is what was announced; what has gone out is as long.
                    missing => {
                        self.sending = Bytes::from(vec![0; missing]);
                        let padded = self.send_bytes(SendFlags::MORE).await;
                        padded.map_err(SendError::Link)?;
                        return self.pad(left - n).await;
                    }
                },
                Teed::NoRoom => match self.copy_some(pipe, left).await? {
                    0 => return self.pad(left).await,
                    n => n,
                },
                Teed::Empty => return self.pad(left).await,
            };
        }
        Ok(Sent {
            bytes: length as usize,
            digest: None,
        })
    }

    /// The frame's length is on the wire already, so what is missing is filled, and the image
    /// then aborted.
    async fn pad(&mut self, left: usize) -> Result<Sent, SendError> {
        self.out.put_bytes(0, left);
        self.finish_frame().await.map_err(SendError::Link)?;
        Err(SendError::Stolen)
    }

    /// A frame that is read and copied: as its checksum comes before what it is about, or as there is no
    /// pipe to keep its pages in.
    async fn copy_frame(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        pipe: BorrowedFd<'_>,
        length: u32,
    ) -> Result<Sent, SendError> {
        let room = self.out.len() + head_bytes(self.checks) + length as usize;
        self.make_room(room, 0).await.map_err(SendError::Link)?;
        self.renew(length as usize);
        let start = self.begin_frame();
        let payload = self.out.len();
        if read_into(&mut self.out, pipe, length as usize).map_err(SendError::Source)?
            < length as usize
        {
            self.out.truncate(start);
            return Err(SendError::Stolen);
        }
        self.end_frame(start, stream, sequence);
        let digest = self.checks.then(|| Digest::of(&self.out[payload..]));
        self.flush().await.map_err(SendError::Link)?;
        Ok(Sent {
            bytes: length as usize,
            digest,
        })
    }

    /// Sends some bytes of a frame by copying them.
    async fn copy_some(&mut self, pipe: BorrowedFd<'_>, left: usize) -> Result<usize, SendError> {
        let n = read_into(&mut self.out, pipe, left.min(FEW_BYTES)).map_err(SendError::Link)?;
        self.finish_frame().await.map_err(SendError::Link)?;
        Ok(n)
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

    /// Sends everything gathered, and on a new socket what is not there yet.
    pub async fn flush(&mut self) -> io::Result<()> {
        self.send_gathered(SendFlags::empty()).await
    }

    async fn send_gathered(&mut self, flags: SendFlags) -> io::Result<()> {
        // What somebody before has left over.
        self.send_bytes(flags).await?;
        if self.out.is_empty() {
            return Ok(());
        }
        self.make_room(self.out.len(), 0).await?;
        self.send_out(flags).await
    }

    /// Sends more of a frame that has begun, for which there was room. An acknowledgement is not to be waited
    /// for: the cache gives none within a frame.
    async fn finish_frame(&mut self) -> io::Result<()> {
        self.send_bytes(SendFlags::empty()).await?;
        self.send_out(SendFlags::empty()).await
    }

    async fn send_out(&mut self, flags: SendFlags) -> io::Result<()> {
        self.sending = self.out.split().freeze();
        if let Some(retransmit) = &mut self.retransmit {
            retransmit.keep(self.sending.clone());
        }
        self.send_bytes(flags).await?;
        // Splitting and joining makes the buffer wander and grow; begin anew now and then. Not with what
        // is left of a buffer: what is kept of that keeps all of it, and would be alone in it.
        if self.out.capacity() > BUFFER_BYTES {
            self.out = BytesMut::new();
        }
        Ok(())
    }

    /// Waits until the cache has acknowledged so much that this many more can be kept.
    async fn make_room(&mut self, copies: usize, pages: usize) -> io::Result<()> {
        loop {
            let state = self.changes.borrow_and_update().clone();
            let Some(retransmit) = &mut self.retransmit else {
                return Ok(());
            };
            retransmit.acknowledged(state.acknowledged)?;
            if retransmit.has_room(copies, pages) {
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

    /// Makes sure of a socket that everything kept was sent on. `true`: it was sent just now.
    async fn socket(&mut self) -> io::Result<bool> {
        let mut anew = false;
        loop {
            let state = self.changes.borrow_and_update().clone();
            match state.half {
                Some(_) if state.generation == self.generation => match self.caught_up {
                    true => return Ok(anew),
                    // Whoever began to send what is kept has stopped midway.
                    false => {
                        let why = io::Error::other("a part of what is kept was sent");
                        self.wire.lost(self.generation, why);
                    }
                },
                Some(half) => {
                    (self.half, self.generation) = (half, state.generation);
                    self.caught_up = false;
                    if let Some(retransmit) = &mut self.retransmit {
                        retransmit.resume(state.resumed_at)?;
                    }
                    anew = true;
                    match self.send_kept().await? {
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
    async fn send_kept(&mut self) -> io::Result<io::Result<()>> {
        let half = &self.half;
        let Some(retransmit) = &mut self.retransmit else {
            return Ok(Ok(()));
        };
        // It is kept as well.
        self.sending = Bytes::new();
        let mut cursor = Cursor::default();
        while let Some(copy) = retransmit.next_copy(&mut cursor)? {
            let sent = match copy {
                Copy::Bytes(bytes) => send_copy(half, bytes).await,
                Copy::Pages(pipe, n) => splice_copy(half, pipe, n).await,
            };
            if let Err(e) = sent {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    }

    /// Sends what is in `sending`, and on a new socket what is kept. Cancel safe, as long as the
    /// socket lasts.
    async fn send_bytes(&mut self, flags: SendFlags) -> io::Result<()> {
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
    async fn splice(&mut self, pipe: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
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
                    // EAGAIN is the socket's, which has no room, unless the pipe lost its bytes.
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

/// Reads up to `n` bytes that are in the pipe to the end of `out`.
fn read_into(out: &mut BytesMut, pipe: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
    let start = out.len();
    out.resize(start + n, 0);
    let mut done = 0;
    while done < n {
        match rustix::io::read(pipe, &mut out[start + done..]) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
            Ok(more) => done += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                out.truncate(start);
                return Err(e.into());
            }
        }
    }
    out.truncate(start + done);
    Ok(done)
}

#[cfg(test)]
mod tests;
