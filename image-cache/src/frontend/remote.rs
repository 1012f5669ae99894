//! `img-cache.sock`: `criu restore --remote`, every dialect. One connection per operation.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use image_common::criu::dialect::{Carrier, Dialect};
use image_common::criu::frame::MessageError;
use image_common::criu::remote::{encode_reply, encode_snapshot_id, Request, CACHE_SOCKET};
use image_common::criu_io::fdpass::{
    checked_pipe, hung_up, read_message, recv_handover, Handover, PipeEnd, RequestError,
};
use image_common::criu_io::options;
use image_common::error_chain::chain;
use image_common::image::{ImageName, SnapshotId};
use image_common::procfs::process::{peer_pid, Process};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use crate::cli::RemoteDialect;
use crate::frontend::idle_readers::{ClockedSink, IdleClock};
use crate::frontend::pump::{pump, report, PipeSink};
use crate::frontend::service::Service;
use crate::frontend::verdict::{End, Peer, Restore, Verdict};
use crate::store::image::Image;
use crate::store::session::Session;
use crate::store::set::trial::Trial;
use crate::store::set::{Holds, Lookup, Reader, Set, Taking};
use crate::store::waiting::Waits;
use crate::store::Store;

/// A CRIU sends its header in one write right after it connected.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

const ENOENT: u32 = 2;
const EIO: u32 = 5;

/// Restores that are remembered until their FINISH. Each holds its session's memory, so one
/// that failed is forgotten with its session (`Frontends::reconcile`), or after so many others.
const MAX_RESTORES: usize = 64;

/// How long to wait for a pipe before the data go to the socket, by what the dump showed of
/// this CRIU. A wrong guess costs this much time and nothing else: see [`deliver`].
const WAIT_KNOWN_PIPE: Duration = Duration::from_secs(5);
const WAIT_UNKNOWN: Duration = Duration::from_millis(200);

#[derive(Debug, thiserror::Error)]
enum RemoteError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("bad request: {0}")]
    Message(#[from] MessageError),
    #[error("no request within {} s", HEADER_TIMEOUT.as_secs())]
    Slow,
    #[error("answering")]
    Io(#[from] io::Error),
    #[error("image {image} of snapshot {snapshot}: {reason}")]
    Gone {
        snapshot: SnapshotId,
        image: ImageName,
        reason: String,
    },
    #[error("snapshot list: {0}")]
    List(String),
    #[error("this is a request of criu dump, and image-cache serves criu restore: criu dump connects to img-proxy.sock")]
    WrongSide,
    #[error("bytes without a descriptor came where a pipe was expected")]
    Unexpected,
    #[error("its set has gone, and it took nothing for {0:?} (--idle-timeout); the restore fails")]
    Deaf(Duration),
    #[error("image-cache is stopping")]
    Stopping,
}

pub async fn serve(mut stream: UnixStream, service: Service) {
    if let Err(e) = operation(&mut stream, &service).await {
        tracing::error!("{CACHE_SOCKET}: {}", chain(&e));
        // Silence would read as "error 0" (`img-remote.c`): a raw image would look empty.
        let _ = stream.write_all(&encode_reply(EIO)).await;
    }
}

async fn operation(stream: &mut UnixStream, service: &Service) -> Result<(), RemoteError> {
    let body = tokio::time::timeout(HEADER_TIMEOUT, read_message(stream))
        .await
        .map_err(|_| RemoteError::Slow)??;
    let Some(body) = body else {
        tracing::debug!("{CACHE_SOCKET}: connected and left");
        return Ok(());
    };
    let request = Request::decode(&body)?;
    let work = async {
        match request {
            Request::ListRead(_) => list(&*stream, service).await.map(After::List),
            Request::Read { snapshot, image } => find(&*stream, service, snapshot, image)
                .await
                .map(After::Image),
            Request::FinishRestore => Ok(After::Finish),
            Request::ListPush(_) | Request::Write { .. } | Request::FinishDump => {
                Err(RemoteError::WrongSide)
            }
        }
    };
    let after = tokio::select! {
        after = work => after?,
        () = service.shutdown.forced.cancelled() => return Err(RemoteError::Stopping),
    };
    match after {
        After::List(None) | After::Image(Found::HungUp) => Ok(()),
        After::List(Some(ids)) => {
            stream.write_all(&encode_reply(0)).await?;
            for id in ids {
                stream.write_all(&encode_snapshot_id(&id)).await?;
            }
            Ok(())
        }
        After::Image(Found::Missing) => Ok(stream.write_all(&encode_reply(ENOENT)).await?),
        After::Image(Found::Ready {
            image,
            dialect,
            session,
            taking,
        }) => {
            let _reader = session.reader();
            let idle_clock = IdleClock::new(&service.store, &session);
            let how = hint(service.dialect, dialect);
            let pid = peer_pid(stream);
            stream.write_all(&encode_reply(0)).await?;
            tokio::select! {
                sent = deliver(stream, &image, how, taking.as_ref(), &idle_clock) => sent,
                () = idle_clock.lost() => {
                    // Or it would hold the set for as long as its process lives.
                    let theirs = |r: &Arc<Restore>| Arc::ptr_eq(&r.session, &session) && r.is_of(pid);
                    service.remote_restores().retain(|r| !theirs(r));
                    Err(RemoteError::Deaf(service.store.limits.ports.idle_timeout))
                }
                () = service.shutdown.forced.cancelled() => Ok(()),
            }
        }
        After::Finish => {
            match current(service, &Peer::of(stream)) {
                Some(restore) => {
                    // CRIU waits for the answer, and its end may be what tells.
                    let service = service.clone();
                    tokio::spawn(async move { finished(&service, &restore).await });
                }
                None => tracing::warn!(
                    "FINISH came from a process that has read no set here; it is ignored"
                ),
            }
            // The original closes without an answer, and CRIU ignores either.
            let _ = stream.write_all(&encode_reply(0)).await;
            Ok(())
        }
    }
}

async fn finished(service: &Service, restore: &Arc<Restore>) {
    let verdict = restore.conclude(&service.store, End::Finished).await;
    if matches!(verdict, Some(Verdict::Restored | Verdict::Unknown)) {
        forget(service, restore);
        // Its session's sockets wait for that.
        service.store.session_changes.bump();
    }
}

enum After {
    List(Option<Vec<String>>),
    Image(Found),
    Finish,
}

enum Found {
    Ready {
        image: Arc<Image>,
        dialect: Dialect,
        session: Arc<Session>,
        /// Its memory goes along, if on a pipe.
        taking: Option<Taking>,
    },
    Missing,
    HungUp,
}

/// The restore of a set that asks for `image`: its CRIU is the process that asks first, which is its main
/// process, for the inventory. All that it and the tasks that it makes ask for counts. `Err`: another
/// restore has the set.
fn asked(
    stream: &UnixStream,
    service: &Service,
    begun: Option<Arc<Restore>>,
    (session, set): (&Arc<Session>, &Arc<Set>),
    image: &ImageName,
    holds: Holds,
) -> Result<Option<Arc<Restore>>, Taken> {
    let restore = match begun {
        Some(restore) => restore,
        // Parents are read too; what a restore is about is a dump.
        None if set.is_pre_dump() => return Ok(None),
        None => {
            let criu = Process::of_any_peer(stream);
            let restore = Restore::new(session.clone(), set.clone(), criu);
            if holds == Holds::Named {
                restore.is_named_to_hold();
            }
            if !service.is_given(&restore, image) {
                return Err(Taken);
            }
            service.restores.note(&restore, &Peer::of(stream));
            restore.watch(&service.store);
            if !restore.has_criu() && image.is_inventory() {
                // Its end will not be seen.
                restore.doubt(&service.store);
            }
            let mut remote = service.remote_restores();
            if remote.len() >= MAX_RESTORES {
                // One that has its set is needed for the verdict; there are no more of these than sets.
                let over = |r: &Arc<Restore>| r.set.given_to() != Some(r.id);
                if let Some(at) = remote.iter().position(over) {
                    remote.remove(at);
                }
            }
            remote.push(restore.clone());
            restore
        }
    };
    restore.asks(image, peer_pid(stream));
    Ok(Some(restore))
}

/// Another restore has the set.
struct Taken;

/// A process that asks for the inventory once more has given up what it began before.
fn begins_anew(service: &Service, set: &Arc<Set>, pid: Option<i32>) {
    let mut remote = service.remote_restores();
    remote.retain(|r| {
        let own = Arc::ptr_eq(&r.set, set) && pid.is_some() && r.criu_pid() == pid;
        let over = own && r.has_built_nothing() && set.given_to() == Some(r.id);
        if over {
            set.settle(r.id, false);
        }
        !over
    });
}

/// The restore of `set` that asks for `image`, if it has begun.
fn known(
    remote: &[Arc<Restore>],
    set: &Arc<Set>,
    image: &ImageName,
    pid: Option<i32>,
) -> Option<Arc<Restore>> {
    let mut of_set = remote.iter().rev().filter(|r| Arc::ptr_eq(&r.set, set));
    let restore = of_set.find(|r| r.is_of(pid) || r.criu_pid().is_none())?;
    let anew = image.is_inventory() && restore.has_asked(image);
    (!anew).then(|| restore.clone())
}

/// Where the restore that `pid` belongs to finds a snapshot.
fn begun_restore(
    service: &Service,
    pid: Option<i32>,
    snapshot: &SnapshotId,
) -> Option<(Arc<Session>, Arc<Set>)> {
    let remote = service.remote_restores();
    let own = remote.iter().rev().find(|r| r.is_of(pid) && r.goes_on())?;
    let set = own.session.snapshot(snapshot)?;
    Some((own.session.clone(), set))
}

/// The restore that a FINISH is about. Its connection says whose it is, or nothing does.
fn current(service: &Service, criu: &Peer) -> Option<Arc<Restore>> {
    let remote = service.remote_restores();
    remote.iter().rev().find(|r| r.is_by(criu)).cloned()
}

fn forget(service: &Service, restore: &Arc<Restore>) {
    let mut remote = service.remote_restores();
    // One process restores one set at a time: what it began before is over too.
    let same = |r: &Restore| r.criu_pid().is_some() && r.criu_pid() == restore.criu_pid();
    remote.retain(|r| !Arc::ptr_eq(r, restore) && !same(r));
}

/// Waits until the image is there, or known not to be.
async fn find(
    stream: &UnixStream,
    service: &Service,
    snapshot: SnapshotId,
    image: ImageName,
) -> Result<Found, RemoteError> {
    if is_separator(&snapshot) {
        return Ok(Found::Missing);
    }
    let pid = peer_pid(stream);
    let search = async {
        let mut changes = service.store.changes.subscribe();
        let mut waiting_for: Option<Arc<Session>> = None;
        let (mut holds, mut waits) = (Holds::No, None);
        loop {
            changes.mark_unchanged();
            let gone = |reason| RemoteError::Gone {
                snapshot: snapshot.clone(),
                image: image.clone(),
                reason,
            };
            if let Some(reason) = waiting_for.as_ref().and_then(|s| service.store.why_gone(s)) {
                return Err(gone(reason));
            }
            // A restore that has begun stays with its session, whatever comes after.
            let begun = (!image.is_inventory())
                .then(|| begun_restore(service, pid, &snapshot))
                .flatten();
            let found = begun.or_else(|| service.store.snapshot(&service.scope, &snapshot));
            if let Some((session, set)) = found {
                if image.is_inventory() {
                    begins_anew(service, &set, pid);
                }
                let own = known(&service.remote_restores(), &set, &image, pid);
                let to_begin = Reader {
                    restore: None,
                    holds,
                };
                let reader = own.as_ref().map_or(to_begin, |own| own.reader());
                match set.lookup(&image, reader) {
                    Lookup::Ready(found) => {
                        let asked = asked(stream, service, own, (&session, &set), &image, holds);
                        let Ok(restore) = asked else {
                            continue; // and wait for it
                        };
                        if image.is_inventory() {
                            tracing::info!(session = %session.name, %snapshot, "restore --remote begins");
                        }
                        let taking = restore
                            .filter(|_| service.store.release_on_read)
                            .and_then(|r| set.to_be_taken(&found, r.id));
                        let dialect = set.dialect();
                        return Ok(Found::Ready {
                            image: found,
                            dialect,
                            session,
                            taking,
                        });
                    }
                    Lookup::Missing => return Ok(Found::Missing),
                    Lookup::Gone(reason) => return Err(gone(reason)),
                    Lookup::Wait => waiting_for = Some(session),
                }
            }
            if waits.is_none() && image.is_inventory() {
                holds = holds_of(stream, service).await;
                waits = Some(service.store.restore_waits(&service.scope, holds));
                continue;
            }
            let _ = changes.changed().await;
        }
    };
    tokio::select! {
        found = search => found,
        () = hung_up(stream) => Ok(Found::HungUp),
    }
}

/// Waits until the newest session's series is over, then lists the snapshots of all sessions.
///
/// CRIU takes the entry before an id for its parent, and the first of equal ids. So the
/// newest session comes first, and between sessions, which have nothing to do with each
/// other, stands an id that no snapshot has: CRIU asks for that parent's pagemap, finds none, and
/// the chain ends there as it should.
async fn list(stream: &UnixStream, service: &Service) -> Result<Option<Vec<String>>, RemoteError> {
    let search = async {
        let mut changes = service.store.changes.subscribe();
        let mut waiting_for: Option<Arc<Session>> = None;
        let (mut holds, mut waits) = (Holds::No, None);
        loop {
            changes.mark_unchanged();
            if let Some(reason) = waiting_for.as_ref().and_then(|s| service.store.why_gone(s)) {
                return Err(RemoteError::List(reason));
            }
            let mut sessions = service.store.newest(&service.scope);
            sessions.retain(|s| s.is_remote());
            match sessions.first() {
                Some(newest) if newest.has_final_dump() => {
                    return Ok(Some(joined_lists(&sessions)));
                }
                Some(newest) if holds != Holds::No && newest.is_tried() => {
                    if let Some((criu, waits)) = Process::of_any_peer(stream).zip(waits.take()) {
                        tokio::spawn(waits_on(service.store.clone(), newest.clone(), criu, waits));
                    }
                    return Ok(Some(joined_lists(&sessions)));
                }
                Some(newest) => waiting_for = Some(newest.clone()),
                None => {}
            }
            if waits.is_none() {
                holds = holds_of(stream, service).await;
                waits = Some(service.store.restore_waits(&service.scope, holds));
                continue;
            }
            let _ = changes.changed().await;
        }
    };
    tokio::select! {
        ids = search => ids,
        () = hung_up(stream) => Ok(None),
    }
}

/// Whether the CRIU that asks can hold what it restores.
async fn holds_of(stream: &UnixStream, service: &Service) -> Holds {
    if Process::of_any_peer(stream).is_none() {
        return Holds::No; // its end would not be seen
    }
    let named = options::of_peer(peer_pid(stream)).await.image_cache_script;
    let named = if named { Holds::Named } else { Holds::No };
    service.restores.holds(&Peer::of(stream)).max(named)
}

/// Between two connections of one CRIU, of which the second begins to read the set in trial.
async fn waits_on(store: Arc<Store>, session: Arc<Session>, criu: Process, waits: Waits) {
    let mut changes = store.changes.subscribe();
    let begun = async {
        let waits_still = |set: &Arc<Set>| set.trial() == Trial::Running { read: false };
        while session.sets().iter().any(waits_still) {
            let _ = changes.changed().await;
        }
    };
    tokio::select! {
        () = begun => {}
        () = criu.exited() => {}
    }
    drop(waits);
}

const SEPARATOR: &str = "-/no parent/";

fn is_separator(id: &SnapshotId) -> bool {
    id.as_str().starts_with(SEPARATOR)
}

fn joined_lists(sessions: &[Arc<Session>]) -> Vec<String> {
    let mut ids: Vec<String> = Vec::new();
    for session in sessions {
        if !ids.is_empty() {
            ids.push(format!("{SEPARATOR}{}", ids.len()));
        }
        let mut sets = session.sets();
        sets.retain(|s| s.is_listed());
        // In the order of their pushes, as the clients know it.
        ids.extend(sets.iter().rev().map(|s| s.snapshot.to_string()));
    }
    ids
}

/// How a reader will take its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Socket,
    Pipe,
    /// Offer the socket after this long without a pipe.
    SocketAfter(Duration),
}

fn hint(configured: RemoteDialect, dumped_with: Dialect) -> Delivery {
    match (configured, dumped_with.carrier()) {
        (RemoteDialect::Socket, _) => Delivery::Socket,
        (RemoteDialect::Pipe, _) => Delivery::Pipe,
        (RemoteDialect::Auto, Carrier::Socket) => Delivery::SocketAfter(Duration::ZERO),
        (RemoteDialect::Auto, Carrier::Pipe) => Delivery::SocketAfter(WAIT_KNOWN_PIPE),
        (RemoteDialect::Auto, Carrier::Unknown) => Delivery::SocketAfter(WAIT_UNKNOWN),
    }
}

/// Hands the image over the way the client wants it, which the bytes so far do not tell: a
/// pipe client sends a descriptor now, a socket client waits for data.
///
/// A guess may be wrong without harm. Data on the socket are never read by a pipe client, so
/// when its descriptor comes late the image is simply sent again, on the pipe. And a socket
/// client that was taken for a pipe client gets its data after the wait. The socket is not
/// closed but shut down after the data: a late descriptor can still come.
async fn deliver(
    stream: &UnixStream,
    image: &Arc<Image>,
    delivery: Delivery,
    taking: Option<&Taking>,
    idle_clock: &IdleClock,
) -> Result<(), RemoteError> {
    let on_socket = async {
        match delivery {
            Delivery::Pipe => std::future::pending().await,
            Delivery::Socket => {}
            Delivery::SocketAfter(wait) => tokio::time::sleep(wait).await,
        }
        // Builds with this dialect may open their pages image twice, so it stays.
        let mut sink = ClockedSink {
            sink: stream,
            idle_clock,
        };
        let served = pump(image, &mut sink, None).await;
        socket2::SockRef::from(stream).shutdown(std::net::Shutdown::Write)?;
        report(image, served);
        match delivery {
            Delivery::Socket => Ok(()),
            // Until the client closes, or its descriptor comes after all.
            _ => std::future::pending().await,
        }
    };
    let fd = tokio::select! {
        biased;
        handover = recv_handover(stream) => match handover? {
            Handover::Fd(fd) => fd,
            Handover::Eof => return Ok(()),
            Handover::Data(_) => return Err(RemoteError::Unexpected),
        },
        sent = on_socket => return sent,
    };
    let mut sink = ClockedSink {
        sink: PipeSink::new(checked_pipe(fd, PipeEnd::Write)?, image),
        idle_clock,
    };
    report(image, pump(image, &mut sink, taking).await);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Policy, Store};
    use image_common::link::codec::SetNumber;

    fn id(text: &str) -> SnapshotId {
        SnapshotId::new(text).unwrap()
    }

    #[test]
    fn sessions_are_kept_apart_in_the_list() {
        let store = Store::new(1 << 20, Policy::default());
        let open = |session: &str, sets: &[(&str, Option<u32>)]| {
            let session = store
                .open_session(session.parse().unwrap(), 1, "test".into())
                .unwrap();
            for (i, (name, parent)) in (1..).zip(sets) {
                let dialect = Dialect::RemoteSocket;
                let parent = parent.map(SetNumber);
                session
                    .open_set(SetNumber(i), id(name), parent, false, dialect)
                    .unwrap();
            }
        };
        open("old", &[("a", None), ("b", None)]);
        open("new", &[("p1", None), ("p2", Some(1)), ("d", Some(2))]);
        let ids = joined_lists(&store.newest(&crate::store::Scope::Any));
        assert_eq!(ids, ["p1", "p2", "d", "-/no parent/3", "a", "b"]);
        assert!(is_separator(&id(&ids[3])));
    }
}
