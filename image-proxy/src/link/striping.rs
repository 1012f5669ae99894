//! Large images over several connections (`--connections`).
//!
//! Each connection has a pipe of its own. A frame's bytes are moved by `splice` from CRIU's
//! pipe into the one of a free connection, by reference, and a task of that connection sends
//! them. So a slow connection holds one frame, and the image goes on over the others.
//!
//! Connection 0 carries everything else, too. A frame for it holds its [`Writer`] from the moment the frame is
//! made: what is put later, such as the end of the image, is sent later. The cache relies on that: the frame that it
//! waits for is never behind one that waits.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::criu_io::fdpass::enlarge_pipe;
use image_common::link::codec::{FrameFormat, StreamNumber};
use image_common::link::digest::Digest;
use rustix::pipe::{pipe_with, PipeFlags};
use tokio::sync::{mpsc, oneshot, OwnedMutexGuard, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::link::image_data::{ImageData, ReadOutcome};
use crate::link::writer::{SendError, Writer};

/// Capacity of a connection's pipe: one frame of the greatest length. The most that an unprivileged
/// process may ask for; in a shorter pipe frames are shorter.
const PIPE_BYTES: usize = 1 << 20;

/// The connections of a link, for frames of large images.
pub struct Striping {
    first: Arc<tokio::sync::Mutex<Writer>>,
    connections: Vec<Connection>,
    /// Connections with nothing to send, but for connection 0: that is free if its writer is.
    free: Mutex<Vec<usize>>,
    ready: Semaphore,
}

struct Connection {
    pipe: OwnedFd,
    frames: mpsc::Sender<Frame>,
}

/// The task that sends the frames of one connection.
pub struct ConnectionSender {
    number: usize,
    pipe: OwnedFd,
    frames: mpsc::Receiver<Frame>,
}

/// A frame whose bytes are in the connection's pipe.
struct Frame {
    stream: StreamNumber,
    sequence: u32,
    length: usize,
    /// With checksums: where the digest goes when the frame is sent.
    digest: Option<oneshot::Sender<Digest>>,
    /// On connection 0.
    writer: Option<OwnedMutexGuard<Writer>>,
}

/// A connection with nothing to send, for one frame.
pub struct FreeConnection<'a> {
    striping: &'a Striping,
    number: usize,
    writer: Option<OwnedMutexGuard<Writer>>,
    used: bool,
}

impl Striping {
    /// Over so many connections, the first one among them.
    pub fn new(
        connections: usize,
        first: Arc<tokio::sync::Mutex<Writer>>,
    ) -> std::io::Result<(Self, Vec<ConnectionSender>)> {
        let (mut list, mut senders) = (Vec::new(), Vec::new());
        for number in 0..connections {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            enlarge_pipe(&writer, PIPE_BYTES);
            let (frames, queue) = mpsc::channel(1);
            list.push(Connection {
                pipe: writer,
                frames,
            });
            senders.push(ConnectionSender {
                number,
                pipe: reader,
                frames: queue,
            });
        }
        let striping = Self {
            first,
            connections: list,
            ready: Semaphore::new(connections - 1),
            free: Mutex::new((1..connections).collect()),
        };
        Ok((striping, senders))
    }

    fn free_connections(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a connection with nothing to send. Cancel safe.
    pub async fn free(&self) -> FreeConnection<'_> {
        let connection = |number, writer| FreeConnection {
            striping: self,
            number,
            writer,
            used: false,
        };
        tokio::select! {
            // The others first: small images and control frames have connection 0 alone.
            biased;
            Ok(permit) = self.ready.acquire() => {
                permit.forget();
                match self.free_connections().pop() {
                    Some(number) => connection(number, None),
                    None => unreachable!("each permit stands for a connection in the list"),
                }
            }
            writer = self.first.clone().lock_owned() => connection(0, Some(writer)),
        }
    }

    fn release(&self, number: usize) {
        if number > 0 {
            self.free_connections().push(number);
            self.ready.add_permits(1);
        }
    }
}

impl FreeConnection<'_> {
    /// Moves what the image has into this connection's pipe, as one frame. With checksums its digest follows
    /// when it is sent.
    pub fn take(
        mut self,
        stream: StreamNumber,
        sequence: u32,
        image: &mut impl ImageData,
        format: FrameFormat,
    ) -> Result<(ReadOutcome, Option<oneshot::Receiver<Digest>>), SendError> {
        let connection = &self.striping.connections[self.number];
        let taken = image
            .move_into(&connection.pipe)
            .map_err(SendError::Source)?;
        let ReadOutcome::Bytes(length) = taken else {
            return Ok((taken, None));
        };
        let (digest, digest_receiver) = match format.is_checked() {
            true => {
                let (digest, receiver) = oneshot::channel();
                (Some(digest), Some(receiver))
            }
            false => (None, None),
        };
        let frame = Frame {
            stream,
            sequence,
            length,
            digest,
            writer: self.writer.take(),
        };
        self.used = true;
        // The connection is free, so the queue has space, unless its task has ended with the link.
        connection
            .frames
            .try_send(frame)
            .map_err(|_| SendError::Down)?;
        Ok((taken, digest_receiver))
    }
}

impl Drop for FreeConnection<'_> {
    fn drop(&mut self) {
        if !self.used {
            self.striping.release(self.number);
        }
    }
}

impl ConnectionSender {
    /// Sends the connection's frames until the link ends. Connection 0 has no writer of its own: it comes with the
    /// frames. An error ends the link: `lost` is called while this still has the writer, so that no other task sends
    /// behind half a frame, or fails for another reason.
    pub async fn send(
        mut self,
        striping: Arc<Striping>,
        mut own: Option<Writer>,
        link_down: CancellationToken,
        lost: impl FnOnce(SendError),
    ) {
        loop {
            let resumed = async {
                match &mut own {
                    Some(writer) => writer.resumed().await,
                    None => std::future::pending().await,
                }
            };
            let frame = tokio::select! {
                frame = self.frames.recv() => frame,
                // With nothing new to send, the unacknowledged bytes are sent.
                resumed = resumed => {
                    let resumed = match (resumed, &mut own) {
                        (Ok(()), Some(writer)) => tokio::select! {
                            flushed = writer.flush() => flushed,
                            () = link_down.cancelled() => return,
                        },
                        (resumed, _) => resumed,
                    };
                    match resumed {
                        Ok(()) => continue,
                        Err(e) => return lost(SendError::Link(e)),
                    }
                }
                () = link_down.cancelled() => None,
            };
            let Some(mut frame) = frame else { return };
            let writer = match (&mut frame.writer, &mut own) {
                (Some(writer), _) => &mut **writer,
                (None, Some(writer)) => writer,
                (None, None) => unreachable!("a frame for connection 0 has its writer"),
            };
            let sending =
                writer.splice_frame(frame.stream, frame.sequence, &self.pipe, frame.length);
            // A link that hangs within a frame is given up as a whole.
            let sent = tokio::select! {
                sent = sending => sent,
                () = link_down.cancelled() => return,
            };
            let sent = match sent {
                Ok(sent) => sent,
                Err(e) => return lost(e),
            };
            if let (Some(told), Some(digest)) = (frame.digest.take(), sent.digest) {
                let _ = told.send(digest); // the image may have been given up
            }
            drop(frame);
            striping.release(self.number);
        }
    }
}
