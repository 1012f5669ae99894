//! The link of a session to the cache, one connection or several: connect, greet, send through
//! the [`Writer`] or the [`Lanes`], hand what comes back to the runs it is about.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use image_common::control::chain;
use image_common::image::SessionName;
use image_common::link::codec::{Message, RoundPages, SetNumber, StreamNumber};
use image_common::link::handshake::{Answer, Hello, Place};
use image_common::link::reader::{greet, FrameReader, ReadError, ShakeError};
use image_common::link::VERSIONS;
use image_common::net;
use tokio::io::AsyncReadExt;
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::TcpStream;
use tokio::sync::{oneshot, Notify};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::lanes::Lanes;
use crate::run::Run;
use crate::writer::Writer;

const SOFTWARE: &str = concat!("image-proxy ", env!("CARGO_PKG_VERSION"));

/// How long the cache may take to close a connection after our farewell.
const FAREWELL: Duration = Duration::from_secs(5);

/// When a further connection ends, the first one usually ends too, and says why; it is given
/// this long.
const LAST_WORD: Duration = Duration::from_millis(200);

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
}

pub struct Link {
    pub peer: String,
    /// Of the first connection.
    writer: Arc<tokio::sync::Mutex<Writer>>,
    /// With more than one connection.
    lanes: Option<Arc<Lanes>>,
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
        let peer = target.peer();
        let within = target.connect_timeout;
        let connecting = connect_all(target, session);
        let streams = tokio::time::timeout(within, connecting)
            .await
            .map_err(|_| ConnectError::Timeout {
                peer: peer.clone(),
                within,
            })??;
        let mut halves = streams.into_iter().map(TcpStream::into_split);
        let Some((first_read, first_write)) = halves.next() else {
            unreachable!("there is a first connection")
        };
        let further: Vec<_> = halves.collect();
        let writer = Arc::new(tokio::sync::Mutex::new(Writer::new(first_write)));
        let (lanes, lane_ends) = match further.len() {
            0 => (None, Vec::new()),
            n => {
                let (lanes, ends) = Lanes::new(n + 1, writer.clone())
                    .map_err(|e| ConnectError::Pipes(target.connections, e))?;
                (Some(Arc::new(lanes)), ends)
            }
        };
        let link = Arc::new(Self {
            peer,
            writer,
            lanes: lanes.clone(),
            gathered: Notify::new(),
            routes: Mutex::default(),
            next_stream: AtomicU32::new(1),
            down: CancellationToken::new(),
            reason: OnceLock::new(),
            finished: CancellationToken::new(),
        });
        tokio::spawn(link.clone().receive(FrameReader::new(first_read)));
        tokio::spawn(link.clone().flush_gathered());
        let mut writers = vec![None];
        for (number, (read_half, write_half)) in (1..).zip(further) {
            tokio::spawn(link.clone().watch(number, read_half));
            writers.push(Some(Writer::new(write_half)));
        }
        for (end, writer) in lane_ends.into_iter().zip(writers) {
            if let Some(lanes) = &lanes {
                tokio::spawn(end.send(link.clone(), lanes.clone(), writer));
            }
        }
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

    /// The ways for large frames, if there is more than one connection.
    pub fn lanes(&self) -> Option<&Lanes> {
        self.lanes.as_deref()
    }

    /// The writer of the first connection, for whole frames.
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
                    self.lost(&e);
                    Err(self.why())
                }
            },
            () = self.down.cancelled() => Err(self.why()),
        }
    }

    /// Sending on it failed.
    pub fn lost(&self, error: &dyn std::error::Error) {
        self.fail(&format!("link to {} lost: {}", self.peer, chain(error)));
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
    /// link that is stuck is cut after a while: `false`.
    pub async fn close(&self, reason: &str) -> bool {
        let goodbye = Message::Goodbye {
            reason: reason.to_owned(),
        };
        let farewell = async {
            let sent = self.send_now(&goodbye).await.is_ok();
            if sent {
                self.finished.cancelled().await;
            }
            sent
        };
        let farewell = tokio::time::timeout(FAREWELL, farewell).await;
        if farewell.is_err() {
            tracing::warn!(
                peer = self.peer,
                "image-cache does not close the link; it is cut"
            );
        }
        self.fail("the session ended");
        farewell.unwrap_or(false)
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
                self.lost(&e);
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

    /// A further connection brings nothing but its end, and with that the session ends.
    async fn watch(self: Arc<Self>, number: usize, mut read_half: OwnedReadHalf) {
        let mut byte = [0];
        let read = tokio::select! {
            read = read_half.read(&mut byte) => read,
            () = self.down.cancelled() => return,
        };
        let what = match read {
            Ok(0) => "was closed by image-cache".to_owned(),
            Ok(_) => "brought bytes, against the link protocol".to_owned(),
            Err(e) => format!("was lost: {e}"),
        };
        // In a session that was closed that is how it goes.
        if tokio::time::timeout(LAST_WORD, self.finished.cancelled())
            .await
            .is_err()
        {
            self.fail(&format!(
                "connection {number} of the link to {} {what}",
                self.peer
            ));
        }
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

impl Target {
    fn peer(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// All connections of a session, the first one first.
async fn connect_all(
    target: &Target,
    session: &SessionName,
) -> Result<Vec<TcpStream>, ConnectError> {
    let (first, key) = connect_one(target, session, Place::First).await?;
    let mut joining = JoinSet::new();
    for connection in 1..target.connections {
        let (target, session) = (target.clone(), session.clone());
        joining.spawn(async move {
            let place = Place::Joins { connection, key };
            let joined = connect_one(&target, &session, place).await;
            joined.map(|(stream, _)| (connection, stream))
        });
    }
    let mut streams = vec![(0, first)];
    while let Some(joined) = joining.join_next().await {
        match joined {
            Ok(joined) => streams.push(joined?),
            Err(e) => std::panic::resume_unwind(e.into_panic()),
        }
    }
    streams.sort_by_key(|(connection, _)| *connection);
    Ok(streams.into_iter().map(|(_, stream)| stream).collect())
}

/// One connection, and the key of its session.
async fn connect_one(
    target: &Target,
    session: &SessionName,
    place: Place,
) -> Result<(TcpStream, u64), ConnectError> {
    let peer = target.peer();
    let mut stream = match net::connect(&target.host, target.port).await {
        Ok(stream) => stream,
        Err(source) => return Err(ConnectError::Connect { peer, source }),
    };
    let hello = Hello {
        versions: VERSIONS,
        proxy: target.proxy,
        place,
        connections: target.connections,
        session: session.clone(),
        software: SOFTWARE.to_owned(),
    };
    match greet(&mut stream, &hello).await {
        Ok(Answer::Welcome {
            version,
            key,
            software,
        }) => {
            if place == Place::First {
                let connections = target.connections;
                tracing::info!(%session, peer, version, connections, software, "connected");
            }
            Ok((stream, key))
        }
        Ok(Answer::Refused { reason, .. }) => Err(ConnectError::Refused { peer, reason }),
        Err(source) => Err(ConnectError::Shake { peer, source }),
    }
}
