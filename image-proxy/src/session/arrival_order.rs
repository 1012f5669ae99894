//! The order in which CRIU's connections came, and what is still unread of them.
//!
//! A `--remote` CRIU makes a connection per image, and each is served by a task of its own. An
//! operation that depends on earlier ones takes its turn here.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use tokio::net::UnixStream;

use crate::session::run::Run;
use crate::session::state::RunState;

/// The listening sockets of `--remote`, as far as the order of arrival depends on them.
pub trait RemoteSockets: Send + Sync {
    /// Whether a connection waits to be accepted.
    fn have_backlog(&self) -> bool;
    /// Refuses CRIU's next connections until the CRIU of this run is gone.
    fn refuse_until_gone(self: Arc<Self>, run: &Arc<Run>);
}

/// How long an operation waits for the connections before it, at most. The work takes far less.
const SETTLED_WITHIN: Duration = Duration::from_secs(12);

/// Connections whose purpose is not known yet. CRIU makes a connection per image, so "CRIU
/// has nothing open" can be said only when none of these is left, nor one not yet accepted.
///
/// CRIU writes its request before it does anything else. So a connection on which nothing
/// waits to be read, or which has stalled inside its request, is no earlier operation.
pub struct ArrivalOrder {
    waiting: Mutex<Waiting>,
    sockets: OnceLock<Arc<dyn RemoteSockets>>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// By order of arrival.
    tickets: BTreeMap<u64, Purpose>,
}

enum Purpose {
    /// Not known; or a push whose id has not been read.
    Reading(Weak<UnixStream>),
    /// It changes the list of runs and is about to.
    Absorbing,
}

impl Purpose {
    fn has_input(&self) -> bool {
        match self {
            Self::Reading(stream) => stream
                .upgrade()
                .is_some_and(|s| rustix::io::ioctl_fionread(&*s).is_ok_and(|n| n > 0)),
            Self::Absorbing => false,
        }
    }
}

/// A connection's place in the order of arrival, held until it has done what others wait for.
pub struct Ticket {
    number: u64,
    order: Arc<ArrivalOrder>,
}

impl ArrivalOrder {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::default(),
            sockets: OnceLock::new(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ticket(self: &Arc<Self>, connection: &Arc<UnixStream>) -> Ticket {
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        let purpose = Purpose::Reading(Arc::downgrade(connection));
        waiting.tickets.insert(number, purpose);
        Ticket {
            number,
            order: self.clone(),
        }
    }

    /// Lets other tasks run until it is so. What is waited for needs nothing but a turn.
    async fn until(&self, mut settled: impl FnMut() -> bool) {
        let wait = async {
            while !settled() {
                tokio::task::yield_now().await;
            }
        };
        let _ = tokio::time::timeout(SETTLED_WITHIN, wait).await;
    }

    /// Waits until the purpose of every connection made so far is known.
    pub async fn settled(&self) {
        self.until(|| {
            let backlog = self.sockets.get().is_some_and(|s| s.have_backlog());
            !backlog && !self.waiting().tickets.values().any(Purpose::has_input)
        })
        .await;
    }

    /// Waits until every operation that began so far is done: also the pushes that wait for an
    /// earlier run.
    pub async fn absorbed(&self) {
        self.settled().await;
        self.until(|| {
            let waiting = self.waiting();
            let mut purposes = waiting.tickets.values();
            !purposes.any(|p| matches!(p, Purpose::Absorbing))
        })
        .await;
    }

    pub fn serves(&self, sockets: Arc<dyn RemoteSockets>) {
        let _ = self.sockets.set(sockets);
    }

    /// A run without script has failed. Closed connections would kill its CRIU (SIGPIPE), so the next
    /// image that CRIU opens is refused instead.
    pub fn veto(&self, run: &Arc<Run>, state: &RunState) {
        let over = state.dumper.is_done();
        let sockets = self.sockets.get();
        if let Some(sockets) = sockets.filter(|_| !over && state.stops_by_refusal()) {
            sockets.clone().refuse_until_gone(run);
        }
    }
}

impl Ticket {
    /// From now on it is waited for by those that ask for the list of runs.
    pub fn absorbs(&self) {
        let mut waiting = self.order.waiting();
        waiting.tickets.insert(self.number, Purpose::Absorbing);
    }

    /// Waits until every operation that its client began earlier is done.
    pub async fn turn(&self) {
        self.order
            .until(|| {
                let waiting = self.order.waiting();
                let mut earlier = waiting.tickets.range(..self.number);
                !earlier.any(|(_, p)| matches!(p, Purpose::Absorbing) || p.has_input())
            })
            .await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.order.waiting().tickets.remove(&self.number);
    }
}
