//! Can `criu restore` read a set? What the images themselves tell is looked at before a commit,
//! while the process can still go on.
//!
//! Only what is certain counts: an image that no known CRIU wrote, or a feature that nothing here
//! knows, passes. The tasks are frozen meanwhile. So small images are read once, where they lie,
//! and pages are not read at all; of a pages image the size is compared.
//!
//! What a restore does, by image, is in CRIU's `pstree.c` (`read_one_pstree_item`), `cr-restore.c`
//! (`open_core`, `check_core`), `mem.c` (`prepare_mm_pid`, `restore_priv_vma_content`),
//! `pagemap.c` and `shmem.c`.

use std::collections::HashSet;
use std::ops::Range;

use image_common::criu::dialect::Dialect;
use image_common::criu::image_file::ImageError;
use image_common::criu::inventory::{self, SetKind};
use image_common::criu::page_server::Entry;
use image_common::criu::pstree::Task;
use image_common::criu::{memfd, mm, nftables, pagemap, pstree};
use image_common::image::{SnapshotId, INVENTORY};

use crate::store::image::Image;
use crate::store::set::images::{Bytes, Images, INVENTORY_HEAD_BYTES, PSTREE};

/// Page sizes of the hosts that CRIU runs on.
const PAGE_BYTES: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];

/// A ruleset that is longer is not read: it has rules.
const MAX_RULESET_BYTES: u64 = 1 << 20;

/// Why `criu restore` cannot read a set, or would make something else of it without an error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    #[error("{name} is missing: {by} names it, and criu restore needs it")]
    Missing { name: String, by: String },
    #[error("{PSTREE} is missing, which criu restore needs")]
    NoTree,
    #[error("{PSTREE} has no task")]
    NoTask,
    #[error("{name}: {source}")]
    Image { name: String, source: ImageError },
    #[error("{pages} has {bytes} bytes, which are not the {present} pages that {pagemap} names")]
    Size {
        pagemap: String,
        pages: String,
        bytes: u64,
        present: u64,
    },
    #[error("{pagemap}: the pages at {vaddr:#x} are in a parent, and no parent here has them")]
    Nowhere { pagemap: String, vaddr: u64 },
    #[error(
        "{pagemap}: the pages at {vaddr:#x} were left on the source (--lazy-pages): post-copy is not supported yet"
    )]
    Lazy { pagemap: String, vaddr: u64 },
    #[error("{pagemap}: the pages at {vaddr:#x} are in no private mapping of {mm}")]
    Outside {
        pagemap: String,
        mm: String,
        vaddr: u64,
    },
    #[error("private huge pages: criu restore --stream cannot restore them ({mm}, the mapping at {start:#x})")]
    HugePages { mm: String, start: u64 },
    #[error("pages in a mapping that a plugin makes: criu restore --stream cannot restore them ({mm}, the mapping at {start:#x})")]
    Plugin { mm: String, start: u64 },
    #[error(
        "the nftables rules of a network namespace ({name}): criu restore --stream restores none of them and says nothing. \
         If they are made anew by other means, start image-cache with --allow nftables"
    )]
    Nftables { name: String },
}

/// What the operator takes although it is restored otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Network namespaces without their nftables rules.
    pub nftables: bool,
}

/// What is in the set already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    Here,
    /// Pagemaps and pages of tasks may come apart from the other images.
    MayCome,
}

/// What the checks read of a set.
#[derive(Clone, Copy)]
pub struct View<'a> {
    pub snapshot: &'a SnapshotId,
    pub dialect: Dialect,
    pub images: &'a Images,
}

/// Checks a whole set. `parents`: the images of the sets that its pagemaps may refer to, nearest first.
pub fn check(
    set: View<'_>,
    parents: &[&Images],
    allowed: Allowed,
    pages: Pages,
) -> Result<(), Flaw> {
    let judge = Judge {
        set,
        images: set.images,
        parents,
        pages,
    };
    judge.inventory()?;
    judge.rulesets(allowed)?;
    let tasks = match set.images.tree() {
        Some(tree) => known(PSTREE, tree)?,
        None if judge.is_of_known_criu() => return Err(Flaw::NoTree),
        None => None,
    };
    let Some(tasks) = tasks else {
        return Ok(());
    };
    if tasks.is_empty() {
        return Err(Flaw::NoTask);
    }
    let mut shared = HashSet::new();
    for task in &tasks {
        judge.task(task, &mut shared)?;
    }
    judge.memory_files(&mut shared)
}

/// `None`: no known CRIU wrote it, or it is too long to be looked at.
fn known<T>(name: &str, read: Result<T, ImageError>) -> Result<Option<T>, Flaw> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(ImageError::Foreign | ImageError::TooLong) => Ok(None),
        Err(source) => Err(Flaw::Image {
            name: name.to_owned(),
            source,
        }),
    }
}

/// An error of an image, or what was found in it.
enum Stop {
    Image(ImageError),
    Flaw(Flaw),
}

impl From<ImageError> for Stop {
    fn from(e: ImageError) -> Self {
        Self::Image(e)
    }
}

impl Stop {
    fn of<T>(name: &str, read: Result<T, Self>) -> Result<Option<T>, Flaw> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(Self::Image(e)) => known(name, Err(e)),
            Err(Self::Flaw(flaw)) => Err(flaw),
        }
    }
}

/// Mappings of a task that have pages in its pagemap.
#[derive(Default)]
struct Mappings {
    /// All that are private, in the order of addresses.
    private: Vec<Range<u64>>,
    /// Of them those that a restore by stream cannot fill.
    unreadable: Vec<(Range<u64>, Unreadable)>,
    /// They are in order, as far as is known: only then is there an answer about addresses.
    ordered: bool,
    any: bool,
}

#[derive(Clone, Copy)]
enum Unreadable {
    Huge,
    Plugin,
}

struct Judge<'a> {
    set: View<'a>,
    images: &'a Images,
    parents: &'a [&'a Images],
    pages: Pages,
}

impl Judge<'_> {
    fn inventory(&self) -> Result<(), Flaw> {
        let Some(image) = self.images.image(INVENTORY) else {
            return Ok(()); // said by `complete`
        };
        let head = image.head(INVENTORY_HEAD_BYTES);
        match inventory::kind_of(&head) {
            SetKind::Unclear if inventory::has_magic(&head) => Err(Flaw::Image {
                name: INVENTORY.to_owned(),
                source: ImageError::Broken,
            }),
            _ => Ok(()),
        }
    }

    /// Whether there are registers of a task in a form that is known.
    fn is_of_known_criu(&self) -> bool {
        let cores = self.images.named(|name| name.as_str().starts_with("core-"));
        let is_known =
            |core| pstree::is_zombie(Bytes::of(core).pieces()) != Err(ImageError::Foreign);
        cores.iter().any(|core| is_known(core))
    }

    fn has(&self, name: &str) -> bool {
        self.images.image(name).is_some()
    }

    fn require(&self, name: String, by: &str) -> Result<Bytes, Flaw> {
        let by = || by.to_owned();
        let bytes = self.images.bytes(&name);
        bytes.ok_or_else(|| Flaw::Missing { name, by: by() })
    }

    fn task(&self, task: &Task, shared: &mut HashSet<u64>) -> Result<(), Flaw> {
        let pid = task.pid;
        let [core, mm, map] = ["core", "mm", "pagemap"].map(|kind| format!("{kind}-{pid}.img"));
        let zombie = pstree::is_zombie(self.require(core.clone(), PSTREE)?.pieces());
        let zombie = known(&core, zombie)?;
        if zombie == Some(true) {
            return Ok(());
        }
        // Of a task whose state is not known, what is there must fit together.
        let lives = zombie.is_some();
        if lives {
            for thread in &task.threads {
                self.require(format!("core-{thread}.img"), PSTREE)?;
            }
        }
        let mappings = match self.images.bytes(&mm) {
            Some(image) => self.mappings(&mm, &image, shared)?,
            None if lives => return self.require(mm, PSTREE).map(drop),
            None => Mappings::default(),
        };
        let files = ["files.img", "reg-files.img"];
        if lives && mappings.any && !files.iter().any(|name| self.has(name)) {
            // Its executable is named there.
            self.require(files[0].to_owned(), &mm)?;
        }
        match self.images.bytes(&map) {
            Some(image) => self.pagemap(&map, &image, Some((&mm, &mappings))),
            None if self.pages == Pages::MayCome || !lives => Ok(()),
            None => self.require(map, PSTREE).map(drop),
        }
    }

    /// Reads an `mm-*.img` that is there, and checks the shared memory that it names, each once.
    fn mappings(
        &self,
        name: &str,
        image: &Bytes,
        shared: &mut HashSet<u64>,
    ) -> Result<Mappings, Flaw> {
        let mut mappings = Mappings {
            ordered: true,
            ..Mappings::default()
        };
        let remote = self.set.dialect.is_remote();
        let read = mm::vmas(image.pieces(), |vma| {
            mappings.any = true;
            if vma.is_shared_memory() && shared.insert(vma.shmid) {
                self.shared_memory(&vma, name).map_err(Stop::Flaw)?;
            }
            if vma.is_private() {
                // A restore of a `--remote` build reads otherwise, and knows neither of them.
                mappings.add(&vma, !remote);
            }
            Ok(())
        });
        match Stop::of(name, read)? {
            Some(()) => Ok(mappings),
            None => Ok(Mappings::default()),
        }
    }

    fn shared_memory(&self, vma: &mm::Vma, by: &str) -> Result<(), Flaw> {
        let map = format!("pagemap-shmem-{}.img", vma.shmid);
        let needed = vma.is_anonymous_shared() && self.pages == Pages::Here;
        match self.images.bytes(&map) {
            Some(image) => self.pagemap(&map, &image, None),
            None if needed => self.require(map, by).map(drop),
            None => Ok(()),
        }
    }

    /// The files of memory: their numbers are not in the mappings.
    fn memory_files(&self, shared: &mut HashSet<u64>) -> Result<(), Flaw> {
        const MEMFD: &str = "memfd.img";
        let Some(image) = self.images.bytes(MEMFD) else {
            return Ok(());
        };
        let read = memfd::shmids(image.pieces(), |shmid| {
            let map = format!("pagemap-shmem-{shmid}.img");
            match self
                .images
                .bytes(&map)
                .filter(|_| shared.insert(shmid.into()))
            {
                Some(image) => self.pagemap(&map, &image, None).map_err(Stop::Flaw),
                None => Ok(()),
            }
        });
        Stop::of(MEMFD, read).map(drop)
    }

    /// One pagemap that is there: its pages image, its parents and, of a task, its mappings.
    fn pagemap(
        &self,
        name: &str,
        image: &Bytes,
        mappings: Option<(&str, &Mappings)>,
    ) -> Result<(), Flaw> {
        let Some(level) = level(self.images, name, image)? else {
            return Ok(());
        };
        match entries(name, image, &level, mappings)? {
            Some(holes) => self.in_parents(name, holes),
            None => Ok(()),
        }
    }

    /// Whether each of `holes` has its pages in some parent.
    fn in_parents(&self, name: &str, mut holes: Vec<Range<u64>>) -> Result<(), Flaw> {
        let nowhere = |hole: &Range<u64>| Flaw::Nowhere {
            pagemap: name.to_owned(),
            vaddr: hole.start,
        };
        for parent in self.parents {
            let Some(first) = holes.first() else {
                return Ok(());
            };
            // One without this pagemap ends the chain (`pagemap.c`).
            let bytes = parent.bytes(name).ok_or_else(|| nowhere(first))?;
            let Some(level) = level(parent, name, &bytes)? else {
                return Ok(());
            };
            let mut deeper = Vec::new();
            let mut waiting = holes.drain(..).peekable();
            let read = pagemap::walk(bytes.pieces(), |entry| {
                let range = level.range(&entry);
                while let Some(hole) = waiting.peek_mut() {
                    if hole.start < range.start {
                        return Err(Stop::Flaw(nowhere(hole)));
                    }
                    if hole.start >= range.end {
                        break;
                    }
                    let end = hole.end.min(range.end);
                    if !entry.is_present() {
                        deeper.push(hole.start..end);
                    }
                    hole.start = end;
                    if !hole.is_empty() {
                        break;
                    }
                    waiting.next();
                }
                Ok(())
            });
            if Stop::of(name, read)?.is_none() {
                return Ok(());
            }
            if let Some(hole) = waiting.next() {
                return Err(nowhere(&hole));
            }
            drop(waiting);
            holes = deeper;
        }
        holes.first().map_or(Ok(()), |hole| Err(nowhere(hole)))
    }

    fn rulesets(&self, allowed: Allowed) -> Result<(), Flaw> {
        let mut rulesets = self
            .images
            .named(|name| name.as_str().starts_with("nftables-"));
        rulesets.sort_by(|a, b| a.name.cmp(&b.name));
        rulesets
            .iter()
            .try_for_each(|image| self.ruleset(image, allowed))
    }

    fn ruleset(&self, image: &Image, allowed: Allowed) -> Result<(), Flaw> {
        let name = image.name.as_str();
        let long = image.size() > MAX_RULESET_BYTES;
        let has_rules = || {
            let bytes = Bytes::of(image);
            nftables::has_rules(&bytes.pieces().collect::<Vec<_>>().concat())
        };
        // `--remote` builds know no such image.
        if self.set.dialect.is_remote() || !(long || has_rules()) {
            return Ok(());
        }
        match allowed.nftables {
            true => {
                tracing::warn!(snapshot = %self.set.snapshot, image = name, "nftables rules that a restore will leave out (--allow nftables)");
                Ok(())
            }
            false => Err(Flaw::Nftables {
                name: name.to_owned(),
            }),
        }
    }
}

/// What a pagemap has in a parent. `None`: no known CRIU wrote it.
fn entries(
    name: &str,
    image: &Bytes,
    level: &Level,
    mappings: Option<(&str, &Mappings)>,
) -> Result<Option<Vec<Range<u64>>>, Flaw> {
    let mut holes = Vec::new();
    let mut cursor = mappings.map(|(mm, mappings)| Cursor {
        pagemap: name,
        mm,
        mappings,
        private: 0,
        unreadable: 0,
    });
    let read = pagemap::walk(image.pieces(), |entry| {
        let range = level.range(&entry);
        if entry.is_hole() {
            holes.push(range.clone());
        } else if !entry.is_present() {
            let (pagemap, vaddr) = (name.to_owned(), entry.vaddr);
            return Err(Stop::Flaw(Flaw::Lazy { pagemap, vaddr }));
        }
        match &mut cursor {
            Some(cursor) => cursor.pass(range).map_err(Stop::Flaw),
            None => Ok(()),
        }
    });
    Ok(Stop::of(name, read)?.map(|_| holes))
}

/// Compares the sizes of a pagemap and its pages image. `None`: no known CRIU wrote it.
fn level(images: &Images, name: &str, image: &Bytes) -> Result<Option<Level>, Flaw> {
    let mut present = 0u64;
    let read = pagemap::walk(image.pieces(), |entry| {
        if entry.is_present() {
            present = present.checked_add(entry.pages).ok_or(ImageError::Broken)?;
        }
        Ok(())
    });
    let Some(id) = known(name, read)? else {
        return Ok(None);
    };
    let pages = format!("pages-{id}.img");
    let Some(image) = images.image(&pages) else {
        return Err(Flaw::Missing {
            name: pages,
            by: name.to_owned(),
        });
    };
    let bytes = image.size();
    let fits = |page: &&u64| present.checked_mul(**page) == Some(bytes);
    match PAGE_BYTES.iter().find(fits) {
        Some(&page_bytes) => Ok(Some(Level { page_bytes })),
        // A longer one is no better: its pagemap has lost its end.
        None => Err(Flaw::Size {
            pagemap: name.to_owned(),
            pages,
            bytes,
            present,
        }),
    }
}

/// What is known of a pagemap and its pages.
struct Level {
    page_bytes: u64,
}

impl Level {
    /// Addresses of an entry. [`Entry`] bounds them for all sizes of pages.
    fn range(&self, entry: &Entry) -> Range<u64> {
        entry.vaddr..entry.vaddr + entry.pages * self.page_bytes
    }
}

impl Mappings {
    fn add(&mut self, vma: &mm::Vma, by_stream: bool) {
        let range = vma.start..vma.end;
        let last = self.private.last().map_or(0, |last| last.end);
        self.ordered &= last <= range.start && range.start <= range.end;
        let why = match (vma.is_hugetlb(), vma.is_of_plugin()) {
            (true, _) => Some(Unreadable::Huge),
            (false, true) => Some(Unreadable::Plugin),
            _ => None,
        };
        let why = why.filter(|_| by_stream);
        self.unreadable.extend(why.map(|why| (range.clone(), why)));
        self.private.push(range);
    }
}

/// Goes through mappings and pages together, forward as a restore does.
struct Cursor<'a> {
    pagemap: &'a str,
    mm: &'a str,
    mappings: &'a Mappings,
    private: usize,
    unreadable: usize,
}

impl Cursor<'_> {
    fn pass(&mut self, mut pages: Range<u64>) -> Result<(), Flaw> {
        let Mappings {
            private,
            unreadable,
            ordered,
            any,
        } = self.mappings;
        if !ordered || !any {
            return Ok(());
        }
        while unreadable
            .get(self.unreadable)
            .is_some_and(|(mapping, _)| mapping.end <= pages.start)
        {
            self.unreadable += 1;
        }
        if let Some((mapping, why)) = unreadable.get(self.unreadable) {
            if mapping.start < pages.end {
                let (mm, start) = (self.mm.to_owned(), mapping.start);
                return Err(match why {
                    Unreadable::Huge => Flaw::HugePages { mm, start },
                    Unreadable::Plugin => Flaw::Plugin { mm, start },
                });
            }
        }
        while !pages.is_empty() {
            match private.get(self.private) {
                Some(mapping) if mapping.end <= pages.start => self.private += 1,
                Some(mapping) if mapping.start <= pages.start => {
                    pages.start = mapping.end.min(pages.end);
                }
                _ => {
                    return Err(Flaw::Outside {
                        pagemap: self.pagemap.to_owned(),
                        mm: self.mm.to_owned(),
                        vaddr: pages.start,
                    })
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
