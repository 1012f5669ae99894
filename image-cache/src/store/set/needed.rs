//! Which images a restore of a set reads. The tree in `pstree.img` tells: an images directory may
//! have images that an earlier dump left in it, and no CRIU reads those.

use std::collections::HashSet;
use std::sync::Arc;

use image_common::criu::image_file::ImageError;
use image_common::criu::pstree::Task;
use image_common::criu::{mm, pagemap, pstree};
use image_common::image::{ImageName, INVENTORY};

use crate::store::image::Image;
use crate::store::set::images::{Bytes, Images, PSTREE};

/// The images of a set without which no restore can have come to its end: the tree, and each task's
/// registers and memory. Of a set that still arrives nothing tells which these are.
pub fn needed(images: &Images) -> HashSet<ImageName> {
    let mut needed = Needed {
        images,
        names: HashSet::new(),
    };
    for name in [INVENTORY, PSTREE] {
        needed.image(name);
    }
    match images.tree() {
        Some(Ok(tasks)) => tasks.iter().for_each(|task| needed.task(task)),
        // As nothing tells which of them are of this dump, all are.
        _ => needed.every_task(),
    }
    needed.names
}

struct Needed<'a> {
    images: &'a Images,
    names: HashSet<ImageName>,
}

impl Needed<'_> {
    /// Notes an image if it is in the set; `true` if it is, and was not noted before.
    fn image(&mut self, name: &str) -> Option<Arc<Image>> {
        let image = self.images.image(name)?;
        self.names.insert(image.name.clone()).then_some(image)
    }

    fn task(&mut self, task: &Task) {
        let pid = task.pid;
        for pid in std::iter::once(&pid).chain(&task.threads) {
            self.image(&format!("core-{pid}.img"));
        }
        let mm = self.image(&format!("mm-{pid}.img"));
        let core = self.images.bytes(&format!("core-{pid}.img"));
        if core.is_some_and(|core| pstree::is_zombie(core.pieces()) == Ok(true)) {
            return;
        }
        self.pages(&format!("pagemap-{pid}.img"));
        let mm = mm.map(|mm| Bytes::of(&mm));
        let shared = |vma: mm::Vma| {
            if vma.is_anonymous_shared() {
                self.pages(&format!("pagemap-shmem-{}.img", vma.shmid));
            }
            Ok::<_, ImageError>(())
        };
        // What of it cannot be read adds nothing.
        let _ = mm.map(|mm| mm::vmas(mm.pieces(), shared));
    }

    fn pages(&mut self, pagemap: &str) {
        let Some(map) = self.image(pagemap) else {
            return;
        };
        if let Ok(id) = pagemap::pages_id(Bytes::of(&map).pieces()) {
            self.image(&format!("pages-{id}.img"));
        }
    }

    fn every_task(&mut self) {
        let of_task = |name: &ImageName| {
            let name = name.as_str();
            let kinds = ["core-", "mm-", "pagemap-", "pages-"];
            kinds.iter().any(|kind| name.starts_with(kind))
        };
        let images = self.images.named(of_task);
        self.names.extend(images.iter().map(|i| i.name.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{put, recorded, set};
    use super::*;

    fn names(needed: &HashSet<ImageName>) -> Vec<&str> {
        let mut names: Vec<&str> = needed.iter().map(ImageName::as_str).collect();
        names.sort_unstable();
        names
    }

    /// Case 02: a directory that has images of an earlier dump in it.
    #[test]
    fn images_that_an_earlier_dump_left_are_not_needed() {
        let set = set();
        recorded(&set, "stream-plain/images");
        let own = set.needed();
        assert!(
            names(&own).iter().any(|n| n.starts_with("pages-")),
            "{own:?}"
        );
        for left in [
            "core-4.img",
            "mm-4.img",
            "pagemap-4.img",
            "pages-77.img",
            "pagemap-shmem-4.img",
        ] {
            put(&set, left, b"left over");
        }
        assert_eq!(set.needed(), own);
    }

    #[test]
    fn without_a_tree_every_image_of_tasks_is_needed() {
        let set = set();
        for name in [
            INVENTORY,
            PSTREE,
            "core-4.img",
            "mm-4.img",
            "pages-1.img",
            "files.img",
        ] {
            put(&set, name, b"of no known CRIU");
        }
        let expected = [
            "core-4.img",
            "inventory.img",
            "mm-4.img",
            "pages-1.img",
            "pstree.img",
        ];
        assert_eq!(names(&set.needed()), expected);
    }
}
