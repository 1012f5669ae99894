//! One connection to the cache: connect, greet, send through the [`Writer`], hand what comes
//! back to the runs it is about.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use image_common::control::chain;
use image_common::image::SessionName;
use image_common::link::codec::{Message, RoundPages, SetNumber, StreamNumber};
use image_common::link::handshake::{Answer, Hello};
use image_common::link::reader::{greet, FrameReader, ReadError, ShakeError};
use image_common::link::VERSIONS;
use image_common::net;
use tokio::net::tcp::OwnedReadHalf;
use tokio::sync::{oneshot, Notify};
use tokio_util::sync::CancellationToken;

use crate::run::Run;
use crate::writer::Writer;

const SOFTWARE: &str = concat!("image-proxy ", env!("CARGO_PKG_VERSION"));

/// How long the cache may take to close a connection after our farewell.
const FAREWELL: Duration = Duration::from_secs(5);

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
    #[error("handshake with image-cache at {peer}")]
    Shake {
        peer: String,
        #[source]
        source: ShakeError,
    },
    #[error("image-cache at {peer} refuses the session: {reason}")]
    Refused { peer: String, reason: String },
}

/// Where the cache is and who we are.
#[derive(Debug, Clone)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub proxy: u64,
    pub connect_timeout: Duration,
}

pub struct Link {
    pub peer: String,
    writer: tokio::sync::Mutex<Writer>,
    gathered: Notify,
    routes: Mutex<Routes>,
    next_stream: AtomicU32,
    /// The connection is of no use any more; why is in `reason`.
    down: CancellationToken,
    reason: OnceLock<String>,
    /// The reading side has ended: the cache has seen everything that it will ever see.
    finished: CancellationToken,
}

/// What the cache says of a round: merged, or why not.
pub type RoundAnswer = Result<RoundPages, String>;

#[derive(Default)]
struct Routes {
    streams: HashMap<StreamNumber, Arc<Run>>,
    rounds: HashMap<StreamNumber, oneshot::Sender<RoundAnswer>>,
    sets: HashMap<SetNumber, Arc<Run>>,
}

impl Link {
    pub async fn connect(
        target: &Target,
        session: &SessionName,
    ) -> Result<Arc<Self>, ConnectError> {
        let peer = format!("{}:{}", target.host, target.port);
        let within = target.connect_timeout;
        let connected = async {
            let peer = peer.clone();
            let mut stream = net::connect(&target.host, target.port)
                .await
                .map_err(|source| ConnectError::Connect {
                    peer: peer.clone(),
                    source,
                })?;
            let hello = Hello {
                versions: VERSIONS,
                proxy: target.proxy,
                session: session.clone(),
                software: SOFTWARE.to_owned(),
            };
            match greet(&mut stream, &hello).await {
                Ok(Answer::Welcome { version, software }) => {
                    tracing::info!(%session, peer, version, software, "connected");
                    Ok(stream)
                }
                Ok(Answer::Refused { reason, .. }) => Err(ConnectError::Refused { peer, reason }),
                Err(source) => Err(ConnectError::Shake { peer, source }),
            }
        };
        let stream = tokio::time::timeout(within, connected)
            .await
            .map_err(|_| ConnectError::Timeout {
                peer: peer.clone(),
                within,
            })??;
        let (read_half, write_half) = stream.into_split();
        let link = Arc::new(Self {
            peer,
            writer: Writer::new(write_half).into(),
            gathered: Notify::new(),
            routes: Mutex::default(),
            next_stream: AtomicU32::new(1),
            down: CancellationToken::new(),
            reason: OnceLock::new(),
            finished: CancellationToken::new(),
        });
        tokio::spawn(link.clone().receive(FrameReader::new(read_half)));
        tokio::spawn(link.clone().flush_gathered());
        Ok(link)
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_set(&self, set: SetNumber, run: &Arc<Run>) {
        self.routes().sets.insert(set, run.clone());
    }

    pub fn remove_set(&self, set: SetNumber) {
        let mut routes = self.routes();
        routes.sets.remove(&set);
        routes.streams.retain(|_, run| run.set != set);
    }

    /// A number for an image of `run`; its acknowledgement will find its way.
    pub fn add_stream(&self, run: &Arc<Run>) -> StreamNumber {
        // 2^32 images in one session: years.
        let stream = StreamNumber(self.next_stream.fetch_add(1, Ordering::Relaxed));
        self.routes().streams.insert(stream, run.clone());
        stream
    }

    /// The same for a page server round, with the answer to it.
    pub fn add_round(&self) -> (StreamNumber, oneshot::Receiver<RoundAnswer>) {
        let stream = StreamNumber(self.next_stream.fetch_add(1, Ordering::Relaxed));
        let (answer, answered) = oneshot::channel();
        self.routes().rounds.insert(stream, answer);
        (stream, answered)
    }

    pub fn remove_round(&self, stream: StreamNumber) {
        self.routes().rounds.remove(&stream);
    }

    /// The writer, for whole frames.
    pub async fn writer(&self) -> tokio::sync::MutexGuard<'_, Writer> {
        self.writer.lock().await
    }

    /// Queues a message; it goes out soon.
    pub async fn send(&self, message: &Message) {
        self.writer().await.put(message);
        self.gathered.notify_one();
    }

    /// What was put into the writer goes out soon.
    pub fn notify(&self) {
        self.gathered.notify_one();
    }

    /// Sends a message and everything before it, until the kernel has it.
    pub async fn send_now(&self, message: &Message) -> Result<(), String> {
        let flushed = async {
            let mut writer = self.writer().await;
            writer.put(message);
            writer.flush().await
        };
        tokio::select! {
            sent = flushed => match sent {
                Ok(()) => Ok(()),
                Err(e) => {
                    self.fail(&format!("link to {} lost: {e}", self.peer));
                    Err(self.why())
                }
            },
            () = self.down.cancelled() => Err(self.why()),
        }
    }

    /// Declares the connection dead, and with it every run on it.
    pub fn fail(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        self.down.cancel();
        let (runs, rounds) = {
            let mut routes = self.routes();
            let runs: Vec<_> = routes.sets.values().cloned().collect();
            (runs, std::mem::take(&mut routes.rounds))
        };
        for (_, round) in rounds {
            let _ = round.send(Err(self.why()));
        }
        for run in runs {
            run.fail(&self.why());
        }
    }

    pub async fn failed(&self) {
        self.down.cancelled().await;
    }

    pub fn is_down(&self) -> bool {
        self.down.is_cancelled()
    }

    pub fn why(&self) -> String {
        self.reason
            .get()
            .cloned()
            .unwrap_or_else(|| "the link is closed".to_owned())
    }

    /// Says farewell and waits until the cache has closed: then it has seen everything. A
    /// link that is stuck is cut after a while.
    pub async fn close(&self, reason: &str) {
        let goodbye = Message::Goodbye {
            reason: reason.to_owned(),
        };
        let farewell = async {
            if self.send_now(&goodbye).await.is_ok() {
                self.finished.cancelled().await;
            }
        };
        if tokio::time::timeout(FAREWELL, farewell).await.is_err() {
            tracing::warn!(
                peer = self.peer,
                "image-cache does not close the link; it is cut"
            );
        }
        self.fail("the session ended");
    }

    async fn flush_gathered(self: Arc<Self>) {
        loop {
            tokio::select! {
                () = self.gathered.notified() => {}
                () = self.down.cancelled() => return,
            }
            // Whoever is ready to gather more does so first: one write for all of them.
            tokio::task::yield_now().await;
            let flushed = tokio::select! {
                flushed = async { self.writer().await.flush().await } => flushed,
                () = self.down.cancelled() => return,
            };
            if let Err(e) = flushed {
                self.fail(&format!("link to {} lost: {e}", self.peer));
            }
        }
    }

    async fn receive(self: Arc<Self>, mut reader: FrameReader<OwnedReadHalf>) {
        let ended = tokio::select! {
            ended = self.dispatch(&mut reader) => ended,
            () = self.down.cancelled() => Ok(()),
        };
        let reason = match ended {
            Ok(()) => format!("image-cache at {} closed the link", self.peer),
            Err(e) => format!("link to {} lost: {}", self.peer, chain(&e)),
        };
        self.finished.cancel();
        self.fail(&reason);
    }

    async fn dispatch(&self, reader: &mut FrameReader<OwnedReadHalf>) -> Result<(), ReadError> {
        while let Some(header) = reader.header().await? {
            match reader.message(header).await? {
                Message::ImageAck { stream, total } => {
                    if let Some(run) = self.routes().streams.remove(&stream) {
                        run.acknowledged(total);
                    }
                }
                Message::RoundAck { stream, pages } => {
                    let round = self.routes().rounds.remove(&stream);
                    round.map(|r| r.send(Ok(pages)));
                }
                Message::ImageRefused { stream, reason } => {
                    if let Some(round) = self.routes().rounds.remove(&stream) {
                        let _ = round.send(Err(self.said(&reason)));
                        continue;
                    }
                    let run = self.routes().streams.remove(&stream);
                    run.inspect(|run| run.fail(&self.said(&reason)));
                }
                Message::SetGated { set } => self.of_set(set, Run::gate_answered),
                Message::SetStored { set, kind } => self.of_set(set, |run| run.stored(kind)),
                Message::Committed { set } => self.of_set(set, |run| run.commit_answered(Ok(()))),
                Message::CommitRefused { set, reason } => {
                    let reason = self.said(&reason);
                    self.of_set(set, |run| run.commit_answered(Err(reason.clone())));
                }
                Message::SetAbort { set, reason } => {
                    let reason = self.said(&reason);
                    self.of_set(set, |run| run.fail(&reason));
                }
                Message::Goodbye { reason } => {
                    let _ = self.reason.set(self.said(&reason));
                }
                other => {
                    let _ = self.reason.set(format!(
                        "image-cache at {} broke the link protocol: {other:?}",
                        self.peer
                    ));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn said(&self, reason: &str) -> String {
        format!("image-cache at {}: {reason}", self.peer)
    }

    fn of_set(&self, set: SetNumber, tell: impl Fn(&Run)) {
        // An answer that comes after the run ended interests nobody.
        let run = self.routes().sets.get(&set).cloned();
        if let Some(run) = run {
            tell(&run);
        }
    }
}
