//! One snapshot made of a `--remote` chain: every page that the last one has in a parent is
//! taken from the nearest older snapshot that holds it.
//!
//! No byte is copied: the flat pages image consists of pieces of the chain's pages images.

use std::sync::Arc;

use image_common::criu::page_server::Entry;
use image_common::criu::pagemap;
use image_common::image::ImageName;

use crate::store::image::{Image, ImageWriter, Slab, WriteError};
use crate::store::memory::budget::{
    Budget, Charge, OutOfMemory, IMAGE_OVERHEAD_BYTES, PIECE_OVERHEAD_BYTES,
};
use crate::store::memory::segment::Piece;
use crate::store::set::images::Images;

#[derive(Debug, thiserror::Error)]
pub enum SquashError {
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("{0} is not a whole pagemap")]
    Pagemap(ImageName),
    #[error("{0} has no pages image")]
    NoPages(ImageName),
    #[error("{name}: a hole at {vaddr:#x} has no page in any parent")]
    Missing { name: ImageName, vaddr: u64 },
    #[error("{0}: its pages image is too short")]
    Short(ImageName),
}

/// The images of one snapshot of the chain, by name.
pub trait Snapshot {
    fn image(&self, name: &str) -> Option<Arc<Image>>;
}

impl Snapshot for Images {
    fn image(&self, name: &str) -> Option<Arc<Image>> {
        Images::image(self, name)
    }
}

/// A pagemap of one level, with where each entry's pages are.
struct Level {
    entries: Vec<(Entry, u64)>,
    pages: Arc<Image>,
    pages_name: ImageName,
    page_bytes: u64,
}

/// The flat images of one pagemap: the pagemap itself, and its pages.
pub struct Squashed {
    pub pagemap: Arc<Image>,
    pub pages: Arc<Image>,
    /// The images that the pages are from, and that are charged for them.
    sources: Vec<Arc<Image>>,
}

impl Squashed {
    /// The chain is about to go, but for the pages that this has of it.
    pub fn take_over(&self) {
        for source in &self.sources {
            self.pages.take_charge(source);
        }
    }
}

/// Squashes the pagemap `name` of `chain`, newest first. `None` if it has no holes.
pub fn squash(
    name: &ImageName,
    chain: &[&dyn Snapshot],
    slab: &Arc<Slab>,
    budget: &Arc<Budget>,
) -> Result<Option<Squashed>, SquashError> {
    let mut levels = Vec::new();
    for snapshot in chain {
        // A level without this pagemap ends the chain (`pagemap.c`).
        match level(name, *snapshot)? {
            Some(level) => levels.push(level),
            None => break,
        }
    }
    let Some(newest) = levels.first() else {
        return Ok(None);
    };
    if !newest.entries.iter().any(|(e, _)| e.is_hole()) {
        return Ok(None);
    }
    let mut flat = Flat {
        name,
        entries: Vec::new(),
        pieces: Vec::new(),
        charge: budget.charge(IMAGE_OVERHEAD_BYTES).map_err(limit)?,
    };
    for (entry, _) in &newest.entries {
        flat.take(
            &levels,
            entry.vaddr,
            entry.vaddr + entry.pages * newest.page_bytes,
        )?;
    }
    let page_bytes = newest.page_bytes;
    let pages_id = pagemap::entries(&newest_image(name, chain)?)
        .ok_or_else(|| SquashError::Pagemap(name.clone()))?
        .0;
    let entries = flat
        .entries
        .iter()
        .map(|&(start, end)| (start, (end - start) / page_bytes));
    let bytes = pagemap::encode(pages_id, entries);
    let mut writer = ImageWriter::new(name.clone(), None, None, slab.clone(), budget)?;
    writer.put(&bytes)?;
    let pagemap = writer.finish(bytes.len() as u64)?;
    let pages = Image::of_pieces(newest.pages_name.clone(), flat.pieces, flat.charge);
    Ok(Some(Squashed {
        pagemap,
        pages,
        sources: levels.into_iter().map(|level| level.pages).collect(),
    }))
}

fn limit(e: OutOfMemory) -> SquashError {
    WriteError::from(e).into()
}

fn newest_image(name: &ImageName, chain: &[&dyn Snapshot]) -> Result<Vec<u8>, SquashError> {
    let image = chain.first().and_then(|s| s.image(name.as_str()));
    image
        .map(|i| i.head(usize::MAX))
        .ok_or_else(|| SquashError::Pagemap(name.clone()))
}

fn level(name: &ImageName, snapshot: &dyn Snapshot) -> Result<Option<Level>, SquashError> {
    let Some(image) = snapshot.image(name.as_str()) else {
        return Ok(None);
    };
    let parsed = pagemap::entries(&image.head(usize::MAX));
    let (pages_id, entries) = parsed.ok_or_else(|| SquashError::Pagemap(name.clone()))?;
    let pages_name = ImageName::new(&format!("pages-{pages_id}.img"));
    let pages_name = pages_name.map_err(|_| SquashError::Pagemap(name.clone()))?;
    let pages = snapshot
        .image(pages_name.as_str())
        .ok_or_else(|| SquashError::NoPages(name.clone()))?;
    let present: u64 = entries
        .iter()
        .filter(|e| e.is_present())
        .map(|e| e.pages)
        .sum();
    // The page size of the dumping host follows from the lengths; without pages any will do.
    let page_bytes = match present {
        0 => 4096,
        n if pages.size() % n == 0 && (pages.size() / n).is_power_of_two() => pages.size() / n,
        _ => return Err(SquashError::Short(pages_name)),
    };
    let mut offset = 0;
    let entries = entries
        .into_iter()
        .map(|entry| {
            let at = offset;
            if entry.is_present() {
                offset += entry.pages * page_bytes;
            }
            (entry, at)
        })
        .collect();
    Ok(Some(Level {
        entries,
        pages,
        pages_name,
        page_bytes,
    }))
}

struct Flat<'a> {
    name: &'a ImageName,
    /// Start and end address, merged.
    entries: Vec<(u64, u64)>,
    pieces: Vec<Piece>,
    /// For the lists, not for the pages, which are charged where they are from.
    charge: Charge,
}

impl Flat<'_> {
    /// Takes `at..end` from the first of `levels` that has it, split where entries end.
    fn take(&mut self, levels: &[Level], mut at: u64, end: u64) -> Result<(), SquashError> {
        let missing = |vaddr| SquashError::Missing {
            name: self.name.clone(),
            vaddr,
        };
        let Some((level, older)) = levels.split_first() else {
            return Err(missing(at));
        };
        while at < end {
            // Entries are sorted (`restore` demands it): the last one that starts at or below.
            let next = level.entries.partition_point(|(e, _)| e.vaddr <= at);
            let covering = next.checked_sub(1).map(|i| &level.entries[i]);
            let Some((entry, offset)) =
                covering.filter(|(e, _)| e.vaddr + e.pages * level.page_bytes > at)
            else {
                return Err(SquashError::Missing {
                    name: self.name.clone(),
                    vaddr: at,
                });
            };
            let stop = end.min(entry.vaddr + entry.pages * level.page_bytes);
            if entry.is_present() {
                let from = offset + (at - entry.vaddr);
                let pieces = level.pages.slice(from, stop - at);
                let pieces = pieces.ok_or_else(|| SquashError::Short(level.pages_name.clone()))?;
                self.add(at, stop, pieces)?;
            } else {
                self.take(older, at, stop)?;
            }
            at = stop;
        }
        Ok(())
    }

    fn add(&mut self, start: u64, end: u64, pieces: Vec<Piece>) -> Result<(), SquashError> {
        match self.entries.last_mut() {
            Some((_, last_end)) if *last_end == start => *last_end = end,
            _ => self.entries.push((start, end)),
        }
        for piece in pieces {
            if !self
                .pieces
                .last_mut()
                .is_some_and(|last| last.try_join(&piece))
            {
                // Few bytes of a pagemap can name many pieces, also the same ones again.
                self.charge.grow(PIECE_OVERHEAD_BYTES).map_err(limit)?;
                self.pieces.push(piece);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Dir(HashMap<String, Arc<Image>>);

    impl Snapshot for Dir {
        fn image(&self, name: &str) -> Option<Arc<Image>> {
            self.0.get(name).cloned()
        }
    }

    fn put(name: &str, bytes: &[u8], budget: &Arc<Budget>) -> Arc<Image> {
        let name = ImageName::new(name).unwrap();
        let mut writer = ImageWriter::new(name, None, None, Arc::default(), budget).unwrap();
        writer.put(bytes).unwrap();
        writer.finish(bytes.len() as u64).unwrap()
    }

    fn recorded(snapshot: &str, budget: &Arc<Budget>) -> Dir {
        let base = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/remote-2018-incremental/images/"
        );
        let read = |name: &str| {
            let bytes = std::fs::read(format!("{base}{snapshot}/{name}")).unwrap();
            (name.to_owned(), put(name, &bytes, budget))
        };
        Dir(HashMap::from([
            read("pagemap-173.img"),
            read("pages-1.img"),
        ]))
    }

    /// Page by page, as CRIU would look it up.
    fn page(chain: &[&Dir], vaddr: u64) -> Option<Vec<u8>> {
        let (dir, older) = chain.split_first()?;
        let map = pagemap::entries(&dir.image("pagemap-173.img")?.head(usize::MAX))?;
        let pages = dir.image("pages-1.img")?.head(usize::MAX);
        let mut offset = 0;
        for entry in map.1 {
            let inside = (entry.vaddr..entry.vaddr + entry.pages * 4096).contains(&vaddr);
            match (inside, entry.is_present()) {
                (true, true) => {
                    let at = usize::try_from(offset + vaddr - entry.vaddr).unwrap();
                    return Some(pages[at..at + 4096].to_vec());
                }
                (true, false) => return page(older, vaddr),
                (false, true) => offset += entry.pages * 4096,
                (false, false) => {}
            }
        }
        None
    }

    #[test]
    fn the_recorded_chain() {
        let budget = Budget::new(1 << 30);
        let dirs: Vec<Dir> = ["dump", "pre2", "pre1"]
            .map(|d| recorded(d, &budget))
            .into();
        let chain: Vec<&Dir> = dirs.iter().collect();
        let snapshots: Vec<&dyn Snapshot> = dirs.iter().map(|d| d as &dyn Snapshot).collect();
        let name = ImageName::new("pagemap-173.img").unwrap();
        let flat = squash(&name, &snapshots, &Arc::default(), &budget)
            .unwrap()
            .unwrap();

        let (pages_id, entries) = pagemap::entries(&flat.pagemap.head(usize::MAX)).unwrap();
        assert_eq!(pages_id, 1);
        let before = pagemap::entries(&dirs[0].0["pagemap-173.img"].head(usize::MAX))
            .unwrap()
            .1;
        let count = |entries: &[Entry]| entries.iter().map(|e| e.pages).sum::<u64>();
        assert_eq!(count(&entries), count(&before));
        assert!(entries.len() < before.len(), "neighbours are merged");
        let bytes = flat.pages.head(usize::MAX);
        let mut got = bytes.chunks(4096);
        for entry in entries {
            assert!(entry.is_present() && !entry.is_hole());
            for n in 0..entry.pages {
                let vaddr = entry.vaddr + n * 4096;
                assert!(
                    got.next().map(<[u8]>::to_vec) == page(&chain, vaddr),
                    "{vaddr:#x}"
                );
            }
        }
        assert!(got.next().is_none());
        // The chain goes, and the flat image pays for what it has of it.
        flat.take_over();
        drop(dirs);
        let (held, pages) = (budget.used(), flat.pages.size());
        assert!(held > pages, "{held} for {pages}");
        drop(flat);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_has_no_holes_is_left_as_it_is_and_a_cut_chain_is_refused() {
        let budget = Budget::new(1 << 30);
        let dirs = ["dump", "pre2", "pre1"].map(|d| recorded(d, &budget));
        let snapshots: Vec<&dyn Snapshot> = dirs.iter().map(|d| d as &dyn Snapshot).collect();
        let name = ImageName::new("pagemap-173.img").unwrap();
        let squash = |chain| squash(&name, chain, &Arc::default(), &budget);
        assert!(squash(&snapshots[2..]).unwrap().is_none());
        match squash(&snapshots[..2]) {
            Err(SquashError::Missing { .. }) => {}
            other => panic!("{:?}", other.map(|s| s.is_some())),
        }
    }

    /// A pagemap image; of an entry: first page, pages, and whether it is a hole.
    fn map(entries: impl IntoIterator<Item = (u64, u64, bool)>) -> Vec<u8> {
        let mut image = pagemap::encode(1, []);
        let head = image.len();
        for (page, pages, hole) in entries {
            let mut one = pagemap::encode(1, [(page * 4096, pages)]).split_off(head);
            if hole {
                let flags = one.len() - 3; // before the field of a small number of pages
                one[flags] = 1;
            }
            image.extend(one);
        }
        image
    }

    /// A pagemap of 20 KiB that names the same scattered pages again and again.
    #[test]
    fn lists_are_charged() {
        let budget = Budget::new(1 << 30);
        let dir = |map: Vec<u8>, pages: usize| {
            let images = [
                ("pagemap-7.img", map),
                ("pages-1.img", vec![1; pages * 4096]),
            ];
            let images = images.map(|(name, bytes)| (name.to_owned(), put(name, &bytes, &budget)));
            Dir(HashMap::from(images))
        };
        // No two neighbours are of one level, so that no two pieces join.
        let chain = [
            dir(map((0..1000).map(|_| (0, 64, true))), 0),
            dir(map((0..64).map(|n| (n, 1, n % 2 == 0))), 32),
            dir(map((0..64).step_by(2).map(|n| (n, 1, false))), 32),
        ];
        let snapshots: Vec<&dyn Snapshot> = chain.iter().map(|d| d as &dyn Snapshot).collect();
        let name = ImageName::new("pagemap-7.img").unwrap();
        let squash = |limit| squash(&name, &snapshots, &Arc::default(), &Budget::new(limit));
        let refused = squash(3 << 20);
        assert!(
            matches!(refused, Err(SquashError::Write(WriteError::Limit(_)))),
            "64,000 pieces are 4 MiB"
        );
        assert!(squash(8 << 20).is_ok());
    }
}
