//! Images that an earlier dump left in an images directory. CRIU removes none of them, and reads
//! none: what `pstree.img` does not name is of no task of this dump.
//!
//! Told apart are images of tasks, and the memory of tasks, which may be long. All others belong to
//! the dump as far as can be told, and so does everything if its images cannot be read.

use std::collections::HashSet;

use crate::criu::image_file::ImageError;
use crate::criu::{memfd, mm, pagemap, pstree};
use crate::image::ImageName;

/// Kinds of images that have the pid of a task, or of a thread, in their names
/// (`imgset_template` in CRIU's `image-desc.c`).
const OF_TASKS: [&str; 12] = [
    "core-",
    "ids-",
    "mm-",
    "creds-",
    "fs-",
    "vmas-",
    "sigacts-",
    "rlimit-",
    "itimers-",
    "posix-timers-",
    "signal-s-",
    "signal-p-",
];

/// More of an image is not read.
const MAX_IMAGE_BYTES: usize = 64 << 20;
/// Enough for the first message of a pagemap.
const HEAD_BYTES: usize = 4096;

/// Where the pages of a dump are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagesAre {
    /// In the directory, as far as is known.
    Here,
    /// They went through a page server: CRIU wrote none to its directory.
    Elsewhere,
}

/// The image files of a directory.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Listing {
    pub images: Vec<ImageName>,
    pub left_over: Vec<ImageName>,
}

impl Listing {
    /// Some of the names that are left over, for a log; `None` if there are none.
    pub fn left_over_names(&self) -> Option<String> {
        const SHOWN: usize = 8;
        let shown = self.left_over.iter().take(SHOWN).map(ImageName::as_str);
        let shown = shown.collect::<Vec<_>>().join(", ");
        let more = self.left_over.len().saturating_sub(SHOWN);
        match (self.left_over.len(), more) {
            (0, _) => None,
            (_, 0) => Some(shown),
            (_, more) => Some(format!("{shown} and {more} more")),
        }
    }
}

/// Sorts the images of a directory. `read` gives an image, or its first bytes.
pub fn sort(
    names: Vec<ImageName>,
    pages: PagesAre,
    read: impl Fn(&str, usize) -> Option<Vec<u8>>,
) -> Listing {
    let pids = read("pstree.img", MAX_IMAGE_BYTES).and_then(|image| pids(&image));
    let Some(pids) = pids else {
        let images = names;
        return Listing {
            images,
            ..Listing::default()
        };
    };
    let own = Own {
        pids,
        pages,
        names: &names,
        read: &read,
    };
    let memory = own.memory();
    let is_own = |name: &ImageName| own.has(name.as_str(), &memory);
    let (images, left_over) = names.iter().cloned().partition(is_own);
    Listing { images, left_over }
}

/// The pids of all tasks and threads.
fn pids(image: &[u8]) -> Option<HashSet<u32>> {
    let tasks = pstree::tasks([image]).ok()?;
    let pids = |task: pstree::Task| std::iter::once(task.pid).chain(task.threads);
    Some(tasks.into_iter().flat_map(pids).collect())
}

/// Pagemaps and pages images of the dump.
enum Memory {
    /// These pagemaps, and the pages images of these numbers.
    Known {
        pagemaps: HashSet<String>,
        pages: HashSet<u32>,
    },
    /// All that there are.
    Unknown,
}

struct Own<'a, R> {
    pids: HashSet<u32>,
    pages: PagesAre,
    names: &'a [ImageName],
    read: &'a R,
}

impl<R: Fn(&str, usize) -> Option<Vec<u8>>> Own<'_, R> {
    fn has(&self, name: &str, memory: &Memory) -> bool {
        if let Some(pid) = OF_TASKS.iter().find_map(|kind| number(name, kind)) {
            return self.pids.contains(&pid);
        }
        match memory {
            Memory::Unknown => true,
            Memory::Known { pagemaps, .. } if name.starts_with("pagemap-") => {
                pagemaps.contains(name)
            }
            Memory::Known { pages, .. } => {
                number(name, "pages-").is_none_or(|id| pages.contains(&id))
            }
        }
    }

    fn memory(&self) -> Memory {
        if self.pages == PagesAre::Elsewhere {
            return Memory::Known {
                pagemaps: HashSet::new(),
                pages: HashSet::new(),
            };
        }
        self.pagemaps().map_or(Memory::Unknown, |pagemaps| {
            let pages = pagemaps.iter().map(|name| {
                let head = (self.read)(name, HEAD_BYTES)?;
                pagemap::pages_id([&head[..]]).ok()
            });
            match pages.collect::<Option<HashSet<u32>>>() {
                Some(pages) => Memory::Known { pagemaps, pages },
                None => Memory::Unknown,
            }
        })
    }

    /// `None`: it cannot be told.
    fn pagemaps(&self) -> Option<HashSet<String>> {
        let names = self.names.iter().map(ImageName::as_str);
        let all: Vec<&str> = names.filter(|n| n.starts_with("pagemap-")).collect();
        let of_tasks = all.iter().filter(|name| {
            let pid = number(name, "pagemap-");
            pid.is_some_and(|pid| self.pids.contains(&pid))
        });
        let mut own: HashSet<String> = of_tasks.map(|&name| name.to_owned()).collect();
        let shared = all.iter().filter(|n| n.starts_with("pagemap-shmem-"));
        let shared: Vec<&str> = shared.copied().collect();
        if !shared.is_empty() {
            let shmids = self.shmids()?;
            let is_own = |name: &&str| {
                number64(name, "pagemap-shmem-").is_none_or(|shmid| shmids.contains(&shmid))
            };
            own.extend(shared.into_iter().filter(is_own).map(str::to_owned));
        }
        Some(own)
    }

    /// Shared memory that the tasks' mappings and memory files name.
    fn shmids(&self) -> Option<HashSet<u64>> {
        // Segments of System V need not be mapped.
        if self
            .names
            .iter()
            .any(|n| n.as_str().starts_with("ipcns-shm-"))
        {
            return None;
        }
        let mut shmids = HashSet::new();
        for pid in &self.pids {
            // A thread has none.
            let Some(mm) = (self.read)(&format!("mm-{pid}.img"), MAX_IMAGE_BYTES) else {
                continue;
            };
            let read = mm::vmas([&mm[..]], |vma| {
                if vma.is_shared_memory() {
                    shmids.insert(vma.shmid);
                }
                Ok::<_, ImageError>(())
            });
            read.ok()?;
        }
        if let Some(files) = (self.read)("memfd.img", MAX_IMAGE_BYTES) {
            let read = memfd::shmids([&files[..]], |shmid| {
                shmids.insert(shmid.into());
                Ok::<_, ImageError>(())
            });
            read.ok()?;
        }
        Some(shmids)
    }
}

fn number64(name: &str, kind: &str) -> Option<u64> {
    name.strip_prefix(kind)?.strip_suffix(".img")?.parse().ok()
}

fn number(name: &str, kind: &str) -> Option<u32> {
    number64(name, kind)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::path::Path;

    fn recorded(dir: &str) -> BTreeMap<String, Vec<u8>> {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
        let files = std::fs::read_dir(fixtures.join(dir)).unwrap();
        files
            .map(|file| {
                let path = file.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                (name, std::fs::read(path).unwrap())
            })
            .collect()
    }

    fn listing(files: &BTreeMap<String, Vec<u8>>, pages: PagesAre) -> (Vec<&str>, Vec<&str>) {
        let names = files.keys().map(|n| ImageName::new(n).unwrap()).collect();
        let read = |name: &str, max: usize| files.get(name).map(|b| b[..b.len().min(max)].to_vec());
        let Listing { images, left_over } = sort(names, pages, read);
        let texts = |names: Vec<ImageName>| {
            let of = |name: &ImageName| files.get_key_value(name.as_str()).unwrap().0.as_str();
            names.iter().map(of).collect()
        };
        (texts(images), texts(left_over))
    }

    /// Case 01.
    #[test]
    fn images_of_tasks_that_are_not_in_the_tree_are_left_over() {
        let mut files = recorded("stream-plain/images");
        let own: Vec<String> = files.keys().cloned().collect();
        let mut left = Vec::new();
        for kind in OF_TASKS {
            left.push(format!("{kind}4.img"));
        }
        left.extend(["pagemap-4.img", "pages-77.img", "pagemap-shmem-4.img"].map(String::from));
        for name in &left {
            files.insert(name.clone(), Vec::new());
        }
        left.sort();
        assert_eq!(
            listing(&files, PagesAre::Here),
            (
                own.iter().map(String::as_str).collect(),
                left.iter().map(String::as_str).collect()
            )
        );
        // Of other kinds nothing is known.
        for name in [
            "fdinfo-99.img",
            "netns-9.img",
            "ghost-file-1.img",
            "tmpfs-4.tar.gz",
            "mine-4.img",
        ] {
            files.insert(name.to_owned(), Vec::new());
            assert!(listing(&files, PagesAre::Here).0.contains(&name), "{name}");
        }
    }

    #[test]
    fn memory_in_the_directory_is_left_over_where_a_page_server_has_it() {
        let files = recorded("stream-plain/images");
        let (images, left) = listing(&files, PagesAre::Elsewhere);
        assert!(left
            .iter()
            .all(|n| n.starts_with("pagemap-") || n.starts_with("pages-")));
        assert_eq!(left.len(), 2, "{left:?}");
        assert!(images.contains(&"pstree.img"));
    }

    #[test]
    fn where_nothing_can_be_told_all_belongs_to_the_dump() {
        let mut files = recorded("stream-plain/images");
        files.insert("core-4.img".to_owned(), Vec::new());
        files.insert("pages-77.img".to_owned(), Vec::new());
        files.insert("pstree.img".to_owned(), b"another format".to_vec());
        assert_eq!(listing(&files, PagesAre::Here).1, [""; 0]);
        files.remove("pstree.img");
        assert_eq!(listing(&files, PagesAre::Here).1, [""; 0]);
        let mut files = recorded("stream-plain/images");
        let pagemap = files
            .keys()
            .find(|n| n.starts_with("pagemap-"))
            .unwrap()
            .clone();
        files.insert(pagemap, b"another format".to_vec());
        files.insert("pages-77.img".to_owned(), Vec::new());
        assert_eq!(listing(&files, PagesAre::Here).1, [""; 0]);
    }

    #[test]
    fn a_log_names_some() {
        let name = |n: u32| ImageName::new(&format!("core-{n}.img")).unwrap();
        let mut listing = Listing::default();
        assert_eq!(listing.left_over_names(), None);
        listing.left_over = vec![name(1), name(2)];
        assert_eq!(listing.left_over_names().unwrap(), "core-1.img, core-2.img");
        listing.left_over = (0..10).map(name).collect();
        assert!(listing
            .left_over_names()
            .unwrap()
            .ends_with("core-7.img and 2 more"));
    }
}
