//! The complete images of a set, by name, and what can be read off them alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use dashmap::DashMap;
use image_common::criu::image_file::ImageError;
use image_common::criu::page_server::PagemapId;
use image_common::criu::pstree::Task;
use image_common::criu::{pagemap, pstree};
use image_common::image::{ImageName, INVENTORY};

use crate::store::image::Image;
use crate::store::memory::segment::Piece;

/// Inventories are well below this; a longer one is not parsed beyond it.
pub const INVENTORY_HEAD_BYTES: usize = 64 << 10;

pub const PSTREE: &str = "pstree.img";

/// The bytes of an image, where they lie.
pub struct Bytes(Vec<Piece>);

impl Bytes {
    pub fn of(image: &Image) -> Self {
        Self(image.slice(0, image.size()).unwrap_or_default())
    }

    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|piece| &**piece)
    }
}

/// The threads of the link put images in while restores look others up, and while checks and `status`
/// walk over all of them: a walk holds up neither. What belongs together with the state of the set is
/// changed under the lock of the set.
#[derive(Default)]
pub struct Images(DashMap<ImageName, Arc<Image>>);

impl Images {
    pub fn get(&self, name: &ImageName) -> Option<Arc<Image>> {
        self.0.get(name).map(|image| image.clone())
    }

    pub fn image(&self, name: &str) -> Option<Arc<Image>> {
        self.get(&ImageName::new(name).ok()?)
    }

    pub fn inventory(&self) -> Option<Arc<Image>> {
        self.image(INVENTORY)
    }

    /// Takes the place of an image of the same name.
    pub fn insert(&self, image: Arc<Image>) {
        self.0.insert(image.name.clone(), image);
    }

    #[cfg(test)]
    pub fn remove(&self, name: &ImageName) -> bool {
        self.0.remove(name).is_some()
    }

    pub fn clear(&self) {
        self.0.clear();
    }

    /// Those whose names are wanted, in no order. They are collected first: to look an image up in the
    /// middle of a walk over the map could wait for a writer that waits for the walk.
    pub fn named(&self, wanted: impl Fn(&ImageName) -> bool) -> Vec<Arc<Image>> {
        let images = self.0.iter().filter(|entry| wanted(entry.key()));
        images.map(|entry| entry.value().clone()).collect()
    }

    /// Number of images and their bytes.
    pub fn totals(&self) -> (usize, u64) {
        let bytes = self.0.iter().map(|image| image.size()).sum();
        (self.0.len(), bytes)
    }

    pub fn bytes(&self, name: &str) -> Option<Bytes> {
        self.image(name).map(|image| Bytes::of(&image))
    }

    /// The tasks that a restore makes; `None` without `pstree.img`.
    pub fn tree(&self) -> Option<Result<Vec<Task>, ImageError>> {
        self.bytes(PSTREE)
            .map(|image| pstree::tasks(image.pieces()))
    }

    /// Tasks whose memory is described here.
    pub fn tasks(&self) -> BTreeSet<u64> {
        let task = |name: &ImageName| {
            let number = name.as_str().strip_prefix("mm-")?.strip_suffix(".img")?;
            number.parse().ok()
        };
        let tasks = self.0.iter().filter_map(|entry| task(entry.key()));
        match self.tree() {
            // Others are left over from an earlier dump.
            Some(Ok(tree)) => {
                let tree: BTreeSet<u64> = tree.iter().map(|task| task.pid.into()).collect();
                tasks.filter(|id| tree.contains(id)).collect()
            }
            _ => tasks.collect(),
        }
    }

    /// Tasks whose memory is described here (`mm-N.img`) and not there (`pagemap-N.img`).
    pub fn tasks_without_pages(&self) -> BTreeSet<u64> {
        let tasks = self.tasks().into_iter();
        tasks
            .filter(|&id| self.image(&PagemapId::Task(id).image_name()).is_none())
            .collect()
    }

    /// Nothing but pagemaps that can be read to their end, and all the pages that they name.
    pub fn is_memory_alone(&self) -> bool {
        // Page sizes of the hosts that CRIU runs on.
        const PAGE_BYTES: [u64; 3] = [4 << 10, 16 << 10, 64 << 10];
        let mut pages = 0;
        let mut pagemaps = 0;
        for image in self.named(|_| true) {
            if image.name.is_pages() {
                pages += 1;
                continue;
            }
            let whole = || {
                let map = image.name.is_pagemap().then(|| image.head(usize::MAX))?;
                let map = pagemap::summarize(&map)?;
                let name = ImageName::new(&format!("pages-{}.img", map.pages_id)).ok()?;
                let len = self.get(&name)?.size();
                let fits = |page: &u64| map.present.checked_mul(*page) == Some(len);
                PAGE_BYTES.iter().any(fits).then_some(())
            };
            if whole().is_none() {
                return false;
            }
            pagemaps += 1;
        }
        pagemaps > 0 && pages == pagemaps
    }
}
