//! `streamer-serve.sock`: `criu restore --stream`. One connection per CRIU run, a request per
//! image; the answer may wait, the images are sent independently of one another.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use image_common::control::chain;
use image_common::criu::stream::{decode_request, encode_reply};
use image_common::fdpass::{
    checked_pipe, read_message, recv_handover, Handover, PipeEnd, RequestError,
};
use image_common::image::ImageName;
use image_common::process::Process;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::pump::{pipe_sink, pump, Served};
use super::Service;
use crate::store::image::Image;
use crate::store::session::{ReaderGuard, Session, StreamTarget};
use crate::store::set::{Lookup, Set};

/// Why a restore's connection ended before its time. CRIU learns of it by the end of file.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("bad request: {0}")]
    Message(#[from] image_common::criu::frame::MessageError),
    #[error("answering")]
    Io(#[from] io::Error),
    #[error("CRIU sent no descriptor for {0}")]
    NoDescriptor(ImageName),
    #[error("the set cannot be restored: {0}")]
    Gone(String),
    #[error("image-cache is stopping")]
    Stopping,
}

/// What a restore is about, once its first request has told.
struct Bound {
    session: Arc<Session>,
    set: Arc<Set>,
    asked: HashSet<ImageName>,
    _reader: ReaderGuard,
}

pub async fn serve(mut stream: UnixStream, service: Service) {
    let criu = Process::of_peer(&stream);
    let mut bound = None;
    match requests(&mut stream, &service, criu.as_ref(), &mut bound).await {
        Ok(()) => {}
        Err(StreamError::Request(e)) if bound.is_none() => {
            tracing::warn!(
                "{}: {}",
                image_common::criu::stream::SERVE_SOCKET,
                chain(&e)
            );
        }
        Err(e) => tracing::error!(
            session = bound.as_ref().map(|b: &Bound| b.session.name.to_string()),
            "restore --stream: {}",
            chain(&e)
        ),
    }
    if let Some(bound) = bound {
        judge(&bound, criu.as_ref(), &service);
    }
}

/// Did this restore succeed? CRIU does not say; two signs together do. It asked for every
/// image that a restore needs, and its main process closed the connection and lives on: CRIU
/// closes it after it resumed the tasks (`restore_root_task`), while a failed one exits with
/// the connection open.
fn judge(bound: &Bound, criu: Option<&Process>, service: &Service) {
    if !bound.set.restored_by(&bound.asked) {
        tracing::info!(session = %bound.session.name, "a reader left before it had read what a restore needs; kept");
        return;
    }
    match criu.map(Process::has_memory) {
        Some(true) => service.store.restored(&bound.session),
        _ => tracing::warn!(
            session = %bound.session.name,
            "CRIU read everything and exited: whether it restored is not known, so the set is kept \
             (give criu restore --action-script image-cache to be sure; image-cache drop {} frees it)",
            bound.session.name
        ),
    }
}

async fn requests(
    stream: &mut UnixStream,
    service: &Service,
    criu: Option<&Process>,
    bound: &mut Option<Bound>,
) -> Result<(), StreamError> {
    loop {
        // Nothing is lost when a stop cuts this: the connection ends with it.
        let body = tokio::select! {
            body = read_message(stream) => body?,
            () = service.shutdown.forced.cancelled() => return Err(StreamError::Stopping),
        };
        let Some(body) = body else { return Ok(()) };
        let name = decode_request(&body)?;
        let image = tokio::select! {
            image = find(service, bound, &name) => image?,
            () = hung_up(stream) => return Ok(()),
            () = service.shutdown.forced.cancelled() => return Err(StreamError::Stopping),
        };
        if let Some(bound) = bound {
            if bound.asked.is_empty() {
                service
                    .restores
                    .note(criu.map(Process::pid), &bound.session);
            }
            bound.asked.insert(name.clone());
        }
        stream.write_all(&encode_reply(image.is_some())).await?;
        let Some(image) = image else {
            tracing::debug!(image = %name, "no such image");
            continue;
        };
        let fd = match recv_handover(stream).await? {
            Handover::Fd(fd) => checked_pipe(fd, PipeEnd::Write)?,
            Handover::Eof | Handover::Data(_) => return Err(StreamError::NoDescriptor(name)),
        };
        let sink = pipe_sink(fd, &image)?;
        let stop = service.shutdown.forced.clone();
        // Never one after another: CRIU asks for pages while it still reads their pagemap.
        tokio::spawn(async move {
            tokio::select! {
                served = pump(&image, &sink) => report(&image, served),
                () = stop.cancelled() => {}
            }
        });
    }
}

pub fn report(image: &Image, served: io::Result<Served>) {
    match served {
        Ok(Served::Whole) => tracing::debug!(image = %image.name, "served"),
        Ok(Served::ClosedEarly) => tracing::debug!(image = %image.name, "closed early by CRIU"),
        Ok(Served::Broken) => {
            tracing::error!(image = %image.name, "broke while it was read; the restore fails");
        }
        Err(e) => tracing::error!(image = %image.name, "cannot be served: {e}"),
    }
}

/// Waits until it is known whether the image exists; the first request finds the set.
async fn find(
    service: &Service,
    bound: &mut Option<Bound>,
    name: &ImageName,
) -> Result<Option<Arc<Image>>, StreamError> {
    let mut changes = service.store.changes.subscribe();
    let mut waiting_for: Option<Arc<Session>> = None;
    loop {
        changes.mark_unchanged();
        if let Some(bound) = bound {
            match bound.set.lookup(name) {
                Lookup::Ready(image) => return Ok(Some(image)),
                Lookup::Missing => return Ok(None),
                Lookup::Gone(reason) => return Err(StreamError::Gone(reason)),
                Lookup::Wait => {}
            }
        } else {
            // A restore that waited for a session shares its fate, even if an older set or a
            // newer session could take its place: the operator should know.
            if let Some(reason) = waiting_for.as_ref().and_then(|s| s.aborted()) {
                return Err(StreamError::Gone(reason));
            }
            let newest = service.store.newest(&service.scope).into_iter().next();
            if let Some(session) = newest {
                match session.stream_target(name) {
                    StreamTarget::Set(set) => {
                        tracing::info!(session = %session.name, snapshot = %set.snapshot, "restore --stream begins");
                        let reader = session.reader();
                        let asked = HashSet::new();
                        *bound = Some(Bound {
                            session,
                            set,
                            asked,
                            _reader: reader,
                        });
                        continue;
                    }
                    StreamTarget::Gone(reason) => return Err(StreamError::Gone(reason)),
                    StreamTarget::Wait => waiting_for = Some(session),
                }
            }
        }
        // The sender lives in the store, so this only returns for a change.
        let _ = changes.changed().await;
    }
}

/// Resolves when the peer is gone. It has nothing to say while it waits for an answer.
pub async fn hung_up(stream: &UnixStream) {
    let mut byte = [std::mem::MaybeUninit::uninit(); 1];
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        let peeked = stream.try_io(Interest::READABLE, || {
            let socket = socket2::SockRef::from(stream);
            socket.peek(&mut byte)
        });
        match peeked {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // It speaks out of turn: leave that to whoever reads next.
            Ok(n) if n > 0 => std::future::pending().await,
            _ => return,
        }
    }
}
