//! A connection of the link that outlives its sockets.
//!
//! Each direction is a stream of bytes that are counted from the first frame on. When a socket
//! breaks, another takes its place: each side says how much it has received, and the other goes
//! on from there, out of what it kept. Frames know nothing of it; a reader of frames just waits.
//!
//! What is kept for that is the writers' matter: image-proxy keeps pages by reference
//! (`image-proxy/src/link/retransmit.rs`), image-cache its few answers.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::watch;
use tokio::time::Sleep;

use crate::link::handshake::is_later;
use crate::net::socket::{ReadHalf, Socket, WriteHalf};

/// The receiver tells how much has arrived at least after each so many bytes, and a frame.
/// Senders keep a multiple of it.
pub const ACK_BYTES: u64 = 1 << 20;

/// The same when it waits for more, after the end of a frame: senders that keep less than [`ACK_BYTES`] wait
/// for that.
pub const ACK_WAITING_BYTES: u64 = 256 << 10;

/// The connection, shared by its reader, its writer, and the task that repairs it.
pub struct ResumableStream {
    reading: Mutex<Reading>,
    state: watch::Sender<StreamState>,
}

struct Reading {
    half: Option<ReadHalf>,
    /// Bytes of the peer's stream.
    received: u64,
    /// The reader, while there is nothing to read from.
    waiting: Option<Waker>,
    /// Counts how often the connection was taken over.
    takers: u64,
    /// The attempt of the last one of them that had a number.
    attempt: u16,
    /// It has no reader any more, so no socket takes the place of the last one.
    closed: bool,
}

/// What a peer says that would resume a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// So many bytes of our stream it has.
    pub received: u64,
    /// Its attempts are counted; 0: they are not.
    pub attempt: u16,
}

/// Why a connection is not taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    #[error("the connection was closed")]
    Closed,
    #[error("attempt {attempt} to resume it comes after attempt {newest}, which has resumed it")]
    Attempt { attempt: u16, newest: u16 },
    #[error("an attempt that has {received} bytes of the answers comes after {acknowledged} were acknowledged")]
    Count { received: u64, acknowledged: u64 },
}

/// The right to bring the next socket of a connection, as long as no later peer has taken it over.
#[derive(Debug)]
pub struct TakenOver {
    /// How much of the peer's stream has been received: what that socket begins with.
    pub received: u64,
    taker: u64,
}

/// The socket that a stream has now.
#[derive(Clone, Default)]
pub struct StreamState {
    /// Counts the sockets.
    pub generation: u64,
    /// `None`: it broke, and the next one is not there yet.
    pub half: Option<Arc<WriteHalf>>,
    /// What the peer had received of our stream when this socket began.
    pub resumed_at: u64,
    /// What it has said since.
    pub acknowledged: u64,
    /// Why there is no socket.
    pub lost: Option<Arc<io::Error>>,
}

impl ResumableStream {
    pub fn new(socket: Socket) -> Arc<Self> {
        let wire = Arc::new(Self {
            reading: Mutex::new(Reading {
                half: None,
                received: 0,
                waiting: None,
                takers: 0,
                attempt: 0,
                closed: false,
            }),
            state: watch::Sender::default(),
        });
        wire.attach(socket, 0);
        wire
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on with this socket; the peer has received so much of our stream.
    pub fn attach(&self, socket: Socket, resumed_at: u64) {
        self.put_in_place(self.reading(), socket, resumed_at);
    }

    /// The same for the peer that took it over. Returns `false` and closes the socket if a later
    /// peer took it over after that, or the connection was closed.
    pub fn attach_taken(&self, taken: &TakenOver, socket: Socket, resumed_at: u64) -> bool {
        let reading = self.reading();
        let newest = !reading.closed && reading.takers == taken.taker;
        if newest {
            self.put_in_place(reading, socket, resumed_at);
        }
        newest
    }

    fn put_in_place(&self, mut reading: MutexGuard<'_, Reading>, socket: Socket, resumed_at: u64) {
        let (read_half, write_half) = socket.into_split();
        reading.half = Some(read_half);
        let waiting = reading.waiting.take();
        self.state.send_modify(|state| {
            state.generation += 1;
            state.half = Some(Arc::new(write_half));
            state.resumed_at = resumed_at;
            state.acknowledged = state.acknowledged.max(resumed_at);
            state.lost = None;
        });
        drop(reading);
        if let Some(waker) = waiting {
            waker.wake();
        }
    }

    /// Reads and writes no more on the present socket, because another one takes its place. From
    /// here to that socket nothing is read: one that an earlier taker still brings would bring
    /// bytes that are sent again on this one.
    ///
    /// What its peer said before its last attempt may come after it: the network held it up. Then
    /// nothing changes.
    pub fn take_over(&self, claim: Claim, why: io::Error) -> Result<TakenOver, NotTaken> {
        let Claim { received, attempt } = claim;
        let mut reading = self.reading();
        if reading.closed {
            return Err(NotTaken::Closed);
        }
        let newest = reading.attempt;
        if !is_later(attempt, newest) {
            return Err(NotTaken::Attempt { attempt, newest });
        }
        let acknowledged = self.state.borrow().acknowledged;
        if received < acknowledged {
            return Err(NotTaken::Count {
                received,
                acknowledged,
            });
        }
        self.break_off(&mut reading, why);
        reading.takers += 1;
        if attempt != 0 {
            reading.attempt = attempt;
        }
        Ok(TakenOver {
            received: reading.received,
            taker: reading.takers,
        })
    }

    /// Ends it for good: its reader is gone. The present socket goes, and no other takes its place.
    pub fn close(&self) {
        let mut reading = self.reading();
        reading.closed = true;
        self.break_off(&mut reading, io::ErrorKind::NotConnected.into());
    }

    /// Reads and writes no more on the present socket.
    pub fn detach(&self, why: io::Error) {
        self.break_off(&mut self.reading(), why);
    }

    /// Ends the present socket, if there is one, for all that read and write it: to them it broke.
    pub fn shut_down(&self) {
        if let Some(half) = self.state().half {
            half.shut_down();
        }
    }

    /// The socket of this generation is of no use any more.
    pub fn lost(&self, generation: u64, why: io::Error) {
        // With the lock no other socket takes its place between the look and the deed.
        let mut reading = self.reading();
        if self.state.borrow().generation == generation && reading.half.is_some() {
            self.break_off(&mut reading, why);
        }
    }

    fn break_off(&self, reading: &mut Reading, why: io::Error) {
        reading.half = None;
        self.state.send_modify(|state| {
            state.half = None;
            state.lost = Some(Arc::new(why));
        });
        // The reader has a limit to how long it waits.
        if let Some(waker) = reading.waiting.take() {
            waker.wake();
        }
    }

    /// How much of the peer's stream has been received.
    pub fn received(&self) -> u64 {
        self.reading().received
    }

    /// The peer has received so much of ours.
    pub fn acknowledge(&self, received: u64) {
        self.state.send_if_modified(|state| {
            let more = received > state.acknowledged;
            state.acknowledged = state.acknowledged.max(received);
            more
        });
    }

    pub fn state(&self) -> StreamState {
        self.state.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<StreamState> {
        self.state.subscribe()
    }

    /// Whether it has a socket.
    pub fn is_attached(&self) -> bool {
        self.state.borrow().half.is_some()
    }
}

/// The reading end; there is one.
pub struct ResumableReader {
    wire: Arc<ResumableStream>,
    /// How long it waits for another socket. `None`: as long as it takes.
    patience: Option<Duration>,
    waited: Option<Pin<Box<Sleep>>>,
    received: u64,
}

impl ResumableReader {
    pub fn new(wire: Arc<ResumableStream>, patience: Option<Duration>) -> Self {
        Self {
            wire,
            patience,
            waited: None,
            received: 0,
        }
    }

    pub fn received(&self) -> u64 {
        self.received
    }

    /// Nothing to read from: waits for another socket, or until patience ends.
    fn wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(patience) = self.patience else {
            return Poll::Pending;
        };
        let waited = self.waited.get_or_insert_with(|| {
            if let Some(why) = self.wire.state().lost.filter(|_| !patience.is_zero()) {
                tracing::warn!(
                    "connection lost: {why}; the peer has {patience:?} to connect again"
                );
            }
            Box::pin(tokio::time::sleep(patience))
        });
        if !patience.is_zero() && waited.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let why = self.wire.state().lost;
        let kind = why
            .as_ref()
            .map_or(io::ErrorKind::NotConnected, |e| e.kind());
        let what = why.map_or_else(|| "no connection".to_owned(), |e| e.to_string());
        Poll::Ready(Err(io::Error::new(kind, what)))
    }
}

impl AsyncRead for ResumableReader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut reading = this
            .wire
            .reading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(half) = &mut reading.half {
            let before = into.filled().len();
            let read = Pin::new(half).poll_read(cx, into);
            let n = into.filled().len() - before;
            let why = match read {
                Poll::Pending => {
                    reading.wait(cx);
                    // It is there again, also if it brings nothing for a long time.
                    this.waited = None;
                    return Poll::Pending;
                }
                Poll::Ready(Ok(())) if n > 0 || into.remaining() == 0 => {
                    reading.received += n as u64;
                    this.received = reading.received;
                    this.waited = None;
                    return Poll::Ready(Ok(()));
                }
                // An end without a farewell is a break like any other.
                Poll::Ready(Ok(())) => closed_by_peer(),
                Poll::Ready(Err(e)) => e,
            };
            this.wire.break_off(&mut reading, why);
        }
        reading.wait(cx);
        drop(reading);
        this.wait(cx)
    }
}

/// What an unannounced end of the stream means.
fn closed_by_peer() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the peer closed the connection",
    )
}

impl Reading {
    /// The task that takes the socket away, or brings the next one, wakes the reader.
    fn wait(&mut self, cx: &Context<'_>) {
        let known = self.waiting.as_ref();
        if !known.is_some_and(|waker| waker.will_wake(cx.waker())) {
            self.waiting = Some(cx.waker().clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    async fn bringing(bytes: &[u8]) -> (Socket, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).await.unwrap();
        (Socket::Unix(ours), theirs)
    }

    fn claimed(wire: &ResumableStream, received: u64, attempt: u16) -> Result<TakenOver, NotTaken> {
        let why = io::Error::other("it connected again");
        wire.take_over(Claim { received, attempt }, why)
    }

    /// The proxy connected, sent, lost that socket too, and connected again, before the first of
    /// these sockets came to where it is read.
    #[tokio::test]
    async fn what_came_on_a_socket_that_was_overtaken_is_not_read() {
        let (first, _peer) = bringing(b"").await;
        let wire = ResumableStream::new(first);
        let (older, newer) = (claimed(&wire, 0, 1).unwrap(), claimed(&wire, 0, 2).unwrap());
        let (late, _late) = bringing(b"begi").await;
        let (now, _now) = bringing(b"beginning").await;
        assert!(!wire.attach_taken(&older, late, 0) && !wire.is_attached());
        assert!(wire.attach_taken(&newer, now, 0));
        let mut read = [0; 9];
        let mut reader = ResumableReader::new(wire.clone(), None);
        reader.read_exact(&mut read).await.unwrap();
        assert_eq!((&read, reader.received()), (b"beginning", 9));
    }

    /// Its peer would wait for ever for a reader.
    #[tokio::test]
    async fn a_closed_connection_takes_no_socket() {
        let (first, mut peer) = bringing(b"").await;
        let wire = ResumableStream::new(first);
        let taken = claimed(&wire, 0, 0);
        wire.close();
        let (late, mut late_peer) = bringing(b"").await;
        assert!(!wire.attach_taken(&taken.unwrap(), late, 0) && !wire.is_attached());
        for peer in [&mut peer, &mut late_peer] {
            assert_eq!(peer.read(&mut [0]).await.unwrap(), 0, "closed");
        }
        assert_eq!(claimed(&wire, 0, 0).unwrap_err(), NotTaken::Closed);
    }

    /// The network held an attempt up, and its peer has resumed the connection since.
    #[tokio::test]
    async fn an_attempt_that_comes_late_takes_nothing() {
        let (first, _first) = bringing(b"").await;
        let wire = ResumableStream::new(first);
        let newer = claimed(&wire, 10, 2).unwrap();
        let (now, _now) = bringing(b"now").await;
        assert!(wire.attach_taken(&newer, now, 10));
        let late = |attempt| NotTaken::Attempt { attempt, newest: 2 };
        assert_eq!(claimed(&wire, 10, 1).unwrap_err(), late(1));
        assert_eq!(claimed(&wire, 10, 2).unwrap_err(), late(2));
        // Without a number its count tells, if more was acknowledged since.
        wire.acknowledge(20);
        let behind = NotTaken::Count {
            received: 19,
            acknowledged: 20,
        };
        assert_eq!(claimed(&wire, 19, 0).unwrap_err(), behind);
        assert_eq!(claimed(&wire, 19, 3).unwrap_err(), behind);
        let mut read = [0; 3];
        let mut reader = ResumableReader::new(wire.clone(), None);
        reader.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"now", "its socket stays");
        // What was refused does not count as the newest.
        assert!(claimed(&wire, 20, 3).is_ok());
    }
}
