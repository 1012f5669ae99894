//! Memory of pages that a round has superseded, for the next round of the same series to be
//! received into.
//!
//! To give single pages back means to take huge pages apart, and new memory means to zero it:
//! for a round of single pages that is as much work as to receive it. What a process had in its
//! memory thereby stays within its own series: a pool belongs to one [`super::PageStore`], and
//! only memory that was never handed out is in it ([`OwnedPiece`]).

use std::sync::Arc;
use std::time::Duration;

use image_common::criu::requests::LONG_BYTES;

use crate::store::memory::budget::{Budget, Charge};
use crate::store::memory::segment::{give_back_all, OwnedPiece};

/// Pools keep at most this part of the pages that there are, so that both together stay below
/// 1.1 times these.
pub const PART: u64 = 16;

/// By then a commit has been answered.
const LATER: Duration = Duration::from_millis(500);

pub struct Pool {
    /// From [`LONG_BYTES`] on.
    long: Vec<OwnedPiece>,
    short: Vec<OwnedPiece>,
    /// For all its bytes.
    charge: Charge,
}

impl Pool {
    pub fn empty(budget: &Arc<Budget>) -> Self {
        Self {
            long: Vec::new(),
            short: Vec::new(),
            charge: budget.nothing(),
        }
    }

    /// Leaves nothing behind.
    pub fn take(&mut self) -> Self {
        Self {
            long: std::mem::take(&mut self.long),
            short: std::mem::take(&mut self.short),
            charge: self.charge.split(u64::MAX),
        }
    }

    /// Whole pages, for an entry that is received straight to where it stays and wants memory in
    /// one piece ([`LONG_BYTES`]), or for a shorter one.
    pub fn piece(&mut self, long: bool) -> Option<OwnedPiece> {
        match long {
            true => self.long.pop(),
            false => self.short.pop().or_else(|| self.long.pop()),
        }
    }

    /// It has pieces, and none for a long entry.
    pub fn is_short(&self) -> bool {
        self.long.is_empty() && !self.short.is_empty()
    }

    /// Takes back what is left of [`Self::piece`], which is charged still.
    pub fn put_back(&mut self, piece: OwnedPiece) {
        match piece.len() as u64 {
            0 => {}
            LONG_BYTES.. => self.long.push(piece),
            _ => self.short.push(piece),
        }
    }

    /// So many bytes of its pieces were taken out.
    pub fn taken(&mut self, bytes: usize) -> Charge {
        self.charge.split(bytes as u64)
    }

    /// Takes over pieces with their charge.
    pub fn add(&mut self, pieces: impl IntoIterator<Item = OwnedPiece>, charge: Charge) {
        self.charge.absorb(charge);
        for piece in pieces {
            self.put_back(piece);
        }
    }

    pub fn absorb(&mut self, mut other: Pool) {
        self.long.append(&mut other.long);
        self.short.append(&mut other.short);
        self.charge.absorb(other.charge.split(u64::MAX));
    }

    /// Takes out what it has above `keep` bytes (whole pages), and its charge. Long pieces first:
    /// to give them back is cheap. Then those that lie together, so that few huge pages are split.
    pub fn excess(&mut self, keep: u64) -> Vec<OwnedPiece> {
        let too_much = self.charge.bytes().saturating_sub(keep);
        // All of it is memory of this process.
        let mut left = usize::try_from(too_much).unwrap_or(usize::MAX);
        let mut out = Vec::new();
        for pieces in [&mut self.long, &mut self.short] {
            let mut whole = 0;
            for piece in pieces.iter_mut() {
                if left == 0 {
                    break;
                }
                let cut = piece.huge_border(left);
                if cut < piece.len() {
                    let rest = piece.split_off(cut);
                    out.push(std::mem::replace(piece, rest));
                    left = 0;
                    break;
                }
                left = left.saturating_sub(piece.len());
                whole += 1;
            }
            out.extend(pieces.drain(..whole));
        }
        let given = out.iter().map(|piece| piece.len() as u64).sum();
        drop(self.charge.split(given));
        out
    }
}

impl Pool {
    /// Gives all back a little later, on a thread of its own: now the source waits for its
    /// commit, with its process frozen.
    pub fn give_back_later(self) {
        if self.charge.bytes() > 0 {
            let thread = std::thread::Builder::new().name("give-back".to_owned());
            // Without a thread it is done here and now.
            let _ = thread.spawn(move || {
                // The thread is for this alone, so nothing waits for it.
                #[allow(clippy::disallowed_methods)]
                std::thread::sleep(LATER);
                drop(self);
            });
        }
    }
}

#[cfg(test)]
impl Pool {
    pub fn pieces(&self) -> impl Iterator<Item = &OwnedPiece> {
        self.long.iter().chain(&self.short)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut all = std::mem::take(&mut self.long);
        all.append(&mut self.short);
        give_back_all(all);
    }
}
