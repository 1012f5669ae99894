//! What a `--remote` dump reads back from the proxy: the pagemaps of its parents, and their
//! pages.
//!
//! CRIU checks against the parent's pagemap that its holes are covered, and on the way skips
//! the pages of the parent's pages image, by reading and discarding them (`pagemap.c`; the
//! content does not matter, the length does). So pagemaps are kept as they pass, and of a
//! pages image only its length: it is answered with zeros.

use std::collections::HashMap;

use bytes::Bytes;
use image_common::image::{ImageName, SnapshotId};

/// Pagemaps of a series together. Beyond it the series goes on without parents: 64 MiB are
/// entries for 3 million separate ranges.
pub const MAX_PAGEMAP_BYTES: usize = 64 << 20;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParentImage {
    Pagemap(Bytes),
    PagesOf(u64),
}

#[derive(Default)]
pub struct ParentImages {
    images: HashMap<(SnapshotId, ImageName), ParentImage>,
    bytes: usize,
    overflowed: bool,
}

/// Whether image-proxy keeps a copy of this image while it sends it.
pub fn is_remembered(name: &ImageName) -> bool {
    name.is_pagemap()
}

impl ParentImages {
    pub fn pagemap(&mut self, snapshot: &SnapshotId, name: &ImageName, bytes: Vec<u8>) {
        if self.bytes + bytes.len() > MAX_PAGEMAP_BYTES {
            self.overflowed = true;
            self.images.clear();
            self.bytes = 0;
        }
        if !self.overflowed {
            self.bytes += bytes.len();
            self.insert(snapshot, name, ParentImage::Pagemap(bytes.into()));
        }
    }

    pub fn pages(&mut self, snapshot: &SnapshotId, name: &ImageName, length: u64) {
        self.insert(snapshot, name, ParentImage::PagesOf(length));
    }

    fn insert(&mut self, snapshot: &SnapshotId, name: &ImageName, kept: ParentImage) {
        let old = self.images.insert((snapshot.clone(), name.clone()), kept);
        if let Some(ParentImage::Pagemap(old)) = old {
            self.bytes -= old.len();
        }
    }

    pub fn get(&self, snapshot: &SnapshotId, name: &ImageName) -> Option<ParentImage> {
        self.images.get(&(snapshot.clone(), name.clone())).cloned()
    }

    /// Too much to keep: the next dump of the series must be a full one.
    pub fn overflowed(&self) -> bool {
        self.overflowed
    }

    pub fn forget(&mut self, snapshot: &SnapshotId) {
        self.images.retain(|(s, _), _| s != snapshot);
        let size = |kept: &ParentImage| match kept {
            ParentImage::Pagemap(bytes) => bytes.len(),
            ParentImage::PagesOf(_) => 0,
        };
        self.bytes = self.images.values().map(size).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_replaced_forgotten_overflowed() {
        let id = |t: &str| SnapshotId::new(t).unwrap();
        let map = ImageName::new("pagemap-1.img").unwrap();
        let mut kept = ParentImages::default();
        kept.pagemap(&id("a"), &map, vec![1; 10]);
        kept.pagemap(&id("a"), &map, vec![2; 20]);
        assert_eq!(
            kept.get(&id("a"), &map),
            Some(ParentImage::Pagemap(vec![2; 20].into()))
        );
        assert_eq!((kept.get(&id("b"), &map), kept.bytes), (None, 20));
        kept.forget(&id("a"));
        assert_eq!(kept.bytes, 0);
        kept.pagemap(&id("a"), &map, vec![0; MAX_PAGEMAP_BYTES]);
        assert!(!kept.overflowed());
        kept.pagemap(&id("b"), &map, vec![0]);
        assert!(kept.overflowed() && kept.get(&id("a"), &map).is_none());
    }
}
