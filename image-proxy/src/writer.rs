//! The sending half of the link: frames into one TCP connection, image data by `splice`.
//!
//! Whoever holds the writer sends whole frames; a frame that has begun is finished, or the
//! connection is dead. Small frames are gathered and sent together by the flusher.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use bytes::{Buf, BufMut, BytesMut};
use image_common::link::codec::{Header, Message, StreamNumber, HEADER_BYTES};
use image_common::link::MAX_DATA_BYTES;
use rustix::net::{send, SendFlags};
use rustix::pipe::{splice, SpliceFlags};
use tokio::io::Interest;
use tokio::net::tcp::OwnedWriteHalf;

use crate::source::Source;

/// Gathered bytes beyond this are sent by whoever gathers.
const GATHER_BYTES: usize = 256 << 10;

/// Longest data frame that is read and copied instead of spliced.
const FEW_BYTES: usize = 64 << 10;

pub struct Writer {
    half: OwnedWriteHalf,
    out: BytesMut,
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

impl Writer {
    pub fn new(half: OwnedWriteHalf) -> Self {
        Self {
            half,
            out: BytesMut::new(),
        }
    }

    pub fn put(&mut self, message: &Message) {
        message.encode(&mut self.out);
    }

    /// A data frame of a round, of bytes that are in memory already, at most
    /// [`MAX_DATA_BYTES`]. Pages of rounds are not numbered: they stay on this connection.
    pub fn put_data(&mut self, stream: StreamNumber, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        debug_assert!(length <= MAX_DATA_BYTES);
        Header::data(stream, 0, length).encode(&mut self.out);
        self.out.extend_from_slice(bytes);
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
    ) -> Result<Took, SendError> {
        let start = self.out.len();
        self.out.put_bytes(0, HEADER_BYTES);
        self.out.reserve(FEW_BYTES);
        let mut limited = self.out.split_off(start + HEADER_BYTES);
        let read = source.read(&mut limited);
        let n = limited.len();
        if n > 0 {
            if let Some(keep) = keep {
                keep.extend_from_slice(&limited);
            }
            let mut header = BytesMut::with_capacity(HEADER_BYTES);
            // The buffer is far below u32::MAX; MAX_DATA_BYTES is checked by the caller's peer.
            let length = u32::try_from(n).unwrap_or(MAX_DATA_BYTES);
            Header::data(stream, sequence, length).encode(&mut header);
            self.out[start..].copy_from_slice(&header);
            self.out.unsplit(limited);
        } else {
            self.out.unsplit(limited);
            self.out.truncate(start);
        }
        match read.map_err(SendError::Source)? {
            Some(0) => Ok(Took::End),
            Some(n) => Ok(Took::Bytes(n)),
            None => Ok(Took::Nothing),
        }
    }

    /// Sends a frame of pages of a round, as [`Self::splice_numbered`]. They all go over one
    /// connection, in their order, so they are not numbered.
    pub async fn splice_frame(
        &mut self,
        stream: StreamNumber,
        pipe: BorrowedFd<'_>,
        n: usize,
    ) -> Result<usize, SendError> {
        self.splice_numbered(stream, 0, pipe, n).await
    }

    /// Sends one data frame of `n` bytes from the pipe. Not cancel safe: half a frame ends the
    /// connection.
    pub async fn splice_numbered(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        pipe: impl AsFd,
        n: usize,
    ) -> Result<usize, SendError> {
        let pipe = pipe.as_fd();
        let length = u32::try_from(n).unwrap_or(u32::MAX).min(MAX_DATA_BYTES);
        Header::data(stream, sequence, length).encode(&mut self.out);
        self.send_gathered(SendFlags::MORE)
            .await
            .map_err(SendError::Link)?;
        let mut left = length as usize;
        while left > 0 {
            let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
            let moved = self.half.as_ref().try_io(Interest::WRITABLE, || {
                splice(pipe, None, self.half.as_ref().as_fd(), None, left, flags)
                    .map_err(io::Error::from)
            });
            match moved {
                Ok(0) => return self.pad(left).await,
                Ok(n) => left -= n,
                // EAGAIN is the socket's, which has no room, unless the pipe lost its bytes.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let in_pipe = rustix::io::ioctl_fionread(pipe).unwrap_or(0);
                    if in_pipe < left as u64 {
                        return self.pad(left).await;
                    }
                    self.half.writable().await.map_err(SendError::Link)?;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(SendError::Link(e)),
            }
        }
        Ok(length as usize)
    }

    /// The frame's length is on the wire already, so what is missing is filled, and the image
    /// then aborted.
    async fn pad(&mut self, left: usize) -> Result<usize, SendError> {
        self.out.put_bytes(0, left);
        self.flush().await.map_err(SendError::Link)?;
        Err(SendError::Stolen)
    }

    /// Sends everything gathered.
    pub async fn flush(&mut self) -> io::Result<()> {
        self.send_gathered(SendFlags::empty()).await
    }

    async fn send_gathered(&mut self, flags: SendFlags) -> io::Result<()> {
        while !self.out.is_empty() {
            let sent = self.half.as_ref().try_io(Interest::WRITABLE, || {
                let socket = self.half.as_ref().as_fd();
                Ok(send(socket, &self.out, flags | SendFlags::NOSIGNAL)?)
            });
            match sent {
                Ok(n) => self.out.advance(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.half.writable().await?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        // Splitting and joining makes the buffer wander and grow; begin anew now and then.
        if self.out.capacity() > 2 * GATHER_BYTES {
            self.out = BytesMut::new();
        }
        Ok(())
    }
}
