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

use std::sync::{Arc, Weak};

use tokio::sync::mpsc;

use crate::store::memory::budget::Budget;
use crate::store::memory::region::{Region, HUGE_PAGE_BYTES};
use crate::store::memory::reserved::ReserveJob;

/// Less than this is there in a moment.
const LEAST_BYTES: usize = 16 << 20;

/// Mapped at once.
const REGION_BYTES: usize = 64 << 20;

/// More threads wait for each other in the kernel, and others have work to do, too.
const MAX_THREADS: usize = 4;

/// A dump that is under way does not wait for one that has not begun.
const NICE: i32 = 10;

/// Makes memory ready for `bytes` that `budget`'s session will bring, or as many of them as there is
/// room for. Gives how many there are then.
pub async fn reserve(budget: &Arc<Budget>, bytes: u64) -> u64 {
    let bytes = bytes.min(budget.room());
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX) & !(HUGE_PAGE_BYTES - 1);
    if bytes < LEAST_BYTES || budget.reserve(bytes as u64).is_err() {
        return 0;
    }
    let job = ReserveJob::new(bytes);
    if !budget.reserved().begin(&job) {
        drop(budget.release_reserved());
        return 0;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = cores.min(MAX_THREADS).min(bytes.div_ceil(REGION_BYTES));
    let (working, mut all_done) = mpsc::channel::<()>(1);
    for _ in 0..threads {
        let (job, budget, working) = (job.clone(), Arc::downgrade(budget), working.clone());
        let thread = std::thread::Builder::new().name("reserve".to_owned());
        let started = thread.spawn(move || {
            let _ = rustix::process::setpriority_process(None, NICE); // of this thread
            work(&job, &budget);
            drop(working);
        });
        if let Err(e) = started {
            tracing::warn!(
                "cannot start a thread that makes reserved memory ready, so less of it is: {e}"
            );
        }
    }
    drop(working);
    // No message is sent: the channel closes when the last of them has ended.
    all_done.recv().await;
    let ready = budget.reserved().bytes() as u64;
    budget.keep_reserved(ready);
    ready
}

fn work(job: &Arc<ReserveJob>, budget: &Weak<Budget>) {
    while let Some(len) = job.next_part(REGION_BYTES) {
        let Some(memory) = budget
            .upgrade()
            .filter(|budget| budget.allows_guess())
            .map(|budget| budget.memory.clone())
        else {
            return;
        };
        let Ok(region) = Region::aligned(&memory, len) else {
            return;
        };
        // In short calls: a thread that maps memory waits for them.
        for start in (0..len).step_by(HUGE_PAGE_BYTES) {
            if job.is_stopped() || region.populate(start, HUGE_PAGE_BYTES).is_err() {
                return;
            }
        }
        let put = |budget: Arc<Budget>| budget.reserved().put(job, region, budget.reserved_bytes());
        if !budget.upgrade().is_some_and(put) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::memory::reserved::TAKEN_BYTES;

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
        let region = session.reserved().take(3 << 20).unwrap();
        assert_eq!(region.len(), 4 << 20);
        assert_eq!(
            session.reserved().take(64 << 20).unwrap().len(),
            TAKEN_BYTES
        );
        assert!(
            session.reserved().take((1 << 20) - 1).is_none(),
            "too small"
        );
        assert_eq!(session.reserved().take(1 << 20).unwrap().len(), 2 << 20);
        drop(session.release_reserved());
        assert!(session.reserved().take(4 << 20).is_none());
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
        while let Some(region) = session.reserved().take(8 << 20) {
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
        assert!(one.reserved().take(4 << 20).is_none());
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
        let job = ReserveJob::new(128 << 20);
        session.reserve(128 * MIB).unwrap();
        assert!(session.reserved().begin(&job));
        // Most of the dump was here first.
        let charge = session.charge(100 * MIB).unwrap();
        work(&job, &Arc::downgrade(&session));
        assert_eq!(session.reserved().bytes(), 0);
        drop(charge);
        drop(session.release_reserved());
        assert!(job.is_stopped());
        assert_eq!(session.used(), 0);
    }
}
