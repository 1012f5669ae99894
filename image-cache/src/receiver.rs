//! The link into the store: one task per proxy reads its frames, a second one sends the
//! answers.
//!
//! The way of a byte: the kernel's socket buffer -> the image's memory, by one `recv` into the
//! place where it stays. Only what was read together with a frame's header, and small images
//! as a whole, are copied once more.

mod rounds;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use image_common::control::chain;
use image_common::criu::inventory::SetKind;
use image_common::link::codec::{Header, Message, SetNumber, StreamNumber};
use image_common::link::handshake::{choose_version, Answer, HandshakeError, Hello, Refusal};
use image_common::link::reader::{receive_hello, FrameReader, ReadError, ShakeError};
use image_common::link::VERSIONS;
use image_common::shutdown::Shutdown;
use image_common::units::human_size;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tracing::Instrument;

use rounds::RoundTransfer;

use crate::frontend::Frontends;
use crate::store::image::{ImageWriter, WriteError};
use crate::store::session::{Session, SessionError};
use crate::store::set::{OpenError, Set, SetError};
use crate::store::Store;

/// A proxy greets at once; this is for the others.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Answers not yet sent. A proxy that does not read them is not read from either.
const ANSWER_QUEUE: usize = 256;

/// More images than any CRIU has open at once; a bound for what a peer can make us remember.
const MAX_OPEN_IMAGES: usize = 64 << 10;

/// Images of sets that were given up are read into this and forgotten.
const DISCARD_BYTES: usize = 64 << 10;

const SOFTWARE: &str = concat!("image-cache ", env!("CARGO_PKG_VERSION"));

/// Why a link ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum LinkFailure {
    #[error(transparent)]
    Shake(#[from] ShakeError),
    #[error("no handshake within {} s", HANDSHAKE_TIMEOUT.as_secs())]
    ShakeTimeout,
    #[error("refused: {0}")]
    Refused(String),
    #[error("link lost")]
    Read(#[from] ReadError),
    #[error("the link was closed before the session ended")]
    Closed,
    #[error("the proxy broke the link protocol")]
    Session(#[from] SessionError),
    #[error("the proxy broke the link protocol: {0}")]
    Protocol(String),
    #[error("the answers cannot be sent")]
    Answers,
    #[error("image-cache is stopping")]
    Stopping,
    #[error("the proxy connected anew")]
    Replaced,
}

/// Serves one proxy from its handshake to its end. Logs what went wrong; there is nobody else
/// to tell.
pub async fn serve<S>(
    stream: S,
    peer: String,
    store: Arc<Store>,
    frontends: Arc<Frontends>,
    shutdown: Shutdown,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    if let Err(e) = accept(stream, &peer, store, frontends, shutdown).await {
        tracing::error!(%peer, "{}", chain(&e));
    }
}

async fn accept<S>(
    mut stream: S,
    peer: &str,
    store: Arc<Store>,
    frontends: Arc<Frontends>,
    shutdown: Shutdown,
) -> Result<(), LinkFailure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let hello = tokio::time::timeout(HANDSHAKE_TIMEOUT, receive_hello(&mut stream))
        .await
        .map_err(|_| LinkFailure::ShakeTimeout)?;
    let hello = match hello {
        Err(ShakeError::Protocol(e @ HandshakeError::Version { .. })) => {
            refuse(&mut stream, Refusal::Version, e.to_string()).await;
            return Err(ShakeError::Protocol(e).into());
        }
        other => other?,
    };
    let session = match open(&hello, peer, &store, &frontends, &shutdown) {
        Ok(session) => session,
        Err((why, reason)) => {
            refuse(&mut stream, why, reason.clone()).await;
            return Err(LinkFailure::Refused(reason));
        }
    };
    // `decode` accepted the versions, so there is a common one.
    let version = choose_version(&hello.versions, &VERSIONS).unwrap_or(*VERSIONS.end());
    let span = tracing::info_span!("link", session = %session.name, %peer);
    let result = async {
        tracing::info!(version, software = hello.software, "session begins");
        let answer = Answer::Welcome {
            version,
            software: SOFTWARE.to_owned(),
        };
        stream
            .write_all(&answer.encode())
            .await
            .map_err(ReadError::Io)?;
        run(stream, &session, &store, &shutdown).await
    }
    .instrument(span.clone())
    .await;
    let _entered = span.enter();
    let reason = match &result {
        Ok(goodbye) if goodbye.is_empty() => "the source ended the session".to_owned(),
        Ok(goodbye) => format!("the source ended the session: {goodbye}"),
        Err(e) => chain(e),
    };
    store.disconnect(&session, &reason);
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
    shutdown: &Shutdown,
) -> Result<Arc<Session>, (Refusal, String)> {
    if shutdown.requested.is_cancelled() {
        return Err((Refusal::Unavailable, "image-cache is stopping".to_owned()));
    }
    let session = store
        .open_session(hello.session.clone(), hello.proxy, peer.to_owned())
        .map_err(|e| (Refusal::SessionInUse, e.to_string()))?;
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
async fn run<S>(
    stream: S,
    session: &Arc<Session>,
    store: &Arc<Store>,
    shutdown: &Shutdown,
) -> Result<String, LinkFailure>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (read_half, write_half) = tokio::io::split(stream);
    let (answers, queue) = mpsc::channel(ANSWER_QUEUE);
    let sender = tokio::spawn(send_answers(write_half, queue));
    let mut receiver = Receiver {
        reader: FrameReader::new(read_half),
        answers,
        session: session.clone(),
        store: store.clone(),
        images: HashMap::new(),
        rounds: HashMap::new(),
        shutdown: shutdown.clone(),
    };
    let result = tokio::select! {
        result = receiver.run() => result,
        () = shutdown.forced.cancelled() => Err(LinkFailure::Stopping),
        () = session.replaced.cancelled() => Err(LinkFailure::Replaced),
    };
    for (_, transfer) in receiver.images.drain() {
        transfer.give_up();
    }
    if let Err(e) = &result {
        let reason = chain(e);
        // Best effort, and never instead of the error itself.
        let _ = receiver.answers.try_send(Message::Goodbye { reason });
    }
    drop(receiver);
    // What is queued, e.g. that farewell, may still go out; a dead link ends this by itself.
    let _ = tokio::time::timeout(Duration::from_secs(1), sender).await;
    result
}

/// Sends what is queued, as much as there is in one write.
async fn send_answers<W: AsyncWrite + Unpin>(mut to: W, mut queue: mpsc::Receiver<Message>) {
    let mut batch = Vec::with_capacity(ANSWER_QUEUE);
    let mut out = BytesMut::new();
    while queue.recv_many(&mut batch, ANSWER_QUEUE).await > 0 {
        batch.drain(..).for_each(|m: Message| m.encode(&mut out));
        if to.write_all(&out).await.is_err() {
            return; // the reading half sees why
        }
        out.clear();
    }
    let _ = to.shutdown().await;
}

struct Receiver<R> {
    reader: FrameReader<R>,
    answers: mpsc::Sender<Message>,
    session: Arc<Session>,
    store: Arc<Store>,
    images: HashMap<StreamNumber, Transfer>,
    rounds: HashMap<StreamNumber, RoundTransfer>,
    shutdown: Shutdown,
}

/// An image on its way.
struct Transfer {
    set: Arc<Set>,
    /// `None`: it was refused, or its set given up; the rest is read and forgotten.
    writer: Option<ImageWriter>,
}

impl Transfer {
    fn give_up(self) {
        if let Some(writer) = self.writer {
            self.set.drop_image(writer);
        }
    }
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    async fn run(&mut self) -> Result<String, LinkFailure> {
        while let Some(header) = self.reader.header().await? {
            if let Some(stream) = header.as_data() {
                self.data(stream, header).await?;
                continue;
            }
            match self.reader.message(header).await? {
                Message::Goodbye { reason } => return Ok(reason),
                message => self.message(message).await?,
            }
        }
        Err(LinkFailure::Closed)
    }

    async fn answer(&self, message: Message) -> Result<(), LinkFailure> {
        self.answers
            .send(message)
            .await
            .map_err(|_| LinkFailure::Answers)
    }

    async fn message(&mut self, message: Message) -> Result<(), LinkFailure> {
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
            Message::SetDialect { set, dialect } => {
                self.session.set(set)?.set_dialect(dialect);
                Ok(())
            }
            Message::SetGate { set } => match self.session.set(set)?.gate() {
                Ok(()) => self.answer(Message::SetGated { set }).await,
                Err(e) => self.abort(set, &chain(&e)).await,
            },
            Message::SetComplete { set, images, bytes } => self.complete(set, images, bytes).await,
            Message::Commit { set, images, bytes } => {
                let held = self.session.set(set)?;
                if self.shutdown.requested.is_cancelled() {
                    // What is promised now would be gone in a moment.
                    let reason = "image-cache is stopping".to_owned();
                    return self.answer(Message::CommitRefused { set, reason }).await;
                }
                match held.commit(images, bytes) {
                    Ok(()) => {
                        tracing::info!(snapshot = %held.snapshot, images, bytes, "held for commit");
                        self.answer(Message::Committed { set }).await
                    }
                    Err(e) => {
                        let reason = chain(&e);
                        tracing::error!(snapshot = %held.snapshot, "commit refused: {reason}");
                        self.answer(Message::CommitRefused { set, reason }).await
                    }
                }
            }
            Message::Confirm { set } => self.finalize(set, Set::confirm),
            Message::SetClose { set } => self.finalize(set, Set::close),
            Message::SetDoubt { set, reason } => {
                let doubted = self.session.set(set)?;
                tracing::error!(
                    snapshot = %doubted.snapshot,
                    "in doubt: {reason}. If the process is dead on the source, run `image-cache release {}`; if it lives, `image-cache drop {}`",
                    self.session.name, self.session.name
                );
                doubted
                    .doubt()
                    .map_err(|e| LinkFailure::Protocol(chain(&e)))
            }
            Message::SetAbort { set, reason } => {
                let given_up = self.session.set(set)?;
                tracing::warn!(snapshot = %given_up.snapshot, "the source gave the set up: {reason}");
                self.forget_transfers(set);
                given_up
                    .abort(&format!("the source gave it up: {reason}"))
                    .map_err(|e| LinkFailure::Protocol(e.to_string()))
            }
            Message::ImageOpen {
                stream,
                set,
                path,
                mode,
                size,
            } => self.open_image(stream, set, path, mode, size).await,
            Message::ImageEnd { stream, total } => self.end_image(stream, total).await,
            Message::RoundOpen {
                stream,
                set,
                page_bytes,
            } => self.open_round(stream, set, page_bytes),
            Message::RoundMap { stream, id } => {
                let transfer = self.round(stream)?;
                transfer.map = Some(id);
                transfer.round.iter_mut().for_each(|r| r.open(id));
                Ok(())
            }
            Message::RoundEntry { stream, entry } => {
                let transfer = self.round(stream)?;
                transfer.entries += 1;
                let Some(id) = transfer.map else {
                    return Err(LinkFailure::Protocol(
                        "an entry without a pagemap".to_owned(),
                    ));
                };
                match transfer.round.as_mut().map(|r| r.add(id, entry)) {
                    None | Some(Ok(())) => Ok(()),
                    Some(Err(e)) => self.refuse_round(stream, &e).await,
                }
            }
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
                let transfer = self.take(stream)?;
                if let Some(writer) = &transfer.writer {
                    tracing::warn!(snapshot = %transfer.set.snapshot, image = %writer.image().name, "image aborted by the source: {reason}");
                }
                transfer.give_up();
                Ok(())
            }
            other => Err(LinkFailure::Protocol(format!(
                "a proxy does not send {other:?}"
            ))),
        }
    }

    async fn complete(
        &mut self,
        set: SetNumber,
        images: u32,
        bytes: u64,
    ) -> Result<(), LinkFailure> {
        let stored = self.session.set(set)?;
        if stored.rounds() > 0 && stored.expected_kind().is_dump() {
            // Before the set can be served: they are a part of it.
            let lend = self.store.release_on_read;
            let flat = self
                .session
                .flatten_pages(&stored, &self.store.budget, lend);
            if let Err(e) = flat {
                return self.abort(set, &chain(&e)).await;
            }
        }
        if self.store.squash && stored.expected_kind().is_dump() {
            if let Err(e) = self.session.squash(&stored, &self.store.budget) {
                return self.abort(set, &chain(&e)).await;
            }
        }
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

    fn finalize(
        &mut self,
        set: SetNumber,
        step: impl Fn(&Set) -> Result<(), SetError>,
    ) -> Result<(), LinkFailure> {
        let set = self.session.set(set)?;
        step(&set).map_err(|e| LinkFailure::Protocol(chain(&e)))?;
        let (images, bytes) = set.totals();
        tracing::info!(snapshot = %set.snapshot, images, size = human_size(bytes), "ready to be restored");
        Ok(())
    }

    /// Gives a set up and tells the proxy.
    async fn abort(&mut self, number: SetNumber, reason: &str) -> Result<(), LinkFailure> {
        let set = self.session.set(number)?;
        if set.is_aborted() {
            return Ok(());
        }
        tracing::error!(snapshot = %set.snapshot, "set given up: {reason}");
        self.forget_transfers(number);
        set.abort(reason)
            .map_err(|e| LinkFailure::Protocol(e.to_string()))?;
        let reason = reason.to_owned();
        self.answer(Message::SetAbort {
            set: number,
            reason,
        })
        .await
    }

    fn forget_transfers(&mut self, set: SetNumber) {
        for transfer in self.images.values_mut().filter(|t| t.set.number == set) {
            if let Some(writer) = transfer.writer.take() {
                transfer.set.drop_image(writer);
            }
        }
    }

    async fn open_image(
        &mut self,
        stream: StreamNumber,
        set: SetNumber,
        path: image_common::image::ImageName,
        mode: u32,
        size: Option<u64>,
    ) -> Result<(), LinkFailure> {
        const O_APPEND: u32 = 0x400;
        if stream.0 == 0 || self.images.contains_key(&stream) {
            return Err(LinkFailure::Protocol(format!(
                "stream number {} is in use",
                stream.0
            )));
        }
        if self.images.len() >= MAX_OPEN_IMAGES {
            return Err(LinkFailure::Protocol(format!(
                "more than {MAX_OPEN_IMAGES} open images"
            )));
        }
        let set = self.session.set(set)?;
        tracing::debug!(snapshot = %set.snapshot, image = %path, "image begins");
        let mut transfer = Transfer {
            set: set.clone(),
            writer: None,
        };
        if set.is_aborted() {
            self.images.insert(stream, transfer);
            return Ok(());
        }
        let append = mode & O_APPEND != 0;
        match set.open_image(&path, size, append, &self.store.budget) {
            Ok(writer) => {
                transfer.writer = Some(writer);
                self.images.insert(stream, transfer);
                Ok(())
            }
            Err(OpenError::Order(e)) => Err(LinkFailure::Protocol(e.to_string())),
            Err(OpenError::Write(e)) => {
                self.images.insert(stream, transfer);
                self.refuse_image(stream, &path.to_string(), &e).await
            }
        }
    }

    fn take(&mut self, stream: StreamNumber) -> Result<Transfer, LinkFailure> {
        self.images
            .remove(&stream)
            .ok_or_else(|| LinkFailure::Protocol(format!("there is no stream {}", stream.0)))
    }

    async fn data(&mut self, stream: StreamNumber, header: Header) -> Result<(), LinkFailure> {
        let length = header.length as usize;
        if self.rounds.contains_key(&stream) {
            return self.pages(stream, length).await;
        }
        let Some(transfer) = self.images.get_mut(&stream) else {
            return Err(LinkFailure::Protocol(format!(
                "there is no stream {}",
                stream.0
            )));
        };
        let Some(writer) = &mut transfer.writer else {
            return self.discard(length).await;
        };
        match receive_frame(&mut self.reader, writer, length).await? {
            (_, Ok(())) => Ok(()),
            (left, Err(e)) => {
                let name = writer.image().name.to_string();
                self.discard(left).await?;
                self.refuse_image(stream, &name, &e).await
            }
        }
    }

    async fn discard(&mut self, mut left: usize) -> Result<(), LinkFailure> {
        let mut scratch = vec![0; left.min(DISCARD_BYTES)];
        while left > 0 {
            let n = scratch.len().min(left);
            left -= self.reader.data(&mut scratch[..n]).await?;
        }
        Ok(())
    }

    async fn end_image(&mut self, stream: StreamNumber, total: u64) -> Result<(), LinkFailure> {
        let Transfer { set, writer } = self.take(stream)?;
        let Some(writer) = writer else { return Ok(()) };
        let name = writer.image().name.clone();
        match set.finish_image(writer, total) {
            Ok(()) => {
                tracing::debug!(snapshot = %set.snapshot, image = %name, bytes = total, "image stored");
                self.answer(Message::ImageAck { stream, total }).await
            }
            Err(e) => Err(LinkFailure::Protocol(format!(
                "image {name}: {}",
                chain(&e)
            ))),
        }
    }

    /// An image that cannot be held takes its set with it: a set with a hole is of no use.
    async fn refuse_image(
        &mut self,
        stream: StreamNumber,
        name: &str,
        error: &WriteError,
    ) -> Result<(), LinkFailure> {
        let reason = format!("image {name}: {}", chain(error));
        let set = match self.images.get(&stream) {
            Some(transfer) => transfer.set.number,
            None => return Ok(()),
        };
        self.answer(Message::ImageRefused {
            stream,
            reason: reason.clone(),
        })
        .await?;
        self.abort(set, &reason).await
    }
}

/// Receives one data frame. The inner error is about our memory: then so many bytes of the
/// frame are still to be read.
async fn receive_frame<R: AsyncRead + Unpin>(
    reader: &mut FrameReader<R>,
    writer: &mut ImageWriter,
    length: usize,
) -> Result<(usize, Result<(), WriteError>), ReadError> {
    if let Err(e) = writer.reserve(length) {
        return Ok((length, Err(e)));
    }
    if writer.is_small(length) {
        let mut small = vec![0; length];
        let mut done = 0;
        while done < length {
            done += reader.data(&mut small[done..]).await?;
        }
        return Ok((0, writer.put_small(&small)));
    }
    let mut left = length;
    while left > 0 {
        let spare = match writer.spare(left) {
            Ok(spare) => spare,
            Err(e) => return Ok((left, Err(e))),
        };
        let n = reader.data(spare).await?;
        writer.filled(n);
        left -= n;
    }
    Ok((0, Ok(())))
}
