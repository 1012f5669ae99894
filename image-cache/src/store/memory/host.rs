//! Memory that images may take before the kernel would kill the daemon, and with it every set.
//!
//! `--memory-limit` is what the operator wants; this is what there is. Each charge of the store
//! ([`crate::store::memory::budget`]) asks here. Looking costs some system calls, so a look allows for the charges
//! that follow it, up to a part of what it has found.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::store::memory::arena::Source;
use image_common::procfs::host_memory::HostMemory;
pub use image_common::procfs::host_memory::{Bound, Bounded};
use image_common::units::human_size;

/// What stays free of each limit: for what is not charged (buffers of sockets and pipes, the heap, page
/// tables), and for what else grows between two looks.
const SPARE_PART: u64 = 64;
const LEAST_SPARE_BYTES: u64 = 16 << 20;
const MOST_SPARE_BYTES: u64 = 1 << 30;

/// What stays free when memory is made ready on a guess, which must drive nothing out.
const GUESS_SPARE_PART: u64 = 16;

/// A look allows for this part of what is free, and for so many bytes at most.
const ALLOWED_PART: u64 = 4;
const MOST_ALLOWED_BYTES: u64 = 64 << 20;

/// After this time another process may have taken what a look has seen.
const VALID: Duration = Duration::from_millis(250);

/// Page tables that lead to memory: the kernel's, and charged to the same group.
const TABLES_PART: u64 = 256;

/// With less than this left it matters what could be reclaimed.
const PLENTY_BYTES: u64 = 4 << 30;

/// The host, or a control group, has no more for images.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("memory is short: {}, {}, is used up to {}; past it the kernel would kill image-cache with every set", .0.of, human_size(.0.limit), human_size(.0.left))]
pub struct Shortage(Bound);

/// Looks at what there is.
#[derive(Debug)]
pub struct Gauge {
    memory: HostMemory,
    /// The daemon's own memory, without images.
    own: u64,
    /// What images are in, if it is not anonymous.
    images: Source,
    began: Instant,
    /// Bytes that may be charged before the next look.
    allowed: AtomicU64,
    /// When the last look was, in milliseconds since `began`.
    looked: AtomicU64,
    looking: Mutex<()>,
}

impl Default for Gauge {
    fn default() -> Self {
        Self::below("/")
    }
}

impl Gauge {
    /// For a test that has made its own `proc` and `sys`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        let memory = HostMemory::below(root);
        Self {
            own: memory.own_anonymous().unwrap_or(0),
            memory,
            images: Source::Anonymous,
            began: Instant::now(),
            allowed: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            looking: Mutex::default(),
        }
    }

    /// Of images that are in this memory.
    pub fn of(self, images: Source) -> Self {
        Self { images, ..self }
    }

    /// The smallest limit. `None` if the kernel tells of none.
    pub fn smallest(&self) -> Option<Bound> {
        let bounds = self.memory.bounds(0).into_iter();
        bounds.min_by_key(|bound| bound.limit)
    }

    /// `bytes` are about to be touched. `charged` is all that is charged, these included.
    pub fn take(&self, bytes: u64, charged: impl Fn() -> u64) -> Result<(), Shortage> {
        if self.is_allowed(bytes) {
            return Ok(());
        }
        let _one = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have looked meanwhile.
        if self.is_allowed(bytes) {
            return Ok(());
        }
        let free = self.free(charged(), spare)?;
        let allowed = (free / ALLOWED_PART).min(MOST_ALLOWED_BYTES);
        self.looked.store(self.now(), Ordering::Relaxed);
        self.allowed.store(allowed, Ordering::Relaxed);
        Ok(())
    }

    fn is_allowed(&self, bytes: u64) -> bool {
        let valid = u64::try_from(VALID.as_millis()).unwrap_or(u64::MAX);
        let age = self
            .now()
            .saturating_sub(self.looked.load(Ordering::Relaxed));
        let take = |allowed: u64| allowed.checked_sub(bytes);
        age <= valid
            && self
                .allowed
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                .is_ok()
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// How much can be made ready on a guess, beside what is charged.
    pub fn room_for_guess(&self, charged: u64) -> u64 {
        self.free(charged, guess_spare).unwrap_or(0)
    }

    /// Whether a guess, which is charged, may still be made true: others may have taken its room.
    pub fn allows_guess(&self, charged: u64) -> bool {
        // Less than at its beginning, since nothing of what it takes is exact.
        let between = |limit: u64| (spare(limit) + guess_spare(limit)) / 2;
        self.free(charged, between).is_ok()
    }

    /// What is left in the tightest bound, without what stays free there, and without what is charged
    /// and not yet touched.
    fn free(&self, charged: u64, spare: impl Fn(u64) -> u64) -> Result<u64, Shortage> {
        let bounds = self.memory.bounds(PLENTY_BYTES);
        let touched = self
            .memory
            .own_anonymous()
            .map(|bytes| bytes.saturating_sub(self.own));
        // Also what an earlier process has touched: it may be charged to another group, and does not come any more.
        let in_arena = self.images.arena().map_or(0, |arena| arena.resident());
        let touched = touched.map(|bytes| bytes.saturating_add(in_arena));
        let to_come = charged.saturating_sub(touched.unwrap_or(charged));
        let to_come = to_come.saturating_add(to_come / TABLES_PART);
        let needed = |bound: &Bound| to_come.saturating_add(spare(bound.limit));
        let tightest = bounds
            .into_iter()
            .min_by_key(|bound| i128::from(bound.left) - i128::from(needed(bound)));
        let Some(bound) = tightest else {
            return Ok(u64::MAX); // the kernel tells nothing
        };
        bound
            .left
            .checked_sub(needed(&bound))
            .ok_or(Shortage(bound))
    }
}

fn spare(limit: u64) -> u64 {
    let part = (limit / SPARE_PART).clamp(LEAST_SPARE_BYTES, MOST_SPARE_BYTES);
    part.min(limit / 4)
}

fn guess_spare(limit: u64) -> u64 {
    (limit / GUESS_SPARE_PART).max(spare(limit) * 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::testing::Fake;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_group_is_not_filled_to_its_limit() {
        let fake = Fake::new(100);
        let gauge = fake.gauge();
        assert_eq!(gauge.smallest().unwrap().limit, 100 * MIB);
        // 16 MiB stay free.
        assert!(gauge.take(84 * MIB, || 84 * MIB - MIB).is_ok());
        let refused = gauge.take(85 * MIB, || 85 * MIB).unwrap_err();
        assert!(refused
            .to_string()
            .contains("memory.max of the control group"));
        // What has arrived is in the group's usage, and not counted twice.
        fake.used(60, 50);
        assert!(gauge.take(20 * MIB, || 70 * MIB).is_ok());
        assert!(gauge.take(40 * MIB, || 90 * MIB).is_err());
    }

    #[test]
    fn what_was_looked_at_lasts_for_a_part_of_it() {
        let fake = Fake::new(1000);
        let gauge = fake.gauge();
        let charged = std::cell::Cell::new(0);
        let mut looks = 0;
        for _ in 0..900 {
            charged.set(charged.get() + MIB);
            fake.used(charged.get() / MIB, charged.get() / MIB);
            let look = std::cell::Cell::new(0);
            let all = || {
                look.set(1);
                charged.get()
            };
            gauge.take(MIB, all).unwrap();
            looks += look.get();
        }
        assert!((10..200).contains(&looks), "{looks}");
        // A limit that was lowered counts from the next look on.
        fake.limit(900);
        assert!((0..64).any(|_| gauge.take(MIB, || 900 * MIB).is_err()));
    }

    #[test]
    fn a_guess_leaves_more_than_what_comes() {
        let fake = Fake::new(1600);
        let gauge = fake.gauge();
        assert_eq!(gauge.room_for_guess(0), 1500 * MIB);
        assert!(gauge.allows_guess(1500 * MIB));
        fake.used(80, 0);
        assert!(!gauge.allows_guess(1500 * MIB), "others took the room");
        assert!(gauge.take(MIB, || 1450 * MIB).is_ok());
        fake.used(1500, 1500);
        assert_eq!(gauge.room_for_guess(1500 * MIB), 0);
        assert!(gauge.take(MIB, || 1501 * MIB).is_ok());
    }

    #[test]
    fn where_nothing_is_told_nothing_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let gauge = Gauge::below(dir.path());
        assert!(gauge.smallest().is_none());
        assert!(gauge.take(1 << 40, || 1 << 40).is_ok());
    }
}
