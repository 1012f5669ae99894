//! CRIU dumps into us: the unix sockets, one file per dialect. The frontends turn requests
//! into runs and images and know nothing of the link.

pub mod read_back;
pub mod remote;
pub mod stream;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use image_common::sockets::has_backlog;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::proxy::needs_veto;
use crate::run::{Run, State};

/// A failing accept (out of descriptors) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The longest that [`Frontier::settled`] waits: the time a silent connection has for its
/// header, and a bit.
const SETTLED_WITHIN: Duration = Duration::from_secs(12);

/// Connections whose purpose is not known yet. CRIU makes a connection per image, so "CRIU
/// has nothing open" can be said only when none of these is left, nor one not yet accepted.
pub struct Frontier {
    waiting: Mutex<Waiting>,
    changes: watch::Sender<()>,
    sockets: OnceLock<Arc<remote::Sockets>>,
}

#[derive(Default)]
struct Waiting {
    next: u64,
    /// By order of arrival: whether the connection is known not to be an image.
    tickets: BTreeMap<u64, bool>,
}

/// A connection's place in the order of arrival, held until its purpose is known.
pub struct Ticket {
    number: u64,
    frontier: Arc<Frontier>,
}

impl Frontier {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            waiting: Mutex::default(),
            changes: watch::Sender::new(()),
            sockets: OnceLock::new(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ticket(self: &Arc<Self>) -> Ticket {
        let mut waiting = self.waiting();
        let number = waiting.next;
        waiting.next += 1;
        waiting.tickets.insert(number, false);
        Ticket {
            number,
            frontier: self.clone(),
        }
    }

    async fn wait(&self, until: impl Fn(&BTreeMap<u64, bool>) -> bool) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            if until(&self.waiting().tickets) {
                return;
            }
            let _ = changes.changed().await; // the sender is in `self`
        }
    }

    /// Waits until the purpose of every connection made so far is known.
    pub async fn settled(&self) {
        let settled = async {
            loop {
                self.wait(|tickets| tickets.values().all(|known| *known))
                    .await;
                match self.sockets.get() {
                    Some(sockets) if sockets.have_backlog() => tokio::task::yield_now().await,
                    _ => return,
                }
            }
        };
        // Somebody who connects and says nothing must not hold up a dump for longer.
        let _ = tokio::time::timeout(SETTLED_WITHIN, settled).await;
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
            .filter(|_| !over && needs_veto(state.dialect))
        {
            tokio::spawn(sockets.clone().refuse_until_gone(run.clone()));
        }
    }
}

impl Ticket {
    /// Its purpose is known, and it is no image: it keeps its place in the order, and nobody
    /// has to wait for it to say that CRIU has nothing open.
    pub fn is_no_image(&self) {
        self.frontier.waiting().tickets.insert(self.number, true);
        self.frontier.changes.send_replace(());
    }

    /// Waits until the purpose of every connection accepted before this one is known.
    pub async fn turn(&self) {
        self.frontier
            .wait(|tickets| tickets.keys().next().is_none_or(|&n| n >= self.number))
            .await;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.frontier.waiting().tickets.remove(&self.number);
        self.frontier.changes.send_replace(());
    }
}

/// Accepts until `stop`; connections outlive it.
pub async fn accept<F, T>(listener: Arc<UnixListener>, stop: CancellationToken, serve: F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((connection, _)) => drop(tokio::spawn(serve(connection))),
            Err(e) => {
                tracing::error!("cannot accept a connection: {e}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Waits until nothing waits to be accepted.
async fn backlog_empty(listener: &UnixListener) {
    while has_backlog(listener) {
        tokio::task::yield_now().await;
    }
}
