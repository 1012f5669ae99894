//! The address space of the process that is dumped in rounds, and which of its pages a round finds
//! dirty.

use crate::memory::PAGE;

const BASE: u64 = 0x7f00_0000_0000;
/// Longest run: what fits into one of CRIU's page pipes of 1 MiB.
const LONGEST: usize = 256;

/// A mapped range. Its pages are those from `first` on in the bench's memory.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub vaddr: u64,
    pub first: usize,
    pub pages: usize,
}

/// A pagemap entry of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub vaddr: u64,
    pub pages: usize,
    /// number of its first page in the bench's memory; `None`: a hole, the parent has it
    pub memory: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Dirty {
    All,
    /// so many percent, in runs of 1 to 256 pages
    Runs(usize),
    /// so many percent, page by page all over the place
    Scattered(usize),
}

pub struct Space {
    pub regions: Vec<Region>,
    pub pages: usize,
}

impl Space {
    /// `pages` in regions of 1 to 256 pages with gaps between them.
    pub fn new(pages: usize) -> Self {
        let mut random = Random(0x5851_f42d_4c95_7f2d);
        let mut regions = Vec::new();
        let (mut vaddr, mut first) = (BASE, 0);
        while first < pages {
            let len = random.run().min(pages - first);
            regions.push(Region {
                vaddr,
                first,
                pages: len,
            });
            first += len;
            vaddr += ((len + 1 + random.below(8)) * PAGE) as u64;
        }
        Self { regions, pages }
    }

    /// Which pages are dirty. Another `seed` gives other ones.
    pub fn dirty(&self, what: Dirty, seed: u64) -> Vec<bool> {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut dirty = vec![what == Dirty::All; self.pages];
        match what {
            Dirty::All => (),
            Dirty::Scattered(percent) => {
                // One page out of each stretch, so that few touch.
                let stretch = 100 / percent;
                for start in (0..self.pages).step_by(stretch) {
                    let at = start + random.below(stretch);
                    dirty[at.min(self.pages - 1)] = true;
                }
            }
            Dirty::Runs(percent) => {
                let mut left = self.pages * percent / 100;
                while left > 0 {
                    let len = random.run().min(left);
                    let start = random.below(self.pages - len);
                    // What overlaps an earlier run makes the round a little smaller.
                    dirty[start..start + len].fill(true);
                    left -= len;
                }
            }
        }
        dirty
    }

    /// The entries of a round in the order of their addresses: dirty pages, and holes for the
    /// others, each as long as its region allows.
    pub fn entries(&self, dirty: &[bool]) -> Vec<Entry> {
        let mut entries = Vec::new();
        for region in &self.regions {
            let of_region = &dirty[region.first..region.first + region.pages];
            let mut at = 0;
            for run in of_region.chunk_by(|a, b| a == b) {
                entries.push(Entry {
                    vaddr: region.vaddr + (at * PAGE) as u64,
                    pages: run.len(),
                    memory: run[0].then_some(region.first + at),
                });
                at += run.len();
            }
        }
        entries
    }
}

/// xorshift64: the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // Less than `n`, which is one.
        #[allow(clippy::cast_possible_truncation)]
        let below = (self.0 % n as u64) as usize;
        below
    }

    /// A length: each power of two up to the longest is as likely, and what lies between too.
    fn run(&mut self) -> usize {
        let power = 1 << self.below(9);
        (power + self.below(power)).min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_cover_the_regions_and_carry_what_is_dirty() {
        let space = Space::new(10_000);
        assert!(space.regions.iter().all(|r| r.pages <= LONGEST));
        assert!(space
            .regions
            .windows(2)
            .all(|w| w[0].vaddr + (w[0].pages * PAGE) as u64 <= w[1].vaddr - PAGE as u64));
        for what in [Dirty::All, Dirty::Runs(1), Dirty::Scattered(10)] {
            let dirty = space.dirty(what, 7);
            let entries = space.entries(&dirty);
            let pages = |of: &dyn Fn(&&Entry) -> bool| {
                entries.iter().filter(of).map(|e| e.pages).sum::<usize>()
            };
            assert_eq!(pages(&|_| true), 10_000);
            let sent = pages(&|e| e.memory.is_some());
            assert_eq!(sent, dirty.iter().filter(|d| **d).count());
            match what {
                Dirty::All => assert_eq!((sent, entries.len()), (10_000, space.regions.len())),
                Dirty::Runs(_) => assert!((50..=100).contains(&sent)),
                Dirty::Scattered(_) => assert_eq!(sent, 1000),
            }
        }
        assert!(space.dirty(Dirty::Scattered(1), 1) != space.dirty(Dirty::Scattered(1), 2));
    }
}
