//! Memory that one writer fills from the front while readers look at what is filled.
//!
//! The only unsafe code of the store is in here. The rule that makes it sound: bytes below
//! `filled` never change again and may be read by anybody; bytes from `filled` on belong to
//! the one [`Tail`] of the segment, which hands them out only through `&mut self`.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};

/// Segments of at least this size ask for huge pages: 512 times fewer page faults while an
/// image arrives. Below it, the part of a huge page that stays unused would cost too much.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Anonymous memory, given back to the kernel when the last reference goes.
///
/// Pages never written are never resident, so a segment may be larger than what it will hold.
pub struct Segment {
    map: MmapRaw,
    filled: AtomicUsize,
}

/// The right to fill a segment.
pub struct Tail {
    segment: Arc<Segment>,
}

/// A filled, immutable piece of a segment.
#[derive(Clone)]
pub struct Piece {
    segment: Arc<Segment>,
    start: usize,
    len: usize,
}

impl Tail {
    pub fn new(capacity: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(capacity).map_anon()?;
        if capacity >= HUGE_PAGE_BYTES {
            // Without huge pages it is slower, and that is all.
            let _ = map.advise(Advice::HugePage);
        }
        // What processes had in their memory must not end in a core file of ours.
        let _ = map.advise(Advice::DontDump);
        let segment = Segment {
            map: map.into(),
            filled: AtomicUsize::new(0),
        };
        Ok(Self {
            segment: Arc::new(segment),
        })
    }

    fn filled(&self) -> usize {
        // Only this Tail stores to it.
        self.segment.filled.load(Ordering::Relaxed)
    }

    /// The rest of the segment.
    pub fn spare(&mut self) -> &mut [u8] {
        let filled = self.filled();
        let len = self.segment.map.len() - filled;
        // SAFETY: [filled, len) lies inside the mapping, is initialised (anonymous memory is
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
        Piece {
            segment: self.segment.clone(),
            start,
            len: n,
        }
    }
}

impl Piece {
    /// Joins a piece that directly follows in the same segment.
    pub fn try_join(&mut self, next: &Piece) -> bool {
        let follows =
            Arc::ptr_eq(&self.segment, &next.segment) && self.start + self.len == next.start;
        if follows {
            self.len += next.len;
        }
        follows
    }

    /// All but the first `n` bytes.
    pub fn skip(&self, n: usize) -> Piece {
        let n = n.min(self.len);
        Piece {
            segment: self.segment.clone(),
            start: self.start + n,
            len: self.len - n,
        }
    }
}

impl std::ops::Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        debug_assert!(self.start + self.len <= self.segment.filled.load(Ordering::Acquire));
        // SAFETY: a Piece is made by `advance` and covers only bytes below `filled`, which no
        // Tail hands out again, so they are initialised and never written while the Arc lives.
        // The Piece reached this thread through a lock or channel after `advance` returned.
        unsafe { std::slice::from_raw_parts(self.segment.map.as_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_their_bytes_while_the_tail_goes_on() {
        let mut tail = Tail::new(3 << 20).unwrap();
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
        let mut tail = Tail::new(4096).unwrap();
        tail.spare()[..10].copy_from_slice(b"0123456789");
        let mut a = tail.advance(4);
        let b = tail.advance(6);
        assert!(!b.clone().try_join(&a));
        assert!(a.try_join(&b));
        assert_eq!(&*a, b"0123456789");
        assert_eq!(&*a.skip(7), b"789");
        assert_eq!(&*a.skip(11), b"");
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn a_tail_cannot_run_over() {
        let mut tail = Tail::new(4096).unwrap();
        tail.advance(4097);
    }
}
