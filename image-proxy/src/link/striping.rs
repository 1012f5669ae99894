//! Large images over several connections (`--connections`).
//!
//! Each connection has a pipe of its own. A frame's bytes are moved by `splice` from CRIU's
//! pipe into the one of a free connection, by reference, and a task of that connection sends
//! them. So a slow connection holds one frame, and the image goes on over the others.
//!
//! Connection 0 carries everything else, too. Whoever sends a frame there has its [`Writer`]
//! from the moment the frame is given out: whatever is put after it stays after it, such as the
//! end of the image. The cache relies on that; what it waits for is never behind what waits.

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

/// Capacity of a connection's pipe: one frame of the longest. The most that an unprivileged
/// process may ask for; with less, frames are shorter.
const PIPE_BYTES: usize = 1 << 20;

/// The connections of a link as ways for large frames.
pub struct Lanes {
    first: Arc<tokio::sync::Mutex<Writer>>,
    lanes: Vec<Lane>,
    /// Lanes with nothing to send, but for connection 0: that is free if its writer is.
    free: Mutex<Vec<usize>>,
    ready: Semaphore,
}

struct Lane {
    pipe: OwnedFd,
    frames: mpsc::Sender<Frame>,
}

/// The other end of a lane.
pub struct LaneEnd {
    number: usize,
    pipe: OwnedFd,
    frames: mpsc::Receiver<Frame>,
}

/// A frame whose bytes are in the lane's pipe.
struct Frame {
    stream: StreamNumber,
    sequence: u32,
    length: usize,
    /// With checksums: who wants to know.
    digest: Option<oneshot::Sender<Digest>>,
    /// On connection 0.
    writer: Option<OwnedMutexGuard<Writer>>,
}

/// A lane that has nothing to send, for one frame.
pub struct FreeLane<'a> {
    lanes: &'a Lanes,
    number: usize,
    writer: Option<OwnedMutexGuard<Writer>>,
    used: bool,
}

impl Lanes {
    /// Lanes over so many connections, the first one among them.
    pub fn new(
        connections: usize,
        first: Arc<tokio::sync::Mutex<Writer>>,
    ) -> std::io::Result<(Self, Vec<LaneEnd>)> {
        let (mut lanes, mut ends) = (Vec::new(), Vec::new());
        for number in 0..connections {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
            enlarge_pipe(&writer, PIPE_BYTES);
            let (frames, queue) = mpsc::channel(1);
            lanes.push(Lane {
                pipe: writer,
                frames,
            });
            ends.push(LaneEnd {
                number,
                pipe: reader,
                frames: queue,
            });
        }
        let lanes = Self {
            first,
            lanes,
            ready: Semaphore::new(connections - 1),
            free: Mutex::new((1..connections).collect()),
        };
        Ok((lanes, ends))
    }

    fn free_lanes(&self) -> MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a lane with nothing to send. Cancel safe.
    pub async fn free(&self) -> FreeLane<'_> {
        let lane = |number, writer| FreeLane {
            lanes: self,
            number,
            writer,
            used: false,
        };
        tokio::select! {
            // The others first: small images and control frames have connection 0 alone.
            biased;
            Ok(permit) = self.ready.acquire() => {
                permit.forget();
                match self.free_lanes().pop() {
                    Some(number) => lane(number, None),
                    None => unreachable!("a permit is a lane in the list"),
                }
            }
            writer = self.first.clone().lock_owned() => lane(0, Some(writer)),
        }
    }

    fn release(&self, number: usize) {
        if number > 0 {
            self.free_lanes().push(number);
            self.ready.add_permits(1);
        }
    }
}

impl FreeLane<'_> {
    /// Takes what the image has for this lane, as one frame. With checksums its digest follows
    /// when it is sent.
    pub fn take(
        mut self,
        stream: StreamNumber,
        sequence: u32,
        image: &mut impl ImageData,
        format: FrameFormat,
    ) -> Result<(ReadOutcome, Option<oneshot::Receiver<Digest>>), SendError> {
        let lane = &self.lanes.lanes[self.number];
        let taken = image.move_into(&lane.pipe).map_err(SendError::Source)?;
        let ReadOutcome::Bytes(length) = taken else {
            return Ok((taken, None));
        };
        let (digest, told) = match format.is_checked() {
            true => {
                let (digest, told) = oneshot::channel();
                (Some(digest), Some(told))
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
        // The lane is free, so there is room, unless its task has ended with the link.
        lane.frames.try_send(frame).map_err(|_| SendError::Down)?;
        Ok((taken, told))
    }
}

impl Drop for FreeLane<'_> {
    fn drop(&mut self) {
        if !self.used {
            self.lanes.release(self.number);
        }
    }
}

impl LaneEnd {
    /// Sends the lane's frames until the link ends; an error ends it. Connection 0 has no writer of its own: it
    /// comes with the frames.
    pub async fn send(
        mut self,
        lanes: Arc<Lanes>,
        mut own: Option<Writer>,
        link_down: CancellationToken,
    ) -> Result<(), SendError> {
        loop {
            let resumed = async {
                match &mut own {
                    Some(writer) => writer.resumed().await,
                    None => std::future::pending().await,
                }
            };
            let frame = tokio::select! {
                frame = self.frames.recv() => frame,
                // With nothing to send, what is kept is.
                resumed = resumed => {
                    let resumed = match (resumed, &mut own) {
                        (Ok(()), Some(writer)) => tokio::select! {
                            flushed = writer.flush() => flushed,
                            () = link_down.cancelled() => return Ok(()),
                        },
                        (resumed, _) => resumed,
                    };
                    resumed.map_err(SendError::Link)?;
                    continue;
                }
                () = link_down.cancelled() => None,
            };
            let Some(mut frame) = frame else {
                return Ok(());
            };
            let writer = match (&mut frame.writer, &mut own) {
                (Some(writer), _) => &mut **writer,
                (None, Some(writer)) => writer,
                (None, None) => unreachable!("a frame for connection 0 has its writer"),
            };
            let sending =
                writer.splice_frame(frame.stream, frame.sequence, &self.pipe, frame.length);
            // A link that hangs in mid-frame is given up as a whole, frame and all.
            let sent = tokio::select! {
                sent = sending => sent?,
                () = link_down.cancelled() => return Ok(()),
            };
            if let (Some(told), Some(digest)) = (frame.digest.take(), sent.digest) {
                let _ = told.send(digest); // the image may have been given up
            }
            drop(frame);
            lanes.release(self.number);
        }
    }
}
