//! `image-cache-control.sock`: what an operator, or restore's action script, may say.

pub mod decide;
pub mod import;

use std::sync::Arc;
use std::time::Duration;

use image_common::control::status::{Memory, Status};
use image_common::control::{self, Answer, ControlError, Request, Restoring};
use image_common::criu_io::fdpass::{recv_handover, Handover};
use image_common::error_chain::chain;
use image_common::image::{SessionName, SnapshotId};
use image_common::procfs::process::starter_of;
use tokio::net::UnixStream;

use crate::control::import::import;
use crate::frontend::verdict::{Peer, Restores};
use crate::frontend::Frontends;
use crate::store::{Scope, Store};

/// Files are read as fast as their file system is; this is for one that hangs.
const IMPORT_WITHIN: Duration = Duration::from_secs(3600);

/// It comes with the line.
const PIDFD_WITHIN: Duration = Duration::from_secs(5);

pub async fn serve(mut stream: UnixStream, store: Arc<Store>, frontends: Arc<Frontends>) {
    let restores = frontends.restores();
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
        let decided = match &request {
            Request::Restoring(step) => speaks(&stream, step, &restores).await,
            request => verdict(request, &store),
        };
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
    let dir = match recv_handover(stream).await {
        Ok(Handover::Fd(dir)) => dir,
        Ok(_) => return Err("the directory did not come".to_owned()),
        Err(e) => return Err(chain(&e)),
    };
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

/// The action script of a restore says how far its CRIU has come.
async fn speaks(
    stream: &UnixStream,
    restoring: &Restoring,
    restores: &Restores,
) -> Result<(), String> {
    let pidfd = match restoring.pidfd {
        true => match tokio::time::timeout(PIDFD_WITHIN, recv_handover(stream)).await {
            Ok(Ok(Handover::Fd(pidfd))) => Some(pidfd),
            Ok(Err(e)) => return Err(chain(&e)),
            Ok(Ok(_)) | Err(_) => return Err("CRIU's pidfd did not come".to_owned()),
        },
        false => None,
    };
    let pid = starter_of(stream, restoring.criu_pid).map_err(|e| e.to_string())?;
    let said = restores.speaks(Peer { pid, pidfd }, restoring.criu_pid, restoring.step);
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
