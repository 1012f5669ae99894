//! `streamer-serve.sock`: `criu restore --stream`. One connection per CRIU run, a request per
//! image; the answer may wait, the images are sent independently of one another.

use std::future::{poll_fn, Future as _};
use std::io;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use image_common::criu::options::Unserved;
use image_common::criu::stream::{decode_request, encode_reply, SERVE_SOCKET};
use image_common::criu_io::fdpass::{
    checked_pipe, hung_up, read_message, recv_handover_from, tell_senders, write_message, Handover,
    Inbound, PipeEnd, RequestError,
};
use image_common::criu_io::options;
use image_common::error_chain::chain;
use image_common::image::ImageName;
use image_common::procfs::process::{peer_pid, Process};
use image_common::tasks;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::frontend::idle_readers::{ClockedSink, IdleClock};
use crate::frontend::pump::{pump, report, PipeSink};
use crate::frontend::service::Service;
use crate::frontend::verdict::{End, Peer, Restore};
use crate::store::image::Image;
use crate::store::session::{ReaderGuard, Session, StreamTarget};
use crate::store::set::{Holds, Lookup};

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
    #[error("its set has gone, and it took nothing for {0:?} (--idle-timeout); the restore fails")]
    Deaf(Duration),
    #[error("an image was cut by {}; the restore fails", tasks::OWN_ERROR)]
    Cut,
    #[error("image-cache is stopping")]
    Stopping,
    #[error("{0}; the restore fails, and no set is touched")]
    Unserved(#[from] Unserved),
}

/// What a restore is about, once its first request has told.
struct Bound {
    restore: Arc<Restore>,
    idle_clock: Arc<IdleClock>,
    _reader: ReaderGuard,
}

/// The process at the other end, until it is known what it restores.
struct Caller {
    criu: Option<Process>,
    peer: Peer,
    /// What its command line says.
    named: Holds,
}

impl Caller {
    /// Whether it can hold. A CRIU whose end is not seen is given no set in trial.
    fn holds(&self, service: &Service) -> Holds {
        match self.criu {
            Some(_) => service.restores.holds(&self.peer).max(self.named),
            None => Holds::No,
        }
    }
}

pub async fn serve(stream: UnixStream, service: Service) {
    // Before its second message, which needs an answer.
    if let Err(e) = tell_senders(&stream) {
        return tracing::error!("{SERVE_SOCKET}: cannot serve a connection: {e}");
    }
    let options = options::of_peer(peer_pid(&stream)).await;
    let mut caller = Some(Caller {
        criu: Process::of_any_peer(&stream),
        peer: Peer::of(&stream),
        named: match options.image_cache_script {
            true => Holds::Named,
            false => Holds::No,
        },
    });
    let stream = match Inbound::new(stream) {
        Ok(stream) => stream,
        Err(e) => return tracing::error!("{SERVE_SOCKET}: cannot serve a connection: {e}"),
    };
    let mut bound = None;
    let ended = match options.unserved() {
        Some(unserved) => Err(unserved.into()),
        None => requests(&stream, &service, &mut caller, &mut bound).await,
    };
    let (by_criu, stopping) = (ended.is_ok(), matches!(ended, Err(StreamError::Stopping)));
    match ended {
        Ok(()) => {}
        Err(StreamError::Request(e)) if bound.is_none() => {
            tracing::warn!("{SERVE_SOCKET}: {}", chain(&e));
        }
        Err(e) => tracing::error!(
            session = bound
                .as_ref()
                .map(|b: &Bound| b.restore.session.name.to_string()),
            "restore --stream: {}",
            chain(&e)
        ),
    }
    let Some(Bound {
        restore, _reader, ..
    }) = bound
    else {
        return;
    };
    if stopping && !restore.said_so() {
        // The stop has said in the log what becomes of its set.
        restore.failed();
        return;
    }
    let end = match by_criu {
        true => End::Closed,
        false => End::CutOff,
    };
    restore.conclude(&service.store, end).await;
}

async fn requests(
    stream: &Inbound,
    service: &Service,
    caller: &mut Option<Caller>,
    bound: &mut Option<Bound>,
) -> Result<(), StreamError> {
    // A task that serves an image panicked: CRIU may take what came of it for the whole.
    let cut = CancellationToken::new();
    loop {
        // Nothing is lost when a stop cuts this: the connection ends with it.
        let body = tokio::select! {
            body = read_message(stream) => body?,
            // Its tasks may hold the connection still, and nothing they wait for comes any more.
            () = criu_ended(bound) => return Ok(()),
            () = lost(bound) => return Err(StreamError::Deaf(service.store.limits.ports.idle_timeout)),
            () = cut.cancelled() => return Err(StreamError::Cut),
            () = service.shutdown.forced.cancelled() => return Err(StreamError::Stopping),
        };
        let Some(body) = body else { return Ok(()) };
        let name = decode_request(&body)?;
        let image = tokio::select! {
            biased; // it is known nearly always, and a look at the socket costs more
            image = find(service, caller, bound, &name) => image?,
            () = hung_up(stream) => return Ok(()),
            () = service.shutdown.forced.cancelled() => return Err(StreamError::Stopping),
        };
        write_message(stream, &encode_reply(image.is_some())).await?;
        let Some(image) = image else {
            tracing::debug!(image = %name, "no such image");
            continue;
        };
        let (handover, sender) = recv_handover_from(stream).await?;
        if let Some(bound) = bound {
            bound.restore.asks(&name, sender);
            bound.idle_clock.takes();
        }
        let fd = match handover {
            Handover::Fd(fd) => checked_pipe(fd, PipeEnd::Write)?,
            Handover::Eof | Handover::Data(_) => return Err(StreamError::NoDescriptor(name)),
        };
        let taking = match bound {
            Some(Bound { restore, .. }) if service.store.release_on_read => {
                restore.set.to_be_taken(&image, restore.id)
            }
            _ => None,
        };
        let stop = service.shutdown.forced.clone();
        let idle_clock = match bound {
            Some(bound) => bound.idle_clock.clone(),
            None => unreachable!("an image was found in a set"),
        };
        let transfer = async move {
            let mut sink = ClockedSink {
                sink: PipeSink::new(fd, &image),
                idle_clock: &idle_clock,
            };
            tokio::select! {
                served = pump(&image, &mut sink, taking.as_ref()) => report(&image, served),
                // The connection says so, or has ended.
                () = idle_clock.lost() => tracing::debug!(image = %image.name, "its reader is given up"),
                () = stop.cancelled() => {}
            }
        };
        let mut serving = Box::pin(transfer.in_current_span());
        // What fits into the pipe at once, as most images do, needs no task.
        let waits = poll_fn(|cx| Poll::Ready(serving.as_mut().poll(cx).is_pending())).await;
        if waits {
            // Never one after another: CRIU asks for pages while it still reads their pagemap.
            let cut = cut.clone();
            tasks::spawn("serving an image", serving, move |_| cut.cancel());
        }
    }
}

async fn criu_ended(bound: &Option<Bound>) {
    match bound {
        Some(bound) => bound.restore.criu_ended().await,
        None => std::future::pending().await,
    }
}

async fn lost(bound: &Option<Bound>) {
    match bound {
        Some(bound) => bound.idle_clock.lost().await,
        None => std::future::pending().await,
    }
}

/// Waits until it is known whether the image exists; the first request finds the set.
async fn find(
    service: &Service,
    caller: &mut Option<Caller>,
    bound: &mut Option<Bound>,
    name: &ImageName,
) -> Result<Option<Arc<Image>>, StreamError> {
    let mut changes = service.store.changes.subscribe();
    let mut waiting_for: Option<Arc<Session>> = None;
    // Until the set is given to it.
    let mut waits = None;
    loop {
        changes.mark_unchanged();
        if let Some(bound) = bound {
            let restore = &bound.restore;
            match restore.set.lookup(name, restore.reader()) {
                // Another one may have it, and lose it again.
                Lookup::Ready(_) if !service.is_given(restore, name) => {}
                Lookup::Ready(image) => return Ok(Some(image)),
                Lookup::Missing => return Ok(None),
                Lookup::Gone(reason) => return Err(StreamError::Gone(reason)),
                Lookup::Wait => {}
            }
        } else {
            // A restore that waited for a session shares its fate, even if an older set or a
            // newer session could take its place: the operator should know.
            if let Some(reason) = waiting_for.as_ref().and_then(|s| service.store.why_gone(s)) {
                return Err(StreamError::Gone(reason));
            }
            let holds = caller
                .as_ref()
                .map_or(Holds::No, |caller| caller.holds(service));
            if waits.is_none() {
                waits = Some(service.store.restore_waits(&service.scope, holds));
            }
            let newest = service.store.newest_of_dumps(&service.scope);
            if let Some(session) = newest {
                match session.stream_target(name, holds) {
                    StreamTarget::Set(set) => {
                        tracing::info!(session = %session.name, snapshot = %set.snapshot, "restore --stream begins");
                        let reader = session.reader();
                        let idle_clock = IdleClock::new(&service.store, &session);
                        let (criu, peer) = match caller.take() {
                            Some(Caller { criu, peer, .. }) => (criu, peer),
                            None => (None, Peer::default()),
                        };
                        let restore = Restore::new(session, set, criu);
                        service.restores.note(&restore, &peer);
                        if holds == Holds::Named {
                            restore.is_named_to_hold();
                        }
                        *bound = Some(Bound {
                            restore,
                            idle_clock,
                            _reader: reader,
                        });
                        continue;
                    }
                    StreamTarget::Gone(reason) => return Err(StreamError::Gone(reason)),
                    StreamTarget::Wait => match service.store.why_gone(&session) {
                        Some(reason) => return Err(StreamError::Gone(reason)),
                        None => waiting_for = Some(session),
                    },
                }
            }
        }
        // The sender lives in the store, so this only returns for a change.
        let _ = changes.changed().await;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSlice, Read};
    use std::mem::MaybeUninit;
    use std::os::fd::AsFd;

    use image_common::criu::dialect::Dialect;
    use image_common::daemon::shutdown::Shutdown;
    use image_common::image::{SnapshotId, INVENTORY};
    use image_common::link::codec::SetNumber;
    use rustix::net::{sendmsg, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::cli::RemoteDialect;
    use crate::frontend::Frontends;
    use crate::store::set::Set;
    use crate::store::{Policy, Scope, Store};

    const BYTES: &[u8] = b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01";

    /// A dump that begins.
    fn begun(store: &Arc<Store>) -> (Arc<Session>, Arc<Set>) {
        let opened = store.open_session("one".parse().unwrap(), 1, "test".into());
        let session = opened.unwrap();
        let snapshot = SnapshotId::new("/img").unwrap();
        let number = SetNumber(1);
        let set = session.open_set(number, snapshot, None, false, Dialect::Stream);
        (session, set.unwrap())
    }

    /// A dump of an inventory alone, to be restored.
    fn session_of(store: &Arc<Store>) -> Arc<Session> {
        let (session, set) = begun(store);
        let len = put(store, &set, INVENTORY);
        set.complete(1, len).unwrap();
        set.close().unwrap();
        session
    }

    fn put(store: &Store, set: &Set, name: &str) -> u64 {
        let name = ImageName::new(name).unwrap();
        let opened = set.open_image(&name, None, false, &store.budget);
        let mut writer = opened.ok().unwrap();
        writer.put(BYTES).unwrap();
        let len = BYTES.len() as u64;
        set.finish_image(writer, len).unwrap();
        len
    }

    /// What a CRIU, this process, does to read an image.
    async fn read(criu: &mut UnixStream, name: &str) {
        let length = u8::try_from(name.len()).unwrap();
        let mut request = vec![length + 2, 0, 0, 0, 0x0a, length];
        request.extend_from_slice(name.as_bytes());
        criu.write_all(&request).await.unwrap();
        let mut reply = [0; 6];
        criu.read_exact(&mut reply).await.unwrap();
        assert_eq!(reply[..], encode_reply(true));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [writer.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let zero = [IoSlice::new(&[0])];
        sendmsg(criu.as_fd(), &zero, &mut control, SendFlags::empty()).unwrap();
        drop(writer);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            std::fs::File::from(reader).read_to_end(&mut bytes).unwrap();
            bytes
        });
        assert_eq!(read.await.unwrap(), BYTES);
    }

    fn frontends(shutdown: Shutdown) -> Arc<Frontends> {
        Frontends::new(Vec::new(), RemoteDialect::Auto, shutdown, |_, _, _| {
            Box::pin(std::future::ready(()))
        })
    }

    /// A restore that has read everything and lives has succeeded if it ends the connection, and not if a stop does.
    #[tokio::test]
    async fn a_stop_does_not_make_a_restore_a_success() {
        for stopped in [true, false] {
            let store = Store::new(1 << 20, Policy::default());
            let session = session_of(&store);
            let shutdown = Shutdown::default();
            let frontends = frontends(shutdown.clone());
            let (mut criu, ours) = UnixStream::pair().unwrap();
            let served = tokio::spawn(serve(ours, frontends.service(&store, Scope::Any)));
            read(&mut criu, INVENTORY).await;
            match stopped {
                true => shutdown.forced.cancel(),
                false => drop(criu),
            }
            served.await.unwrap();
            assert_eq!(store.holds(&session), stopped);
        }
    }

    /// What it has asked for is all that has arrived; that is not all that there will be.
    #[tokio::test]
    async fn a_reader_of_what_still_arrives_has_restored_nothing() {
        let store = Store::new(1 << 20, Policy::default());
        let (session, set) = begun(&store);
        put(&store, &set, "pages-1.img");
        let shutdown = Shutdown::default();
        let frontends = frontends(shutdown);
        let (mut criu, ours) = UnixStream::pair().unwrap();
        let served = tokio::spawn(serve(ours, frontends.service(&store, Scope::Any)));
        read(&mut criu, "pages-1.img").await;
        drop(criu);
        served.await.unwrap();
        assert!(store.holds(&session));
    }
}
