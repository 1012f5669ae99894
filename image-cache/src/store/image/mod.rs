//! One image in memory: written once by the link, read by any number of restores, also while
//! it still arrives.
//!
//! Layout: an image is a list of [`Piece`]s. Its first small frame goes to a segment shared by
//! the set ([`Slab`]), so that 10,000 images of 4 KiB cost 40 MiB and not 10,000 mappings. Such a
//! segment is charged for itself, since one image that is left keeps all of it;
//! what comes after gets segments of its own, which grow with the image: a large one has few
//! pieces and gives its memory back in few calls, and still each piece is a small part of it.
//!
//! A restore may take the memory along ([`ImageReader::release`]): then the pieces go one by one
//! as they are read, and no other reader can read the image any more.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use image_common::image::ImageName;
use image_common::link::phase::OutOfOrder;
use tokio::sync::watch;

use crate::store::memory::arena::Source;
use crate::store::memory::budget::{Budget, Charge, OutOfMemory, IMAGE_OVERHEAD_BYTES};
use crate::store::memory::region::HUGE_PAGE_BYTES;
use crate::store::memory::segment::{Piece, Place, Tail};

/// Largest first frame that goes to the shared segment.
const SMALL_BYTES: usize = 64 << 10;
const SLAB_SEGMENT_BYTES: usize = 1 << 20;
const MIN_SEGMENT_BYTES: usize = 1 << 20;
/// Large enough that the number of mappings stays small, and a multiple of the huge page.
const MAX_SEGMENT_BYTES: usize = 64 << 20;
/// With `--release-on-read` a segment is at most this part of what came before it: memory goes
/// back by segments, and a restore that takes it along holds one twice.
const SEGMENT_PART: usize = 32;

/// How far an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    Arriving,
    Complete,
    /// It will never be whole.
    Broken,
}

/// An image that is one too many for its session.
#[derive(Debug, thiserror::Error)]
#[error("the session has had {0} images (--max-images)")]
pub struct TooManyImages(pub u64);

#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Limit(#[from] OutOfMemory),
    #[error(transparent)]
    Images(#[from] TooManyImages),
    #[error("the kernel gives no more memory")]
    Kernel(#[source] io::Error),
    #[error("{got} bytes arrived where {expected} were announced")]
    Size { got: u64, expected: u64 },
}

/// Why an image cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Order(#[from] OutOfOrder),
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The part that readers and the writer share.
pub struct Image {
    pub name: ImageName,
    content: Mutex<Content>,
    progress: watch::Sender<(u64, Progress)>,
}

struct Content {
    /// What is left of the pieces; the first so many were given back.
    pieces: VecDeque<Piece>,
    released: usize,
    released_bytes: u64,
    len: u64,
    charge: Charge,
}

impl Content {
    fn new(pieces: impl Into<VecDeque<Piece>>, len: u64, charge: Charge) -> Mutex<Self> {
        Mutex::new(Self {
            pieces: pieces.into(),
            released: 0,
            released_bytes: 0,
            len,
            charge,
        })
    }
}

/// Memory for the first bytes of images, shared by the images of a set.
#[derive(Default)]
pub struct Slab(Mutex<Option<Tail>>);

impl Slab {
    /// A copy of `bytes`, whose `charge` the segment takes over.
    fn put(&self, bytes: &[u8], charge: Charge) -> Result<Piece, WriteError> {
        let mut slab = lock(&self.0);
        let begun = slab.take();
        let size = match (&begun, charge.memory()) {
            // A small page of an arena costs more than one of anonymous memory.
            (Some(_), Source::Arena(_)) => HUGE_PAGE_BYTES,
            _ => SLAB_SEGMENT_BYTES,
        };
        let begun = begun.and_then(|mut t| (t.spare().len() >= bytes.len()).then_some(t));
        let mut tail = match begun {
            Some(tail) => tail,
            None => {
                let own = charge.another(FILLER_OVERHEAD_BYTES as u64)?;
                let mut tail = Tail::from(charge.memory(), size, 0).map_err(WriteError::Kernel)?;
                tail.hold(own);
                tail
            }
        };
        tail.hold(charge);
        tail.spare()[..bytes.len()].copy_from_slice(bytes);
        let piece = tail.advance(bytes.len());
        *slab = Some(tail);
        Ok(piece)
    }

    /// Lets go of what is begun.
    pub fn forget(&self) {
        lock(&self.0).take();
    }
}

/// Fills an image.
pub struct ImageWriter {
    image: Arc<Image>,
    slab: Arc<Slab>,
    /// For bytes that are in memory already; what arrives has a [`Filler`] per connection.
    own: Filler,
    /// Bytes of this transfer: an appended image is longer.
    received: u64,
    announced: Option<u64>,
}

/// Memory of an image that one connection receives into, one piece after the other.
#[derive(Default)]
pub struct Filler {
    tail: Option<Tail>,
    filled: u64,
    /// `None`: it fills nothing.
    budget: Option<Arc<Budget>>,
}

/// What a filler costs besides the bytes: the rest of its last page, and the kernel's tables and
/// mapping that lead to it.
pub const FILLER_OVERHEAD_BYTES: usize = 8 << 10;

impl Filler {
    /// Whether it has taken memory.
    pub fn has_begun(&self) -> bool {
        self.tail.is_some()
    }

    /// It takes what `budget` has ready, else new memory. The caller charges the bytes.
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Some(budget.clone()),
            ..Self::default()
        }
    }

    /// Room for at least one of the next `want` bytes, to be received into directly.
    pub fn spare(&mut self, want: usize) -> Result<&mut [u8], WriteError> {
        if self.tail.as_mut().is_none_or(|t| t.spare().is_empty()) {
            let so_far = usize::try_from(self.filled).unwrap_or(usize::MAX);
            let granular = self.budget.as_ref().is_some_and(|b| b.granular);
            let size = segment_bytes(so_far.max(want), granular);
            let ready = self.budget.as_ref().and_then(|b| b.reserved().take(size));
            let memory = self.budget.as_ref().map(|b| b.memory.clone());
            self.tail = Some(match ready {
                Some(ready) => Tail::of(ready),
                None => Tail::from(&memory.unwrap_or_default(), size, so_far)
                    .map_err(WriteError::Kernel)?,
            });
        }
        let Some(tail) = self.tail.as_mut() else {
            unreachable!("the tail was just made")
        };
        let spare = tail.spare();
        let n = spare.len().min(want);
        Ok(&mut spare[..n])
    }

    /// The first `n` bytes of what [`Self::spare`] gave, filled.
    pub fn advance(&mut self, n: usize) -> Option<Piece> {
        self.filled += n as u64;
        self.tail.as_mut().map(|tail| tail.advance(n))
    }
}

impl Image {
    /// A complete image of memory that is there already.
    pub fn of_pieces(name: ImageName, pieces: Vec<Piece>, charge: Charge) -> Arc<Self> {
        let len = pieces.iter().map(|p| p.len() as u64).sum();
        Arc::new(Self {
            name,
            content: Content::new(pieces, len, charge),
            progress: watch::Sender::new((len, Progress::Complete)),
        })
    }

    pub fn size(&self) -> u64 {
        self.progress.borrow().0
    }

    /// Accounts for a frame of `bytes` before it is received.
    pub fn reserve(&self, bytes: usize) -> Result<(), WriteError> {
        let mut content = lock(&self.content);
        Ok(content.charge.grow(bytes as u64)?)
    }

    /// Is charged from now on for what `other` was, whose memory it has.
    pub fn take_charge(&self, other: &Image) {
        let charge = lock(&other.content).charge.split(u64::MAX);
        lock(&self.content).charge.absorb(charge);
    }

    pub fn is_complete(&self) -> bool {
        self.progress.borrow().1 == Progress::Complete
    }

    /// Whether a restore has taken some of its memory along. Then it cannot be read.
    pub fn is_released(&self) -> bool {
        lock(&self.content).released > 0
    }

    /// The pieces of `len` bytes from `offset` on, if there are as many.
    pub fn slice(&self, mut offset: u64, mut len: u64) -> Option<Vec<Piece>> {
        let content = lock(&self.content);
        if content.released > 0 {
            return None;
        }
        let mut pieces = Vec::new();
        for piece in &content.pieces {
            if len == 0 {
                break;
            }
            let size = piece.len() as u64;
            if offset >= size {
                offset -= size;
                continue;
            }
            let mut piece = piece.skip(usize::try_from(offset).ok()?);
            piece.truncate(usize::try_from(len).unwrap_or(usize::MAX));
            offset = 0;
            len -= piece.len() as u64;
            pieces.push(piece);
        }
        (len == 0).then_some(pieces)
    }

    /// Where its bytes are in an arena. `None`: some are in none, or are gone.
    pub fn places(&self) -> Option<Vec<Place>> {
        let content = lock(&self.content);
        let whole = content.released == 0;
        let places = content.pieces.iter().map(Piece::place);
        whole.then(|| places.collect()).flatten()
    }

    /// The bytes of a small complete image, or its first `max`.
    pub fn head(&self, max: usize) -> Vec<u8> {
        let content = lock(&self.content);
        let bytes = content.pieces.iter().flat_map(|p| p.iter().copied());
        bytes.take(max).collect()
    }

    pub fn read(self: &Arc<Self>) -> ImageReader {
        ImageReader {
            image: self.clone(),
            progress: self.progress.subscribe(),
            piece: 0,
            within: 0,
            position: 0,
        }
    }
}

impl ImageWriter {
    pub fn new(
        name: ImageName,
        announced: Option<u64>,
        base: Option<Arc<Image>>,
        slab: Arc<Slab>,
        budget: &Arc<Budget>,
    ) -> Result<Self, WriteError> {
        let (pieces, len, charge) = match &base {
            Some(base) => {
                let content = lock(&base.content);
                // What is continued is charged again: its pieces stay when the old image goes.
                let charge = budget.charge(content.charge.bytes())?;
                (content.pieces.clone(), content.len, charge)
            }
            None => (VecDeque::new(), 0, budget.charge(IMAGE_OVERHEAD_BYTES)?),
        };
        let image = Image {
            name,
            content: Content::new(pieces, len, charge),
            progress: watch::Sender::new((len, Progress::Arriving)),
        };
        Ok(Self {
            image: Arc::new(image),
            slab,
            own: Filler::new(budget),
            received: 0,
            announced,
        })
    }

    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whose memory it takes.
    pub fn budget(&self) -> Option<Arc<Budget>> {
        self.own.budget.clone()
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    /// Whether a first frame of this size goes to the shared segment. Its bytes are copied:
    /// most of them came with the frame's header.
    pub fn is_small(&self, frame_bytes: usize) -> bool {
        self.received == 0 && self.own.filled == 0 && frame_bytes <= SMALL_BYTES
    }

    /// Appends a whole small frame (see [`Self::is_small`]) from `bytes`.
    pub fn put_small(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        let charge = lock(&self.image.content).charge.split(bytes.len() as u64);
        let piece = self.slab.put(bytes, charge)?;
        self.publish(piece);
        Ok(())
    }

    /// Appends bytes that are in memory already.
    pub fn put(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        self.image.reserve(bytes.len())?;
        if self.is_small(bytes.len()) {
            return self.put_small(bytes);
        }
        while !bytes.is_empty() {
            let spare = self.own.spare(bytes.len())?;
            let n = spare.len();
            spare.copy_from_slice(&bytes[..n]);
            if let Some(piece) = self.own.advance(n) {
                self.publish(piece);
            }
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// The next piece of the image, in its order.
    pub fn publish(&mut self, piece: Piece) {
        let added = piece.len() as u64;
        self.received += added;
        let mut content = lock(&self.image.content);
        content.len += added;
        let joined = content
            .pieces
            .back_mut()
            .is_some_and(|last| last.try_join(&piece));
        if !joined {
            content.pieces.push_back(piece);
        }
        let len = content.len;
        drop(content);
        self.image.progress.send_replace((len, Progress::Arriving));
    }

    /// The image is over. It is whole only if as much arrived as the sender counted.
    pub fn finish(self, total: u64) -> Result<Arc<Image>, WriteError> {
        for expected in [Some(total), self.announced].into_iter().flatten() {
            if expected != self.received {
                return Err(WriteError::Size {
                    got: self.received,
                    expected,
                });
            }
        }
        let len = self.image.size();
        self.image.progress.send_replace((len, Progress::Complete));
        Ok(self.image.clone())
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        self.image.progress.send_if_modified(|(_, progress)| {
            let broken = *progress == Progress::Arriving;
            if broken {
                *progress = Progress::Broken;
            }
            broken
        });
    }
}

/// How large the next segment of an image is that has `so_far` bytes: as all before it
/// together, so that there are few, or small ones that can go back one by one.
fn segment_bytes(so_far: usize, granular: bool) -> usize {
    if !granular {
        let size = so_far.next_multiple_of(MIN_SEGMENT_BYTES);
        return size.clamp(MIN_SEGMENT_BYTES, MAX_SEGMENT_BYTES);
    }
    if so_far < HUGE_PAGE_BYTES {
        return MIN_SEGMENT_BYTES;
    }
    let size = (so_far / SEGMENT_PART).min(MAX_SEGMENT_BYTES);
    size.next_multiple_of(HUGE_PAGE_BYTES)
}

/// Reads an image from its start, following it while it arrives.
pub struct ImageReader {
    image: Arc<Image>,
    progress: watch::Receiver<(u64, Progress)>,
    /// Position: index of the piece and offset in it. Pieces only grow and are only appended.
    piece: usize,
    within: usize,
    /// Bytes before that.
    position: u64,
}

/// What a reader gets next.
pub enum Next {
    /// Take some of it, then call [`ImageReader::consume`].
    Pieces(Vec<Piece>),
    End,
    Broken,
    /// Another reader has taken the memory along.
    Released,
}

impl ImageReader {
    /// The next bytes, at most so many pieces; waits for them if the image still arrives.
    /// Cancel safe.
    pub async fn next(&mut self, max_pieces: usize) -> Next {
        loop {
            // Before the content is looked at: a change after that wakes the wait below.
            let progress = self.progress.borrow_and_update().1.clone();
            let there: Vec<Piece> = {
                let content = lock(&self.image.content);
                let Some(first) = self.piece.checked_sub(content.released) else {
                    return Next::Released;
                };
                let rest = content.pieces.range(first..).take(max_pieces);
                let mut skip = self.within;
                rest.map(|piece| piece.skip(std::mem::take(&mut skip)))
                    .filter(|piece| !piece.is_empty())
                    .collect()
            };
            if !there.is_empty() {
                return Next::Pieces(there);
            }
            match progress {
                Progress::Complete => return Next::End,
                Progress::Broken => return Next::Broken,
                // The image, and with it the sender, is kept alive by `self.image`.
                Progress::Arriving => drop(self.progress.changed().await),
            }
        }
    }

    /// Moves on by `n` bytes of what [`Self::next`] gave.
    pub fn consume(&mut self, mut n: usize) {
        let content = lock(&self.image.content);
        let Some(first) = self.piece.checked_sub(content.released) else {
            return; // `next` will tell
        };
        self.position += n as u64;
        for (i, piece) in content.pieces.range(first..).enumerate() {
            let left = piece.len() - self.within;
            // The last piece may still grow, so it is never left behind.
            if n < left || first + i + 1 == content.pieces.len() {
                break;
            }
            n -= left;
            (self.piece, self.within) = (self.piece + 1, 0);
        }
        self.within += n;
    }

    /// Whether [`Self::release`] would give anything back.
    pub fn can_release(&self, keep: u64) -> bool {
        self.count_read(&lock(&self.image.content), keep) > 0
    }

    /// Gives back the pieces that were read, but for the last `keep` bytes. From now on the
    /// image belongs to this reader: any other, there already or still to come, gets
    /// [`Next::Released`].
    pub fn release(&mut self, keep: u64) {
        let mut content = lock(&self.image.content);
        let count = self.count_read(&content, keep);
        if count == 0 {
            return;
        }
        let gone: Vec<Piece> = content.pieces.drain(..count).collect();
        content.released += count;
        content.released_bytes += gone.iter().map(|p| p.len() as u64).sum::<u64>();
        let charged = gone.iter().filter(|piece| !piece.is_held());
        let charged = charged.map(|piece| piece.len() as u64).sum();
        let charge = content.charge.split(charged);
        if self.piece < content.released {
            (self.piece, self.within) = (content.released, 0);
        }
        drop(content);
        // The kernel's work of freeing it holds up no reader of the image.
        drop((gone, charge));
    }

    /// How many of the pieces that are left end `keep` bytes or more behind.
    fn count_read(&self, content: &Content, keep: u64) -> usize {
        // The last piece of an image that arrives may grow, and others may follow it too. And
        // where another reader took pieces that this one still needs, nothing is this one's.
        if !self.image.is_complete() || self.piece < content.released {
            return 0;
        }
        let read = self.position.saturating_sub(keep);
        let mut end = content.released_bytes;
        let ends = content.pieces.iter().map(|piece| {
            end += piece.len() as u64;
            end
        });
        ends.take_while(|&end| end <= read).count()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing that holds these locks can panic half-way through a change.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name() -> ImageName {
        ImageName::new("pages-1.img").unwrap()
    }

    fn put(writer: &mut ImageWriter, bytes: &[u8]) -> Result<(), WriteError> {
        writer.put(bytes)
    }

    async fn read_all(image: &Arc<Image>) -> Option<Vec<u8>> {
        let mut reader = image.read();
        let mut out = Vec::new();
        loop {
            match reader.next(3).await {
                Next::Pieces(pieces) => {
                    let there: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
                    let n = there.len().min(70_001);
                    out.extend_from_slice(&there[..n]);
                    reader.consume(n);
                }
                Next::End => return Some(out),
                Next::Broken | Next::Released => return None,
            }
        }
    }

    fn writer(budget: &Arc<Budget>, announced: Option<u64>) -> ImageWriter {
        ImageWriter::new(name(), announced, None, Arc::default(), budget).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_written_is_read(
            frames in proptest::collection::vec((any::<u8>(), 1..200_000usize), 0..12),
            announce in any::<bool>(),
        ) {
            let total: usize = frames.iter().map(|f| f.1).sum();
            let budget = Budget::new(1 << 30);
            let expected: Vec<u8> = frames.iter().flat_map(|&(b, n)| vec![b; n]).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let mut writer = writer(&budget, announce.then_some(total as u64));
                let image = writer.image().clone();
                // One reader from the start, one at the end.
                let follower = tokio::spawn(async move { read_all(&image).await });
                for &(b, n) in &frames {
                    put(&mut writer, &vec![b; n]).unwrap();
                    tokio::task::yield_now().await;
                }
                let image = writer.finish(total as u64).unwrap();
                assert!(image.is_complete() && image.size() == total as u64);
                assert!(follower.await.unwrap().unwrap() == expected);
                assert!(read_all(&image).await.unwrap() == expected);
            });
            prop_assert_eq!(budget.used(), 0);
        }
    }

    #[tokio::test]
    async fn a_dropped_writer_breaks_its_image() {
        let budget = Budget::new(1 << 20);
        let mut writer = writer(&budget, None);
        put(&mut writer, b"half").unwrap();
        let image = writer.image().clone();
        let reader = tokio::spawn(async move { read_all(&image).await });
        tokio::task::yield_now().await;
        drop(writer);
        assert_eq!(reader.await.unwrap(), None);
    }

    #[tokio::test]
    async fn sizes_must_agree() {
        let budget = Budget::new(1 << 20);
        for (announced, total, good) in [
            (None, 4, true),
            (None, 5, false),
            (Some(4), 4, true),
            (Some(5), 4, false),
        ] {
            let mut writer = writer(&budget, announced);
            put(&mut writer, b"1234").unwrap();
            assert_eq!(writer.finish(total).is_ok(), good);
        }
    }

    #[tokio::test]
    async fn append_continues_and_shares() {
        let budget = Budget::new(1 << 20);
        let mut first = writer(&budget, None);
        put(&mut first, b"one ").unwrap();
        let first = first.finish(4).unwrap();
        let mut second =
            ImageWriter::new(name(), None, Some(first.clone()), Arc::default(), &budget).unwrap();
        put(&mut second, b"two").unwrap();
        let second = second.finish(3).unwrap();
        assert_eq!(read_all(&first).await.unwrap(), b"one ");
        drop(first);
        assert_eq!(read_all(&second).await.unwrap(), b"one two");
        assert_eq!(second.head(5), b"one t");
        let segments = 2 * FILLER_OVERHEAD_BYTES as u64;
        assert_eq!(budget.used(), 7 + segments + IMAGE_OVERHEAD_BYTES);
        drop(second);
        assert_eq!(budget.used(), 0);
    }

    /// One byte that stays keeps the segment, whatever became of the images beside it.
    #[test]
    fn what_is_left_in_a_segment_pays_for_all_of_it() {
        let budget = Budget::new(1 << 30);
        let slab: Arc<Slab> = Arc::default();
        let new = || ImageWriter::new(name(), None, None, slab.clone(), &budget).unwrap();
        let mut stays = new();
        put(&mut stays, &[1]).unwrap();
        for _ in 0..15 {
            let mut goes = new();
            put(&mut goes, &[2; SMALL_BYTES]).unwrap();
        }
        let small = SMALL_BYTES as u64;
        assert!(budget.used() > 15 * small, "{}", budget.used());
        // The next segment is the set's own, too, until it is given up.
        let mut next = new();
        put(&mut next, &[3; SMALL_BYTES]).unwrap();
        drop(next);
        drop(stays);
        assert!(budget.used() >= small && budget.used() < 2 * small);
        slab.forget();
        assert_eq!(budget.used(), 0);
    }

    /// Each continuation has a mapping of its own, which stays.
    #[test]
    fn continuing_is_charged_for_every_part() {
        let budget = Budget::new(1 << 30);
        let part = || vec![0; SMALL_BYTES + 1];
        let mut base = None;
        for n in 1..=10 {
            let mut writer =
                ImageWriter::new(name(), None, base.take(), Arc::default(), &budget).unwrap();
            put(&mut writer, &part()).unwrap();
            base = Some(writer.finish(part().len() as u64).unwrap());
            assert!(budget.used() >= n * part().len() as u64);
        }
    }

    #[test]
    fn the_limit_holds() {
        let segment = FILLER_OVERHEAD_BYTES as u64;
        let budget = Budget::new(IMAGE_OVERHEAD_BYTES + segment + 100);
        let mut writer = writer(&budget, None);
        assert!(put(&mut writer, &[0; 100]).is_ok());
        assert!(matches!(
            put(&mut writer, &[0; 1]),
            Err(WriteError::Limit(_))
        ));
    }
}
