//! How much memory the images may take: all (`--memory-limit`), and those of one session
//! (`--max-session-memory`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::ahead::{Ahead, Leftover};

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
    used: AtomicU64,
    /// The budget that this one is a part of.
    whole: Option<Arc<Budget>>,
    /// Of `used`, what is for bytes that are still to come.
    charged_ahead: AtomicU64,
    ahead: Ahead,
    /// Its parts that have something charged ahead.
    guesses: Mutex<Vec<Weak<Budget>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory limit of {} {}is reached", image_common::units::human_size(*.limit), if *.session { "for one session " } else { "" })]
pub struct OutOfMemory {
    limit: u64,
    session: bool,
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
        Self::part(limit, granular, None)
    }

    /// The budget of a session: what is charged to it is charged to this one, too.
    pub fn of_session(self: &Arc<Self>, limit: Option<u64>) -> Arc<Self> {
        let limit = limit.unwrap_or(u64::MAX);
        Self::part(limit, self.granular, Some(self.clone()))
    }

    fn part(limit: u64, granular: bool, whole: Option<Arc<Self>>) -> Arc<Self> {
        Arc::new(Self {
            limit,
            granular,
            used: AtomicU64::new(0),
            whole,
            charged_ahead: AtomicU64::new(0),
            ahead: Ahead::default(),
            guesses: Mutex::default(),
        })
    }

    /// What was charged ahead is used up first.
    fn add(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let before =
            self.charged_ahead
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |ahead| {
                    (ahead > 0).then(|| ahead.saturating_sub(bytes))
                });
        let drawn = before.unwrap_or(0).min(bytes);
        if drawn == bytes {
            return Ok(());
        }
        self.add_new(bytes - drawn).inspect_err(|_| {
            self.charged_ahead.fetch_add(drawn, Ordering::Relaxed);
        })
    }

    /// The same, but if there is no room it is made of what others only guess.
    fn add_before_guesses(&self, bytes: u64) -> Result<(), OutOfMemory> {
        self.add_new(bytes).or_else(|e| {
            let guesses = std::mem::take(&mut *self.guesses());
            match guesses.is_empty() {
                true => Err(e),
                false => {
                    let parts = guesses.iter().filter_map(Weak::upgrade);
                    parts.for_each(|part| drop(part.forget_ahead()));
                    self.add_new(bytes)
                }
            }
        })
    }

    fn add_new(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let limit = self.limit;
        let session = self.whole.is_some();
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .map_err(|_| OutOfMemory { limit, session })?;
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

    /// How much more can be charged, as it is now.
    pub fn room(&self) -> u64 {
        let own = self.limit.saturating_sub(self.used());
        self.whole
            .as_ref()
            .map_or(own, |whole| whole.room().min(own))
    }

    /// Charges for bytes that are still to come, as long as nobody else needs the room.
    pub fn charge_ahead(self: &Arc<Self>, bytes: u64) -> Result<(), OutOfMemory> {
        self.add_new(bytes)?;
        self.charged_ahead.fetch_add(bytes, Ordering::Relaxed);
        if let Some(whole) = &self.whole {
            let mut guesses = whole.guesses();
            guesses.retain(|other| other.strong_count() > 0);
            guesses.push(Arc::downgrade(self));
        }
        Ok(())
    }

    /// What is left of that.
    pub fn charged_ahead(&self) -> u64 {
        self.charged_ahead.load(Ordering::Relaxed)
    }

    /// The memory that is ready for bytes that are still to come.
    pub fn ahead(&self) -> &Ahead {
        &self.ahead
    }

    /// So many were made ready, and no more are charged ahead.
    pub fn keep_ahead(&self, bytes: u64) {
        let keep = |ahead: u64| (ahead > bytes).then_some(bytes);
        let kept = self
            .charged_ahead
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, keep);
        if let Ok(before) = kept {
            self.subtract(before - bytes);
        }
    }

    /// No more bytes are to come, or others need their room.
    pub fn forget_ahead(&self) -> Leftover {
        let leftover = self.ahead.forget();
        self.subtract(self.charged_ahead.swap(0, Ordering::Relaxed));
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

    /// Another one, of the same budget.
    pub fn another(&self, bytes: u64) -> Result<Charge, OutOfMemory> {
        self.budget.charge(bytes)
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
        drop(self.forget_ahead());
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
            Err(OutOfMemory {
                limit: 100,
                session: false
            })
        );
        assert!(a.grow(u64::MAX).is_err());
        assert_eq!(budget.used(), 100);
        drop(a);
        assert_eq!(budget.used(), 0);
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
