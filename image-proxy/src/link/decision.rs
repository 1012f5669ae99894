//! The decision about a set, when the link of its session is gone: brought on a connection of its own (a HELLO that
//! *decides*), to image-cache, to one that was started since, or to the script that holds the restore there.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use image_common::image::SessionName;
use image_common::link::codec::{Message, SetNumber};
use image_common::link::handshake::Place;
use image_common::link::reader::{FrameReader, ReadError};
use image_common::net::dial::Dial;
use tokio::io::AsyncWriteExt;
use tokio::time::{timeout, Instant};

use crate::link::connect::{connect_one, ConnectError, Log, Target, TRY};

/// How long the target may take to say that it has heard.
const HEARD_WITHIN: Duration = Duration::from_secs(5);

/// What becomes of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The process is dead on the source.
    Commit,
    /// It goes on there, and why.
    Abort(String),
}

/// Why the target has not heard a decision, as far as the source knows.
#[derive(Debug, thiserror::Error)]
pub enum Unheard {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{peer} has not answered within {HEARD_WITHIN:?}")]
    Silent { peer: String },
    #[error("{peer} closed the connection without an answer")]
    Closed { peer: String },
    #[error("no answer of {peer}")]
    Lost {
        peer: String,
        #[source]
        source: ReadError,
    },
    #[error("{peer}: {reason}")]
    Said { peer: String, reason: String },
    #[error("{peer} broke the link protocol: {message}")]
    Broken { peer: String, message: String },
}

/// How a session is found that has no link any more.
#[derive(Debug, Clone)]
pub struct Address {
    pub target: Target,
    pub session: SessionName,
    pub key: u64,
    /// It knows which of the target's addresses the session was at.
    pub dial: Arc<Dial>,
}

impl Address {
    /// Tries once to bring a decision. `Ok`: the target has heard it, and acts on it. Said twice, it is the same.
    pub async fn bring(&self, set: SetNumber, decision: &Decision) -> Result<(), Unheard> {
        let peer = format!("image-cache at {}", self.target.peer());
        let within = TRY.min(self.target.connect_timeout);
        let until = Instant::now() + within;
        let place = || Place::Decides { key: self.key, set };
        let (target, session) = (&self.target, &self.session);
        let connecting = connect_one(target, session, &self.dial, until, place, Log::Quiet);
        let connected = tokio::time::timeout_at(until, connecting).await;
        let (mut socket, _) = connected.unwrap_or_else(|_| {
            Err(ConnectError::Timeout {
                peer: target.peer(),
                within,
                tried: self.dial.several(),
            })
        })?;
        let message = match decision {
            Decision::Commit => Message::Commit { set },
            Decision::Abort(reason) => Message::SetAbort {
                set,
                reason: reason.clone(),
            },
        };
        let farewell = Message::Goodbye {
            reason: String::new(),
        };
        let mut frames = BytesMut::new();
        for message in [message, farewell] {
            message.encode_with(&mut frames, target.frame_format);
        }
        let said = async {
            socket.write_all(&frames).await.map_err(ReadError::Io)?;
            let mut reader = FrameReader::new(socket).with_format(target.frame_format);
            while let Some(header) = reader.header().await? {
                match reader.message(header).await? {
                    Message::Received { .. } => {}
                    message => return Ok(Some(message)),
                }
            }
            Ok(None)
        };
        match timeout(HEARD_WITHIN, said).await {
            Ok(Ok(Some(Message::Goodbye { reason }))) if reason.is_empty() => Ok(()),
            Ok(Ok(Some(Message::Goodbye { reason }))) => Err(Unheard::Said { peer, reason }),
            Ok(Ok(Some(other))) => Err(Unheard::Broken {
                peer,
                message: format!("{other:?}"),
            }),
            Ok(Ok(None)) => Err(Unheard::Closed { peer }),
            Ok(Err(source)) => Err(Unheard::Lost { peer, source }),
            Err(_) => Err(Unheard::Silent { peer }),
        }
    }
}

#[cfg(test)]
mod tests;
