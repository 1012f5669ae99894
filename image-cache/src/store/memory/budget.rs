//! How much memory the images may take: all (`--memory-limit`), and those of one session
//! (`--max-session-memory`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::store::memory::arena::Source;
use crate::store::memory::host::{Gauge, Shortage};
use crate::store::memory::reserved::{Leftover, Reserved};

/// What every image costs besides its bytes: its entry, its name, the rounding of its memory.
pub const IMAGE_OVERHEAD_BYTES: u64 = 512;

/// What a part of an image costs that is not joined with the one before: where it is, in a list
/// that grows by doubling.
pub const PIECE_OVERHEAD_BYTES: u64 = 64;

#[derive(Debug)]
pub struct Budget {
    limit: u64,
    /// Memory is taken in small parts, which can go back one by one.
    pub granular: bool,
    /// Where that memory comes from.
    pub memory: Source,
    used: AtomicU64,
    /// The budget that this one is a part of.
    whole: Option<Arc<Budget>>,
    /// Of `used`, what is reserved for bytes that are still to come.
    reserved_bytes: AtomicU64,
    reserved: Reserved,
    /// Its parts that have something reserved.
    guesses: Mutex<Vec<Weak<Budget>>>,
    /// What there is, of the whole. `None`: nothing but the limit counts.
    gauge: Option<Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutOfMemory {
    #[error("the memory limit of {} {}is reached", image_common::units::human_size(*.limit), if *.session { "for one session " } else { "" })]
    Limit { limit: u64, session: bool },
    #[error(transparent)]
    Short(#[from] Shortage),
}

/// A part of the budget, given back when dropped.
#[derive(Debug)]
pub struct Charge {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Budget {
    pub fn new(limit: u64) -> Arc<Self> {
        Self::with(limit, false)
    }

    pub fn with(limit: u64, granular: bool) -> Arc<Self> {
        Self::part(limit, granular, Source::Anonymous, None, None)
    }

    /// The same, of what `gauge` finds.
    #[cfg(test)]
    pub fn gauged(limit: u64, granular: bool, gauge: Gauge) -> Arc<Self> {
        Self::of(limit, granular, Source::Anonymous, Some(gauge))
    }

    /// The whole, in this memory. Without `gauge` nothing but the limit counts.
    pub fn of(limit: u64, granular: bool, memory: Source, gauge: Option<Gauge>) -> Arc<Self> {
        Self::part(limit, granular, memory, None, gauge)
    }

    /// The budget of a session: what is charged to it is charged to this one, too.
    pub fn of_session(self: &Arc<Self>, limit: Option<u64>) -> Arc<Self> {
        let limit = limit.unwrap_or(u64::MAX);
        let (granular, memory) = (self.granular, self.memory.clone());
        Self::part(limit, granular, memory, Some(self.clone()), None)
    }

    fn part(
        limit: u64,
        granular: bool,
        memory: Source,
        whole: Option<Arc<Self>>,
        gauge: Option<Gauge>,
    ) -> Arc<Self> {
        Arc::new(Self {
            limit,
            granular,
            memory,
            used: AtomicU64::new(0),
            whole,
            reserved_bytes: AtomicU64::new(0),
            reserved: Reserved::default(),
            guesses: Mutex::default(),
            gauge,
        })
    }

    /// What was reserved is used up first.
    fn add(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let before =
            self.reserved_bytes
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |reserved| {
                    (reserved > 0).then(|| reserved.saturating_sub(bytes))
                });
        let drawn = before.unwrap_or(0).min(bytes);
        // What is drawn is looked at, too: it need not go where memory is ready.
        let new = bytes - drawn;
        let added = match new {
            0 => Ok(()),
            new => self.add_new(new),
        };
        let added = added.and_then(|()| self.check_room(bytes).inspect_err(|_| self.subtract(new)));
        added.inspect_err(|_| {
            self.reserved_bytes.fetch_add(drawn, Ordering::Relaxed);
        })
    }

    /// The same, but if there is no room it is made of what others only guess.
    fn add_before_guesses(&self, bytes: u64) -> Result<(), OutOfMemory> {
        self.add_new(bytes)
            .or_else(|e| match self.forget_guesses() {
                false => Err(e),
                true => self.add_new(bytes),
            })
    }

    /// The memory of guesses goes back. `false`: there are none.
    fn forget_guesses(&self) -> bool {
        let guesses = std::mem::take(&mut *self.guesses());
        let parts = guesses.iter().filter_map(Weak::upgrade);
        parts.for_each(|part| drop(part.release_reserved()));
        !guesses.is_empty()
    }

    /// Whether `bytes`, which are charged, can be touched before memory is short. If not, guesses go
    /// first.
    fn check_room(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let whole = self.whole.as_deref().unwrap_or(self);
        let Some(gauge) = &whole.gauge else {
            return Ok(());
        };
        let take = || gauge.take(bytes, || whole.used());
        take()
            .or_else(|e| match whole.forget_guesses() {
                false => Err(e),
                true => take(),
            })
            .map_err(Into::into)
    }

    fn add_new(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let limit = self.limit;
        let session = self.whole.is_some();
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .map_err(|_| OutOfMemory::Limit { limit, session })?;
        let whole = self.whole.as_ref();
        let added = whole.map_or(Ok(()), |whole| whole.add_before_guesses(bytes));
        added.inspect_err(|_| {
            self.used.fetch_sub(bytes, Ordering::Relaxed);
        })
    }

    fn exceed_by(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.exceed_by(bytes);
        }
    }

    fn subtract(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            whole.subtract(bytes);
        }
    }

    fn guesses(&self) -> MutexGuard<'_, Vec<Weak<Budget>>> {
        self.guesses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much more can be charged on a guess, as it is now.
    pub fn room(&self) -> u64 {
        let own = self.limit.saturating_sub(self.used());
        let above = match (&self.whole, &self.gauge) {
            (Some(whole), _) => whole.room(),
            (None, Some(gauge)) => gauge.room_for_guess(self.used()),
            (None, None) => u64::MAX,
        };
        own.min(above)
    }

    /// Whether memory may still be made ready for what is reserved.
    pub fn allows_guess(&self) -> bool {
        let whole = self.whole.as_deref().unwrap_or(self);
        let gauge = whole.gauge.as_ref();
        gauge.is_none_or(|gauge| gauge.allows_guess(whole.used()))
    }

    /// Charges for bytes that are still to come, until another session needs the memory.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Result<(), OutOfMemory> {
        self.add_new(bytes)?;
        self.reserved_bytes.fetch_add(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            let mut guesses = whole.guesses();
            guesses.retain(|other| other.strong_count() > 0);
            guesses.push(Arc::downgrade(self));
        }
        Ok(())
    }

    /// What is left of that.
    pub fn reserved_bytes(&self) -> u64 {
        self.reserved_bytes.load(Ordering::Relaxed)
    }

    /// The reserved memory, as far as it is ready.
    pub fn reserved(&self) -> &Reserved {
        &self.reserved
    }

    /// So many bytes were made ready, and no more stay reserved.
    pub fn keep_reserved(&self, bytes: u64) {
        let keep = |reserved: u64| (reserved > bytes).then_some(bytes);
        let kept = self
            .reserved_bytes
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, keep);
        if let Ok(before) = kept {
            self.subtract(before - bytes);
        }
    }

    /// No more bytes are to come, or other sessions need the memory.
    pub fn release_reserved(&self) -> Leftover {
        let leftover = self.reserved.forget();
        self.subtract(self.reserved_bytes.swap(0, Ordering::Relaxed));
        leftover
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A charge to be grown.
    pub fn nothing(self: &Arc<Self>) -> Charge {
        Charge {
            budget: self.clone(),
            bytes: 0,
        }
    }

    /// A charge that no limit refuses: for what is made of memory that is charged already.
    pub fn exceed(self: &Arc<Self>, bytes: u64) -> Charge {
        self.exceed_by(bytes);
        Charge {
            budget: self.clone(),
            bytes,
        }
    }

    pub fn charge(self: &Arc<Self>, bytes: u64) -> Result<Charge, OutOfMemory> {
        let mut charge = self.nothing();
        charge.grow(bytes)?;
        Ok(charge)
    }
}

impl Charge {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Where the memory that it is for comes from.
    pub fn memory(&self) -> &Source {
        &self.budget.memory
    }

    /// Another one, of the same budget.
    pub fn another(&self, bytes: u64) -> Result<Charge, OutOfMemory> {
        self.budget.charge(bytes)
    }

    /// Grows by what is there already: no limit refuses that.
    pub fn exceed(&mut self, bytes: u64) {
        self.budget.exceed_by(bytes);
        self.bytes += bytes;
    }

    pub fn grow(&mut self, bytes: u64) -> Result<(), OutOfMemory> {
        self.budget.add(bytes)?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Charge {
    /// Takes over another charge. That of another session (a series that a dump has claimed) is
    /// this one's from now on; no limit refuses what is there already.
    pub fn absorb(&mut self, mut other: Charge) {
        if Arc::ptr_eq(&self.budget, &other.budget) {
            self.bytes += std::mem::take(&mut other.bytes);
        } else {
            self.budget.exceed_by(other.bytes);
            self.bytes += other.bytes;
        }
    }

    /// Takes a part of this charge for itself.
    pub fn split(&mut self, bytes: u64) -> Charge {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Charge {
            budget: self.budget.clone(),
            bytes,
        }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        drop(self.release_reserved());
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.budget.subtract(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charged_refused_and_given_back() {
        let budget = Budget::new(100);
        let mut a = budget.charge(60).unwrap();
        assert!(budget.charge(41).is_err());
        a.grow(40).unwrap();
        assert_eq!(
            a.grow(1),
            Err(OutOfMemory::Limit {
                limit: 100,
                session: false
            })
        );
        assert!(a.grow(u64::MAX).is_err());
        assert_eq!(budget.used(), 100);
        drop(a);
        assert_eq!(budget.used(), 0);
    }

    /// Past what the control group has a charge is refused, though the limit has room; a guess goes first.
    #[test]
    fn a_control_group_refuses_before_it_kills() {
        const MIB: u64 = 1 << 20;
        let fake = crate::store::memory::testing::Fake::new(100);
        let whole = Budget::gauged(1 << 40, false, fake.gauge());
        let session = whole.of_session(None);
        let kept = session.charge(40 * MIB).unwrap();
        let refused = session.charge(60 * MIB).unwrap_err();
        assert!(matches!(refused, OutOfMemory::Short(_)), "{refused}");
        assert_eq!((whole.used(), session.used()), (40 * MIB, 40 * MIB));
        // What others have charged and not touched yet is taken.
        let other = whole.of_session(None);
        assert!(other.charge(60 * MIB).is_err());
        fake.used(40, 40);
        // A guess leaves twice as much free, and makes room for what is here.
        assert_eq!(other.room(), 28 * MIB);
        other.reserve(28 * MIB).unwrap();
        assert_eq!(whole.used(), 68 * MIB);
        let more = session.charge(43 * MIB).unwrap();
        assert_eq!(whole.used(), 83 * MIB);
        drop((kept, more));
        assert_eq!((whole.used(), session.used(), other.used()), (0, 0, 0));
    }

    /// Small images do not go where memory is ready: the same bytes are there twice for a while.
    #[test]
    fn what_was_reserved_is_looked_at_when_it_comes() {
        const MIB: u64 = 1 << 20;
        let fake = crate::store::memory::testing::Fake::new(100);
        let whole = Budget::gauged(1 << 40, false, fake.gauge());
        let session = whole.of_session(None);
        session.reserve(60 * MIB).unwrap();
        fake.used(60, 60);
        let first = session.charge(10 * MIB).unwrap();
        assert_eq!(whole.used(), 60 * MIB);
        // Everything touched beside what is ready: the guess goes.
        fake.used(90, 90);
        let all = session.charge(50 * MIB);
        assert!(all.is_err() && session.reserved_bytes() == 50 * MIB);
        drop((first, session));
        assert_eq!(whole.used(), 0);
    }

    #[test]
    fn a_session_has_a_part_of_the_whole() {
        let whole = Budget::new(100);
        let (one, other) = (whole.of_session(Some(60)), whole.of_session(None));
        let mut a = one.charge(50).unwrap();
        assert_eq!(
            a.grow(11).unwrap_err().to_string(),
            "the memory limit of 60 B for one session is reached"
        );
        let b = other.charge(50).unwrap();
        // The session has room, and all together have not.
        assert_eq!(
            a.grow(1).unwrap_err().to_string(),
            "the memory limit of 100 B is reached"
        );
        assert_eq!((one.used(), other.used(), whole.used()), (50, 50, 100));
        a.absorb(b);
        assert_eq!((one.used(), other.used(), whole.used()), (100, 0, 100));
        drop(a);
        assert_eq!((one.used(), other.used(), whole.used()), (0, 0, 0));
    }
}
