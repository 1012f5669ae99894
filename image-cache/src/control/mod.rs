//! `image-cache-control.sock`: what an operator, or restore's action script, may say.

pub mod decide;
mod descriptors;
pub mod held;
pub mod holds;
pub mod import;

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::status::{Memory, Status};
use image_common::control::{self, Answer, ControlError, Request, RestoreStep, Restoring};
use image_common::criu_io::fdpass::hung_up;
use image_common::error_chain::chain;
use image_common::image::{SessionName, SnapshotId};
use image_common::procfs::process::starter_of;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::control::descriptors::{handed_over, WITHIN};
use crate::control::import::import;
use crate::frontend::verdict::{Peer, Restore, Restores, Script};
use crate::frontend::Frontends;
use crate::store::set::trial::AtHold;
use crate::store::{Scope, Store};

/// Files are read as fast as their file system is; this is for one that hangs.
const IMPORT_WITHIN: Duration = Duration::from_secs(3600);

pub async fn serve(mut stream: UnixStream, store: Arc<Store>, frontends: Arc<Frontends>) {
    let outcome = async {
        let request = control::receive(&mut stream).await?;
        if request == Request::Status {
            let status = Box::new(status_of(&store));
            return control::reply(&mut stream, &Answer::Status { status }).await;
        }
        if let Request::Import {
            images_dir,
            session,
        } = &request
        {
            let within_ms = u64::try_from(IMPORT_WITHIN.as_millis()).unwrap_or(u64::MAX);
            control::reply(&mut stream, &Answer::Accepted { within_ms }).await?;
            let imported = imported(&stream, images_dir, session.as_deref(), &store, &frontends);
            let answer = match imported.await {
                Ok(()) => Answer::Done,
                Err(reason) => {
                    tracing::error!(images_dir, "import: {reason}");
                    Answer::Failed { reason }
                }
            };
            return control::reply(&mut stream, &answer).await;
        }
        if let Request::Restoring(restoring) = &request {
            return restored(&mut stream, restoring, &store, &frontends).await;
        }
        if let Request::Holding(held) = &request {
            return held::serve(&mut stream, held, &store, &frontends.restores()).await;
        }
        let decided = verdict(&request, &store);
        let answer = match decided {
            Ok(()) => Answer::Done,
            Err(reason) => Answer::Failed { reason },
        };
        control::reply(&mut stream, &answer).await
    };
    match outcome.await {
        // The peer only looked whether this daemon lives, e.g. another daemon that wants the socket.
        Ok(()) | Err(ControlError::Gone) => {}
        Err(e) => tracing::warn!("control socket: a request was not answered: {}", chain(&e)),
    }
}

/// Makes a set of the images in a directory whose descriptor comes with the request.
async fn imported(
    stream: &UnixStream,
    images_dir: &str,
    session: Option<&str>,
    store: &Arc<Store>,
    frontends: &Arc<Frontends>,
) -> Result<(), String> {
    let session = session.map(SessionName::new).transpose();
    let session = session.map_err(|e| e.to_string())?;
    let snapshot = SnapshotId::new(images_dir).map_err(|e| e.to_string())?;
    let dir = handed_over(stream, "the directory").await?;
    let (store, frontends) = (store.clone(), frontends.clone());
    let imported =
        tokio::task::spawn_blocking(move || import(&store, &frontends, &dir, snapshot, session));
    match imported.await {
        Ok(Ok(session)) => {
            tracing::info!(%session, images_dir, "imported; ready to be restored");
            Ok(())
        }
        Ok(Err(e)) => Err(chain(&e)),
        Err(e) => Err(e.to_string()),
    }
}

/// The action script of a restore speaks. At `post-restore` of one in trial its answer is the decision of the source, or of an
/// operator.
async fn restored(
    stream: &mut UnixStream,
    restoring: &Restoring,
    store: &Arc<Store>,
    frontends: &Frontends,
) -> Result<(), ControlError> {
    let failed = |reason| Answer::Failed { reason };
    let restore = match speaks(stream, restoring, &frontends.restores()).await {
        Ok(restore) => restore,
        Err(reason) => return control::reply(stream, &failed(reason)).await,
    };
    // Pages may have waited for its word.
    store.changes.bump();
    let cannot = |restore: &Arc<Restore>| {
        let late = matches!(
            restoring.step,
            RestoreStep::PreRestore | RestoreStep::PostRestore
        );
        late && restore.is_tried() && !restoring.holds
    };
    if restore.as_ref().is_some_and(cannot) {
        let reason = "its source has not killed the process yet, and this action script cannot hold the restore".to_owned();
        return control::reply(stream, &failed(reason)).await;
    }
    let at_hold = restore.filter(|r| restoring.step == RestoreStep::PostRestore && r.is_tried());
    let Some(restore) = at_hold else {
        return control::reply(stream, &Answer::Done).await;
    };
    let (session, set) = (&restore.session, &restore.set);
    let answer = |at_hold| match at_hold {
        AtHold::GoOn => Answer::Done,
        AtHold::GivenUp(reason) => failed(reason),
        AtHold::Hold => unreachable!("it is decided"),
    };
    let now = set.at_hold(restore.id);
    if now != AtHold::Hold {
        return control::reply(stream, &answer(now)).await;
    }
    let unread = set.script_holds();
    let hold = Box::new(frontends.hold(&restore));
    restore.is_asleep(true);
    control::reply(stream, &Answer::Hold { hold }).await?;
    let mut changes = store.changes.subscribe();
    let mut decided = async || loop {
        changes.mark_unchanged();
        match set.at_hold(restore.id) {
            // The sender lives in the store, so this only returns for a change.
            AtHold::Hold => drop(changes.changed().await),
            decided => return decided,
        }
    };
    let early = tokio::select! {
        line = control::receive_in_time(stream) => match line? {
            // From here on the decision reaches the script in any case.
            Request::Holds => None,
            _ => return Err(ControlError::Gone),
        },
        decided = decided() => Some(decided),
    };
    let decided = match early {
        Some(decided) => decided,
        None => {
            set.holds(restore.id);
            tracing::info!(session = %session.name, id = %session.id, snapshot = %set.snapshot, "restored and held: waits for the commit");
            tokio::select! {
                decided = decided() => decided,
                // Its CRIU fails, which is seen by its end.
                () = hung_up(stream) => return Ok(()),
            }
        }
    };
    if decided == AtHold::GoOn {
        restore.is_asleep(false);
        tracing::info!(session = %session.name, snapshot = %set.snapshot, "the restore goes on: the process is dead on the source");
    }
    control::reply(stream, &answer(decided)).await?;
    // The source is not told that its decision was heard before the script has read it.
    let _ = stream.read(&mut [0; 1]).await;
    drop(unread);
    Ok(())
}

/// The action script of a restore says how far its CRIU has come.
async fn speaks(
    stream: &UnixStream,
    restoring: &Restoring,
    restores: &Restores,
) -> Result<Option<Arc<Restore>>, String> {
    let descriptors = async {
        let mut both = (None, None);
        if restoring.pidfd {
            both.0 = Some(handed_over(stream, "CRIU's pidfd").await?);
        }
        if restoring.log {
            both.1 = Some(handed_over(stream, "CRIU's log").await?);
        }
        Ok(both)
    };
    let (pidfd, log) = tokio::time::timeout(WITHIN, descriptors)
        .await
        .unwrap_or_else(|_| Err("CRIU's descriptors did not come".to_owned()))?;
    let pid = starter_of(stream, restoring.criu_pid).map_err(|e| e.to_string())?;
    let script = Script {
        holds: restoring.holds,
        log: log.map(File::from),
    };
    let said = restores.speaks(
        Peer { pid, pidfd },
        restoring.criu_pid,
        restoring.step,
        script,
    );
    said.map_err(|e| {
        tracing::warn!(step = ?restoring.step, "action script: {e}");
        e.to_string()
    })
}

fn verdict(request: &Request, store: &Arc<Store>) -> Result<(), String> {
    match request {
        Request::Release {
            session,
            process_is_dead,
        } => decide::release(store, session, *process_is_dead),
        Request::Drop {
            session,
            process_lives,
        } => decide::forget(store, session, *process_lives),
        Request::Abort { .. } => {
            Err("this is image-cache, which has `drop`; `abort` is for image-proxy".to_owned())
        }
        // The latter three have been served before.
        Request::Announce(_)
        | Request::Commit(_)
        | Request::Import { .. }
        | Request::Status
        | Request::Holds
        | Request::Holding(_)
        | Request::YieldPort
        | Request::Restoring(_) => {
            Err("this is image-cache; a dump's action script is image-proxy".to_owned())
        }
    }
}

fn status_of(store: &Store) -> Status {
    let sessions = store.newest(&Scope::Any);
    Status {
        program: "image-cache".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        cache: None,
        memory: Some(Memory {
            used_bytes: store.budget.used(),
            limit_bytes: store.budget.limit(),
        }),
        sessions: sessions.iter().rev().map(|s| s.status()).collect(),
    }
}
