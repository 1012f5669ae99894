//! CRIU dumps into us: the unix sockets, one file per dialect. The frontends turn requests
//! into runs and images and know nothing of the link.

pub mod images_dir;
pub mod page_server;
pub mod remote;
pub mod remote_read_back;
pub mod stream;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use image_common::criu::dialect::Stop;
use image_common::criu_io::sockets::{self, Listener};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::session::run::{Run, State};

/// The longest that anybody waits for the connections before it. Far more than the work
/// takes; less than what CRIU, or somebody who debugs it, would notice.
const SETTLED_WITHIN: Duration = Duration::from_secs(12);

/// Connections whose purpose is not known yet. CRIU makes a connection per image, so "CRIU
/// has nothing open" can be said only when none of these is left, nor one not yet accepted.
///
/// CRIU writes its request before it does anything else. So a connection on which nothing
/// waits to be read, or which has stalled inside its request, is nobody's earlier operation.
pub struct Frontier {
    waiting: Mutex<Waiting>,
    sockets: OnceLock<Arc<remote::Sockets>>,
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
    frontier: Arc<Frontier>,
}

impl Frontier {
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
            frontier: self.clone(),
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

    pub fn serves(&self, sockets: Arc<remote::Sockets>) {
        let _ = self.sockets.set(sockets);
    }

    /// A run failed which nobody will veto at post-dump, and whose CRIU would be killed if its
    /// connections were closed: the next image it opens is refused instead.
    pub fn veto(&self, run: &Arc<Run>, state: &State) {
        let over = state.finish || state.source_ended;
        if let Some(sockets) = self
            .sockets
            .get()
            .filter(|_| !over && state.dialect.stop() == Stop::RefusedConnection)
        {
            sockets.refuse_until_gone(run);
        }
    }
}

impl Ticket {
    /// From now on it is waited for by those that ask for the list of runs.
    pub fn absorbs(&self) {
        let mut waiting = self.frontier.waiting();
        waiting.tickets.insert(self.number, Purpose::Absorbing);
    }

    /// Waits until every operation that its client began earlier is done.
    pub async fn turn(&self) {
        self.frontier
            .until(|| {
                let waiting = self.frontier.waiting();
                let mut earlier = waiting.tickets.range(..self.number);
                !earlier.any(|(_, p)| matches!(p, Purpose::Absorbing) || p.has_input())
            })
            .await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.frontier.waiting().tickets.remove(&self.number);
    }
}

/// Accepts until `stop`; connections outlive it.
pub async fn accept<F, T>(listener: Arc<Listener>, stop: CancellationToken, serve: F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    sockets::accept(&listener, &stop, &serve).await;
    // What is connected already must be accepted: reset, it would kill CRIU.
    sockets::accept_waiting(&listener, &serve);
}
