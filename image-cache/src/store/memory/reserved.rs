//! The account of reserved memory: what is ready for a dump that is still to come, and the job that
//! makes more of it ready ([`crate::store::memory::reservation`]).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::store::memory::region::{Region, HUGE_PAGE_BYTES};

/// For less, a huge page would be too much.
const LEAST_TAKEN_BYTES: usize = HUGE_PAGE_BYTES / 2;

/// Taken at once, at most. What is left of it at the end of an image was made ready in vain.
pub const TAKEN_BYTES: usize = 8 << 20;

/// What a session may have charged otherwise before its dump begins.
const SLACK_BYTES: u64 = 1 << 20;

/// The reserved memory of a session, as far as it is ready.
#[derive(Debug, Default)]
pub struct Reserved(Mutex<Ready>);

#[derive(Default)]
struct Ready {
    job: Option<Arc<ReserveJob>>,
    /// The dump is here, so no more is made ready.
    over: bool,
    ready: Vec<Region>,
    bytes: usize,
}

impl std::fmt::Debug for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes ready", self.bytes)
    }
}

/// Reserved memory that no dump has used. It goes back when this is dropped; much of it takes long.
#[must_use]
pub struct Leftover(#[allow(dead_code, reason = "to be dropped")] Vec<Region>);

impl Leftover {
    /// Gives it back on another thread.
    pub fn drop_aside(self) {
        if !self.0.is_empty() {
            drop(tokio::task::spawn_blocking(move || drop(self)));
        }
    }
}

/// One RESERVE, while threads touch memory for it.
pub struct ReserveJob {
    bytes: usize,
    begun: AtomicUsize,
    stopped: AtomicBool,
}

impl ReserveJob {
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes,
            begun: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        })
    }

    /// The size of the next part of at most `most` bytes; `None` if all of it has begun.
    pub fn next_part(&self, most: usize) -> Option<usize> {
        let at = self.begun.fetch_add(most, Ordering::Relaxed);
        let len = most.min(self.bytes.saturating_sub(at));
        (len > 0).then_some(len)
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

impl Reserved {
    fn state(&self) -> MutexGuard<'_, Ready> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bytes(&self) -> usize {
        self.state().bytes
    }

    /// About `want` bytes, if so many are ready. Nothing for a `want` that is too small.
    pub fn take(&self, want: usize) -> Option<Region> {
        if want < LEAST_TAKEN_BYTES {
            return None;
        }
        let want = want.min(TAKEN_BYTES).next_multiple_of(HUGE_PAGE_BYTES);
        let mut state = self.state();
        let mut region = state.ready.pop()?;
        if region.len() > want {
            let rest = region.split_off(want);
            state.ready.push(rest);
        }
        state.bytes -= region.len();
        Some(region)
    }

    /// Stops the job. What is ready goes back with the value that this returns.
    pub fn forget(&self) -> Leftover {
        let mut state = self.state();
        state.over = true;
        if let Some(job) = state.job.take() {
            job.stopped.store(true, Ordering::Relaxed);
        }
        state.bytes = 0;
        Leftover(std::mem::take(&mut state.ready))
    }

    /// `false`: too late, the dump is here.
    pub fn begin(&self, job: &Arc<ReserveJob>) -> bool {
        let mut state = self.state();
        if !state.over {
            state.job = Some(job.clone());
        }
        !state.over
    }

    /// Adds a region that was touched. `false` if no more are wanted.
    pub fn put(&self, job: &Arc<ReserveJob>, region: Region, wanted: u64) -> bool {
        let mut state = self.state();
        let current = state.job.as_ref().is_some_and(|j| Arc::ptr_eq(j, job));
        let needed = (state.bytes + region.len()) as u64 <= wanted.saturating_add(SLACK_BYTES);
        if current && needed {
            state.bytes += region.len();
            state.ready.push(region);
        }
        current && needed
    }
}
