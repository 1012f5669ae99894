//! The link into the store: one task per connection reads its frames, one per session sends the
//! answers.
//!
//! The way of a byte: the kernel's socket buffer -> the image's memory, by one `recv` into the
//! place where it stays. Only what was read together with a frame's header, and small images
//! as a whole, are copied once more.

mod answers;
mod connections;
mod ending;
mod images;
mod prepared;
mod reassembly;
mod rounds;
pub mod threads;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use image_common::admission::quota::share;
use image_common::control::chain;
use image_common::criu::inventory::SetKind;
use image_common::daemon::shutdown::Shutdown;
use image_common::link::codec::{Header, Message, SetNumber, StreamNumber};
use image_common::link::handshake::{
    choose_version, Answer, HandshakeError, Hello, Place, Refusal,
};
use image_common::link::reader::{receive_hello, FrameReader, ReadError, ShakeError};
use image_common::link::resumable::{
    Claim, Socket, Wire, WireReader, ACK_BYTES, ACK_WAITING_BYTES,
};
use image_common::link::VERSIONS;
use image_common::net::DEAD_PEER;
use image_common::tasks;
use image_common::units::human_size;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use answers::AnswerError;
use connections::Hub;
pub use connections::Links;
use ending::Ending;
use reassembly::{ArrivalError, Arrivals};
use rounds::RoundTransfer;

use crate::frontend::Frontends;
use crate::limits::Handshake;
use crate::store::memory::budget::OutOfMemory;
use crate::store::memory::reservation;
use crate::store::session::{Opener, Session, SessionError};
use crate::store::set::{Set, SetError};
use crate::store::{NoSession, Store};

/// Answers not yet sent. A proxy that does not read them is not read from either.
const ANSWER_QUEUE: usize = 256;

const SOFTWARE: &str = concat!("image-cache ", env!("CARGO_PKG_VERSION"));

/// Why a link ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum LinkFailure {
    #[error(transparent)]
    Shake(#[from] ShakeError),
    #[error("no handshake within {0:?}")]
    ShakeTimeout(Duration),
    #[error("no handshake, and others need the place")]
    ShakeCut,
    #[error("{0}")]
    Refused(String),
    #[error("link lost")]
    Read(#[from] ReadError),
    #[error("the link was closed before the session ended")]
    Closed,
    #[error("the proxy broke the link protocol")]
    Session(#[source] SessionError),
    #[error("a set cannot be held")]
    Limit(#[source] OutOfMemory),
    #[error("the proxy broke the link protocol")]
    Arrival(#[from] ArrivalError),
    #[error("the proxy broke the link protocol: {0}")]
    Protocol(String),
    #[error("the proxy broke the link protocol: more than image data on connection {0}")]
    NotData(u16),
    #[error("connection {0} of the session")]
    Connection(u16, #[source] Box<LinkFailure>),
    #[error("the answers cannot be sent")]
    Answers,
    #[error("the proxy broke the link protocol")]
    Unheard(#[source] AnswerError),
    #[error("{0}")]
    Own(&'static str),
    #[error("link lost, and the proxy has not connected again within {0:?} to take its answers")]
    Away(Duration),
    #[error("image-cache is stopping")]
    Stopping,
    #[error("the proxy connected anew, or an operator has decided")]
    Replaced,
    #[error("an operator of the target has decided about the set: {0}")]
    Decided(&'static str),
}

impl From<SessionError> for LinkFailure {
    fn from(e: SessionError) -> Self {
        match e {
            SessionError::Limit(e) => Self::Limit(e),
            e => Self::Session(e),
        }
    }
}

impl LinkFailure {
    /// Whether it is about somebody who never got into a session.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Shake(_) | Self::ShakeTimeout(_) | Self::ShakeCut | Self::Refused(_)
        )
    }
}

/// Serves one connection from its handshake to its end.
pub async fn serve(
    mut stream: Socket,
    handshake: Handshake,
    peer: &str,
    store: Arc<Store>,
    frontends: Arc<Frontends>,
    links: Arc<Links>,
    shutdown: Shutdown,
) -> Result<(), LinkFailure> {
    let within = store.limits.handshake_timeout;
    let hello = tokio::select! {
        hello = tokio::time::timeout(within, receive_hello(&mut stream)) => hello,
        () = handshake.cut() => return Err(LinkFailure::ShakeCut),
    };
    let hello = hello.map_err(|_| LinkFailure::ShakeTimeout(within))?;
    drop(handshake);
    let hello = match hello {
        Err(ShakeError::Protocol(e @ HandshakeError::Version { .. })) => {
            refuse(&mut stream, Refusal::Version, e.to_string()).await;
            return Err(ShakeError::Protocol(e).into());
        }
        other => other?,
    };
    // `decode` accepted the versions, so there is a common one.
    let version = choose_version(&hello.versions, &VERSIONS).unwrap_or(*VERSIONS.end());
    let patience = hello.patience.min(links.link_timeout);
    let welcome = |key, received| Answer::Welcome {
        version,
        key,
        received,
        patience,
        software: SOFTWARE.to_owned(),
    };
    if let Place::Resumes {
        connection,
        key,
        received,
        attempt,
    } = hello.place
    {
        let place = (connection, key, Claim { received, attempt });
        let welcome = |arrived| welcome(key, arrived);
        return links.resume(&hello, stream, place, welcome).await;
    }
    if let Place::Joins { connection, key } = hello.place {
        let joined = match links.join(&hello, connection, key) {
            Ok(joined) => joined,
            Err(reason) => {
                refuse(&mut stream, Refusal::NoSession, reason.clone()).await;
                return Err(LinkFailure::Refused(reason));
            }
        };
        connections::serve(stream, joined, &welcome(key, 0), store, shutdown).await;
        return Ok(());
    }
    let session = match open(&hello, peer, &store, &frontends, &links, &shutdown) {
        Ok(session) => Ending::new(&store, session),
        Err((why, reason)) => {
            refuse(&mut stream, why, reason.clone()).await;
            return Err(LinkFailure::Refused(reason));
        }
    };
    let span = tracing::info_span!("link", session = %session.name, %peer);
    let (answers, queue) = mpsc::channel(ANSWER_QUEUE);
    // Before the welcome: the further connections come as soon as the proxy has heard it.
    let longer = match patience.is_zero() {
        true => patience,
        // The proxy may have noticed later by so much.
        false => patience + DEAD_PEER,
    };
    let hub = links.open(&hello, &session, answers, longer);
    let result = async {
        let connections = hello.connections;
        tracing::info!(
            version,
            connections,
            software = hello.software,
            "session begins"
        );
        stream
            .write_all(&welcome(hub.key, 0).encode())
            .await
            .map_err(ReadError::Io)?;
        run(hub.attach(0, stream), &hub, queue, &store, &shutdown).await
    }
    .instrument(span.clone())
    .await;
    // Their tasks have left the store alone since `run` ended; now they close, too.
    drop(hub);
    let _entered = span.enter();
    let reason = match &result {
        Ok(goodbye) if goodbye.is_empty() => "the source ended the session".to_owned(),
        Ok(goodbye) => format!("the source ended the session: {goodbye}"),
        Err(e) => chain(e),
    };
    session.end(&reason);
    frontends.reconcile(&store);
    tracing::info!(
        held = human_size(store.budget.used()),
        "session ends: {reason}"
    );
    result.map(drop)
}

fn open(
    hello: &Hello,
    peer: &str,
    store: &Arc<Store>,
    frontends: &Arc<Frontends>,
    links: &Links,
    shutdown: &Shutdown,
) -> Result<Arc<Session>, (Refusal, String)> {
    if shutdown.requested.is_cancelled() {
        return Err((Refusal::Unavailable, "image-cache is stopping".to_owned()));
    }
    let most = share(store.limits.ports.max_connections);
    links
        .check_room(peer, hello.connections, most)
        .map_err(|reason| (Refusal::Unavailable, reason))?;
    let opener = Opener {
        proxy: hello.proxy,
        opening: match hello.place {
            Place::First { opening } => opening,
            Place::Joins { .. } | Place::Resumes { .. } => 0,
        },
    };
    let session = store
        .open_session(hello.session.clone(), opener, peer.to_owned())
        .map_err(|e| match e {
            NoSession::Overtaken(_) => (Refusal::Overtaken, e.to_string()),
            NoSession::NameInUse(_) => (Refusal::SessionInUse, e.to_string()),
            NoSession::TooMany(_) => (Refusal::Unavailable, e.to_string()),
        })?;
    // Before the proxy is welcomed, so that whoever saw its dump succeed finds the sockets.
    if let Err(e) = frontends.serve_session(store, &session.name) {
        let reason = format!("no sockets for session {}: {}", session.name, chain(&e));
        store.disconnect(&session, &reason);
        return Err((Refusal::Unavailable, reason));
    }
    Ok(session)
}

async fn refuse(stream: &mut (impl AsyncWrite + Unpin), why: Refusal, reason: String) {
    let answer = Answer::Refused { why, reason };
    // The peer may be gone; the reason is in our log anyhow.
    let _ = stream.write_all(&answer.encode()).await;
    let _ = stream.shutdown().await;
}

/// Reads frames until the session ends; gives the proxy's farewell.
async fn run(
    wire: Arc<Wire>,
    hub: &Hub,
    queue: mpsc::Receiver<Message>,
    store: &Arc<Store>,
    shutdown: &Shutdown,
) -> Result<String, LinkFailure> {
    let (unheard, gone) = oneshot::channel();
    let sending = answers::send(wire.clone(), queue, hub.checks, hub.patience);
    let sending = async move {
        let _ = unheard.send(sending.await);
    };
    let sender = tasks::spawn("answering", sending, |_| {});
    let unheard = async {
        match gone.await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(AnswerError::Away)) => LinkFailure::Away(hub.patience),
            Ok(Err(e)) => LinkFailure::Unheard(e),
            // It has not come to say anything.
            Err(_) => LinkFailure::Own(tasks::OWN_ERROR),
        }
    };
    let mut receiver = Receiver::new(hub.reader(&wire), hub, 0, store, shutdown);
    let result = tokio::select! {
        result = receiver.run() => result,
        failure = unheard => Err(failure),
        () = hub.over.cancelled() => Err(hub.failure()),
        () = shutdown.forced.cancelled() => Err(LinkFailure::Stopping),
        () = hub.session.taken_over.cancelled() => Err(LinkFailure::Replaced),
        () = prepared::watch(&hub.session, &wire, hub.prepared_timeout) => unreachable!("it watches for ever"),
    };
    // No connection touches a set any more when its session is judged by what is there.
    hub.stop_readers().await;
    hub.images.forget_all();
    // Best effort, and never instead of the error itself. An answer to the proxy's farewell
    // says that everything before it was heard.
    let reason = result.as_ref().err().map_or_else(String::new, |e| chain(e));
    let _ = receiver.answers.try_send(Message::Goodbye { reason });
    drop(receiver);
    hub.no_more_answers();
    // What is queued, e.g. that farewell, may still go out; a dead link ends this by itself.
    let _ = tokio::time::timeout(Duration::from_secs(1), sender).await;
    hub.close(0);
    result
}

/// Reads one connection.
struct Receiver {
    reader: FrameReader<WireReader>,
    /// So much of the stream was acknowledged. `None`: nobody wants to know.
    acknowledged: Option<u64>,
    answers: mpsc::Sender<Message>,
    session: Arc<Session>,
    store: Arc<Store>,
    /// Shared by the connections of the session.
    images: Arc<Arrivals>,
    /// Which of them this is; all but image data come on 0.
    connection: u16,
    rounds: HashMap<StreamNumber, RoundTransfer>,
    /// RESERVE has come.
    reserved: bool,
    /// The connection that the answers go out on.
    first: Option<Arc<Wire>>,
    shutdown: Shutdown,
}

impl Receiver {
    fn new(
        reader: WireReader,
        hub: &Hub,
        connection: u16,
        store: &Arc<Store>,
        shutdown: &Shutdown,
    ) -> Self {
        Self {
            reader: FrameReader::new(reader).with_checks(hub.checks),
            acknowledged: (!hub.patience.is_zero()).then_some(0),
            first: hub.first(),
            answers: hub.answers(),
            session: hub.session.clone(),
            store: store.clone(),
            images: hub.images.clone(),
            connection,
            rounds: HashMap::new(),
            reserved: false,
            shutdown: shutdown.clone(),
        }
    }

    /// The first connection, until the session ends; gives the proxy's farewell.
    async fn run(&mut self) -> Result<String, LinkFailure> {
        while let Some(header) = self.header().await? {
            if let Some(stream) = header.as_data() {
                self.data(stream, header).await?;
            } else {
                match self.reader.message(header).await? {
                    Message::Goodbye { reason } => return Ok(reason),
                    message => self.message(message).await?,
                }
            }
            self.acknowledge(ACK_BYTES).await?;
        }
        Err(LinkFailure::Closed)
    }

    /// A further connection: image data alone, until the session ends.
    async fn run_further(&mut self) -> Result<(), LinkFailure> {
        while let Some(header) = self.header().await? {
            match header.as_data() {
                Some(stream) => self.data(stream, header).await?,
                None => return Err(LinkFailure::NotData(self.connection)),
            }
            self.acknowledge(ACK_BYTES).await?;
        }
        Err(LinkFailure::Closed)
    }

    /// The next frame's header. Who waits for it has told the proxy what came before.
    async fn header(&mut self) -> Result<Option<Header>, LinkFailure> {
        tokio::select! {
            biased;
            header = self.reader.header() => return Ok(header?),
            () = std::future::ready(()) => {}
        }
        self.acknowledge(ACK_WAITING_BYTES).await?;
        Ok(self.reader.header().await?)
    }

    /// Tells the proxy what it need not keep any more, if that is so much.
    async fn acknowledge(&mut self, least: u64) -> Result<(), LinkFailure> {
        let (connection, total) = (self.connection, self.reader.get_ref().received());
        match &mut self.acknowledged {
            Some(told) if total - *told >= least => *told = total,
            _ => return Ok(()),
        }
        self.answer(Message::Received { connection, total }).await
    }

    async fn answer(&self, message: Message) -> Result<(), LinkFailure> {
        self.answers
            .send(message)
            .await
            .map_err(|_| LinkFailure::Answers)
    }

    async fn message(&mut self, message: Message) -> Result<(), LinkFailure> {
        self.still_wanted(&message)?;
        match message {
            Message::SetOpen {
                set,
                gated,
                dialect,
                parent,
                snapshot,
            } => {
                tracing::info!(%snapshot, gated, "set begins");
                self.session
                    .open_set(set, snapshot, parent, gated, dialect)?;
                if gated {
                    self.answer(Message::SetGated { set }).await?;
                }
                Ok(())
            }
            Message::Reserve { bytes } => self.reserve(bytes),
            Message::SetDialect { set, dialect } => {
                self.session.set(set)?.set_dialect(dialect);
                Ok(())
            }
            Message::SetGate { set } => match self.session.set(set)?.gate() {
                Ok(()) => self.answer(Message::SetGated { set }).await,
                Err(e) => self.abort(set, &chain(&e)).await,
            },
            Message::SetComplete { set, images, bytes } => self.complete(set, images, bytes).await,
            Message::Received {
                connection: 0,
                total,
            } => {
                if let Some(first) = &self.first {
                    first.acknowledge(total);
                }
                Ok(())
            }
            Message::Prepare {
                set,
                images,
                bytes,
                digest,
            } => {
                let ready = self.session.set(set)?;
                if self.shutdown.requested.is_cancelled() {
                    // What is promised now would be gone in a moment.
                    let reason = "image-cache is stopping".to_owned();
                    return self.answer(Message::PrepareRefused { set, reason }).await;
                }
                let checked = ready.digests.check(digest).map_err(|e| chain(&e));
                let prepared =
                    checked.and_then(|()| ready.prepare(images, bytes).map_err(|e| chain(&e)));
                match prepared {
                    Ok(()) => {
                        tracing::info!(snapshot = %ready.snapshot, images, bytes, "prepared: every image is here");
                        self.session.prepared.notify_one();
                        self.answer(Message::Prepared { set }).await
                    }
                    Err(reason) => {
                        tracing::error!(snapshot = %ready.snapshot, "cannot be prepared, so the source must not kill the process: {reason}");
                        self.answer(Message::PrepareRefused { set, reason }).await
                    }
                }
            }
            Message::Commit { set } => self.commit(set),
            Message::SetClose { set } => self.close_set(set),
            Message::SetDoubt { set, reason } => self.doubt(set, &reason),
            Message::SetAbort { set, reason } => self.given_up(set, &reason),
            Message::ImageOpen {
                stream,
                set,
                path,
                mode,
                size,
            } => self.open_image(stream, set, path, mode, size).await,
            Message::ImageEnd {
                stream,
                total,
                digest,
            } => {
                let digest = self.reader.digest().map(|_| digest);
                match self.images.end(stream, total, digest)? {
                    Some(whole) => self.stored(stream, whole).await,
                    None => Ok(()), // it is forgotten, or its last bytes are on other connections
                }
            }
            Message::RoundOpen {
                stream,
                set,
                page_bytes,
                layout,
            } => self.open_round(stream, set, page_bytes, layout),
            Message::RoundEnd {
                stream,
                entries,
                pages,
            } => self.end_round(stream, entries, pages).await,
            Message::ImageAbort { stream, reason } if self.rounds.contains_key(&stream) => {
                tracing::warn!("page server round broken off: {reason}");
                self.rounds.remove(&stream);
                Ok(())
            }
            Message::ImageAbort { stream, reason } => {
                let image = self.images.abort(stream)?;
                if let Some(image) = image {
                    tracing::warn!(%image, "image aborted by the source: {reason}");
                }
                Ok(())
            }
            other => Err(LinkFailure::Protocol(format!(
                "a proxy does not send {other:?}"
            ))),
        }
    }

    /// Makes memory ready, aside: the proxy need not wait for it.
    fn reserve(&mut self, bytes: u64) -> Result<(), LinkFailure> {
        if std::mem::replace(&mut self.reserved, true) {
            return Err(LinkFailure::Protocol("a second RESERVE".to_owned()));
        }
        let budget = self.session.budget.clone();
        // Whoever holds the queue open makes the session's end wait.
        let answers = self.answers.downgrade();
        let answer = async move {
            let began = Instant::now();
            let ready = reservation::reserve(&budget, bytes).await;
            tracing::info!(
                expected = human_size(bytes),
                ready = human_size(ready),
                "memory made ready in {:.1?}",
                began.elapsed()
            );
            if let Some(answers) = answers.upgrade() {
                let _ = answers.send(Message::Reserved { bytes: ready }).await;
            }
        };
        // The proxy waits for it no longer than it likes.
        tasks::spawn("making memory ready", answer, |_| {});
        Ok(())
    }

    async fn complete(
        &mut self,
        set: SetNumber,
        images: u32,
        bytes: u64,
    ) -> Result<(), LinkFailure> {
        let stored = self.session.set(set)?;
        if stored.is_promised() {
            return Err(LinkFailure::Protocol(
                "SET_COMPLETE after PREPARE".to_owned(),
            ));
        }
        self.images.settled(set, None).await?;
        if stored.expected_kind().is_dump() {
            // Before the set can be served: they are a part of it.
            let host = self.session.host();
            if let Err(e) = self.store.gather_pages(&self.session, &stored, host) {
                return self.abort(set, &chain(&e)).await;
            }
        }
        // All that was to come is here, and its tasks are frozen.
        self.session.budget.release_reserved().drop_aside();
        self.judge(&stored);
        match stored.complete(images, bytes) {
            Ok(kind) => {
                let what = match kind {
                    SetKind::Dump | SetKind::Unclear => "dump",
                    SetKind::PreDump => "pre-dump",
                };
                tracing::info!(snapshot = %stored.snapshot, images, bytes, "{what} complete");
                self.answer(Message::SetStored { set, kind }).await
            }
            Err(SetError::Aborted(_)) => Ok(()), // the proxy was told when it happened
            Err(e) => self.abort(set, &chain(&e)).await,
        }
    }

    /// Before the set is called complete, from when on an ungated one may be restored.
    fn judge(&self, set: &Set) {
        let parents = self.session.parents(set);
        let Err(flaw) = set.judge(&parents, self.store.allowed) else {
            return;
        };
        let (snapshot, id) = (&set.snapshot, self.session.id);
        match set.is_in_doubt() {
            false => {
                tracing::warn!(%snapshot, "this set will not be prepared for a commit: {flaw}")
            }
            true => tracing::error!(
                %snapshot,
                "in doubt: {flaw}. The dump has no action script, so CRIU kills the process all the same. \
                 `image-cache release {id}` lets a restore try, `image-cache drop {id}` forgets this copy"
            ),
        }
    }

    /// Gives a set up and tells the proxy.
    async fn abort(&mut self, number: SetNumber, reason: &str) -> Result<(), LinkFailure> {
        let set = self.session.set(number)?;
        if set.is_aborted() {
            return Ok(());
        }
        if set.is_promised() {
            // The source may have killed: only it, or an operator, gives such a set up.
            return Err(LinkFailure::Protocol(format!("{reason}, after PREPARE")));
        }
        tracing::error!(snapshot = %set.snapshot, "set given up: {reason}");
        self.images.forget_set(number);
        self.session.budget.release_reserved().drop_aside();
        set.abort(reason)
            .map_err(|e| LinkFailure::Protocol(e.to_string()))?;
        let reason = reason.to_owned();
        self.answer(Message::SetAbort {
            set: number,
            reason,
        })
        .await
    }
}
