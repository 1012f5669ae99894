//! The sending half of a connection: frames into its socket, image data by `splice`.
//!
//! The task that holds the writer sends whole frames; a frame that has begun is finished, or the link
//! is dead. Small frames are gathered ([`framing`]) and sent together by the flusher. Image data go from their pipe
//! into the socket ([`splicing`]). When the socket breaks, the writer waits for the next one, sends again what the cache
//! does not have, and goes on ([`retransmission`]).

mod framing;
mod retransmission;
mod splicing;

use std::io;
use std::sync::Arc;

use bytes::BufMut;
use image_common::link::codec::{FrameFormat, Message, StreamNumber};
use image_common::link::digest::Digest;
use image_common::link::resumable::ResumableStream;
use image_common::net::socket::Socket;
use rustix::net::SendFlags;

use crate::link::image_data::{ImageData, ReadOutcome};
use crate::link::writer::framing::FrameBuffer;
use crate::link::writer::retransmission::ResumableSender;

/// Longest data frame that is read and copied instead of spliced.
const FEW_BYTES: usize = 64 << 10;

/// What is left of a buffer is read into unless it is less than this.
const LEAST_READ: usize = 64 << 10;

pub struct Writer {
    /// Gathered and not sent yet.
    frames: FrameBuffer,
    sender: ResumableSender,
}

/// The link broke, or the pipe did something that no pipe of CRIU's does.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("cannot send on the link")]
    Link(#[source] io::Error),
    #[error("cannot read the image from CRIU")]
    Source(#[source] io::Error),
    #[error("the link is closed")]
    Down,
    #[error(
        "another process reads CRIU's pipe: bytes of the image are gone, and the image is aborted"
    )]
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
    /// For a connection that was just made. With a `retransmit_buffer` it outlives its sockets.
    pub fn new(
        wire: Arc<ResumableStream>,
        retransmit_buffer: Option<usize>,
        format: FrameFormat,
    ) -> io::Result<Self> {
        Ok(Self {
            frames: FrameBuffer::new(format),
            sender: ResumableSender::new(wire, retransmit_buffer)?,
        })
    }

    pub fn put(&mut self, message: &Message) {
        self.frames.put_message(message);
    }

    /// A data frame of a round, of bytes that are in memory already, at most
    /// [`MAX_DATA_BYTES`](image_common::link::MAX_DATA_BYTES). Pages of rounds are not numbered: they stay on this
    /// connection.
    pub fn put_data(&mut self, stream: StreamNumber, bytes: &[u8]) {
        self.frames.put_data(stream, 0, bytes);
    }

    /// See [`FrameBuffer::has_space`].
    pub fn has_space(&self, more: usize) -> bool {
        self.frames.has_space(more)
    }

    /// More is gathered than should be.
    pub fn is_full(&self) -> bool {
        self.frames.is_full()
    }

    /// See [`FrameBuffer::renew`].
    fn renew(&mut self, payload: usize) {
        let spare = || self.sender.spare_buffer();
        self.frames.renew(payload, spare);
    }

    /// Reads what there is of a small image, or the small rest of a large one, into the
    /// gathered frames. Also into `keep`, where a later read-back needs it.
    pub fn gather_image(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        image: &impl ImageData,
        keep: Option<&mut Vec<u8>>,
    ) -> Result<(ReadOutcome, Option<Digest>), SendError> {
        let format = self.frames.format();
        let frames = &mut self.frames;
        let (read, data) = frames.read_frame(stream, sequence, FEW_BYTES, |out| image.read(out));
        let outcome = read.map_err(SendError::Source)?;
        if !matches!(outcome, ReadOutcome::Bytes(_)) {
            return Ok((outcome, None));
        }
        if let Some(keep) = keep {
            keep.extend_from_slice(data);
        }
        Ok((outcome, format.digest_of(data)))
    }

    /// The same with what CRIU has sent to the page server, at most `most` bytes of it, in a frame
    /// of a round; gives them, too. `None`: there is nothing now. No bytes: it has ended.
    pub fn gather_round(
        &mut self,
        stream: StreamNumber,
        mut most: usize,
        criu: &Socket,
    ) -> io::Result<Option<&[u8]>> {
        if self.frames.is_empty() {
            self.renew(LEAST_READ);
            most = most.min(self.frames.payload_space());
        }
        let (read, data) = self.frames.read_frame(stream, 0, most, |out| {
            match criu.try_read_buf(&mut out.limit(most)) {
                Ok(n) => Ok(Some(n)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                Err(e) => Err(e),
            }
        });
        Ok(read?.map(|_| data))
    }

    /// Waits for a new socket, on which what is kept is to be sent. Cancel safe.
    pub async fn resumed(&mut self) -> io::Result<()> {
        self.sender.resumed().await
    }

    /// Sends everything gathered, and on a new socket what is not there yet.
    pub async fn flush(&mut self) -> io::Result<()> {
        self.send_gathered(SendFlags::empty()).await
    }

    async fn send_gathered(&mut self, flags: SendFlags) -> io::Result<()> {
        // What a task before has left over.
        self.sender.finish(flags).await?;
        if self.frames.is_empty() {
            return Ok(());
        }
        self.sender.make_space(self.frames.len(), 0).await?;
        self.send_frames(flags).await
    }

    /// Sends more of a frame that has begun, for which there was space. It must not wait for an acknowledgement: the
    /// cache gives none within a frame.
    async fn finish_frame(&mut self) -> io::Result<()> {
        self.sender.finish(SendFlags::empty()).await?;
        self.send_frames(SendFlags::empty()).await
    }

    async fn send_frames(&mut self, flags: SendFlags) -> io::Result<()> {
        self.sender.send(self.frames.take(), flags).await?;
        self.frames.release_grown();
        Ok(())
    }
}

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
