//! Making the connections of a link, and making them again when they break.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use image_common::error_chain::chain;
use image_common::image::SessionName;
use image_common::link::codec::FrameFormat;
use image_common::link::handshake::{next_attempt, Answer, Hello, Place, Refusal};
use image_common::link::reader::{greet, ShakeError};
use image_common::link::resumable::ResumableStream;
use image_common::link::VERSIONS;
use image_common::net;
use image_common::net::dial::{Dial, Resolve};
use image_common::net::socket::Socket;
use image_common::net::tls::{self, TlsError};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

const SOFTWARE: &str = concat!("image-proxy ", env!("CARGO_PKG_VERSION"));

/// When a connection ends, the reason may arrive on the first one. The proxy waits this long for it.
const LAST_WORD: Duration = Duration::from_millis(200);

/// How long one try to connect again may take. Short, because the kernel retransmits lost packets after ever longer
/// times, and a new try starts with the shortest.
pub const TRY: Duration = Duration::from_secs(3);

/// With several addresses each that takes the connection has its share of the time for the handshake,
/// and at least so much of it.
const LEAST_SHARE: Duration = Duration::from_secs(2);

/// Between two tries, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot connect to image-cache at {peer}")]
    Connect {
        peer: String,
        #[source]
        source: std::io::Error,
    },
    #[error("image-cache at {peer} does not answer within {within:?}{tried}")]
    Timeout {
        peer: String,
        within: Duration,
        /// The addresses, if there are several.
        tried: String,
    },
    #[error("image-cache at {peer}")]
    Tls {
        peer: String,
        #[source]
        source: TlsError,
    },
    #[error("handshake with image-cache at {peer}")]
    Shake {
        peer: String,
        #[source]
        source: ShakeError,
    },
    #[error("image-cache at {peer} refuses the session: {reason}")]
    Refused {
        peer: String,
        why: Refusal,
        reason: String,
        /// Nothing else can be expected of other addresses.
        last: bool,
    },
    #[error("image-cache at {peer} speaks version {version} of the link protocol on one connection of the session, and {agreed} on another")]
    Versions {
        peer: String,
        version: u16,
        agreed: u16,
    },
    #[error("the connection ended right after the handshake")]
    Gone(#[source] std::io::Error),
    #[error("cannot make the pipes of {0} connections")]
    Pipes(u16, #[source] std::io::Error),
}

impl ConnectError {
    /// A later HELLO arrived before this one.
    fn is_overtaken(&self) -> bool {
        let overtaken = Refusal::Overtaken;
        matches!(self, Self::Refused { why, .. } if *why == overtaken)
    }
}

/// Where the cache is, and how this proxy connects to it.
#[derive(Debug, Clone)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub proxy: u64,
    pub connect_timeout: Duration,
    /// How many connections a session has.
    pub connections: u16,
    /// How long a connection that broke may be away; zero: the link ends with it.
    pub link_timeout: Duration,
    /// How many unacknowledged bytes a session keeps for that, at most.
    pub retransmit_buffer: usize,
    /// Of all its connections.
    pub frame_format: FrameFormat,
    pub tls: Option<Arc<tls::Client>>,
    pub resolver: Arc<dyn Resolve>,
    /// How many sessions this proxy has tried to open.
    pub openings: Arc<AtomicU64>,
}

/// The connections of a new session.
pub struct Connected {
    /// The first one first.
    pub sockets: Vec<Socket>,
    pub key: u64,
    /// Of the link protocol.
    pub version: u16,
    /// How long both sides wait for a connection that broke.
    pub patience: Duration,
    pub dial: Arc<Dial>,
}

/// What the cache answered.
pub struct Welcome {
    version: u16,
    key: u64,
    received: u64,
    patience: Duration,
}

impl Welcome {
    /// All connections of a session are alike.
    fn has_version(&self, agreed: u16, target: &Target) -> Result<(), ConnectError> {
        let (peer, version) = (target.peer(), self.version);
        match version == agreed {
            true => Ok(()),
            false => Err(ConnectError::Versions {
                peer,
                version,
                agreed,
            }),
        }
    }
}

impl Target {
    pub fn peer(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// All connections of a session.
pub async fn connect_all(
    target: &Target,
    session: &SessionName,
) -> Result<Connected, ConnectError> {
    let within = target.connect_timeout;
    let until = Instant::now() + within;
    let dial = Dial::new(&target.host, target.port, target.resolver.clone());
    let dial = Arc::new(dial);
    let connecting = async {
        let opens = || Place::First {
            opening: target.openings.fetch_add(1, Ordering::Relaxed) + 1,
        };
        let (first, welcome) =
            connect_one(target, session, &dial, until, opens, Log::Addresses).await?;
        let (key, version) = (welcome.key, welcome.version);
        let mut joining = JoinSet::new();
        for connection in 1..target.connections {
            let (target, session, dial) = (target.clone(), session.clone(), dial.clone());
            joining.spawn(async move {
                let place = || Place::Joins { connection, key };
                let (socket, welcome) =
                    connect_one(&target, &session, &dial, until, place, Log::Addresses).await?;
                welcome.has_version(version, &target)?;
                Ok((connection, socket))
            });
        }
        let mut sockets = vec![(0, first)];
        while let Some(joined) = joining.join_next().await {
            match joined {
                Ok(joined) => sockets.push(joined?),
                Err(e) => std::panic::resume_unwind(e.into_panic()),
            }
        }
        sockets.sort_by_key(|(connection, _)| *connection);
        Ok(Connected {
            sockets: sockets.into_iter().map(|(_, socket)| socket).collect(),
            key,
            version,
            patience: target.link_timeout.min(welcome.patience),
            dial: dial.clone(),
        })
    };
    let connected = tokio::time::timeout_at(until, connecting).await;
    connected.map_err(|_| ConnectError::Timeout {
        peer: target.peer(),
        within,
        tried: dial.several(),
    })?
}

/// Whether each address that was of no use is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Log {
    Addresses,
    /// The caller tries again and again, and logs what is new.
    Quiet,
}

/// One connection. `until` is when the caller gives up: an address that takes the
/// connection and then says nothing has its share of the time, if there are others.
pub async fn connect_one(
    target: &Target,
    session: &SessionName,
    dial: &Dial,
    until: Instant,
    mut place: impl FnMut() -> Place,
    log: Log,
) -> Result<(Socket, Welcome), ConnectError> {
    let failed = |source| ConnectError::Connect {
        peer: target.peer(),
        source,
    };
    let mut addresses = dial.addresses().await.map_err(failed)?;
    loop {
        let good = dial.good();
        let (stream, tried) = dial.connect(&addresses).await.map_err(failed)?;
        let address = tried.address;
        addresses.retain(|other| *other != address);
        let left = until.saturating_duration_since(Instant::now());
        let share = u32::try_from(addresses.len() + 1).map_or(left, |n| left / n);
        let share = match addresses.is_empty() {
            true => left,
            false => share.max(LEAST_SHARE),
        };
        let shaken = shake(target, session, stream, &mut place);
        let e = match tokio::time::timeout(share, shaken).await {
            Ok(Ok(welcome)) => {
                tried.was_good();
                return Ok(welcome);
            }
            // Another address may lead to another host, which knows nothing of the session.
            Ok(Err(ConnectError::Refused {
                peer, why, reason, ..
            })) => {
                let last = addresses.is_empty() || good.is_none_or(|good| good == address);
                ConnectError::Refused {
                    peer,
                    why,
                    reason,
                    last,
                }
            }
            Ok(Err(e)) => e,
            Err(_) => ConnectError::Timeout {
                peer: address.to_string(),
                within: share,
                tried: String::new(),
            },
        };
        if addresses.is_empty() || matches!(e, ConnectError::Refused { last: true, .. }) {
            return Err(e);
        }
        if log == Log::Addresses {
            tracing::warn!(%session, %address, "{}; trying another address", chain(&e));
        }
    }
}

/// The handshake on a new connection: TLS, HELLO, and the answer.
async fn shake(
    target: &Target,
    session: &SessionName,
    stream: TcpStream,
    mut place: impl FnMut() -> Place,
) -> Result<(Socket, Welcome), ConnectError> {
    let peer = target.peer();
    let mut socket = match &target.tls {
        None => Socket::Tcp(stream),
        Some(tls) => match tls.connect(stream, net::unbracket(&target.host)).await {
            Ok(filtered) => Socket::Unix(filtered),
            Err(source) => return Err(ConnectError::Tls { peer, source }),
        },
    };
    // Not before TLS is up: only a HELLO that is sent counts.
    let place = place();
    let hello = Hello {
        versions: VERSIONS,
        proxy: target.proxy,
        place,
        connections: target.connections,
        frame_format: target.frame_format,
        patience: target.link_timeout,
        session: session.clone(),
        software: SOFTWARE.to_owned(),
    };
    match greet(&mut socket, &hello).await {
        Ok(Answer::Welcome {
            version,
            key,
            received,
            patience,
            software,
        }) => {
            if matches!(place, Place::First { .. }) {
                let connections = target.connections;
                tracing::info!(%session, peer, version, connections, software, "connected");
            }
            let welcome = Welcome {
                version,
                key,
                received,
                patience,
            };
            Ok((socket, welcome))
        }
        Ok(Answer::Refused { why, reason }) => Err(ConnectError::Refused {
            peer,
            why,
            reason,
            last: true,
        }),
        Err(source) => Err(ConnectError::Shake { peer, source }),
    }
}

/// Keeps one connection of a link going.
pub struct Repair {
    pub target: Target,
    pub session: SessionName,
    pub key: u64,
    pub version: u16,
    pub connection: u16,
    pub patience: Duration,
    pub dial: Arc<Dial>,
    /// How many HELLOs were sent to resume it.
    pub attempt: u16,
}

impl Repair {
    /// Makes the connection again whenever it breaks, and then calls `resumed`, until the link ends. An error is why the
    /// link must end: the connection cannot be made again.
    pub async fn keep(
        mut self,
        wire: &ResumableStream,
        link_down: &CancellationToken,
        resumed: impl Fn(),
    ) -> Result<(), String> {
        let mut changes = wire.watch();
        loop {
            let lost = tokio::select! {
                lost = changes.wait_for(|state| state.half.is_none()) => lost.map(|s| s.lost.clone()),
                () = link_down.cancelled() => return Ok(()),
            };
            let Ok(lost) = lost else { return Ok(()) };
            let lost = lost.map_or_else(|| "it was closed".to_owned(), |e| e.to_string());
            let peer = self.target.peer();
            let lost = match self.connection {
                0 => format!("link to {peer} lost: {lost}"),
                n => format!("connection {n} of the link to {peer} lost: {lost}"),
            };
            tokio::select! {
                repaired = self.repair(&lost, wire) => repaired?,
                () = link_down.cancelled() => return Ok(()),
            }
            resumed();
        }
    }

    async fn repair(&mut self, lost: &str, wire: &ResumableStream) -> Result<(), String> {
        // If the link has ended, that cancels this wait. The first connection brings its reason by itself.
        let wait = match self.connection {
            0 => LAST_WORD.min(self.patience),
            _ => LAST_WORD,
        };
        tokio::time::sleep(wait).await;
        if self.patience.is_zero() {
            return Err(lost.to_owned());
        }
        let session = self.session.clone();
        let (began, within) = (Instant::now(), self.patience);
        tracing::warn!(%session, "{lost}; trying for {within:?} to connect again");
        let mut pause = FIRST_PAUSE;
        loop {
            let left = within.saturating_sub(began.elapsed());
            let until = Instant::now() + left.min(TRY);
            let (connection, key, attempt) = (self.connection, self.key, &mut self.attempt);
            let place = || {
                *attempt = next_attempt(*attempt);
                Place::Resumes {
                    connection,
                    key,
                    received: wire.received(),
                    attempt: *attempt,
                }
            };
            let (target, dial) = (&self.target, &self.dial);
            let tried = connect_one(target, &session, dial, until, place, Log::Addresses);
            let why = match tokio::time::timeout_at(until, tried).await {
                Ok(Ok((socket, welcome))) => {
                    let same = welcome.has_version(self.version, &self.target);
                    same.map_err(|e| format!("{lost}; {}", chain(&e)))?;
                    wire.attach(socket, welcome.received);
                    let away = began.elapsed();
                    tracing::warn!(%session, ?away, "connected again to {}", self.target.peer());
                    return Ok(());
                }
                // Only a HELLO that a later one has overtaken may be sent again.
                Ok(Err(e @ ConnectError::Refused { last: true, .. })) if !e.is_overtaken() => {
                    return Err(format!("{lost}; {}", chain(&e)));
                }
                Ok(Err(e)) => chain(&e),
                Err(_) => format!(
                    "image-cache at {} does not answer{}",
                    self.target.peer(),
                    self.dial.several()
                ),
            };
            if began.elapsed() + pause >= within {
                return Err(format!(
                    "{lost}; not connected again within {within:?}: {why}"
                ));
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

#[cfg(test)]
mod tests;
