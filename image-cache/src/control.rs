//! `image-cache-control.sock`: what an operator, or restore's action script, may say.

use std::sync::Arc;

use image_common::control::{self, chain, Answer, ControlError, Request};
use image_common::image::SessionName;
use image_common::process::{parent_of, peer_pid};
use image_common::status::{Memory, Status};
use tokio::net::UnixStream;

use crate::frontend::restores::Restores;
use crate::store::{Scope, Store};

pub async fn serve(mut stream: UnixStream, store: Arc<Store>, restores: Arc<Restores>) {
    let outcome = async {
        let request = control::receive(&mut stream).await?;
        if request == Request::Status {
            let status = Box::new(status_of(&store));
            return control::reply(&mut stream, &Answer::Status { status }).await;
        }
        let answer = match decide(&request, &stream, &store, &restores) {
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

fn decide(
    request: &Request,
    stream: &UnixStream,
    store: &Arc<Store>,
    restores: &Restores,
) -> Result<(), String> {
    match request {
        Request::Release { session } => {
            let sessions = named(store, session)?;
            let doubts = sessions
                .iter()
                .flat_map(|s| s.sets())
                .filter(|s| s.end_doubt());
            match doubts.count() {
                0 => Err(format!("nothing of session {session} is in doubt")),
                n => {
                    tracing::warn!(session, sets = n, "released from doubt by the operator");
                    Ok(())
                }
            }
        }
        Request::Drop { session } => {
            for session in named(store, session)? {
                if session.is_connected() {
                    return Err(format!("session {} is still being received", session.name));
                }
                tracing::warn!(session = %session.name, "dropped by the operator");
                store.remove(&session);
            }
            Ok(())
        }
        Request::Resuming(run) => {
            // The script's parent is CRIU, in the numbers of our own pid namespace.
            let criu = peer_pid(stream).and_then(parent_of).unwrap_or(run.criu_pid);
            match restores.resumes(criu) {
                true => Ok(()),
                false => Err(format!("CRIU {criu} has read nothing from here")),
            }
        }
        Request::Announce(_) | Request::Commit(_) | Request::Status => {
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

fn named(
    store: &Arc<Store>,
    name: &str,
) -> Result<Vec<Arc<crate::store::session::Session>>, String> {
    let name = SessionName::new(name).map_err(|e| e.to_string())?;
    let sessions = store.newest(&Scope::Session(name.clone()));
    match sessions.is_empty() {
        true => Err(format!("there is no session {name}")),
        false => Ok(sessions),
    }
}
