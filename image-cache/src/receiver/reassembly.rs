//! Images on their way, over however many connections their session has. No I/O in here.
//!
//! The data frames of an image are numbered. A connection that has read a frame's header asks
//! [`Reassembly::begin`] for memory of its own, receives the payload into it, and hands it back
//! with [`Reassembly::done`]. The frame whose turn it is has the image's writer with it, so its
//! bytes are published as they come; one that is early is held until those before it are here.
//! Nothing is copied for that: early bytes lie where they stay, only in which order is known
//! later. With one connection every frame has its turn.
//!
//! What bounds it: bytes are charged to the memory limit before they are received, like all
//! others; of early frames no more than [`MAX_HELD`] are remembered, then connections wait.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image_common::image::ImageName;
use image_common::link::codec::{SetNumber, StreamNumber};
use image_common::link::digest::Digest;
use tokio::sync::Notify;

use crate::store::image::{Filler, Image, ImageWriter, WriteError, FILLER_OVERHEAD_BYTES};
use crate::store::memory::budget::{Budget, PIECE_OVERHEAD_BYTES};
use crate::store::memory::segment::Piece;
use crate::store::set::Set;

/// Early frames of a session, those that are being received included. At 64 KiB a frame 4 GiB
/// have come while one frame was stuck: more would gain nothing.
const MAX_HELD: usize = 64 << 10;

/// What a proxy did wrong.
#[derive(Debug, thiserror::Error)]
pub enum ReassemblyError {
    #[error("there is no stream {}", .0 .0)]
    Unknown(StreamNumber),
    #[error("frame {sequence} of image {name} came a second time")]
    Repeated { name: String, sequence: u32 },
    #[error("frame {sequence} of image {name} is missing")]
    Missing { name: String, sequence: u32 },
    #[error("image {name} ended twice")]
    EndedTwice { name: String },
    #[error("image {name}")]
    Size {
        name: String,
        #[source]
        source: WriteError,
    },
    #[error("{what} did not come, and nothing else within {within:?}")]
    Stuck { what: String, within: Duration },
    #[error("image {name} was damaged on its way: its digest is {ours:08x} here and {theirs:08x} at the source")]
    Digest {
        name: String,
        ours: u32,
        theirs: u32,
    },
}

pub struct Reassembly {
    connections: usize,
    /// How long nothing may come before what is waited for will not.
    patience: Duration,
    state: Mutex<OpenStreams>,
    /// Something changed that a connection may wait for.
    changed: Notify,
    /// Bytes of images that arrived, on any connection: as long as it grows no connection is stuck.
    bytes: AtomicU64,
}

#[derive(Default)]
struct OpenStreams {
    streams: HashMap<StreamNumber, OpenImage>,
    /// Early frames of all images.
    held: usize,
}

/// An image on its way.
struct OpenImage {
    set: Arc<Set>,
    /// `None`: it was refused, or its set given up; the rest is read and forgotten.
    image: Option<Arc<Image>>,
    /// `None`: it is with the connection that receives the frame whose turn it is.
    writer: Option<ImageWriter>,
    /// Of each connection that brought some of it.
    fillers: Vec<Filler>,
    /// Whose memory they take.
    budget: Option<Arc<Budget>>,
    /// Number of the frame whose turn it is.
    next: u32,
    early: HashMap<u32, (Vec<Piece>, Option<Digest>)>,
    /// Of the frames before that, with checksums.
    digest: Digest,
    /// Frames that are being received, and whether they came early.
    receiving: Vec<(u32, bool)>,
    /// Bytes of all frames that have begun.
    begun: u64,
    /// IMAGE_END came, and said so many bytes.
    total: Option<u64>,
    /// What their digest must be.
    expected: Option<u32>,
}

/// A data frame that is being received.
pub struct Frame {
    stream: StreamNumber,
    connection: usize,
    sequence: u32,
    set: Arc<Set>,
    /// It is this frame's turn.
    writer: Option<ImageWriter>,
    filler: Filler,
    pieces: Vec<Piece>,
    small: bool,
    /// Of its bytes, with checksums.
    pub digest: Option<Digest>,
}

/// What a connection does with a frame.
pub enum Begun {
    Receive(Frame),
    /// Its set was given up.
    Forget,
    /// It cannot be held.
    Refused(WriteError),
}

/// An image that is whole, and stored.
pub struct Whole {
    pub set: Arc<Set>,
    pub name: ImageName,
    pub total: u64,
}

impl Frame {
    /// To be given as a whole to [`Self::put_small`].
    pub fn is_small(&self) -> bool {
        self.small
    }

    pub fn put_small(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        match &mut self.writer {
            Some(writer) => writer.put_small(bytes),
            None => Ok(()), // only a frame that has the writer is small
        }
    }

    /// Room for at least one of the next `want` bytes.
    pub fn spare(&mut self, want: usize) -> Result<&mut [u8], WriteError> {
        self.filler.spare(want)
    }

    /// So many bytes were received into it.
    pub fn filled(&mut self, n: usize) {
        let Some(piece) = self.filler.advance(n) else {
            return;
        };
        match &mut self.writer {
            Some(writer) => writer.publish(piece),
            None => {
                let joined = self.pieces.last_mut().is_some_and(|p| p.try_join(&piece));
                if !joined {
                    self.pieces.push(piece);
                }
            }
        }
    }
}

impl Reassembly {
    pub fn new(connections: usize, patience: Duration) -> Self {
        Self {
            connections,
            patience,
            state: Mutex::default(),
            changed: Notify::new(),
            bytes: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, OpenStreams> {
        // Nothing that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        if self.connections > 1 {
            self.changed.notify_waiters();
        }
    }

    /// Some bytes of an image came.
    pub fn count(&self, bytes: usize) {
        if self.connections > 1 {
            self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    pub fn contains_key(&self, stream: &StreamNumber) -> bool {
        self.state().streams.contains_key(stream)
    }

    pub fn len(&self) -> usize {
        self.state().streams.len()
    }

    /// An image begins; without a writer what comes of it is forgotten.
    pub fn open(&self, stream: StreamNumber, set: Arc<Set>, writer: Option<ImageWriter>) {
        let arrival = OpenImage {
            set,
            budget: writer.as_ref().and_then(ImageWriter::budget),
            image: writer.as_ref().map(|w| w.image().clone()),
            writer,
            fillers: Vec::new(),
            next: 0,
            early: HashMap::new(),
            digest: Digest::default(),
            receiving: Vec::new(),
            begun: 0,
            total: None,
            expected: None,
        };
        self.state().streams.insert(stream, arrival);
        self.changed();
    }

    /// Which set, and which image, if it is still wanted.
    pub fn about(&self, stream: StreamNumber) -> Option<(SetNumber, ImageName)> {
        let state = self.state();
        let arrival = state.streams.get(&stream)?;
        Some((arrival.set.number, arrival.image.as_ref()?.name.clone()))
    }

    /// Takes the frame whose header was read on `connection`. Waits as long as its image has not
    /// begun, which is told on the first connection, and as long as too many early frames are
    /// here. Cancel safe.
    pub async fn begin(
        &self,
        stream: StreamNumber,
        connection: usize,
        sequence: u32,
        length: usize,
    ) -> Result<Begun, ReassemblyError> {
        // Without the wait around it, because that is the way of nearly all.
        if let Some(begun) = self.try_begin(stream, connection, sequence, length)? {
            return Ok(begun);
        }
        let what = || {
            format!(
                "the beginning of stream {}, or its frames before this",
                stream.0
            )
        };
        self.wait(what, || {
            self.try_begin(stream, connection, sequence, length)
        })
        .await
    }

    fn try_begin(
        &self,
        stream: StreamNumber,
        connection: usize,
        sequence: u32,
        length: usize,
    ) -> Result<Option<Begun>, ReassemblyError> {
        let mut state = self.state();
        let OpenStreams { streams, held } = &mut *state;
        let Some(arrival) = streams.get_mut(&stream) else {
            return match connection {
                // Here an image begins before its data come.
                0 => Err(ReassemblyError::Unknown(stream)),
                _ => Ok(None),
            };
        };
        let begun = arrival.begun.saturating_add(length as u64);
        if let Some(expected) = arrival.total.filter(|&total| total < begun) {
            return Err(arrival.size(begun, expected));
        }
        let Some(image) = arrival.image.clone() else {
            arrival.begun = begun;
            if arrival.total == Some(begun) {
                streams.remove(&stream);
            }
            return Ok(Some(Begun::Forget));
        };
        // Numbers wrap around; so many frames are never on their way at once.
        let ahead = sequence.wrapping_sub(arrival.next);
        let here = arrival.early.contains_key(&sequence) || arrival.is_receiving(sequence);
        if here || ahead > u32::MAX / 2 {
            return Err(ReassemblyError::Repeated {
                name: arrival.name(),
                sequence,
            });
        }
        if ahead > 0 && self.connections == 1 {
            return Err(arrival.missing());
        }
        if ahead > 0 && *held >= MAX_HELD {
            return Ok(None);
        }
        let first = arrival.begun == 0;
        arrival.begun = begun;
        let small =
            first && ahead == 0 && arrival.writer.as_ref().is_some_and(|w| w.is_small(length));
        let overhead = match small || arrival.has_filler(connection) {
            true => 0,
            false => FILLER_OVERHEAD_BYTES,
        };
        // What comes over one connection is joined with what came before.
        let listed = match self.connections {
            1 => 0,
            _ => usize::try_from(PIECE_OVERHEAD_BYTES).unwrap_or(usize::MAX),
        };
        if let Err(e) = image.reserve(length + overhead + listed) {
            return Ok(Some(Begun::Refused(e)));
        }
        arrival.receiving.push((sequence, ahead > 0));
        let writer = match ahead {
            0 => arrival.writer.take(),
            _ => {
                *held += 1;
                None
            }
        };
        Ok(Some(Begun::Receive(Frame {
            stream,
            connection,
            sequence,
            set: arrival.set.clone(),
            writer,
            filler: match small {
                true => Filler::default(),
                false => arrival.filler(connection),
            },
            pieces: Vec::new(),
            small,
            digest: None,
        })))
    }

    /// The frame was received, or as much of it as will be. Gives the image if that made it
    /// whole.
    pub fn done(&self, frame: Frame) -> Result<Option<Whole>, ReassemblyError> {
        let mut state = self.state();
        let OpenStreams { streams, held } = &mut *state;
        let early = frame.writer.is_none();
        let arrival = streams.get_mut(&frame.stream);
        let Some(arrival) = arrival.filter(|a| a.image.is_some()) else {
            // Given up meanwhile; early frames are out of the count already.
            if let Some(writer) = frame.writer {
                frame.set.drop_image(writer);
            }
            return Ok(None);
        };
        arrival.receiving.retain(|&(s, _)| s != frame.sequence);
        if !frame.small {
            arrival.fillers[frame.connection] = frame.filler;
        }
        match early {
            true => {
                arrival
                    .early
                    .insert(frame.sequence, (frame.pieces, frame.digest));
            }
            false => {
                arrival.writer = frame.writer;
                arrival.follows(frame.digest);
                arrival.next = arrival.next.wrapping_add(1);
            }
        }
        if let Some(writer) = &mut arrival.writer {
            while let Some((pieces, digest)) = arrival.early.remove(&arrival.next) {
                pieces.into_iter().for_each(|piece| writer.publish(piece));
                if let Some(digest) = digest {
                    arrival.digest.then(digest);
                }
                arrival.next = arrival.next.wrapping_add(1);
                *held -= 1;
            }
        }
        let whole = Self::finish_if_whole(streams, frame.stream);
        drop(state);
        self.changed();
        whole
    }

    /// IMAGE_END: so many bytes were sent, with this digest if there are checksums. Gives the image if all of them are here.
    pub fn end(
        &self,
        stream: StreamNumber,
        total: u64,
        digest: Option<u32>,
    ) -> Result<Option<Whole>, ReassemblyError> {
        let mut state = self.state();
        let arrival = state.streams.get_mut(&stream);
        let arrival = arrival.ok_or(ReassemblyError::Unknown(stream))?;
        if arrival.total.is_some() {
            let name = arrival.name();
            return Err(ReassemblyError::EndedTwice { name });
        }
        let more_to_come = self.connections > 1 && arrival.begun < total;
        if arrival.begun != total && !more_to_come {
            return Err(arrival.size(arrival.begun, total));
        }
        arrival.total = Some(total);
        arrival.expected = digest;
        if arrival.image.is_none() && !more_to_come {
            state.streams.remove(&stream);
            return Ok(None);
        }
        let whole = Self::finish_if_whole(&mut state.streams, stream);
        drop(state);
        self.changed();
        whole
    }

    /// Stores the image before any connection can see that it is not on its way any more: one that
    /// waits for that relies on finding it in its set.
    fn finish_if_whole(
        streams: &mut HashMap<StreamNumber, OpenImage>,
        stream: StreamNumber,
    ) -> Result<Option<Whole>, ReassemblyError> {
        let arrival = streams.get_mut(&stream);
        let Some(arrival) = arrival.filter(|a| a.image.is_some()) else {
            return Ok(None);
        };
        let all_here = arrival.total == Some(arrival.begun) && arrival.receiving.is_empty();
        if !all_here {
            return Ok(None);
        }
        if !arrival.early.is_empty() {
            return Err(arrival.missing()); // and it cannot come: these are all the bytes
        }
        let (set, total) = (arrival.set.clone(), arrival.begun);
        let Some(writer) = arrival.writer.take() else {
            return Ok(None);
        };
        let name = writer.image().name.clone();
        let (ours, expected) = (arrival.digest.crc(), arrival.expected);
        streams.remove(&stream);
        if let Some(theirs) = expected {
            if ours != theirs {
                set.drop_image(writer);
                let name = name.to_string();
                return Err(ReassemblyError::Digest { name, ours, theirs });
            }
            set.digests.add(&name, total, ours);
        }
        match set.finish_image(writer, total) {
            Ok(()) => Ok(Some(Whole { set, name, total })),
            Err(source) => Err(ReassemblyError::Size {
                name: name.to_string(),
                source,
            }),
        }
    }

    /// IMAGE_ABORT: gives the image that will not be whole, if it was still wanted.
    pub fn abort(&self, stream: StreamNumber) -> Result<Option<ImageName>, ReassemblyError> {
        let mut state = self.state();
        let OpenStreams { streams, held } = &mut *state;
        let arrival = streams.get_mut(&stream);
        let arrival = arrival.ok_or(ReassemblyError::Unknown(stream))?;
        let name = arrival.image.as_ref().map(|image| image.name.clone());
        *held -= arrival.forget();
        if self.connections == 1 {
            streams.remove(&stream);
        } // else more of it may come on others; a run that broke off ends its session soon
        drop(state);
        self.changed();
        Ok(name)
    }

    /// What comes of the images of this set is forgotten from now on.
    pub fn forget_set(&self, set: SetNumber) {
        let mut state = self.state();
        let OpenStreams { streams, held } = &mut *state;
        streams.retain(|_, arrival| {
            if arrival.set.number == set {
                *held -= arrival.forget();
            }
            arrival.image.is_some() || arrival.total != Some(arrival.begun)
        });
        drop(state);
        self.changed();
    }

    /// The session is over.
    pub fn forget_all(&self) {
        let mut state = self.state();
        for (_, mut arrival) in state.streams.drain() {
            arrival.forget();
        }
        state.held = 0;
    }

    /// Waits until the images of the set that have ended, or the one of this name, are stored.
    /// Their last bytes may be on other connections still. Cancel safe.
    pub async fn settled(
        &self,
        set: SetNumber,
        name: Option<&ImageName>,
    ) -> Result<(), ReassemblyError> {
        if self.connections == 1 {
            return Ok(()); // what has ended was stored then
        }
        let on_its_way = |arrival: &OpenImage| match &arrival.image {
            Some(image) if arrival.set.number == set && arrival.total.is_some() => {
                name.is_none_or(|name| image.name == *name)
            }
            _ => false,
        };
        let what = || format!("the rest of the images of set {}", set.0);
        self.wait(what, || {
            let waiting = self.state().streams.values().any(on_its_way);
            Ok((!waiting).then_some(()))
        })
        .await
    }

    /// Slow is not dead: as long as anything arrives anywhere, this waits.
    async fn wait<T>(
        &self,
        what: impl Fn() -> String,
        mut look: impl FnMut() -> Result<Option<T>, ReassemblyError>,
    ) -> Result<T, ReassemblyError> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            // From now on no change is missed.
            changed.as_mut().enable();
            if let Some(found) = look()? {
                return Ok(found);
            }
            let bytes = self.bytes.load(Ordering::Relaxed);
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(self.patience) => {
                    if self.bytes.load(Ordering::Relaxed) == bytes {
                        return Err(ReassemblyError::Stuck {
                            what: what(),
                            within: self.patience,
                        });
                    }
                }
            }
        }
    }
}

impl OpenImage {
    fn name(&self) -> String {
        let name = self.image.as_ref().map(|image| image.name.to_string());
        name.unwrap_or_else(|| "(given up)".to_owned())
    }

    /// The digest of the frame whose turn it was.
    fn follows(&mut self, digest: Option<Digest>) {
        if let Some(digest) = digest {
            self.digest.then(digest);
        }
    }

    fn size(&self, got: u64, expected: u64) -> ReassemblyError {
        ReassemblyError::Size {
            name: self.name(),
            source: WriteError::Size { got, expected },
        }
    }

    fn missing(&self) -> ReassemblyError {
        ReassemblyError::Missing {
            name: self.name(),
            sequence: self.next,
        }
    }

    fn is_receiving(&self, sequence: u32) -> bool {
        self.receiving.iter().any(|&(s, _)| s == sequence)
    }

    fn has_filler(&self, connection: usize) -> bool {
        self.fillers.get(connection).is_some_and(Filler::has_begun)
    }

    fn filler(&mut self, connection: usize) -> Filler {
        if self.fillers.len() <= connection {
            let filler = || {
                self.budget
                    .as_ref()
                    .map_or_else(Filler::default, Filler::new)
            };
            self.fillers.resize_with(connection + 1, filler);
        }
        std::mem::take(&mut self.fillers[connection])
    }

    /// Gives its memory back; gives how many early frames that were.
    fn forget(&mut self) -> usize {
        if self.image.take().is_none() {
            return 0;
        }
        // The frame whose turn it is may be on its way into memory; its connection gives the
        // writer back when it is done with it.
        if let Some(writer) = self.writer.take() {
            self.set.drop_image(writer);
        }
        self.fillers.clear();
        let being_received = self.receiving.iter().filter(|(_, early)| *early);
        let early = self.early.len() + being_received.count();
        self.early.clear();
        self.receiving.clear();
        early
    }
}

#[cfg(test)]
mod tests;
