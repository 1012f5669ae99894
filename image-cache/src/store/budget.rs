//! How much memory the images may take (`--memory-limit`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// What every image costs besides its bytes: its entry, its name, the rounding of its memory.
pub const IMAGE_OVERHEAD_BYTES: u64 = 512;

#[derive(Debug)]
pub struct Budget {
    limit: u64,
    /// Memory is taken in small parts, which can go back one by one.
    pub granular: bool,
    used: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the memory limit of {} is reached", image_common::units::human_size(*.limit))]
pub struct OutOfMemory {
    limit: u64,
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
        })
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
        self.used.fetch_add(bytes, Ordering::Relaxed);
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

    pub fn grow(&mut self, bytes: u64) -> Result<(), OutOfMemory> {
        let limit = self.budget.limit;
        let add = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
        self.budget
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add)
            .map_err(|_| OutOfMemory { limit })?;
        self.bytes += bytes;
        Ok(())
    }
}

impl Charge {
    /// Takes over another charge of the same budget.
    pub fn absorb(&mut self, mut other: Charge) {
        self.bytes += std::mem::take(&mut other.bytes);
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
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
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
        assert_eq!(a.grow(1), Err(OutOfMemory { limit: 100 }));
        assert!(a.grow(u64::MAX).is_err());
        assert_eq!(budget.used(), 100);
        drop(a);
        assert_eq!(budget.used(), 0);
    }
}
