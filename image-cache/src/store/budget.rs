//! How much memory the images may take: all (`--memory-limit`), and those of one session
//! (`--max-session-memory`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

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
        Arc::new(Self {
            limit,
            granular,
            used: AtomicU64::new(0),
            whole: None,
        })
    }

    /// The budget of a session: what is charged to it is charged to this one, too.
    pub fn of_session(self: &Arc<Self>, limit: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            limit: limit.unwrap_or(u64::MAX),
            granular: self.granular,
            used: AtomicU64::new(0),
            whole: Some(self.clone()),
        })
    }

    fn add(&self, bytes: u64) -> Result<(), OutOfMemory> {
        let limit = self.limit;
        let session = self.whole.is_some();
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .map_err(|_| OutOfMemory { limit, session })?;
        let added = self.whole.as_ref().map_or(Ok(()), |whole| whole.add(bytes));
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
