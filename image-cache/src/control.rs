//! `image-cache-control.sock`: what an operator, or restore's action script, may say.

use std::sync::Arc;
use std::time::Duration;

use image_common::control::{self, chain, Answer, ControlError, Request};
use image_common::fdpass::{recv_handover, Handover};
use image_common::image::{SessionName, SnapshotId};
use image_common::process::starter_of;
use image_common::status::{Memory, Status};
use tokio::net::UnixStream;

use crate::decide;
use crate::frontend::restores::Restores;
use crate::frontend::Frontends;
use crate::import::import;
use crate::store::{Scope, Store};

/// Files are read as fast as their file system is; this is for one that hangs.
const IMPORT_WITHIN: Duration = Duration::from_secs(3600);

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
        let answer = match verdict(&request, &stream, &store, &restores) {
            Ok(()) => Answer::Done,
            Err(reason) => Answer::Failed { reason },
        };
        control::reply(&mut stream, &answer).await
    };
    match outcome.await {
        // Somebody only looked whether we live, e.g. another daemon that wants the socket.
        Ok(()) | Err(ControlError::Gone) => {}
        Err(e) => tracing::warn!("control: {}", chain(&e)),
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

fn verdict(
    request: &Request,
    stream: &UnixStream,
    store: &Arc<Store>,
    restores: &Restores,
) -> Result<(), String> {
    match request {
        Request::Release {
            session,
            process_is_dead,
        } => decide::release(store, session, *process_is_dead),
        Request::Drop {
            session,
            process_lives,
        } => decide::forget(store, session, *process_lives),
        Request::Resuming(run) => {
            let seen = starter_of(stream, run.criu_pid).map_err(|e| e.to_string())?;
            let criu = seen.unwrap_or(run.criu_pid);
            match restores.resumes(criu) {
                true => Ok(()),
                false => Err(format!("CRIU {criu} has read nothing from here")),
            }
        }
        Request::Abort { .. } => {
            Err("this is image-cache, which has `drop`; `abort` is for image-proxy".to_owned())
        }
        Request::Announce(_) | Request::Commit(_) | Request::Import { .. } | Request::Status => {
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
