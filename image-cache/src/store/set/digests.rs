//! Digests of the images of a set, where the link has checksums.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use image_common::control::status;
use image_common::image::ImageName;
use image_common::link::digest::of_image;

#[derive(Debug, thiserror::Error)]
#[error("the digest of all images is {ours:016x} here and {theirs:016x} at the source")]
pub struct DigestError {
    ours: u64,
    theirs: u64,
}

/// What arrived, by name: bytes and CRC-32C. A name that was written twice counts twice in the
/// sum, like in all the counts of a set.
#[derive(Default)]
pub struct Digests(Mutex<Known>);

#[derive(Default)]
struct Known {
    images: BTreeMap<String, (u64, u32)>,
    sum: u64,
}

impl Digests {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An image is whole.
    pub fn add(&self, name: &ImageName, bytes: u64, digest: u32) {
        let mut known = self.known();
        let more = of_image(name.as_str(), bytes, digest);
        known.sum = known.sum.wrapping_add(more);
        known.images.insert(name.to_string(), (bytes, digest));
    }

    /// By name, and their sum: see [`Self::refound`].
    pub fn all(&self) -> (BTreeMap<String, (u64, u32)>, u64) {
        let known = self.known();
        (known.images.clone(), known.sum)
    }

    /// Those of a set that was here before.
    pub fn refound(images: BTreeMap<String, (u64, u32)>, sum: u64) -> Self {
        Self(Mutex::new(Known { images, sum }))
    }

    /// The set is given up: they are not asked for, and nothing is charged for them any more.
    pub fn forget(&self) {
        self.known().images = BTreeMap::new();
    }

    /// Compares with what the source says of all of them; without checksums both are 0.
    pub fn check(&self, theirs: u64) -> Result<(), DigestError> {
        let ours = self.known().sum;
        match ours == theirs {
            true => Ok(()),
            false => Err(DigestError { ours, theirs }),
        }
    }

    pub fn status(&self) -> Option<status::Digests> {
        let known = self.known();
        let image = |(name, (bytes, crc)): (&String, &(u64, u32))| status::ImageDigest {
            image: name.clone(),
            bytes: *bytes,
            crc32c: format!("{crc:08x}"),
        };
        (!known.images.is_empty()).then(|| status::Digests {
            set: format!("{:016x}", known.sum),
            images: known.images.iter().map(image).collect(),
        })
    }
}
