//! Memory that is made ready before a dump comes.
//!
//! Anonymous memory costs a fault and its zeroing when it is first touched: on a virtual machine
//! whose host has taken free memory back, as much as receiving into it. Before its tasks are frozen
//! image-proxy tells how much a dump will bring, and waits: what is touched here then, on as many
//! cores as there are, is not touched in the tasks' frozen time.
//!
//! What is ready is charged to its session, and what arrives uses up that charge before it is
//! charged itself ([`Budget`]). It is only a guess about the future: when others need the memory, or
//! the set is complete without it, it goes back.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::mpsc;

use crate::store::memory::budget::Budget;
use crate::store::memory::region::{Region, HUGE_PAGE_BYTES};

/// Less than this is there in a moment.
const LEAST_BYTES: usize = 16 << 20;

/// Mapped at once.
const REGION_BYTES: usize = 64 << 20;

/// For less, a huge page would be too much.
const LEAST_TAKEN_BYTES: usize = HUGE_PAGE_BYTES / 2;

/// Taken at once, at most: what is left of it at the end of an image was made ready in vain.
const TAKEN_BYTES: usize = 8 << 20;

/// What a session may have charged otherwise without being a dump that has begun.
const SLACK_BYTES: u64 = 1 << 20;

/// More threads wait for each other in the kernel, and others have work to do, too.
const MAX_THREADS: usize = 4;

/// Nobody's dump that is under way shall wait for one that is not.
const NICE: i32 = 10;

/// What a session has ready.
#[derive(Debug, Default)]
pub struct Ahead(Mutex<State>);

#[derive(Default)]
struct State {
    job: Option<Arc<Job>>,
    /// No more comes, so nothing is to be made ready any more.
    over: bool,
    ready: Vec<Region>,
    bytes: usize,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes ready", self.bytes)
    }
}

/// Memory that was made ready in vain. It goes back when this is dropped, which takes as long as there is
/// much of it.
#[must_use]
pub struct Leftover(#[allow(dead_code, reason = "to be dropped")] Vec<Region>);

impl Leftover {
    /// Nobody waits for it.
    pub fn drop_aside(self) {
        if !self.0.is_empty() {
            drop(tokio::task::spawn_blocking(move || drop(self)));
        }
    }
}

/// What is being made ready.
struct Job {
    bytes: usize,
    begun: AtomicUsize,
    stopped: AtomicBool,
}

impl Ahead {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// About `want` bytes, if so many are ready; nothing for what is too small for it.
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

    /// Nothing is made ready any more, and what is there goes back with what this gives.
    pub fn forget(&self) -> Leftover {
        let mut state = self.state();
        state.over = true;
        if let Some(job) = state.job.take() {
            job.stopped.store(true, Ordering::Relaxed);
        }
        state.bytes = 0;
        Leftover(std::mem::take(&mut state.ready))
    }

    /// `false`: it comes too late.
    fn begin(&self, job: &Arc<Job>) -> bool {
        let mut state = self.state();
        if !state.over {
            state.job = Some(job.clone());
        }
        !state.over
    }

    /// `false` if it is of no use any more.
    fn put(&self, job: &Arc<Job>, region: Region, wanted: u64) -> bool {
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

/// Makes memory ready for `bytes` that `budget`'s session will bring, or as many of them as there is
/// room for. Gives how many there are then.
pub async fn reserve(budget: &Arc<Budget>, bytes: u64) -> u64 {
    let bytes = bytes.min(budget.room());
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX) & !(HUGE_PAGE_BYTES - 1);
    if bytes < LEAST_BYTES || budget.charge_ahead(bytes as u64).is_err() {
        return 0;
    }
    let job = Arc::new(Job {
        bytes,
        begun: AtomicUsize::new(0),
        stopped: AtomicBool::new(false),
    });
    if !budget.ahead().begin(&job) {
        drop(budget.forget_ahead());
        return 0;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(MAX_THREADS).min(bytes.div_ceil(REGION_BYTES));
    let (working, mut all_done) = mpsc::channel::<()>(1);
    for _ in 0..threads {
        let (job, budget, working) = (job.clone(), Arc::downgrade(budget), working.clone());
        let thread = std::thread::Builder::new().name("ahead".to_owned());
        let started = thread.spawn(move || {
            let _ = rustix::process::setpriority_process(None, NICE); // of this thread
            work(&job, &budget);
            drop(working);
        });
        if let Err(e) = started {
            tracing::warn!("no thread to make memory ready: {e}");
        }
    }
    drop(working);
    // Nobody says anything: it ends when the last of them has gone.
    all_done.recv().await;
    let ready = budget.ahead().state().bytes as u64;
    budget.keep_ahead(ready);
    ready
}

fn work(job: &Arc<Job>, budget: &Weak<Budget>) {
    loop {
        let at = job.begun.fetch_add(REGION_BYTES, Ordering::Relaxed);
        let len = REGION_BYTES.min(job.bytes.saturating_sub(at));
        if len == 0 || !budget.upgrade().is_some_and(|budget| budget.allows_guess()) {
            return;
        }
        let Ok(region) = Region::aligned(len) else {
            return;
        };
        // In short calls: whoever maps memory waits for them.
        for start in (0..len).step_by(HUGE_PAGE_BYTES) {
            if job.stopped.load(Ordering::Relaxed)
                || region.populate(start, HUGE_PAGE_BYTES).is_err()
            {
                return;
            }
        }
        let put = |budget: Arc<Budget>| budget.ahead().put(job, region, budget.charged_ahead());
        if !budget.upgrade().is_some_and(put) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
    }

    #[test]
    fn what_is_ready_is_charged_once_and_used_up() {
        let whole = Budget::new(200 * MIB);
        let session = whole.of_session(None);
        let ready = runtime().block_on(reserve(&session, 100 * MIB + 5));
        assert_eq!(ready, 100 * MIB);
        assert_eq!((whole.used(), session.used()), (100 * MIB, 100 * MIB));
        // What arrives is charged already.
        let mut charge = session.charge(70 * MIB).unwrap();
        assert_eq!(whole.used(), 100 * MIB);
        charge.grow(40 * MIB).unwrap();
        assert_eq!(whole.used(), 110 * MIB);
        // In whole huge pages, at most so many at once.
        let region = session.ahead().take(3 << 20).unwrap();
        assert_eq!(region.len(), 4 << 20);
        assert_eq!(session.ahead().take(64 << 20).unwrap().len(), TAKEN_BYTES);
        assert!(session.ahead().take((1 << 20) - 1).is_none(), "too small");
        assert_eq!(session.ahead().take(1 << 20).unwrap().len(), 2 << 20);
        drop(session.forget_ahead());
        assert!(session.ahead().take(4 << 20).is_none());
        assert_eq!(
            runtime().block_on(reserve(&session, 100 * MIB)),
            0,
            "too late"
        );
        drop(charge);
        assert_eq!((whole.used(), session.used()), (0, 0));
    }

    #[test]
    fn all_of_it_can_be_taken() {
        let session = Budget::new(300 * MIB).of_session(None);
        let ready = runtime().block_on(reserve(&session, 150 * MIB));
        let mut taken = 0;
        while let Some(region) = session.ahead().take(8 << 20) {
            taken += region.len() as u64;
        }
        assert_eq!((ready, taken), (150 * MIB, 150 * MIB));
    }

    #[test]
    fn others_that_need_the_memory_get_it() {
        let whole = Budget::new(100 * MIB);
        let (one, other) = (whole.of_session(None), whole.of_session(None));
        assert_eq!(runtime().block_on(reserve(&one, 500 * MIB)), 100 * MIB);
        let charge = other.charge(60 * MIB).unwrap();
        assert_eq!((whole.used(), one.used()), (60 * MIB, 0));
        assert!(one.ahead().take(4 << 20).is_none());
        // What has arrived is not guessed.
        assert!(one.charge(41 * MIB).is_err());
        let arrived = one.charge(40 * MIB).unwrap();
        assert_eq!(runtime().block_on(reserve(&other, 50 * MIB)), 0);
        drop((charge, arrived));
        assert_eq!(whole.used(), 0);
    }

    #[test]
    fn a_session_that_goes_leaves_nothing_charged() {
        let whole = Budget::new(100 * MIB);
        let session = whole.of_session(Some(40 * MIB));
        assert_eq!(runtime().block_on(reserve(&session, 90 * MIB)), 40 * MIB);
        drop(session);
        assert_eq!(whole.used(), 0);
    }

    #[test]
    fn it_stops_when_it_is_not_wanted_any_more() {
        let session = Budget::new(1 << 40).of_session(None);
        let job = Arc::new(Job {
            bytes: 128 << 20,
            begun: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        });
        session.charge_ahead(128 * MIB).unwrap();
        assert!(session.ahead().begin(&job));
        // Most of the dump was here first.
        let charge = session.charge(100 * MIB).unwrap();
        work(&job, &Arc::downgrade(&session));
        assert_eq!(session.ahead().state().bytes, 0);
        drop(charge);
        drop(session.forget_ahead());
        assert!(job.stopped.load(Ordering::Relaxed));
        assert_eq!(session.used(), 0);
    }
}
