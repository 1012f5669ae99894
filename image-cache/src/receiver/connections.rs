//! The further connections of sessions. The first one opens its session here; others join it,
//! carry image data, and end with it. If one of them breaks, the session does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::link::codec::Message;
use image_common::link::handshake::{Answer, Hello};
use image_common::link::reader::ReadError;
use image_common::shutdown::Shutdown;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::{TaskTracker, TaskTrackerToken};

use super::arrivals::Arrivals;
use super::{LinkFailure, Receiver};
use crate::store::session::Session;
use crate::store::Store;

/// The sessions that are connected, by their keys.
#[derive(Default)]
pub struct Links(Mutex<HashMap<u64, Arc<Hub>>>);

/// What the connections of a session share.
pub(super) struct Hub {
    pub(super) key: u64,
    proxy: u64,
    pub(super) session: Arc<Session>,
    pub(super) images: Arc<Arrivals>,
    /// Every connection stops reading.
    pub(super) over: CancellationToken,
    /// The first connection was closed: the others may, too. Before that the proxy could take
    /// a closed connection for the reason of the end.
    closed: CancellationToken,
    state: Mutex<State>,
    readers: TaskTracker,
}

struct State {
    /// Connections that may still join, by number.
    missing: Vec<u16>,
    connections: u16,
    answers: Option<mpsc::Sender<Message>>,
    failure: Option<LinkFailure>,
}

/// Ends the session's further connections when it is dropped.
pub(super) struct Opened<'a> {
    hub: Arc<Hub>,
    links: &'a Links,
}

/// A further connection that was let in.
pub(super) struct Joined {
    hub: Arc<Hub>,
    connection: u16,
    reads: TaskTrackerToken,
}

impl Links {
    fn hubs(&self) -> MutexGuard<'_, HashMap<u64, Arc<Hub>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn open(
        &self,
        hello: &Hello,
        session: &Arc<Session>,
        answers: mpsc::Sender<Message>,
    ) -> Opened<'_> {
        let mut random = [0; 8];
        // A short read cannot happen for 8 bytes once the pool is initialised (getrandom(2)).
        let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
        let hub = Arc::new(Hub {
            key: u64::from_ne_bytes(random),
            proxy: hello.proxy,
            session: session.clone(),
            images: Arc::new(Arrivals::new(hello.connections.into())),
            over: CancellationToken::new(),
            closed: CancellationToken::new(),
            state: Mutex::new(State {
                missing: (1..hello.connections).collect(),
                connections: hello.connections,
                answers: Some(answers),
                failure: None,
            }),
            readers: TaskTracker::new(),
        });
        self.hubs().insert(hub.key, hub.clone());
        Opened { hub, links: self }
    }

    /// Lets a further connection in, or says why not.
    pub(super) fn join(&self, hello: &Hello, connection: u16, key: u64) -> Result<Joined, String> {
        let known = self.hubs().get(&key).cloned();
        // One text for all: a stranger learns nothing of what is here.
        let hub = known
            .filter(|hub| hub.proxy == hello.proxy && hub.session.name == hello.session)
            .ok_or_else(|| format!("no session {} of this proxy is connected", hello.session))?;
        // Before it is looked whether the session is over: `stop_readers` waits for this one.
        let reads = hub.readers.token();
        let mut state = hub.state();
        let place = state.missing.iter().position(|&c| c == connection);
        let place = place.filter(|_| state.connections == hello.connections);
        match place {
            Some(place) if !hub.over.is_cancelled() => drop(state.missing.swap_remove(place)),
            _ => {
                return Err(format!(
                    "session {} waits for no connection {connection} of {}",
                    hello.session, hello.connections
                ))
            }
        }
        drop(state);
        Ok(Joined {
            hub,
            connection,
            reads,
        })
    }
}

impl Hub {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answers(&self) -> mpsc::Sender<Message> {
        // None when the session is over; what is said then is not heard.
        let answers = self.state().answers.clone();
        answers.unwrap_or_else(|| mpsc::channel(1).0)
    }

    /// The queue ends when the connections have let go of theirs.
    pub(super) fn no_more_answers(&self) {
        self.state().answers = None;
    }

    fn fail(&self, why: LinkFailure) {
        self.state().failure.get_or_insert(why);
        self.over.cancel();
    }

    pub(super) fn failure(&self) -> LinkFailure {
        let failure = self.state().failure.take();
        failure.unwrap_or(LinkFailure::Closed)
    }

    /// Returns when no further connection reads any more.
    pub(super) async fn stop_readers(&self) {
        self.over.cancel();
        self.readers.close();
        self.readers.wait().await;
    }
}

impl std::ops::Deref for Opened<'_> {
    type Target = Hub;

    fn deref(&self) -> &Hub {
        &self.hub
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.links.hubs().remove(&self.hub.key);
        self.hub.over.cancel();
        self.hub.closed.cancel();
    }
}

/// Serves a further connection until its session ends.
pub(super) async fn serve<S>(
    mut stream: S,
    joined: Joined,
    welcome: &Answer,
    store: Arc<Store>,
    shutdown: Shutdown,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let Joined {
        hub,
        connection,
        reads,
    } = joined;
    // Closed with the session, not before it: see `Hub::closed`.
    let read = async {
        let sent = stream.write_all(&welcome.encode()).await;
        sent.map_err(ReadError::Io)?;
        let mut receiver = Receiver::new(&mut stream, &hub, connection.into(), &store, &shutdown);
        receiver.run_further().await
    };
    let result = tokio::select! {
        // A frame that is cut off here is of no session any more.
        () = hub.over.cancelled() => Ok(()),
        result = read => result,
    };
    if let Err(e) = result {
        hub.fail(LinkFailure::Connection(connection, Box::new(e)));
    }
    drop(reads);
    hub.closed.cancelled().await;
}
