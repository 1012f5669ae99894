//! The link of a session to the cache, one connection or several: send through the [`Writer`]
//! or the [`Striping`], and pass each answer to the run that it is about.

pub mod answers;
pub mod connect;
pub mod decision;
pub mod image_data;
pub mod retransmit;
pub mod striping;
#[cfg(test)]
pub mod testing;
pub mod writer;

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use image_common::image::SessionName;
use image_common::link::codec::{FrameFormat, Message, RoundPages, SetNumber, StreamNumber};
use image_common::link::reader::{FrameReader, ReadError};
use image_common::link::resumable::{ResumableReader, ResumableStream};
use image_common::link::session_id::SessionId;
use image_common::link::TRIAL_VERSION;
use image_common::net::DEAD_PEER;
use image_common::tasks;
use tokio::io::AsyncReadExt;
use tokio::sync::{oneshot, Notify};
use tokio_util::sync::CancellationToken;

use crate::failure::Failure;
use crate::link::answers::SetAnswers;
use crate::link::connect::{connect_all, ConnectError, Connected, Repair, Target};
use crate::link::decision::Address;
use crate::link::striping::Striping;
use crate::link::writer::Writer;

/// How long the cache may take to answer our farewell.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a cache may be silent that is to answer. It may wait itself: a damaged length makes it take what has come
/// for the beginning of something (TLS notices damage, but not before it has the whole record).
const SILENCE: Duration = DEAD_PEER;

/// So many bytes of answers between two acknowledgements of them: the cache keeps more.
const ANSWERS_ACK_BYTES: u64 = 64 << 10;

/// The least retransmit buffer of a connection: the cache acknowledges in
/// steps of [`image_common::link::resumable::ACK_BYTES`] and a frame.
const LEAST_RETRANSMIT_BUFFER: usize = 4 << 20;

/// How often image-proxy says that it goes on, as long as a set of its is prepared and waits for COMMIT. The
/// cache waits ten times as long (`--prepared-timeout`).
const BEAT: Duration = Duration::from_secs(2);

pub struct Link {
    pub peer: String,
    /// Of the session, as the target's operator names it.
    pub id: SessionId,
    /// Of the first connection.
    writer: Arc<tokio::sync::Mutex<Writer>>,
    /// With more than one connection.
    striping: Option<Arc<Striping>>,
    /// All connections.
    wires: Vec<Arc<ResumableStream>>,
    frame_format: FrameFormat,
    version: u16,
    /// Where decisions are brought when this link is gone. `None`: the cache knows of no such connections.
    address: Option<Arc<Address>>,
    patience: Duration,
    gathered: Notify,
    /// So many bytes of answers were received, as the cache is to be told.
    answers: AtomicU64,
    /// The cache is to hear something.
    beats: AtomicBool,
    routes: Mutex<Routes>,
    next_stream: AtomicU32,
    /// The connection is of no use any more; why is in `reason`.
    down: CancellationToken,
    reason: OnceLock<Failure>,
    /// The reading side has ended: the cache has seen everything that it will ever see.
    finished: CancellationToken,
    /// The cache has answered our farewell, so it has read all that was before it.
    heard: CancellationToken,
}

/// What the cache says of a round: merged, or why not.
pub type RoundAnswer = Result<RoundPages, Failure>;

#[derive(Default)]
struct Routes {
    /// Of which set an image is, until the cache has answered.
    streams: HashMap<StreamNumber, SetNumber>,
    rounds: HashMap<StreamNumber, oneshot::Sender<RoundAnswer>>,
    sets: HashMap<SetNumber, Arc<dyn SetAnswers>>,
    reserved: Option<oneshot::Sender<u64>>,
}

impl Link {
    pub async fn connect(
        target: &Target,
        session: &SessionName,
    ) -> Result<Arc<Self>, ConnectError> {
        let Connected {
            sockets,
            key,
            version,
            patience,
            dial,
        } = connect_all(target, session).await?;
        let retransmit_buffer =
            (target.retransmit_buffer / sockets.len()).max(LEAST_RETRANSMIT_BUFFER);
        let retransmit_buffer = (!patience.is_zero()).then_some(retransmit_buffer);
        let wires: Vec<_> = sockets.into_iter().map(ResumableStream::new).collect();
        let writers = wires
            .iter()
            .map(|wire| Writer::new(wire.clone(), retransmit_buffer, target.frame_format));
        let mut writers = writers
            .collect::<Result<Vec<_>, _>>()
            .map_err(ConnectError::Gone)?
            .into_iter();
        let Some(first) = writers.next() else {
            unreachable!("there is a first connection")
        };
        let writer = Arc::new(tokio::sync::Mutex::new(first));
        let (striping, senders) = match writers.len() {
            0 => (None, Vec::new()),
            n => {
                let (striping, senders) = Striping::new(n + 1, writer.clone())
                    .map_err(|e| ConnectError::Pipes(target.connections, e))?;
                (Some(Arc::new(striping)), senders)
            }
        };
        let link = Arc::new(Self {
            peer: target.peer(),
            id: SessionId::of_key(key),
            writer,
            striping: striping.clone(),
            wires,
            frame_format: target.frame_format,
            version,
            address: (version >= TRIAL_VERSION).then(|| {
                Arc::new(Address {
                    target: target.clone(),
                    session: session.clone(),
                    key,
                    dial: dial.clone(),
                })
            }),
            patience,
            gathered: Notify::new(),
            answers: AtomicU64::new(0),
            beats: AtomicBool::new(false),
            routes: Mutex::default(),
            next_stream: AtomicU32::new(1),
            down: CancellationToken::new(),
            reason: OnceLock::new(),
            finished: CancellationToken::new(),
            heard: CancellationToken::new(),
        });
        for (number, wire) in (0u16..).zip(&link.wires) {
            // It reads on when the connection is repaired; if it is not, the link fails.
            let reader = ResumableReader::new(wire.clone(), None);
            match number {
                0 => {
                    let reader = FrameReader::new(reader).with_format(link.frame_format);
                    link.spawn("reading the link", link.clone().receive(reader));
                }
                _ => link.spawn("watching the link", link.clone().watch(number, reader)),
            }
            let repair = Repair {
                target: target.clone(),
                session: session.clone(),
                key,
                version,
                connection: number,
                patience,
                dial: dial.clone(),
                attempt: 0,
            };
            link.spawn("keeping the link", link.clone().keep(repair, wire.clone()));
        }
        link.spawn("writing to the link", link.clone().flush_gathered());
        let mut own = vec![None];
        own.extend(writers.map(Some));
        for (sender, writer) in senders.into_iter().zip(own) {
            if let Some(striping) = &striping {
                let failing = link.clone();
                let lost = move |e| failing.lost(e);
                let sending = sender.send(striping.clone(), writer, link.down.clone(), lost);
                link.spawn("writing to the link", sending);
            }
        }
        Ok(link)
    }

    /// A task without which the link is of no use: its panic is the end of the link.
    fn spawn(
        self: &Arc<Self>,
        what: &'static str,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let link = self.clone();
        tasks::spawn(what, task, move |why| {
            link.finished.cancel();
            link.fail(Failure::bug(format!("link to {}: {why}", link.peer)));
        });
    }

    /// Keeps a connection going. Its next sender sends the unacknowledged bytes first, so one is woken.
    async fn keep(self: Arc<Self>, repair: Repair, wire: Arc<ResumableStream>) {
        let resumed = || self.notify();
        if let Err(reason) = repair.keep(&wire, &self.down, resumed).await {
            self.fail(Failure::link(reason));
        }
    }

    /// Of all its connections.
    pub fn frame_format(&self) -> FrameFormat {
        self.frame_format
    }

    /// Of the link protocol, as image-cache has chosen it. Of all its connections.
    pub fn version(&self) -> u16 {
        self.version
    }

    pub fn address(&self) -> Option<&Arc<Address>> {
        self.address.as_ref()
    }

    /// How long a connection that broke may be away.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Whether one of its connections is being repaired.
    pub fn is_broken(&self) -> bool {
        !self.wires.iter().all(|wire| wire.is_attached())
    }

    /// Waits for what the cache is to say. If nothing comes of it for some time, the connections are made anew: what was
    /// sent and has got nowhere is sent again.
    pub async fn awaited<T>(&self, answer: impl Future<Output = T>) -> T {
        let received = || self.wires.iter().map(|wire| wire.received()).sum::<u64>();
        tokio::pin!(answer);
        let (mut silence, mut before) = (SILENCE, received());
        loop {
            if let Ok(answer) = tokio::time::timeout(silence, &mut answer).await {
                return answer;
            }
            let now = received();
            if now == before && self.renew(silence) {
                silence *= 2;
            }
            before = now;
        }
    }

    /// Waits for what may take its time while the cache holds a set, and has the cache hear meanwhile that this process
    /// goes on: a process that is stopped, or hangs, does not say so.
    pub async fn heard_during<T>(&self, waiting: impl Future<Output = T>) -> T {
        tokio::pin!(waiting);
        let mut beat = tokio::time::interval(BEAT);
        beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                done = &mut waiting => return done,
                _ = beat.tick() => {
                    // The flusher says it: this one must see the end of what it waits for, also when the link is stuck.
                    self.beats.store(true, Ordering::Relaxed);
                    self.gathered.notify_one();
                }
            }
        }
    }

    /// Breaks connections on which nothing has come for so long, so that they are made again. `false` if that cannot be,
    /// or is being done.
    fn renew(&self, silent: Duration) -> bool {
        if self.patience.is_zero() || self.is_broken() || self.is_down() {
            return false;
        }
        let peer = &self.peer;
        tracing::warn!(peer, "no answer for {silent:?}: connecting again");
        self.wires.iter().for_each(|wire| wire.shut_down());
        true
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers about the set go to `run`.
    pub fn add_set(&self, set: SetNumber, run: Arc<dyn SetAnswers>) {
        self.routes().sets.insert(set, run);
    }

    /// A number for an image of the set; the answer to it will find its way.
    pub fn add_stream(&self, set: SetNumber) -> StreamNumber {
        // 2^32 images in one session: years.
        let stream = StreamNumber(self.next_stream.fetch_add(1, Ordering::Relaxed));
        self.routes().streams.insert(stream, set);
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

    /// For frames of large images, if there is more than one connection.
    pub fn striping(&self) -> Option<&Striping> {
        self.striping.as_deref()
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
    pub async fn send_now(&self, message: &Message) -> Result<(), Failure> {
        let flushed = async {
            let mut writer = self.writer().await;
            writer.put(message);
            writer.flush().await
        };
        tokio::select! {
            sent = flushed => match sent {
                Ok(()) => Ok(()),
                Err(e) => {
                    self.lost(e);
                    Err(self.why())
                }
            },
            () = self.down.cancelled() => Err(self.why()),
        }
    }

    /// Sending on it failed.
    pub fn lost(&self, error: impl std::error::Error + Send + Sync + 'static) {
        let lost = Failure::link(format!("link to {} lost", self.peer));
        self.fail(lost.caused_by(error));
    }

    /// Asks the cache to make memory ready for so many bytes; gives how many are, when it has. Once in
    /// a session.
    pub async fn reserve(&self, bytes: u64) -> u64 {
        let (answer, answered) = oneshot::channel();
        self.routes().reserved = Some(answer);
        let message = Message::Reserve { bytes };
        match self.send_now(&message).await {
            Ok(()) => tokio::select! {
                ready = answered => ready.unwrap_or(0),
                () = self.failed() => 0,
            },
            Err(_) => 0,
        }
    }

    /// Declares the connection dead, and with it every run on it.
    pub fn fail(&self, failure: Failure) {
        let _ = self.reason.set(failure);
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
            run.fail(self.why());
        }
    }

    pub async fn failed(&self) {
        self.down.cancelled().await;
    }

    pub fn is_down(&self) -> bool {
        self.down.is_cancelled()
    }

    pub fn why(&self) -> Failure {
        let reason = self.reason.get().cloned();
        reason.unwrap_or_else(|| Failure::link("the link is closed"))
    }

    /// Says farewell and waits for the answer: then the cache has seen everything. A link that
    /// is stuck is made anew once, then it is cut; one that is being repaired has its time for that.
    /// `false`: the cache has not answered.
    pub async fn close(&self, reason: Option<&str>) -> bool {
        let goodbye = Message::Goodbye {
            reason: reason.unwrap_or_default().to_owned(),
        };
        let farewell = async {
            if self.send_now(&goodbye).await.is_ok() {
                self.finished.cancelled().await;
            }
        };
        tokio::pin!(farewell);
        let mut renewed = false;
        while tokio::time::timeout(FAREWELL, &mut farewell).await.is_err() {
            if !renewed && self.renew(FAREWELL) {
                renewed = true;
            } else if !self.is_broken() {
                tracing::warn!(
                    peer = self.peer,
                    "image-cache has not answered GOODBYE; the proxy closes the link"
                );
                break;
            }
        }
        self.fail(Failure::stopped("the session ended"));
        self.heard.is_cancelled()
    }

    async fn flush_gathered(self: Arc<Self>) {
        let mut told = 0;
        loop {
            tokio::select! {
                () = self.gathered.notified() => {}
                () = self.down.cancelled() => return,
            }
            // Tasks that are ready to gather more do so first: one write for all of them.
            tokio::task::yield_now().await;
            let flush = async {
                let mut writer = self.writer().await;
                let mut total = self.answers.load(Ordering::Relaxed);
                let beat = self.beats.swap(false, Ordering::Relaxed);
                if beat {
                    total = total.max(self.wires[0].received());
                }
                if total > told || beat {
                    told = told.max(total);
                    let connection = 0;
                    writer.put(&Message::Received { connection, total });
                }
                writer.flush().await
            };
            let flushed = tokio::select! {
                flushed = flush => flushed,
                () = self.down.cancelled() => return,
            };
            if let Err(e) = flushed {
                self.lost(e);
            }
        }
    }

    async fn receive(self: Arc<Self>, mut reader: FrameReader<ResumableReader>) {
        let ended = tokio::select! {
            ended = self.dispatch(&mut reader) => ended,
            () = self.down.cancelled() => Ok(()),
        };
        let reason = match ended {
            Ok(()) => Failure::peer(format!("image-cache at {} closed the link", self.peer)),
            Err(e) => Failure::link(format!("link to {} lost", self.peer)).caused_by(e),
        };
        self.finished.cancel();
        self.fail(reason);
    }

    /// A further connection brings nothing.
    async fn watch(self: Arc<Self>, number: u16, mut reader: ResumableReader) {
        let mut byte = [0];
        tokio::select! {
            _ = reader.read(&mut byte) => self.fail(Failure::peer(format!(
                "image-cache at {} broke the link protocol: it sent bytes on connection {number}",
                self.peer
            ))),
            () = self.down.cancelled() => {}
        }
    }

    /// Until the cache says farewell.
    async fn dispatch(&self, reader: &mut FrameReader<ResumableReader>) -> Result<(), ReadError> {
        let mut acknowledged = 0;
        while let Some(header) = reader.header().await? {
            match reader.message(header).await? {
                Message::ImageAck { stream, .. } => {
                    self.of_image(stream, |run| run.image_acknowledged());
                }
                Message::Received { connection, total } => {
                    match self.wires.get(usize::from(connection)) {
                        Some(wire) => wire.acknowledge(total),
                        None => return Err(ReadError::Connection(connection)),
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
                    let reason = self.said(&reason);
                    self.of_image(stream, |run| run.fail(reason.clone()));
                }
                Message::Reserved { bytes } => {
                    let asked = self.routes().reserved.take();
                    asked.map(|asked| asked.send(bytes));
                }
                Message::SetGated { set } => self.of_set(set, |run| run.gate_answered()),
                Message::SetStored { set, kind } => self.of_set(set, |run| run.stored(kind)),
                Message::Prepared { set } => self.of_set(set, |run| run.prepare_answered(Ok(()))),
                Message::PrepareRefused { set, reason } => {
                    let reason = self.said(&reason);
                    self.of_set(set, |run| run.prepare_answered(Err(reason.clone())));
                }
                Message::Trial { set } => self.of_set(set, |run| run.in_trial()),
                Message::Holding { set } => self.of_set(set, |run| run.holding()),
                Message::TrialFailed { set, reason } => {
                    let reason = self.said(&reason);
                    self.of_set(set, |run| run.trial_failed(reason.clone()));
                }
                Message::SetAbort { set, reason } => {
                    let reason = self.said(&reason);
                    self.of_set(set, |run| run.fail(reason.clone()));
                }
                Message::Goodbye { reason } => {
                    match reason.is_empty() {
                        true => self.heard.cancel(),
                        false => drop(self.reason.set(self.said(&reason))),
                    }
                    return Ok(());
                }
                other => {
                    let _ = self.reason.set(Failure::peer(format!(
                        "image-cache at {} broke the link protocol: {other:?}",
                        self.peer
                    )));
                    return Ok(());
                }
            }
            let received = reader.get_ref().received();
            if received - acknowledged >= ANSWERS_ACK_BYTES {
                acknowledged = received;
                // The flusher says it. The reader must not wait for the writer: its holder may wait for
                // space in the retransmit buffer, which comes with what is read next.
                self.answers.store(received, Ordering::Relaxed);
                self.gathered.notify_one();
            }
        }
        Ok(())
    }

    fn said(&self, reason: &str) -> Failure {
        Failure::peer(format!("image-cache at {}: {reason}", self.peer))
    }

    fn of_image(&self, stream: StreamNumber, tell: impl Fn(&dyn SetAnswers)) {
        let set = self.routes().streams.remove(&stream);
        if let Some(set) = set {
            self.of_set(set, tell);
        }
    }

    fn of_set(&self, set: SetNumber, tell: impl Fn(&dyn SetAnswers)) {
        // An answer that comes after the run ended is dropped.
        let run = self.routes().sets.get(&set).cloned();
        if let Some(run) = run {
            tell(&*run);
        }
    }
}

#[cfg(test)]
mod tests;
