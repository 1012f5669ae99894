//! Making the connections of a link, and making them again when they break.

use std::sync::Arc;
use std::time::Duration;

use image_common::control::chain;
use image_common::image::SessionName;
use image_common::link::handshake::{Answer, Hello, Place};
use image_common::link::reader::{greet, ShakeError};
use image_common::link::wire::{Socket, Wire};
use image_common::link::VERSIONS;
use image_common::net;
use image_common::tls::{self, TlsError};
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::link::Link;

const SOFTWARE: &str = concat!("image-proxy ", env!("CARGO_PKG_VERSION"));

/// When a connection ends, the first one may have brought the reason; it is given this long.
const LAST_WORD: Duration = Duration::from_millis(200);

/// How long one try to connect again may take. Short, since what is lost on a bad network is
/// sent again by the kernel after ever longer times, and a new try begins anew.
const TRY: Duration = Duration::from_secs(3);

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
    #[error("image-cache at {peer} does not answer within {within:?}")]
    Timeout { peer: String, within: Duration },
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
    Refused { peer: String, reason: String },
    #[error("the connection was gone at once")]
    Gone(#[source] std::io::Error),
    #[error("no pipes for {0} connections")]
    Pipes(u16, #[source] std::io::Error),
}

/// Where the cache is and who we are.
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
    /// How many bytes a session keeps for that, at most.
    pub replay_window: usize,
    /// Frames have checksums.
    pub checksum: bool,
    pub tls: Option<Arc<tls::Client>>,
}

/// The connections of a new session.
pub struct Connected {
    /// The first one first.
    pub sockets: Vec<Socket>,
    pub key: u64,
    /// How long both sides wait for a connection that broke.
    pub patience: Duration,
}

/// What the cache said.
struct Welcome {
    key: u64,
    received: u64,
    patience: Duration,
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
    let connecting = async {
        let (first, welcome) = connect_one(target, session, Place::First).await?;
        let key = welcome.key;
        let mut joining = JoinSet::new();
        for connection in 1..target.connections {
            let (target, session) = (target.clone(), session.clone());
            joining.spawn(async move {
                let place = Place::Joins { connection, key };
                let joined = connect_one(&target, &session, place).await;
                joined.map(|(socket, _)| (connection, socket))
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
            patience: target.link_timeout.min(welcome.patience),
        })
    };
    let timeout = |_| ConnectError::Timeout {
        peer: target.peer(),
        within,
    };
    tokio::time::timeout(within, connecting)
        .await
        .map_err(timeout)?
}

/// One connection.
async fn connect_one(
    target: &Target,
    session: &SessionName,
    place: Place,
) -> Result<(Socket, Welcome), ConnectError> {
    let peer = target.peer();
    let stream = match net::connect(&target.host, target.port).await {
        Ok(stream) => stream,
        Err(source) => return Err(ConnectError::Connect { peer, source }),
    };
    let mut socket = match &target.tls {
        None => Socket::Tcp(stream),
        Some(tls) => match tls.connect(stream, net::unbracket(&target.host)).await {
            Ok(filtered) => Socket::Unix(filtered),
            Err(source) => return Err(ConnectError::Tls { peer, source }),
        },
    };
    let hello = Hello {
        versions: VERSIONS,
        proxy: target.proxy,
        place,
        connections: target.connections,
        checksums: target.checksum,
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
            if place == Place::First {
                let connections = target.connections;
                tracing::info!(%session, peer, version, connections, software, "connected");
            }
            let welcome = Welcome {
                key,
                received,
                patience,
            };
            Ok((socket, welcome))
        }
        Ok(Answer::Refused { reason, .. }) => Err(ConnectError::Refused { peer, reason }),
        Err(source) => Err(ConnectError::Shake { peer, source }),
    }
}

/// Keeps one connection of a link going.
pub struct Repair {
    pub target: Target,
    pub session: SessionName,
    pub key: u64,
    pub connection: u16,
    pub patience: Duration,
}

impl Repair {
    /// Until the link ends, or must end because the connection is not to be had again.
    pub async fn keep(self, link: Arc<Link>, wire: Arc<Wire>) {
        let mut changes = wire.watch();
        loop {
            let lost = tokio::select! {
                lost = changes.wait_for(|state| state.half.is_none()) => lost.map(|s| s.lost.clone()),
                () = link.failed() => return,
            };
            let Ok(lost) = lost else { return };
            let lost = lost.map_or_else(|| "it was closed".to_owned(), |e| e.to_string());
            let lost = match self.connection {
                0 => format!("link to {} lost: {lost}", link.peer),
                n => format!("connection {n} of the link to {} lost: {lost}", link.peer),
            };
            let repaired = tokio::select! {
                repaired = self.repair(&lost, &wire) => repaired,
                () = link.failed() => return,
            };
            match repaired {
                // Whoever sends on it next sends what is kept first.
                Ok(()) => link.notify(),
                Err(reason) => return link.fail(&reason),
            }
        }
    }

    async fn repair(&self, lost: &str, wire: &Wire) -> Result<(), String> {
        // The end of the link, when that is what it is, stops this.
        tokio::time::sleep(LAST_WORD.min(self.patience)).await;
        if self.patience.is_zero() {
            return Err(lost.to_owned());
        }
        let session = &self.session;
        let (began, within) = (Instant::now(), self.patience);
        tracing::warn!(%session, "{lost}; trying for {within:?} to connect again");
        let mut pause = FIRST_PAUSE;
        loop {
            let left = within.saturating_sub(began.elapsed());
            let received = wire.received();
            let place = Place::Resumes {
                connection: self.connection,
                key: self.key,
                received,
            };
            let tried = connect_one(&self.target, session, place);
            let why = match tokio::time::timeout(left.min(TRY), tried).await {
                Ok(Ok((socket, welcome))) => {
                    wire.attach(socket, welcome.received);
                    let away = began.elapsed();
                    tracing::warn!(%session, ?away, "connected again to {}", self.target.peer());
                    return Ok(());
                }
                Ok(Err(e @ ConnectError::Refused { .. })) => {
                    return Err(format!("{lost}; {}", chain(&e)));
                }
                Ok(Err(e)) => chain(&e),
                Err(_) => format!("image-cache at {} does not answer", self.target.peer()),
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
