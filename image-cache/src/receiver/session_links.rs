//! The connections of sessions. The first one opens its session here; others join it, carry
//! image data, and end with it. One that broke may be resumed for a while; if it is not, the
//! session ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image_common::admission::quota::Host;
use image_common::link::codec::{FrameFormat, Message};
use image_common::link::handshake::{Answer, Hello, Refusal};
use image_common::link::reader::ReadError;
use image_common::link::resumable::{Claim, NotTaken, ResumableReader, ResumableStream};
use image_common::net::socket::Socket;
use image_common::net::DEAD_PEER;
use image_common::tasks;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::{TaskTracker, TaskTrackerToken};

use crate::receiver::failure::LinkFailure;
use crate::receiver::reassembly::Reassembly;
use crate::store::session::{host_of, Session};

/// The sessions that are connected, by their keys.
pub struct Links {
    sessions: Mutex<HashMap<u64, Arc<SessionLinks>>>,
    /// How long a connection that broke may be away, at most.
    pub link_timeout: Duration,
    prepared_timeout: Duration,
}

/// What the connections of a session share.
pub struct SessionLinks {
    pub key: u64,
    proxy: u64,
    pub session: Arc<Session>,
    pub images: Arc<Reassembly>,
    /// Every connection stops reading.
    pub over: CancellationToken,
    /// The first connection was closed: the others may, too. Before that the proxy could take
    /// a closed connection for the reason of the end.
    pub closed: CancellationToken,
    state: Mutex<Places>,
    readers: TaskTracker,
    pub(super) frame_format: FrameFormat,
    /// How long it waits for a connection that broke; zero: not at all.
    pub patience: Duration,
    /// How long a held set's source may say nothing.
    pub prepared_timeout: Duration,
}

/// A connection that may be resumed, and the thread that reads it.
#[derive(Clone)]
struct Place {
    wire: Arc<ResumableStream>,
    home: Handle,
}

struct Places {
    /// Connections that may still join, by number.
    missing: Vec<u16>,
    connections: u16,
    places: HashMap<u16, Place>,
    answers: Option<mpsc::Sender<Message>>,
    failure: Option<LinkFailure>,
}

/// Ends the session's further connections when it is dropped.
pub struct Opened<'a> {
    links: Arc<SessionLinks>,
    all: &'a Links,
}

/// A socket on its way to another thread.
enum Moved {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

/// A further connection that was let in.
pub struct Joined {
    pub links: Arc<SessionLinks>,
    pub connection: u16,
    pub reads: TaskTrackerToken,
}

impl Links {
    pub fn new(link_timeout: Duration, prepared_timeout: Duration) -> Self {
        Self {
            sessions: Mutex::default(),
            link_timeout,
            prepared_timeout,
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<u64, Arc<SessionLinks>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn open(
        &self,
        hello: &Hello,
        session: &Arc<Session>,
        answers: mpsc::Sender<Message>,
        patience: Duration,
    ) -> Opened<'_> {
        let links = Arc::new(SessionLinks {
            key: session.key,
            proxy: hello.proxy,
            session: session.clone(),
            images: Arc::new(Reassembly::new(
                hello.connections.into(),
                patience.max(DEAD_PEER),
            )),
            over: CancellationToken::new(),
            closed: CancellationToken::new(),
            state: Mutex::new(Places {
                missing: (1..hello.connections).collect(),
                connections: hello.connections,
                places: HashMap::new(),
                answers: Some(answers),
                failure: None,
            }),
            readers: TaskTracker::new(),
            frame_format: hello.frame_format,
            patience,
            prepared_timeout: self.prepared_timeout,
        });
        self.sessions().insert(links.key, links.clone());
        Opened { links, all: self }
    }

    /// Whether the address of `peer` may have a session of so many connections beside those that it
    /// has; if not, why.
    pub fn check_room(&self, peer: &str, wanted: u16, most: usize) -> Result<(), String> {
        let Some(host) = host_of(peer).map(Host::of) else {
            return Ok(());
        };
        let sessions = self.sessions();
        let same = |links: &&Arc<SessionLinks>| links.session.host().map(Host::of) == Some(host);
        let theirs = sessions.values().filter(same);
        let theirs = theirs.map(|links| usize::from(links.state().connections));
        match theirs.sum::<usize>() + usize::from(wanted) <= most {
            true => Ok(()),
            false => Err(format!(
                "the sessions of {host} may have {most} connections together (--max-connections)"
            )),
        }
    }

    /// The session that a connection says it is of.
    fn known(&self, hello: &Hello, key: u64) -> Result<Arc<SessionLinks>, String> {
        let known = self.sessions().get(&key).cloned();
        // One text for all: a stranger learns nothing of what is here.
        known
            .filter(|links| links.proxy == hello.proxy && links.session.name == hello.session)
            .filter(|links| links.frame_format == hello.frame_format)
            .ok_or_else(|| format!("no session {} of this proxy is connected", hello.session))
    }

    /// Goes on with a connection that broke: what was received of it counts, and the rest
    /// follows on `socket`. `claim` is what the proxy has of the answers.
    pub async fn resume(
        &self,
        hello: &Hello,
        mut socket: Socket,
        (connection, key, claim): (u16, u64, Claim),
        welcome: impl FnOnce(u64) -> Answer,
    ) -> Result<(), LinkFailure> {
        let place = self.known(hello, key).and_then(|links| {
            let place = links.state().places.get(&connection).cloned();
            place
                .filter(|_| !links.over.is_cancelled() && !links.patience.is_zero())
                .ok_or_else(|| not_resumed(hello, connection))
        });
        let Place { wire, home } = match place {
            Ok(place) => place,
            Err(reason) => {
                refuse(&mut socket, Refusal::NoSession, reason.clone()).await;
                return Err(LinkFailure::Refused(reason));
            }
        };
        // From here on nothing is read of the old socket: the number is exact. No reader may see
        // yet that it broke, the proxy is the first to know of a route that leads nowhere.
        let why = std::io::Error::other("the proxy connected again");
        let taken = match wire.take_over(claim, why) {
            Ok(taken) => taken,
            Err(e) => {
                let (why, reason) = match e {
                    // The session has ended since it was looked up.
                    NotTaken::Closed => (Refusal::NoSession, not_resumed(hello, connection)),
                    // What it comes too late for goes on.
                    NotTaken::Attempt { .. } | NotTaken::Count { .. } => (
                        Refusal::Overtaken,
                        format!("connection {connection} of session {}: {e}", hello.session),
                    ),
                };
                refuse(&mut socket, why, reason.clone()).await;
                return Err(LinkFailure::Refused(reason));
            }
        };
        let arrived = taken.received;
        let sent = socket.write_all(&welcome(arrived).encode()).await;
        sent.map_err(ReadError::Io)?;
        let (session, peer_has) = (&hello.session, claim.received);
        tracing::warn!(%session, connection, arrived, peer_has, "connected again");
        // It belongs to the thread that reads it.
        let moved = match socket {
            Socket::Tcp(stream) => stream.into_std().map(Moved::Tcp),
            Socket::Unix(stream) => stream.into_std().map(Moved::Unix),
        };
        let moved = moved.map_err(ReadError::Io)?;
        let attach = async move {
            let socket = match moved {
                Moved::Tcp(stream) => TcpStream::from_std(stream).map(Socket::Tcp),
                Moved::Unix(stream) => UnixStream::from_std(stream).map(Socket::Unix),
            };
            match socket {
                Ok(socket) => drop(wire.attach_taken(&taken, socket, claim.received)),
                Err(e) => tracing::error!("a connection cannot be resumed: {e}"),
            }
        };
        // The proxy finds it silent, and connects again.
        home.spawn(async { drop(tasks::caught("resuming a connection", attach).await) });
        Ok(())
    }

    /// Lets a further connection in, or says why not.
    pub fn join(&self, hello: &Hello, connection: u16, key: u64) -> Result<Joined, String> {
        let links = self.known(hello, key)?;
        // Before it is looked whether the session is over: `stop_readers` waits for this one.
        let reads = links.readers.token();
        let mut state = links.state();
        let place = state.missing.iter().position(|&c| c == connection);
        let place = place.filter(|_| state.connections == hello.connections);
        match place {
            Some(place) if !links.over.is_cancelled() => drop(state.missing.swap_remove(place)),
            _ => {
                return Err(format!(
                    "session {} waits for no connection {connection} of {}",
                    hello.session, hello.connections
                ))
            }
        }
        drop(state);
        Ok(Joined {
            links,
            connection,
            reads,
        })
    }
}

impl SessionLinks {
    fn state(&self) -> MutexGuard<'_, Places> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn answers(&self) -> mpsc::Sender<Message> {
        // None when the session is over; what is said then is not heard.
        let answers = self.state().answers.clone();
        answers.unwrap_or_else(|| mpsc::channel(1).0)
    }

    /// A connection is there, read by the thread that this is called on.
    pub fn attach(&self, connection: u16, socket: Socket) -> Arc<ResumableStream> {
        let wire = ResumableStream::new(socket);
        let place = Place {
            wire: wire.clone(),
            home: Handle::current(),
        };
        self.state().places.insert(connection, place);
        if connection == 0 {
            let _ = self.session.link.set(wire.clone()); // once per session
        }
        wire
    }

    /// The first connection, once it is there.
    pub fn first(&self) -> Option<Arc<ResumableStream>> {
        self.state().places.get(&0).map(|place| place.wire.clone())
    }

    pub fn reader(&self, wire: &Arc<ResumableStream>) -> ResumableReader {
        ResumableReader::new(wire.clone(), Some(self.patience))
    }

    /// The queue ends when the connections have let go of theirs.
    pub fn no_more_answers(&self) {
        self.state().answers = None;
    }

    pub fn fail(&self, why: LinkFailure) {
        self.state().failure.get_or_insert(why);
        self.over.cancel();
    }

    pub fn failure(&self) -> LinkFailure {
        let failure = self.state().failure.take();
        failure.unwrap_or(LinkFailure::Closed)
    }

    /// Closes the socket of a connection whose reader has ended.
    pub fn close(&self, connection: u16) {
        let place = self.state().places.remove(&connection);
        if let Some(place) = place {
            place.wire.close();
        }
    }

    /// Returns when no further connection reads any more.
    pub async fn stop_readers(&self) {
        self.over.cancel();
        self.readers.close();
        self.readers.wait().await;
    }
}

/// Also of a session that ended while it was looked up.
fn not_resumed(hello: &Hello, connection: u16) -> String {
    format!(
        "connection {connection} of session {} cannot be resumed",
        hello.session
    )
}

impl std::ops::Deref for Opened<'_> {
    type Target = SessionLinks;

    fn deref(&self) -> &SessionLinks {
        &self.links
    }
}

impl Drop for Opened<'_> {
    fn drop(&mut self) {
        self.all.sessions().remove(&self.links.key);
        self.links.over.cancel();
        self.links.closed.cancel();
    }
}

/// Refuses a connection.
pub async fn refuse(stream: &mut (impl AsyncWrite + Unpin), why: Refusal, reason: String) {
    let answer = Answer::Refused { why, reason };
    // The peer may be gone; the reason is in our log anyhow.
    let _ = stream.write_all(&answer.encode()).await;
    let _ = stream.shutdown().await;
}
