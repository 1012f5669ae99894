//! The script of a restore that holds, and whose image-cache is gone: this one takes its place, and gives it the decision.
//!
//! Most often the images went with the other one. Then a session without any stands for the hold: it is in doubt until the
//! source or an operator decides, and goes with the script. If the set is here (`--keep-through-restart`), it belongs to
//! that restore from now on, and what becomes of it is followed.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::hold::Held;
use image_common::control::{self, Answer, ControlError};
use image_common::criu_io::fdpass::{hung_up, recv_handover, Handover};
use image_common::error_chain::chain;
use image_common::procfs::pidfd;
use image_common::procfs::process::Process;
use rustix::process::geteuid;
use tokio::net::UnixStream;

use crate::frontend::verdict::{End, Peer, Restore, Restores};
use crate::store::session::Session;
use crate::store::set::held::HoldEnd;
use crate::store::set::Set;
use crate::store::Store;

/// It comes with the line.
const PIDFD_WITHIN: Duration = Duration::from_secs(5);

/// A session without images goes with the script that it stands for.
struct Standing<'a> {
    store: &'a Store,
    session: Arc<Session>,
    set: Arc<Set>,
    /// Its images are here.
    whole: bool,
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if !self.whole {
            self.store.remove(&self.session);
        }
    }
}

/// Serves the script until there is a decision, or its end.
pub async fn serve(
    stream: &mut UnixStream,
    held: &Held,
    store: &Arc<Store>,
    restores: &Restores,
) -> Result<(), ControlError> {
    let standing = match take_over(stream, held, store, restores).await {
        Ok(standing) => standing,
        Err(reason) => {
            tracing::error!(
                session = held.session,
                id = held.id,
                "the script of a restore that holds is refused: {reason}"
            );
            return control::reply(stream, &Answer::Failed { reason }).await;
        }
    };
    // What comes behind it is the decision, which no time bounds.
    control::reply(stream, &Answer::Accepted { within_ms: 0 }).await?;
    let (session, set) = (&standing.session, &standing.set);
    let unread = set.script_holds();
    let images = match standing.whole {
        true => "its images are here",
        false => "its images were with an image-cache that is gone",
    };
    tracing::warn!(
        session = %session.name, id = %session.id, snapshot = %set.snapshot, peer = %session.peer,
        "a restore holds this set here, asleep; {images}. It waits for the source's decision. {}",
        session.advice()
    );
    let end = tokio::select! {
        end = end_of_hold(store, set) => end,
        () = hung_up(stream) => {
            tracing::warn!(session = %session.name, id = %session.id, "the script of the restore that held has ended");
            return Ok(());
        }
    };
    let answer = match end {
        HoldEnd::GoOn => {
            tracing::warn!(session = %session.name, id = %session.id, "the restore that held goes on");
            Answer::Done
        }
        HoldEnd::GiveUp(reason) => {
            tracing::warn!(session = %session.name, id = %session.id, "the restore that held is given up: {reason}");
            Answer::Failed { reason }
        }
    };
    control::reply(stream, &answer).await?;
    // The source is not told that its decision was heard before the script has read it.
    hung_up(stream).await;
    drop(unread);
    Ok(())
}

async fn end_of_hold(store: &Store, set: &Set) -> HoldEnd {
    let mut changes = store.changes.subscribe();
    loop {
        if let Some(end) = set.end_of_hold() {
            return end;
        }
        // The sender lives in the store.
        let _ = changes.changed().await;
    }
}

async fn take_over<'a>(
    stream: &UnixStream,
    held: &Held,
    store: &'a Arc<Store>,
    restores: &Restores,
) -> Result<Standing<'a>, String> {
    // It brings a session, and knows its key. Users that may restore are not enough.
    let uid = stream.peer_cred().map_err(|e| e.to_string())?.uid();
    if uid != 0 && uid != geteuid().as_raw() {
        return Err(format!(
            "uid {uid} is neither root nor that of this image-cache"
        ));
    }
    let pidfd = match tokio::time::timeout(PIDFD_WITHIN, recv_handover(stream)).await {
        Ok(Ok(Handover::Fd(pidfd))) => pidfd,
        Ok(Err(e)) => return Err(chain(&e)),
        Ok(Ok(_)) | Err(_) => return Err("CRIU's pidfd did not come".to_owned()),
    };
    let (session, set, whole) = store.hold(held).map_err(|e| chain(&e))?;
    let standing = Standing {
        store,
        session,
        set,
        whole,
    };
    if !whole {
        return Ok(standing);
    }
    let (session, set) = (&standing.session, &standing.set);
    let again = pidfd.try_clone().map_err(|e| e.to_string())?;
    let peer = Peer {
        pid: pidfd::number_of(pidfd.as_fd()),
        pidfd: Some(again),
    };
    if restores.has(set, &peer) {
        // Its connection alone broke.
        return Ok(standing);
    }
    let criu = Process::of_pidfd(peer.pid.unwrap_or(0), pidfd);
    let restore = Restore::held(session.clone(), set.clone(), criu);
    if !set.give(restore.id) {
        return Err("another restore has the set".to_owned());
    }
    restores.note(&restore, &peer);
    let store = store.clone();
    tokio::spawn(async move {
        restore.conclude(&store, End::Exited).await;
    });
    Ok(standing)
}
