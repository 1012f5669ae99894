//! Memory that one writer fills from the front while readers look at what is filled.
//!
//! The only unsafe code of the store is in here and in [`super::region`]. The rule that makes it sound: bytes below
//! `filled` never change again and may be read by all; bytes from `filled` on belong to
//! the one [`Tail`] of the segment, which hands them out only through `&mut self`. The bytes of
//! an [`OwnedPiece`] are its own, as long as it is one: it may write to them again.
//!
//! [`vmsplice`] makes that rule last longer than any borrow: a pipe refers to the physical pages
//! of a [`Piece`] until its reader has taken them, which no reference of ours keeps track of.
//! - To unmap such memory, or to give it back with `MADV_DONTNEED`, is fine: the kernel keeps
//!   the pages for the pipe, and what is mapped there next is other pages. In an arena
//!   ([`super::arena`]) that holds for whole huge pages, and for small pages where there are no huge ones.
//! - To write to it again is not, however long ago the last `Piece` went: the reader would get
//!   the new bytes. Memory that was ever a `Piece` is therefore never reused, only given back.
//! - An [`OwnedPiece`] was never handed out as a `Piece` and cannot be spliced, and there is
//!   no way back from a `Piece` to it. So it may be reused ([`OwnedPiece::bytes_mut`]).

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::pipe::{IoSliceRaw, SpliceFlags};

use crate::store::memory::arena::{Arena, Extent, Source};
use crate::store::memory::budget::Charge;
use crate::store::memory::prefault::{Filled, Prefault};
use crate::store::memory::region::{Region, HUGE_PAGE_BYTES};

/// This process, for calls that want a pidfd (Linux 6.14).
const PIDFD_SELF: libc::c_int = -10000;

/// Memory, given back to the kernel when the last reference goes.
pub struct Segment {
    map: Region,
    filled: AtomicUsize,
    /// It has no writer any more.
    sealed: AtomicBool,
    /// Which of its first 64 huge pages were split, so that a part of them could go back.
    split: AtomicU64,
    /// In an arena: of how many pages of each huge page nothing is needed any more.
    gone: Mutex<Vec<usize>>,
    /// What it costs, where that is not charged with its pieces.
    charge: OnceLock<Mutex<Charge>>,
}

/// The right to fill a segment.
pub struct Tail {
    segment: Arc<Segment>,
    ahead: Prefault,
}

/// A filled, immutable piece of a segment.
#[derive(Clone)]
pub struct Piece {
    segment: Arc<Segment>,
    start: usize,
    len: usize,
    /// Whose memory goes back with the last piece of it ([`OwnedPiece::lend`]).
    owner: Option<Arc<OwnedPiece>>,
}

impl Tail {
    #[cfg(test)]
    pub fn new(capacity: usize, before: usize) -> io::Result<Self> {
        Self::from(&Source::Anonymous, capacity, before)
    }

    /// `before`: what of the same image or round is in other segments already.
    pub fn from(source: &Source, capacity: usize, before: usize) -> io::Result<Self> {
        let map = Region::new(source, capacity)?;
        Ok(Self::with(map, Prefault::new(before)))
    }

    /// Of reserved memory, which was never written to.
    pub fn of(ready: Region) -> Self {
        let progress = Prefault::ready(ready.len());
        Self::with(ready, progress)
    }

    fn with(map: Region, ahead: Prefault) -> Self {
        Self {
            segment: Arc::new(Segment::new(map, 0)),
            ahead,
        }
    }

    /// From now on the segment is charged for as long as anything of it is there. Its memory goes
    /// back as a whole, with the last piece: a piece that went before has given nothing back.
    pub fn hold(&mut self, charge: Charge) {
        let mut charge = Some(charge);
        let held = self
            .segment
            .charge
            .get_or_init(|| Mutex::new(charge.take().unwrap_or_else(|| unreachable!())));
        if let Some(more) = charge {
            let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
            held.absorb(more);
        }
    }

    fn filled(&self) -> usize {
        // Only this Tail stores to it.
        self.segment.filled.load(Ordering::Relaxed)
    }

    /// The rest of the segment.
    pub fn spare(&mut self) -> &mut [u8] {
        let filled = self.filled();
        let len = self.segment.map.len() - filled;
        // SAFETY: [filled, len) lies inside the mapping, is initialised (new memory is
        // zero) and belongs to this Tail alone: Pieces end at or below `filled`, there is one
        // Tail for a segment, and the borrow of `self` keeps `advance` away meanwhile.
        unsafe { std::slice::from_raw_parts_mut(self.segment.map.as_mut_ptr().add(filled), len) }
    }

    /// Declares the next `n` bytes filled, and gives them.
    pub fn advance(&mut self, n: usize) -> Piece {
        let start = self.filled();
        assert!(
            n <= self.segment.map.len() - start,
            "advance past the end of a segment"
        );
        // Release: a reader that sees the new value sees the bytes.
        self.segment.filled.store(start + n, Ordering::Release);
        self.ahead.advanced(&self.segment, start + n);
        Piece {
            segment: self.segment.clone(),
            start,
            len: n,
            owner: None,
        }
    }
}

impl Drop for Tail {
    /// What was made ready and is not needed goes back.
    fn drop(&mut self) {
        self.segment.sealed.store(true, Ordering::Relaxed);
        let used = self.filled().next_multiple_of(rustix::param::page_size());
        // The writer's own faults may have brought the rest of a huge page.
        let ready = match self.segment.map.len() >= HUGE_PAGE_BYTES {
            true => self
                .ahead
                .upto()
                .max(used.next_multiple_of(HUGE_PAGE_BYTES)),
            false => used,
        };
        let ready = ready.min(self.segment.map.len());
        if ready > used {
            self.segment.give_back(used, ready - used, Seen::Never);
        }
        self.segment
            .note_gone(ready, self.segment.map.len() - ready);
    }
}

impl Filled for Segment {
    fn capacity(&self) -> usize {
        self.map.len()
    }

    fn filled(&self) -> usize {
        self.filled.load(Ordering::Relaxed)
    }

    fn has_writer(&self) -> bool {
        !self.sealed.load(Ordering::Relaxed)
    }

    /// Changes no content.
    fn populate(&self, start: usize, len: usize) {
        let _ = self.map.populate(start, len); // else the writer faults its pages itself
    }
}

/// Whether memory that goes back was ever a [`Piece`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Never,
    /// A pipe may refer to it.
    Maybe,
}

impl Segment {
    fn new(map: Region, filled: usize) -> Self {
        Self {
            map,
            filled: AtomicUsize::new(filled),
            sealed: AtomicBool::new(filled > 0),
            split: AtomicU64::new(0),
            gone: Mutex::default(),
            charge: OnceLock::new(),
        }
    }

    /// Whether this range has a part of a huge page of which no part went back before.
    fn splits(&self, start: usize, len: usize) -> bool {
        let huge = HUGE_PAGE_BYTES;
        let borders = [start, start + len].into_iter();
        let parts = borders.filter(|border| self.map.len() >= huge && border % huge != 0);
        parts.fold(false, |splits, border| {
            let bit = 1u64.checked_shl(u32::try_from(border / huge).unwrap_or(u32::MAX));
            let known = bit.map(|bit| self.split.fetch_or(bit, Ordering::Relaxed) & bit != 0);
            splits | !known.unwrap_or(false)
        })
    }

    /// Makes sure that memory of this range goes back when it is unmapped.
    ///
    /// A huge page of which a part is unmapped stays whole until memory is short. MADV_FREE of a
    /// part splits it (Linux `madvise_free_huge_pmd`): measured on 6.18. Without huge pages it
    /// changes nothing. A hole in an arena splits it by itself.
    fn split_parts(&self, start: usize, len: usize) {
        if self.map.extent().is_none() && self.splits(start, len) {
            // SAFETY: as for `forget`.
            unsafe { self.map.split(start, len) };
        }
    }

    /// Gives whole pages back to the kernel.
    fn give_back(&self, start: usize, len: usize, seen: Seen) {
        self.split_parts(start, len);
        let in_arena = self.map.extent().is_some();
        let has_huge_pages = self.map.len() >= HUGE_PAGE_BYTES;
        if !(in_arena && has_huge_pages && seen == Seen::Maybe) {
            self.forget(start, len);
        }
        self.note_gone(start, len);
    }

    /// Nothing of these pages is needed any more. In an arena huge pages go back as soon as that is so of all of one: a part
    /// that a pipe may refer to must not go by itself.
    fn note_gone(&self, start: usize, len: usize) {
        let whole = self.map.len();
        if self.map.extent().is_none() || whole < HUGE_PAGE_BYTES || len == 0 {
            return;
        }
        let page = rustix::param::page_size();
        let end = (start + len).next_multiple_of(page);
        let mut gone = self.gone.lock().unwrap_or_else(PoisonError::into_inner);
        gone.resize(whole.div_ceil(HUGE_PAGE_BYTES), 0);
        let blocks = start / HUGE_PAGE_BYTES..end.div_ceil(HUGE_PAGE_BYTES);
        for block in blocks {
            let from = block * HUGE_PAGE_BYTES;
            let upto = (from + HUGE_PAGE_BYTES).min(whole);
            let part = upto.next_multiple_of(page).min(end) - from.max(start);
            let Some(count) = gone.get_mut(block) else {
                continue;
            };
            *count += part / page;
            if *count == (upto - from).div_ceil(page) {
                self.forget(from, upto - from);
            }
        }
    }

    /// For ranges whose content is not wanted any more.
    fn forget(&self, start: usize, len: usize) {
        // SAFETY: the callers: a Tail that is going, for what is behind `filled`, which no
        // Piece covers and no writer will fill; an OwnedPiece that is going, for its own range,
        // which is below `filled`, so that no Tail writes there, and is reached through it
        // alone; or a huge page, all of which has gone in one of these ways. Ranges that are not whole
        // pages are rounded outwards, so they must be: `Round`
        // lets no pagemap begin within a page, and what it cuts is whole pages; the last page of
        // a round that is given up has nothing behind it but its own tail.
        unsafe { self.map.give_back(start, len) };
    }
}

impl Piece {
    /// Joins a piece that directly follows in the same segment.
    pub fn try_join(&mut self, next: &Piece) -> bool {
        let owner = |piece: &Piece| piece.owner.as_ref().map(Arc::as_ptr);
        let follows = Arc::ptr_eq(&self.segment, &next.segment)
            && self.start + self.len == next.start
            && owner(self) == owner(next);
        if follows {
            self.len += next.len;
        }
        follows
    }

    /// Where it is in an arena; `None`: it is in none.
    pub fn place(&self) -> Option<Place> {
        Some(Place {
            region: self.segment.map.extent()?,
            start: self.start as u64,
            len: self.len as u64,
            held: self.is_held(),
        })
    }

    /// Whether its segment is charged itself ([`Tail::hold`]).
    pub fn is_held(&self) -> bool {
        self.segment.charge.get().is_some()
    }

    /// At most the first `n` bytes.
    pub fn truncate(&mut self, n: usize) {
        self.len = self.len.min(n);
    }

    /// All but the first `n` bytes.
    pub fn skip(&self, n: usize) -> Piece {
        let n = n.min(self.len);
        Piece {
            segment: self.segment.clone(),
            start: self.start + n,
            len: self.len - n,
            owner: self.owner.clone(),
        }
    }
}

/// Puts into `pipe`, by reference, as much of the front of `pieces` as it has room for; gives
/// the number of bytes, or `WouldBlock` if there is no room.
///
/// A call is one change of the pipe, and wakes its reader once: what it took can be read by one
/// `read`. Room is counted in pages, also in begun ones.
pub fn vmsplice(pipe: impl AsFd, pieces: &[Piece]) -> io::Result<usize> {
    let slices: Vec<_> = pieces.iter().map(|p| IoSliceRaw::from_slice(p)).collect();
    // SAFETY: the slices are readable memory for the length of the call. After it the pipe holds
    // references to the pages, not to the mapping, and the kernel only reads through them: we do
    // not gift them. Their bytes stay what they are by the rule at the top of this file.
    Ok(unsafe { rustix::pipe::vmsplice(pipe, &slices, SpliceFlags::NONBLOCK) }?)
}

/// Where a piece is in an arena: enough to find it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Of its segment.
    pub region: Extent,
    /// In the region.
    pub start: u64,
    pub len: u64,
    pub held: bool,
}

/// A segment that an earlier process has filled.
pub struct Refound(Arc<Segment>);

impl Refound {
    /// Nothing writes there any more. `charge`: see [`Tail::hold`].
    pub fn new(arena: &Arc<Arena>, region: Extent, charge: Option<Charge>) -> io::Result<Self> {
        let map = Region::again(arena, region)?;
        let filled = map.len();
        let segment = Segment::new(map, filled);
        if let Some(charge) = charge {
            let _ = segment.charge.set(Mutex::new(charge)); // it is new
        }
        Ok(Self(Arc::new(segment)))
    }

    /// It is charged for so many bytes more, if for any.
    pub fn charge(&self, bytes: u64) {
        if let Some(charge) = self.0.charge.get() {
            let mut charge = charge.lock().unwrap_or_else(PoisonError::into_inner);
            charge.exceed(bytes);
        }
    }

    /// `None`: it is not in there.
    pub fn piece(&self, start: u64, len: u64) -> Option<Piece> {
        let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
        let end = start.checked_add(len)?;
        (end <= self.0.map.len()).then(|| Piece {
            segment: self.0.clone(),
            start,
            len,
            owner: None,
        })
    }

    /// No piece is in these huge pages, of which the region has whole ones.
    pub fn give_back_unused(&self, used: &mut [(u64, u64)]) {
        used.sort_unstable();
        let huge = HUGE_PAGE_BYTES as u64;
        let mut at = 0;
        let whole = self.0.map.len() as u64;
        for &(start, len) in used.iter().chain([&(whole, 0)]) {
            let to = if start == whole {
                whole
            } else {
                start / huge * huge
            };
            let from = at;
            if to > from && whole >= huge {
                // Both are within the region.
                if let (Ok(from), Ok(len)) = (usize::try_from(from), usize::try_from(to - from)) {
                    self.0.forget(from, len);
                }
            }
            at = at.max(start.saturating_add(len).next_multiple_of(huge));
        }
    }
}

/// A filled piece with one owner: its memory goes back when it is dropped, while the
/// rest of the segment stays.
pub struct OwnedPiece(Piece, Seen);

/// Takes the piece out of its owner, whose memory thereby does not go back.
fn disown(owned: OwnedPiece) -> Piece {
    let piece = owned.0.clone();
    let mut owned = owned;
    owned.0.len = 0; // an empty piece gives nothing back
    piece
}

impl OwnedPiece {
    /// Cuts off what is behind the first `n` bytes.
    pub fn split_off(&mut self, n: usize) -> OwnedPiece {
        let rest = self.0.skip(n);
        self.0.len = n.min(self.0.len);
        OwnedPiece(rest, self.1)
    }

    /// Joins a piece that directly follows; gives it back if it does not.
    pub fn join(&mut self, next: OwnedPiece) -> Result<(), OwnedPiece> {
        match self.0.try_join(&next.0) {
            true => {
                disown(next); // it is part of this one now
                Ok(())
            }
            false => Err(next),
        }
    }

    /// To be written to again: its owner alone has ever had it, as [`Self::share`] and
    /// [`Self::lend`] take the owner along.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let Piece {
            segment,
            start,
            len,
            ..
        } = &self.0;
        // SAFETY: its bytes are reached through this OwnedPiece alone (see its Drop), which is
        // borrowed here; no pipe refers to them, because only a Piece can be spliced; and they
        // are below `filled`, so no Tail writes there. They are initialised and mapped.
        unsafe { std::slice::from_raw_parts_mut(segment.map.as_mut_ptr().add(*start), *len) }
    }

    /// The first border of huge pages that is `n` bytes or more behind its start, or its end: to
    /// cut there splits no huge page.
    pub fn huge_border(&self, n: usize) -> usize {
        let border = (self.0.start + n.min(self.0.len)).next_multiple_of(HUGE_PAGE_BYTES);
        (border - self.0.start).min(self.0.len)
    }

    /// From now on it may have any number of readers, and it stays until the segment goes.
    pub fn share(self) -> Piece {
        disown(self)
    }

    /// From now on it may have any number of readers; its memory goes back with the last piece of it.
    pub fn lend(self) -> Piece {
        let mut owned = self;
        owned.1 = Seen::Maybe;
        let piece = owned.0.clone();
        Piece {
            owner: Some(Arc::new(owned)),
            ..piece
        }
    }
}

/// Drops many pieces at once: their memory goes back with one system call, and one flush of
/// the other cores' address caches, for a thousand of them.
pub fn give_back_all(pieces: Vec<OwnedPiece>) {
    const BATCH: usize = 1024;
    let mut pieces = pieces;
    for batch in pieces.chunks_mut(BATCH) {
        let mut ranges = Vec::with_capacity(batch.len());
        for OwnedPiece(piece, _) in batch.iter() {
            // What is in an arena goes by itself.
            if piece.len > 0 && piece.segment.map.extent().is_none() {
                piece.segment.split_parts(piece.start, piece.len);
                // In the mapping: a piece is below its segment's end.
                let start = piece.segment.map.as_mut_ptr().wrapping_add(piece.start);
                ranges.push(libc::iovec {
                    iov_base: start.cast(),
                    iov_len: piece.len,
                });
            }
        }
        if ranges.is_empty() {
            continue;
        }
        // SAFETY: as for `Segment::forget`: each range is that of an OwnedPiece that is going,
        // and its segment is mapped as long as the piece is there.
        let n = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                PIDFD_SELF,
                ranges.as_ptr(),
                ranges.len(),
                libc::MADV_DONTNEED,
                0,
            )
        };
        let bytes: usize = ranges.iter().map(|range| range.iov_len).sum();
        if usize::try_from(n) == Ok(bytes) {
            for piece in batch {
                if piece.0.segment.map.extent().is_none() {
                    piece.0.len = 0; // an empty piece gives nothing back
                }
            }
        }
        // Linux before 6.14 refuses, and each piece goes by itself when it is dropped.
    }
}

impl std::ops::Deref for OwnedPiece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for OwnedPiece {
    fn drop(&mut self) {
        if self.0.len == 0 || Arc::strong_count(&self.0.segment) == 1 {
            return; // the whole segment goes now
        }
        // The bytes of an OwnedPiece are reached through it alone (`advance_owned` and
        // `split_off` hand out disjoint pieces, `share` and `join` empty the OwnedPiece, and the
        // pieces of a lent one keep it alive), and it is going.
        let Self(piece, seen) = self;
        piece.segment.give_back(piece.start, piece.len, *seen);
    }
}

impl Tail {
    /// The same as [`Self::advance`], for memory that goes back piece by piece. All pieces of
    /// such a segment must be whole pages.
    pub fn advance_owned(&mut self, n: usize) -> OwnedPiece {
        OwnedPiece(self.advance(n), Seen::Never)
    }
}

impl std::ops::Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        debug_assert!(self.start + self.len <= self.segment.filled.load(Ordering::Acquire));
        // SAFETY: a Piece is made by `advance` and covers only bytes below `filled`, which no
        // Tail hands out again, so they are initialised and never written while the Arc lives.
        // The Piece reached this thread through a lock or channel after `advance` returned.
        unsafe {
            std::slice::from_raw_parts(self.segment.map.as_mut_ptr().add(self.start), self.len)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_bytes_while_the_tail_goes_on() {
        let mut tail = Tail::new(3 << 20, 0).unwrap();
        let mut pieces = Vec::new();
        for i in 0..200u8 {
            tail.spare()[..100].fill(i);
            pieces.push(tail.advance(100));
        }
        drop(tail);
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.len() == 100 && piece.iter().all(|&b| usize::from(b) == i));
        }
    }

    #[test]
    fn joining_and_skipping() {
        let mut tail = Tail::new(4096, 0).unwrap();
        tail.spare()[..10].copy_from_slice(b"0123456789");
        let mut a = tail.advance(4);
        let b = tail.advance(6);
        assert!(!b.clone().try_join(&a));
        assert!(a.try_join(&b));
        assert_eq!(&*a, b"0123456789");
        assert_eq!(&*a.skip(7), b"789");
        assert_eq!(&*a.skip(11), b"");
    }

    /// `--mlock`: MADV_DONTNEED refuses locked memory.
    #[test]
    fn locked_memory_goes_back_as_well() {
        let page = rustix::param::page_size();
        let mut tail = Tail::new(4 * page, 0).unwrap();
        tail.spare().fill(7);
        let mut first = tail.advance_owned(page);
        let rest = tail.advance_owned(3 * page);
        let start = tail.segment.map.as_mut_ptr().cast();
        // SAFETY: a range of a mapping that is there; locking changes no content.
        unsafe { rustix::mm::mlock(start, 4 * page) }.unwrap();
        let all = Piece {
            segment: tail.segment.clone(),
            start: 0,
            len: 4 * page,
            owner: None,
        };
        let empty = first.split_off(page);
        give_back_all(vec![first, empty]);
        // Only a test may look: what was given back reads as zeros.
        assert!(all[..page].iter().all(|&b| b == 0));
        assert!(all[page..].iter().all(|&b| b == 7));
        drop(rest);
        assert!(all.iter().all(|&b| b == 0));
    }

    #[test]
    fn an_owned_piece_gives_its_memory_back() {
        let mut tail = Tail::new(64 << 10, 0).unwrap();
        tail.spare()[..32 << 10].fill(7);
        let mut first = tail.advance_owned(32 << 10);
        let mut middle = first.split_off(8 << 10);
        let last = middle.split_off(16 << 10);
        let probe = middle.0.clone();
        drop(middle);
        // Only a test may look: what was given back reads as zeros.
        assert!(probe.iter().all(|&b| b == 0));
        assert!(first.iter().chain(last.iter()).all(|&b| b == 7));
        assert!(first.join(last).is_err(), "they do not touch any more");
        let shared = first.share();
        assert!(shared.len() == 8 << 10 && shared.iter().all(|&b| b == 7));
    }

    #[test]
    fn an_owned_piece_is_written_to_again_alone() {
        let mut tail = Tail::new(4 << 20, 0).unwrap();
        tail.spare()[..3 << 20].fill(7);
        let before = tail.advance_owned(1 << 20);
        let mut piece = tail.advance_owned(1 << 20);
        let after = tail.advance(1 << 20);
        let rest = piece.split_off(8 << 10);
        piece.bytes_mut().fill(9);
        tail.spare().fill(5);
        assert!(piece.len() == 8 << 10 && piece.iter().all(|&b| b == 9));
        for other in [&*before, &*rest, &*after] {
            assert!(other.iter().all(|&b| b == 7));
        }
        // `rest` begins 1 MiB and 8 KiB into the segment, and ends at 2 MiB.
        assert_eq!(before.huge_border(0), 0);
        assert_eq!(before.huge_border(1), 1 << 20);
        assert_eq!(rest.huge_border(1), rest.len());
    }

    #[test]
    fn a_lent_piece_gives_its_memory_back_with_the_last_of_it() {
        let mut tail = Tail::new(64 << 10, 0).unwrap();
        tail.spare()[..32 << 10].fill(7);
        let mut first = tail.advance_owned(16 << 10);
        let rest = tail.advance_owned(16 << 10);
        let kept = rest.share();
        let probe = first.0.clone();
        let second = first.split_off(8 << 10).lend();
        let mut first = first.lend();
        assert!(!first.try_join(&second), "each goes by itself");
        let part = first.skip(5 << 10);
        drop(first);
        assert!(probe.iter().all(|&b| b == 7));
        drop(part);
        // Only a test may look: what was given back reads as zeros.
        assert!(probe[..8 << 10].iter().all(|&b| b == 0));
        assert!(second.iter().chain(kept.iter()).all(|&b| b == 7));
    }

    /// What is in a pipe outlives the memory that it came from.
    #[test]
    fn a_pipe_keeps_the_bytes_of_pieces_that_are_gone() {
        use std::io::Read;
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut tail = Tail::new(64 << 10, 0).unwrap();
        let mut expected = Vec::new();
        let mut pieces = Vec::new();
        for (i, n) in (1u8..).zip([100, 5000, 4096, 1, 8192]) {
            tail.spare()[..n].fill(i);
            expected.extend(vec![i; n]);
            pieces.push(tail.advance(n));
        }
        assert_eq!(vmsplice(&writer, &pieces).unwrap(), expected.len());
        tail.spare().fill(0xff);
        drop((tail, pieces, writer));
        let mut got = Vec::new();
        std::fs::File::from(reader).read_to_end(&mut got).unwrap();
        assert!(got == expected);
    }

    /// A file of memory with huge pages, where this kernel makes one.
    fn arena() -> Arc<Arena> {
        Arena::new(Arena::memfd().unwrap()).unwrap()
    }

    #[test]
    fn what_goes_out_of_an_arena_is_not_there_any_more() {
        let arena = arena();
        let source = Source::Arena(arena.clone());
        let fill = |len: usize| {
            let mut tail = Tail::from(&source, len, 0).unwrap();
            tail.spare().fill(7);
            tail.advance(len)
        };
        let (small, large) = (fill(5000), fill(5 << 20));
        let resident = arena.resident();
        assert!(
            (8192 + (5 << 20)..12 << 20).contains(&resident),
            "{resident}"
        );
        drop(small);
        assert!(arena.resident() <= resident - 8192);
        drop(large);
        assert_eq!(arena.resident(), 0);
    }

    /// Memory that was never handed out goes at once, and what was, by huge pages.
    #[test]
    fn what_a_pipe_may_have_goes_by_huge_pages() {
        let arena = arena();
        let mut tail = Tail::from(&Source::Arena(arena.clone()), 8 << 20, 0).unwrap();
        tail.spare()[..7 << 20].fill(7);
        let mut first = tail.advance_owned(5 << 20);
        let rest = tail.advance_owned(2 << 20);
        drop(tail);
        assert_eq!(arena.resident(), 7 << 20);
        let own = first.split_off(4 << 20);
        drop(own);
        assert_eq!(arena.resident(), 6 << 20);
        let middle = first.split_off(1 << 20);
        let (first, middle, rest) = (first.lend(), middle.lend(), rest.lend());
        drop(middle);
        assert_eq!(arena.resident(), 4 << 20, "the second huge page alone");
        drop(first);
        assert_eq!(arena.resident(), 2 << 20);
        drop(rest);
        assert_eq!(arena.resident(), 0);
    }

    /// The kernel writes zeros into a part of a huge page before it takes that out of the file.
    #[test]
    fn a_pipe_keeps_the_bytes_of_a_part_of_a_huge_page() {
        use std::io::Read;
        let arena = arena();
        let mut tail = Tail::from(&Source::Arena(arena.clone()), 4 << 20, 0).unwrap();
        tail.spare().fill(7);
        let mut first = tail.advance_owned(16 << 10);
        let rest = tail.advance_owned((4 << 20) - (16 << 10));
        let second = first.split_off(8 << 10);
        let lent = first.lend();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert_eq!(
            vmsplice(&writer, std::slice::from_ref(&lent)).unwrap(),
            8 << 10
        );
        drop(lent);
        drop((second, rest, tail, writer));
        assert_eq!(arena.resident(), 0);
        let mut got = Vec::new();
        std::fs::File::from(reader).read_to_end(&mut got).unwrap();
        assert!(got == vec![7; 8 << 10]);
    }

    #[test]
    fn a_segment_is_found_again() {
        let arena = arena();
        let mut tail = Tail::from(&Source::Arena(arena.clone()), 16 << 20, 0).unwrap();
        tail.spare()[..5 << 20].fill(3);
        let first = tail.advance(5 << 20);
        tail.spare()[..100].fill(4);
        let second = tail.advance(100);
        let places = [first.place().unwrap(), second.place().unwrap()];
        assert!(places[0].region == places[1].region && !places[0].held);
        let file = crate::store::memory::arena::again(&arena);
        // As a process that is killed leaves it.
        std::mem::forget((first, second, tail));
        let later = Arena::from(file, 16 << 20).unwrap();
        let found = Refound::new(&later, places[0].region, None).unwrap();
        let piece = |place: &Place| found.piece(place.start, place.len).unwrap();
        let (first, second) = (piece(&places[0]), piece(&places[1]));
        assert!(first.iter().all(|&b| b == 3) && *second == [4; 100]);
        assert!(found.piece(16 << 20, 1).is_none() && found.piece(u64::MAX, 2).is_none());
        found.give_back_unused(&mut [(5 << 20, 100), (4 << 20, 10)]);
        assert!(later.resident() < 3 << 20);
        assert!(*second == [4; 100]);
        drop(first);
        drop((second, found));
        assert_eq!(later.resident(), 0);
        let next = later.take(1).unwrap().offset;
        assert!(next >= 16 << 20, "{next}");
    }

    #[test]
    fn a_full_pipe_takes_no_more_and_one_without_a_reader_nothing() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut tail = Tail::new(1 << 20, 0).unwrap();
        tail.spare().fill(3);
        let piece = tail.advance(1 << 20);
        let n = vmsplice(&writer, std::slice::from_ref(&piece)).unwrap();
        assert!(n > 0 && n < 1 << 20, "{n}");
        let full = vmsplice(&writer, &[piece.skip(n)]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        drop(reader);
        let broken = vmsplice(&writer, &[piece]).unwrap_err();
        assert_eq!(broken.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn a_tail_cannot_run_over() {
        let mut tail = Tail::new(4096, 0).unwrap();
        tail.advance(4097);
    }
}
