//! The page store: what a session's page-server rounds have brought, the newest copy of every
//! page, and made of it one flat set to restore from.
//!
//! A round (one connection of a pre-dump or dump) is collected aside ([`Round`]) and becomes
//! visible as a whole ([`PageStore::merge`]). After that the store holds exactly what the
//! round's pagemaps name: present pages as they came, holes with the pages that earlier rounds
//! brought. What no pagemap names any more goes back to the kernel at once, page by page.
//!
//! Nothing refers to superseded pages: CRIU resolves a hole in the pagemap of the round before
//! (`page-xfer.c`), so a page that this one does not name cannot be asked for by the next.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use image_common::criu::page_server::{Entry, PagemapId};
use image_common::criu::pagemap;
use image_common::criu::requests::LONG_BYTES;
use image_common::link::codec::RoundPages;

use self::pool::Pool;
use crate::store::memory::budget::{Budget, Charge, OutOfMemory};
use crate::store::memory::segment::{give_back_all, OwnedPiece, Piece, Tail};

mod pool;

/// Segments that pages are received into; the first of a round, which may be tiny, has small
/// pages, the others huge ones. Untouched parts cost nothing.
const SEGMENT_BYTES: usize = 16 << 20;
const FIRST_SEGMENT_BYTES: usize = 1 << 20;

/// CRIU's own page server numbers from here, so that dump and page server may share a
/// directory (`page-xfer.c`).
const FIRST_PAGES_ID: u32 = 0x10001;

/// What a pagemap costs however short it is, and an entry besides its pages: a hole has none, and
/// names what is here already.
pub const MAP_BYTES: u64 = 256;
const ENTRY_BYTES: u64 = size_of::<Entry>() as u64;

#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error(transparent)]
    Limit(#[from] OutOfMemory),
    #[error("the kernel gives no more memory")]
    Kernel(#[source] io::Error),
    #[error("{}: a hole at {vaddr:#x} has no page in the rounds before", .id.image_name())]
    Missing { id: PagemapId, vaddr: u64 },
    #[error("{}: the entry at {vaddr:#x} is not behind the one before it", .id.image_name())]
    Order { id: PagemapId, vaddr: u64 },
    #[error("{}: the entry at {vaddr:#x} has pages that only a lazy dump's source has", .id.image_name())]
    Lazy { id: PagemapId, vaddr: u64 },
    #[error("a pagemap begins before the last page of another has come")]
    Part,
    #[error("{}: pages for it before it was opened", .id.image_name())]
    NotOpen { id: PagemapId },
    #[error("{}: {came} bytes of pages came where its entries name {named}", .id.image_name())]
    Size {
        id: PagemapId,
        named: u64,
        came: u64,
    },
}

/// A run of pages with their memory.
struct PageRun {
    start: u64,
    memory: OwnedPiece,
}

/// By address; runs do not overlap.
type PageMap = Vec<PageRun>;

pub struct PageStore {
    page_bytes: u64,
    maps: HashMap<PagemapId, PageMap>,
    charge: Charge,
    /// What rounds have superseded, for the next one.
    pool: Pool,
    /// For the pagemaps themselves. What their runs take is little beside their pages.
    overhead: Charge,
}

/// A round on its way.
pub struct Round {
    page_bytes: u64,
    budget: Arc<Budget>,
    /// New memory.
    tail: Option<Tail>,
    received: usize,
    maps: HashMap<PagemapId, Incoming>,
    charge: Charge,
    /// Memory of earlier rounds of this series; `None`: the round is not of a store that has any.
    pool: Option<Pool>,
    /// A part of it that is being filled, instead of the tail.
    reused: Option<OwnedPiece>,
    /// The last entry is received into pieces as long as can be.
    long: bool,
    /// For pagemaps and entries.
    overhead: Charge,
}

/// A pagemap on its way.
#[derive(Default)]
struct Incoming {
    entries: Vec<Entry>,
    /// The pages of all present entries one behind the other. They come in that order, so this
    /// is a piece per segment, however many entries there are.
    memory: Vec<OwnedPiece>,
    /// Bytes that the present entries name, and that came.
    named: u64,
    came: u64,
}

/// What a merge has superseded, and is not kept for the next round. Its memory goes back when
/// it is dropped, which takes system calls: CRIU need not wait for it.
#[derive(Default)]
#[must_use]
pub struct Superseded(Vec<OwnedPiece>);

impl Superseded {
    /// What lies together stays together: where rounds replace all, that is whole huge pages.
    fn push(&mut self, memory: OwnedPiece) {
        let memory = match self.0.last_mut() {
            Some(last) => last.join(memory).err(),
            None => Some(memory),
        };
        self.0.extend(memory);
    }
}

impl Drop for Superseded {
    fn drop(&mut self) {
        give_back_all(std::mem::take(&mut self.0));
    }
}

impl std::fmt::Debug for Superseded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} runs", self.0.len())
    }
}

/// One pagemap of the flat set, with its pages.
pub struct FlatPagemap {
    /// `pagemap-<id>.img`
    pub pagemap_name: String,
    pub pagemap: Vec<u8>,
    /// `pages-<id>.img`
    pub pages_name: String,
    pub pages: Vec<Piece>,
    pub charge: Charge,
}

impl Round {
    pub fn new(page_bytes: u64, budget: &Arc<Budget>) -> Self {
        Self {
            page_bytes,
            budget: budget.clone(),
            tail: None,
            received: 0,
            maps: HashMap::new(),
            charge: budget.nothing(),
            pool: None,
            reused: None,
            long: false,
            overhead: budget.nothing(),
        }
    }

    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// A pagemap begins; a second time, it begins anew.
    pub fn open(&mut self, id: PagemapId) -> Result<(), PageError> {
        // Memory goes back by whole pages: what begins in the middle of another's page would
        // lose bytes with it.
        if self.received as u64 % self.page_bytes != 0 {
            return Err(PageError::Part);
        }
        self.overhead.grow(MAP_BYTES)?;
        let before = self.maps.insert(id, Incoming::default());
        drop(before.map(|before| self.charge.split(before.came)));
        Ok(())
    }

    /// An entry, whose pages follow by [`Self::spare`] and [`Self::filled`] if it is present.
    pub fn add(&mut self, id: PagemapId, entry: Entry) -> Result<(), PageError> {
        let vaddr = entry.vaddr;
        let map = self.maps.get_mut(&id).ok_or(PageError::NotOpen { id })?;
        map.check(id)?;
        let end = |e: &Entry| e.vaddr + e.pages * self.page_bytes;
        let after = map.entries.last().is_none_or(|last| end(last) <= vaddr);
        if !after || vaddr % self.page_bytes != 0 {
            return Err(PageError::Order { id, vaddr });
        }
        if !entry.is_present() && !entry.is_hole() {
            return Err(PageError::Lazy { id, vaddr });
        }
        if entry.is_present() {
            let bytes = entry.pages * self.page_bytes;
            map.named += bytes;
            // What is left over of earlier rounds is in short pieces: to copy there is less work
            // than to zero new memory, and to give as much back.
            let short = self.pool.as_ref().is_some_and(Pool::is_short);
            self.long = bytes >= LONG_BYTES && !short;
        }
        self.overhead.grow(ENTRY_BYTES)?;
        map.entries.push(entry);
        Ok(())
    }

    /// Room for at most `want` bytes of pages.
    pub fn spare(&mut self, want: usize) -> Result<&mut [u8], PageError> {
        self.reuse();
        let spare = match &mut self.reused {
            Some(memory) => memory.bytes_mut(),
            None => {
                if self.tail.as_mut().is_none_or(|t| t.spare().is_empty()) {
                    let size = match self.received {
                        0 => FIRST_SEGMENT_BYTES,
                        _ => SEGMENT_BYTES,
                    };
                    self.tail = Some(match self.budget.reserved().take(size) {
                        Some(ready) => Tail::of(ready),
                        None => Tail::from(&self.budget.memory, size, self.received)
                            .map_err(PageError::Kernel)?,
                    });
                }
                let Some(tail) = self.tail.as_mut() else {
                    unreachable!("the tail was just made")
                };
                tail.spare()
            }
        };
        let n = spare.len().min(want);
        Ok(&mut spare[..n])
    }

    /// Whether the pages of the entry that was just added had better be put ([`Self::put`]) than
    /// received into [`Self::spare`].
    pub fn prefers_copies(&self) -> bool {
        !self.long
    }

    /// Takes memory of earlier rounds, if there is any for the entry that comes.
    fn reuse(&mut self) {
        // A page ends where it began.
        if self.received as u64 % self.page_bytes != 0 {
            return;
        }
        if let Some(pool) = &mut self.pool {
            if let Some(rest) = self.reused.take() {
                pool.put_back(rest);
            }
            self.reused = pool.piece(self.long);
        }
    }

    /// Appends pages, or parts of them, that are in memory already.
    pub fn put(&mut self, id: PagemapId, mut bytes: &[u8]) -> Result<(), PageError> {
        while !bytes.is_empty() {
            let spare = self.spare(bytes.len())?;
            let n = spare.len();
            spare.copy_from_slice(&bytes[..n]);
            self.filled(id, n)?;
            bytes = &bytes[n..];
        }
        Ok(())
    }

    /// So many bytes were received into [`Self::spare`], for the last entry of `id`. They need
    /// not be whole pages; the entry's must be in the end.
    pub fn filled(&mut self, id: PagemapId, n: usize) -> Result<(), PageError> {
        let Some(map) = self.maps.get_mut(&id) else {
            return Err(PageError::NotOpen { id });
        };
        let memory = match (&mut self.reused, &mut self.pool, &mut self.tail) {
            (Some(memory), Some(pool), _) => {
                self.charge.absorb(pool.taken(n));
                let rest = memory.split_off(n);
                std::mem::replace(memory, rest)
            }
            (_, _, Some(tail)) => {
                self.charge.grow(n as u64)?;
                tail.advance_owned(n)
            }
            _ => return Err(PageError::NotOpen { id }),
        };
        self.received += n;
        map.came += n as u64;
        if map.came > map.named {
            return map.check(id);
        }
        let memory = match map.memory.last_mut() {
            Some(last) => match last.join(memory) {
                Ok(()) => return Ok(()),
                Err(memory) => memory,
            },
            None => memory,
        };
        map.memory.push(memory);
        Ok(())
    }

    pub fn pages(&self) -> u64 {
        let named = self.maps.values().map(|map| map.named);
        // A peer names as much as it likes.
        named.fold(0, u64::saturating_add) / self.page_bytes
    }
}

impl Incoming {
    /// Whether every present entry so far has all its pages.
    fn check(&self, id: PagemapId) -> Result<(), PageError> {
        let (named, came) = (self.named, self.came);
        match named == came {
            true => Ok(()),
            false => Err(PageError::Size { id, named, came }),
        }
    }
}

/// Takes memory from the front of a sequence of runs.
struct Front(std::iter::Peekable<std::vec::IntoIter<OwnedPiece>>);

impl Front {
    fn take(&mut self, max: u64) -> Option<OwnedPiece> {
        let first = self.0.peek_mut()?;
        // A piece is far smaller than memory.
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        match first.len() > max {
            true => {
                let rest = first.split_off(max);
                Some(std::mem::replace(first, rest))
            }
            false => self.0.next(),
        }
    }
}

/// The runs of a pagemap before the round, as they are used up from the lowest address on.
struct Before {
    runs: std::iter::Peekable<std::vec::IntoIter<PageRun>>,
}

impl Before {
    /// The next run below `end`, cut there.
    fn take(&mut self, end: u64) -> Option<PageRun> {
        let first = self.runs.peek_mut().filter(|run| run.start < end)?;
        let below = usize::try_from(end - first.start).unwrap_or(usize::MAX);
        if first.memory.len() <= below {
            return self.runs.next();
        }
        let rest = first.memory.split_off(below);
        let rest = PageRun {
            start: end,
            memory: rest,
        };
        Some(std::mem::replace(first, rest))
    }
}

impl PageStore {
    pub fn new(page_bytes: u64, budget: &Arc<Budget>) -> Self {
        Self {
            page_bytes,
            maps: HashMap::new(),
            charge: budget.nothing(),
            overhead: budget.nothing(),
            pool: Pool::empty(budget),
        }
    }

    /// A round that is received into what earlier ones have left over.
    pub fn begin(&mut self, budget: &Arc<Budget>) -> Round {
        Round {
            pool: Some(self.pool.take()),
            ..Round::new(self.page_bytes, budget)
        }
    }

    /// Whether the last round had this pagemap: then the next one may have holes in it.
    pub fn has(&self, id: PagemapId) -> bool {
        self.maps.contains_key(&id)
    }

    /// The pagemaps of the last round.
    pub fn ids(&self) -> impl Iterator<Item = PagemapId> + '_ {
        self.maps.keys().copied()
    }

    /// Whether there is a page for every hole of `entries`.
    fn check_holes(&self, id: PagemapId, entries: &[Entry]) -> Result<(), PageError> {
        let mut runs = self.maps.get(&id).map_or(&[][..], Vec::as_slice);
        for hole in entries.iter().filter(|entry| entry.is_hole()) {
            let end = hole.vaddr + hole.pages * self.page_bytes;
            let mut at = hole.vaddr;
            while at < end {
                let Some(run) = runs.first() else {
                    return Err(PageError::Missing { id, vaddr: at });
                };
                let run_end = run.start + run.memory.len() as u64;
                match (run.start <= at, at < run_end) {
                    (_, false) => runs = &runs[1..],
                    (true, true) => at = run_end,
                    (false, true) => return Err(PageError::Missing { id, vaddr: at }),
                }
            }
        }
        Ok(())
    }

    /// Makes a whole round visible. On an error the store is as it was.
    pub fn merge(&mut self, mut round: Round) -> Result<(RoundPages, Superseded), PageError> {
        for (&id, map) in &round.maps {
            map.check(id)?;
            self.check_holes(id, &map.entries)?;
        }
        let maps = round.maps.len() as u64;
        self.overhead = round.overhead.split(maps * MAP_BYTES);
        let mut bytes = RoundPages::default();
        let mut superseded = Superseded::default();
        let mut before = std::mem::take(&mut self.maps);
        for (id, map) in round.maps {
            let old = before.remove(&id).unwrap_or_default();
            let new = self.merge_map(map, old, &mut bytes, &mut superseded);
            self.maps.insert(id, new);
        }
        for run in before.into_values().flatten() {
            bytes.dropped += run.memory.len() as u64;
            superseded.push(run.memory);
        }
        self.charge.absorb(round.charge);
        let mut gone = self.charge.split(bytes.replaced + bytes.dropped);
        let page = self.page_bytes;
        if let Some(mut left) = round.pool {
            left.add(
                superseded.0.drain(..).chain(round.reused),
                gone.split(u64::MAX),
            );
            self.pool.absorb(left);
            let pages = (bytes.new + bytes.replaced + bytes.unchanged) / page;
            superseded.0 = self.pool.excess(pages / pool::PART * page);
        }
        drop(gone);
        let pages = RoundPages {
            new: bytes.new / page,
            replaced: bytes.replaced / page,
            unchanged: bytes.unchanged / page,
            dropped: bytes.dropped / page,
        };
        Ok((pages, superseded))
    }

    /// One walk over both, as both are in the order of addresses. `bytes` counts bytes.
    fn merge_map(
        &self,
        map: Incoming,
        old: PageMap,
        bytes: &mut RoundPages,
        superseded: &mut Superseded,
    ) -> PageMap {
        let mut new = PageMap::with_capacity(map.entries.len() + old.len() / 2);
        let mut before = Before {
            runs: old.into_iter().peekable(),
        };
        let mut memory = Front(map.memory.into_iter().peekable());
        for entry in map.entries {
            let end = entry.vaddr + entry.pages * self.page_bytes;
            while let Some(run) = before.take(entry.vaddr) {
                bytes.dropped += run.memory.len() as u64;
                superseded.push(run.memory);
            }
            if entry.is_present() {
                let mut known = 0;
                while let Some(run) = before.take(end) {
                    known += run.memory.len() as u64;
                    superseded.push(run.memory);
                }
                bytes.replaced += known;
                bytes.new += end - entry.vaddr - known;
                let mut start = entry.vaddr;
                while start < end {
                    // `check` has counted them.
                    let Some(memory) = memory.take(end - start) else {
                        break;
                    };
                    let next = start + memory.len() as u64;
                    new.push(PageRun { start, memory });
                    start = next;
                }
            } else {
                bytes.unchanged += end - entry.vaddr;
                while let Some(run) = before.take(end) {
                    new.push(run);
                }
            }
        }
        for run in before.runs {
            bytes.dropped += run.memory.len() as u64;
            superseded.push(run.memory);
        }
        new
    }

    pub fn bytes(&self) -> u64 {
        let runs = self.maps.values().flatten();
        runs.map(|run| run.memory.len() as u64).sum()
    }

    /// The flat set: no parents, entries sorted and merged, all present. PE_LAZY is not kept:
    /// without it neighbours merge, and only a lazy restore could tell the difference.
    /// `hand_out` is one of [`OwnedPiece`]'s ways to become a [`Piece`].
    pub fn flatten(mut self, hand_out: fn(OwnedPiece) -> Piece) -> Vec<FlatPagemap> {
        self.pool.give_back_later();
        let mut maps: Vec<_> = self.maps.into_iter().collect();
        maps.sort_by_key(|(id, _)| *id);
        let numbered = (FIRST_PAGES_ID..).zip(maps);
        numbered
            .map(|(pages_id, (id, map))| {
                let mut entries: Vec<(u64, u64)> = Vec::new();
                let mut pages: Vec<Piece> = Vec::new();
                let mut bytes = 0;
                for PageRun { start, memory } in map {
                    bytes += memory.len() as u64;
                    let count = memory.len() as u64 / self.page_bytes;
                    match entries.last_mut() {
                        Some((at, n)) if *at + *n * self.page_bytes == start => *n += count,
                        _ => entries.push((start, count)),
                    }
                    let piece = hand_out(memory);
                    if !pages.last_mut().is_some_and(|last| last.try_join(&piece)) {
                        pages.push(piece);
                    }
                }
                FlatPagemap {
                    pagemap_name: id.image_name(),
                    pagemap: pagemap::encode(pages_id, entries),
                    pages_name: format!("pages-{pages_id}.img"),
                    pages,
                    charge: self.charge.split(bytes),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests;
