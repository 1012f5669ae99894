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

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use image_common::criu::page_server::{Entry, PagemapId};
use image_common::criu::pagemap;
use image_common::link::codec::RoundPages;

use super::budget::{Budget, Charge, OutOfMemory};
use super::segment::{OwnedPiece, Piece, Tail};

/// Segments that pages are received into. Untouched parts cost nothing.
const SEGMENT_BYTES: usize = 16 << 20;

/// CRIU's own page server numbers from here, so that dump and page server may share a
/// directory (`page-xfer.c`).
const FIRST_PAGES_ID: u32 = 0x10001;

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
    #[error("{}: pages for it before it was opened", .id.image_name())]
    NotOpen { id: PagemapId },
    #[error("{}: {got} bytes came for {pages} pages", .id.image_name())]
    Size { id: PagemapId, pages: u64, got: u64 },
}

/// A run of pages with their memory.
struct Run {
    memory: OwnedPiece,
    _charge: Charge,
}

/// First address -> run. Runs do not overlap.
type PageMap = BTreeMap<u64, Run>;

pub struct PageStore {
    page_bytes: u64,
    maps: HashMap<PagemapId, PageMap>,
}

/// A round on its way.
pub struct Round {
    page_bytes: u64,
    budget: Arc<Budget>,
    tail: Option<Tail>,
    maps: HashMap<PagemapId, Vec<Incoming>>,
}

struct Incoming {
    entry: Entry,
    /// In order; together the entry's pages if it is present.
    runs: Vec<Run>,
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
    pub fn new(page_bytes: u64, budget: Arc<Budget>) -> Self {
        Self {
            page_bytes,
            budget,
            tail: None,
            maps: HashMap::new(),
        }
    }

    pub fn page_bytes(&self) -> u64 {
        self.page_bytes
    }

    /// A pagemap begins; a second time, it begins anew.
    pub fn open(&mut self, id: PagemapId) {
        self.maps.insert(id, Vec::new());
    }

    /// An entry, whose pages follow by [`Self::spare`] and [`Self::filled`] if it is present.
    pub fn add(&mut self, id: PagemapId, entry: Entry) -> Result<(), PageError> {
        let vaddr = entry.vaddr;
        let entries = self.maps.get_mut(&id).ok_or(PageError::NotOpen { id })?;
        let end = |e: &Entry| e.vaddr + e.pages * self.page_bytes;
        let after = entries.last().is_none_or(|i| end(&i.entry) <= vaddr);
        if !after || vaddr % self.page_bytes != 0 {
            return Err(PageError::Order { id, vaddr });
        }
        if !entry.is_present() && !entry.is_hole() {
            return Err(PageError::Lazy { id, vaddr });
        }
        let runs = Vec::new();
        entries.push(Incoming { entry, runs });
        Ok(())
    }

    /// Room for at most `want` bytes of pages.
    pub fn spare(&mut self, want: usize) -> Result<&mut [u8], PageError> {
        if self.tail.as_mut().is_none_or(|t| t.spare().is_empty()) {
            let tail = Tail::new(SEGMENT_BYTES).map_err(PageError::Kernel)?;
            tail.keep_pages_small();
            self.tail = Some(tail);
        }
        let Some(tail) = self.tail.as_mut() else {
            unreachable!("the tail was just made")
        };
        let spare = tail.spare();
        let n = spare.len().min(want);
        Ok(&mut spare[..n])
    }

    /// So many bytes were received into [`Self::spare`], for the last entry of `id`. They need
    /// not be whole pages; the entry's must be in the end.
    pub fn filled(&mut self, id: PagemapId, n: usize) -> Result<(), PageError> {
        let charge = self.budget.charge(n as u64)?;
        let last = self
            .maps
            .get_mut(&id)
            .and_then(|entries| entries.last_mut());
        let (Some(last), Some(tail)) = (last, self.tail.as_mut()) else {
            return Err(PageError::NotOpen { id });
        };
        let memory = tail.advance_owned(n);
        let mut run = Run {
            memory,
            _charge: charge,
        };
        if let Some(previous) = last.runs.last_mut() {
            match previous.memory.join(run.memory) {
                Ok(()) => {
                    previous._charge.absorb(run._charge);
                    return Ok(());
                }
                Err(memory) => run.memory = memory,
            }
        }
        last.runs.push(run);
        Ok(())
    }

    /// Whether every present entry has all its pages.
    fn check(&self) -> Result<(), PageError> {
        for (&id, entries) in &self.maps {
            for Incoming { entry, runs } in entries {
                let got: u64 = runs.iter().map(|r| r.memory.len() as u64).sum();
                let pages = if entry.is_present() { entry.pages } else { 0 };
                if got != pages * self.page_bytes {
                    return Err(PageError::Size { id, pages, got });
                }
            }
        }
        Ok(())
    }

    pub fn pages(&self) -> u64 {
        let entries = self.maps.values().flatten().map(|i| &i.entry);
        entries.filter(|e| e.is_present()).map(|e| e.pages).sum()
    }
}

impl PageStore {
    pub fn new(page_bytes: u64) -> Self {
        Self {
            page_bytes,
            maps: HashMap::new(),
        }
    }

    /// Whether the last round had this pagemap: then the next one may have holes in it.
    pub fn has(&self, id: PagemapId) -> bool {
        self.maps.contains_key(&id)
    }

    /// The first address of `entry` for which there is no page.
    pub fn first_missing(&self, id: PagemapId, entry: &Entry) -> Option<u64> {
        let end = entry.vaddr + entry.pages * self.page_bytes;
        let mut at = entry.vaddr;
        let Some(map) = self.maps.get(&id) else {
            return Some(at);
        };
        while at < end {
            let run_end = map
                .range(..=at)
                .next_back()
                .map(|(&start, run)| start + run.memory.len() as u64);
            match run_end {
                Some(run_end) if run_end > at => at = run_end,
                _ => return Some(at),
            }
        }
        None
    }

    /// Makes a whole round visible. On an error the store is as it was.
    pub fn merge(&mut self, round: Round) -> Result<RoundPages, PageError> {
        round.check()?;
        for (&id, entries) in &round.maps {
            for hole in entries.iter().map(|i| &i.entry).filter(|e| e.is_hole()) {
                if let Some(vaddr) = self.first_missing(id, hole) {
                    return Err(PageError::Missing { id, vaddr });
                }
            }
        }
        let mut stats = RoundPages::default();
        let page = self.page_bytes;
        let mut before = std::mem::take(&mut self.maps);
        for (id, entries) in round.maps {
            let mut old = before.remove(&id).unwrap_or_default();
            let mut new = PageMap::new();
            for Incoming { entry, runs } in entries {
                let end = entry.vaddr + entry.pages * page;
                let superseded = cut_out(&mut old, entry.vaddr, end);
                let known: u64 = superseded.values().map(|r| r.memory.len() as u64).sum();
                if entry.is_present() {
                    stats.replaced += known / page;
                    stats.new += entry.pages - known / page;
                    let mut at = entry.vaddr;
                    for run in runs {
                        let next = at + run.memory.len() as u64;
                        new.insert(at, run);
                        at = next;
                    }
                } else {
                    stats.unchanged += entry.pages;
                    new.extend(superseded);
                }
            }
            stats.dropped += bytes_of(&old) / page;
            self.maps.insert(id, new);
        }
        stats.dropped += before.values().map(bytes_of).sum::<u64>() / page;
        Ok(stats)
    }

    pub fn bytes(&self) -> u64 {
        self.maps.values().map(bytes_of).sum()
    }

    /// The flat set: no parents, entries sorted and merged, all present. PE_LAZY is not kept:
    /// without it neighbours merge, and only a lazy restore could tell the difference.
    /// `hand_out` is one of [`OwnedPiece`]'s ways to become a [`Piece`].
    pub fn flatten(
        self,
        budget: &Arc<Budget>,
        hand_out: fn(OwnedPiece) -> Piece,
    ) -> Vec<FlatPagemap> {
        let mut maps: Vec<_> = self.maps.into_iter().collect();
        maps.sort_by_key(|(id, _)| *id);
        let numbered = (FIRST_PAGES_ID..).zip(maps);
        numbered
            .map(|(pages_id, (id, map))| {
                let mut entries: Vec<(u64, u64)> = Vec::new();
                let mut pages: Vec<Piece> = Vec::new();
                let mut charge = budget.nothing();
                for (vaddr, run) in map {
                    let count = run.memory.len() as u64 / self.page_bytes;
                    match entries.last_mut() {
                        Some((start, n)) if *start + *n * self.page_bytes == vaddr => *n += count,
                        _ => entries.push((vaddr, count)),
                    }
                    charge.absorb(run._charge);
                    let piece = hand_out(run.memory);
                    if !pages.last_mut().is_some_and(|last| last.try_join(&piece)) {
                        pages.push(piece);
                    }
                }
                FlatPagemap {
                    pagemap_name: id.image_name(),
                    pagemap: pagemap::encode(pages_id, entries),
                    pages_name: format!("pages-{pages_id}.img"),
                    pages,
                    charge,
                }
            })
            .collect()
    }
}

fn bytes_of(map: &PageMap) -> u64 {
    map.values().map(|r| r.memory.len() as u64).sum()
}

/// Takes what lies in `start..end` out of `map`, cutting runs at its borders.
fn cut_out(map: &mut PageMap, start: u64, end: u64) -> PageMap {
    for border in [start, end] {
        let across = map.range_mut(..border).next_back();
        let Some((&at, run)) = across else { continue };
        if at + (run.memory.len() as u64) > border {
            // A run is far smaller than memory.
            let keep = usize::try_from(border - at).unwrap_or(usize::MAX);
            let memory = run.memory.split_off(keep);
            let charge = run._charge.split(memory.len() as u64);
            map.insert(
                border,
                Run {
                    memory,
                    _charge: charge,
                },
            );
        }
    }
    let mut inside = map.split_off(&start);
    map.append(&mut inside.split_off(&end));
    inside
}

#[cfg(test)]
mod tests;
