//! The answers of a session: sent on its first connection, and kept until the proxy has them,
//! because the socket may break before.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use image_common::link::codec::{FrameFormat, Message};
use image_common::link::resumable::{ResumableStream, StreamState};
use image_common::net::socket::WriteHalf;
use image_common::net::DEAD_PEER;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Answers not yet sent. A proxy that does not read them is not read from either.
pub const ANSWER_QUEUE: usize = 256;

/// Answers that the proxy has not acknowledged; with more, nothing is read from it either. The
/// proxy acknowledges in steps of 64 KiB.
const MAX_KEPT: usize = 1 << 20;

/// The reader of the connection gives a proxy up that does not come back, and can say why it went. It cannot when it waits
/// itself for room among the answers: then it is told after so much more.
const READER_FIRST: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    #[error("the proxy acknowledges {said} bytes of the answers, and {begin} to {end} are not acknowledged")]
    Acknowledged { said: u64, begin: u64, end: u64 },
    #[error("the proxy has not connected again to take its answers")]
    Away,
}

/// What was queued, as bytes of a stream.
struct Kept {
    bytes: BytesMut,
    /// Where in the stream they begin.
    begin: u64,
    /// How many of them were sent on the present socket.
    sent: usize,
    /// The socket, while there is one.
    half: Option<Arc<WriteHalf>>,
    generation: u64,
    /// Nothing need be kept: the session ends with its socket.
    forgets: bool,
}

impl Kept {
    /// The proxy has everything before `at`.
    fn acknowledged(&mut self, at: u64) -> Result<(), AnswerError> {
        let (begin, end) = (self.begin, self.begin + self.bytes.len() as u64);
        if at > end {
            let said = at;
            return Err(AnswerError::Acknowledged { said, begin, end });
        }
        let gone = usize::try_from(at.saturating_sub(begin)).unwrap_or(0);
        self.bytes.advance(gone);
        self.begin += gone as u64;
        self.sent = self.sent.saturating_sub(gone);
        Ok(())
    }

    fn follow(&mut self, state: &StreamState) -> Result<(), AnswerError> {
        if state.half.is_some() && state.generation != self.generation {
            if state.resumed_at < self.begin {
                return Err(AnswerError::Acknowledged {
                    said: state.resumed_at,
                    begin: self.begin,
                    end: self.begin + self.bytes.len() as u64,
                });
            }
            self.generation = state.generation;
            self.acknowledged(state.resumed_at)?;
            self.sent = 0;
        }
        self.half.clone_from(&state.half);
        self.acknowledged(state.acknowledged)
    }

    fn has_no_room(&self) -> bool {
        self.bytes.len() >= MAX_KEPT
    }

    /// Only what the proxy says makes room.
    fn is_full(&self) -> bool {
        !self.forgets && self.has_no_room()
    }

    fn is_sent(&self) -> bool {
        self.sent == self.bytes.len()
    }

    /// Sends as much as the socket takes at once.
    fn send(&mut self, half: &WriteHalf) -> io::Result<()> {
        while !self.is_sent() {
            match half.try_write(&self.bytes[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        if self.forgets {
            self.bytes.advance(self.sent);
            self.begin += self.sent as u64;
            self.sent = 0;
        }
        Ok(())
    }
}

/// What nothing but the proxy can end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// There is no socket.
    Away,
    /// All that may be kept is, from this byte on.
    Full(u64),
}

/// Sends what is queued until the queue ends, and then what can be sent without waiting for
/// another socket. `patience`: how long that may take; zero: the session ends with its socket.
pub async fn send(
    wire: Arc<ResumableStream>,
    mut queue: mpsc::Receiver<Message>,
    format: FrameFormat,
    patience: Duration,
) -> Result<(), AnswerError> {
    let mut limit: Option<(Waits, Instant)> = None;
    let mut changes = wire.watch();
    let mut kept = Kept {
        bytes: BytesMut::new(),
        begin: 0,
        sent: 0,
        half: None,
        generation: 0,
        forgets: patience.is_zero(),
    };
    let mut batch = Vec::with_capacity(ANSWER_QUEUE);
    let mut queued = true;
    loop {
        kept.follow(&changes.borrow_and_update())?;
        let half = kept.half.clone();
        if !queued && (kept.is_sent() || half.is_none()) {
            return Ok(());
        }
        let waits = match &half {
            None => Some((Waits::Away, patience + READER_FIRST)),
            Some(_) if kept.is_full() => Some((Waits::Full(kept.begin), DEAD_PEER)),
            Some(_) => None,
        };
        limit = waits.map(|(waits, within)| match limit {
            Some((before, until)) if before == waits => (waits, until),
            _ => (waits, Instant::now() + within),
        });
        let too_long = async {
            match limit {
                Some((_, until)) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        let writable = async {
            match &half {
                Some(half) if !kept.is_sent() => half.writable().await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            n = queue.recv_many(&mut batch, ANSWER_QUEUE), if queued && !kept.has_no_room() => {
                queued = n > 0;
                for message in batch.drain(..) {
                    message.encode_with(&mut kept.bytes, format);
                }
            }
            ready = writable => if let Err(e) = ready {
                wire.lost(kept.generation, e);
                continue;
            },
            changed = changes.changed() => if changed.is_err() {
                return Ok(());
            },
            () = too_long => match limit.take() {
                Some((Waits::Full(_), _)) if queue.capacity() > 0 => continue,
                Some((Waits::Full(_), _)) => {
                    // What would tell that they have arrived is behind what is not read for want of
                    // room. On another socket it is said first.
                    tracing::warn!("the proxy acknowledges no answers: it must connect again");
                    let why = io::Error::other("the proxy acknowledged no answers");
                    wire.lost(kept.generation, why);
                    continue;
                }
                _ => return Err(AnswerError::Away),
            },
        }
        if let Some(half) = half {
            if let Err(e) = kept.send(&half) {
                wire.lost(kept.generation, e);
            }
        }
    }
}
