//! `image-proxy-control.sock`: the action script announces a dump and asks for its commit.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::{self, chain, Answer, ControlError, Request};
use image_common::fdpass::{has_hung_up, hung_up, recv_handover, Handover, RequestError};
use image_common::image::SnapshotId;
use image_common::link::codec::{Dialect, Message};
use image_common::process::{parent_of, peer_pid};
use tokio::net::UnixStream;

use crate::link::Link;
use crate::proxy::origin::Origin;
use crate::proxy::page_server::unnamed;
use crate::proxy::{Active, Proxy, RunError};
use crate::run::{Commit, Run, State};
use crate::session::Session;
use crate::ship::ship;

/// CRIU connected before it ran the script, so its connection is at most waiting for us.
const CONNECTED_WITHIN: Duration = Duration::from_millis(500);

/// At post-dump all images are closed; if the inventory is not even begun by then, no more
/// comes. (A CRIU that is configured with the script and dumps somewhere else.)
const INVENTORY_WITHIN: Duration = Duration::from_secs(5);

pub async fn serve(mut stream: UnixStream, proxy: Arc<Proxy>) {
    let outcome = async {
        let request = control::receive(&mut stream).await?;
        let (run, within) = match &request {
            Request::Announce(run) => (run, proxy.settings.target.connect_timeout * 2),
            Request::Commit(run) => (run, proxy.settings.commit_timeout),
            Request::Status => {
                let status = Box::new(proxy.status());
                return control::reply(&mut stream, &Answer::Status { status }).await;
            }
            Request::Release { .. }
            | Request::Drop { .. }
            | Request::Import { .. }
            | Request::Resuming(_) => {
                let reason = "this is image-proxy; that request is for image-cache".to_owned();
                return control::reply(&mut stream, &Answer::Failed { reason }).await;
            }
        };
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        control::reply(&mut stream, &Answer::Accepted { within_ms }).await?;
        let deadline = tokio::time::Instant::now() + within;
        // The script's parent is CRIU. What the kernel says is in the numbers of our own pid
        // namespace, as are the pids of the connections; the script's word may not be.
        let seen = peer_pid(&stream).and_then(parent_of);
        let pid = seen.unwrap_or(run.criu_pid);
        let dir = async {
            let received = match run.images_dir {
                Some(_) => tokio::time::timeout_at(deadline, received_dir(&stream))
                    .await
                    .unwrap_or(Err(RequestError::Descriptors(0))),
                None => Ok(None),
            };
            received.map_err(|e| format!("the images directory did not come: {}", chain(&e)))
        };
        let verdict = match &request {
            Request::Announce(_) => {
                let ahead = async { Ok(Origin::of_script(seen, dir.await?).await) };
                announce(&proxy, pid, snapshot_of(run), ahead, within).await
            }
            _ => match dir.await {
                Ok(dir) => commit(&proxy, &stream, pid, dir, deadline, within).await,
                Err(reason) => Err(reason),
            },
        };
        let answer = match verdict {
            Ok(()) => Answer::Done,
            Err(reason) => {
                tracing::error!("action script of CRIU {pid}: {reason}");
                Answer::Failed { reason }
            }
        };
        control::reply(&mut stream, &answer).await
    };
    match outcome.await {
        // Somebody only looked whether we live, e.g. another daemon that wants the socket.
        Ok(()) | Err(ControlError::Gone) => {}
        Err(e) => tracing::warn!("control: {}", chain(&e)),
    }
}

/// A set that comes as files is named by the directory that they are in.
fn snapshot_of(run: &control::Run) -> SnapshotId {
    let named = run
        .images_dir
        .as_deref()
        .and_then(|dir| SnapshotId::new(dir).ok());
    named.unwrap_or_else(unnamed)
}

async fn received_dir(stream: &UnixStream) -> Result<Option<OwnedFd>, RequestError> {
    match recv_handover(stream).await? {
        Handover::Fd(fd) => Ok(Some(fd)),
        Handover::Eof | Handover::Data(_) => Err(RequestError::Descriptors(0)),
    }
}

/// Makes the set of this run gated, which shows that the cache answers. `origin` comes with the
/// images directory, and takes a moment; a run that has begun must be gated before that.
async fn announce(
    proxy: &Arc<Proxy>,
    pid: i32,
    snapshot: SnapshotId,
    origin: impl std::future::Future<Output = Result<Origin, String>>,
    within: Duration,
) -> Result<(), String> {
    // What comes through the page server of a dump with a script comes after the script.
    let not_gated = |run: &Run| {
        let state = run.state();
        !state.gated && state.dialect != Dialect::PageServer
    };
    proxy.frontier.absorbed().await;
    let Active { run, session } = match proxy.run_of_script(pid, not_gated).await {
        Ok(active) => active,
        // CRIU connects to a page server only after the script; and it may have connected to
        // us, with the connection still waiting to be accepted.
        Err(RunError::NotConnected(_)) => {
            let session = proxy
                .announce_ahead(pid, snapshot, origin.await?)
                .await
                .map_err(|e| e.to_string())?;
            let connected = tokio::time::timeout(within, session.link()).await;
            let connected = connected
                .unwrap_or_else(|_| Err(format!("image-cache did not answer within {within:?}")));
            return connected
                .map(drop)
                .inspect_err(|_| proxy.forget_announced(&session));
        }
        Err(e) => return Err(e.to_string()),
    };
    // From here on the run fails unless it is committed, whatever becomes of the answer.
    run.gate();
    let answered = async {
        // The script has sent it all the same, and must not find us gone.
        origin.await?;
        let link = session.link().await?;
        run.wait_for(|s| s.opened || s.failure().is_some()).await;
        link.send_now(&Message::SetGate { set: run.set }).await?;
        let state = run.wait_for(Run::gate_is_answered).await;
        state
            .failure()
            .map_or(Ok(()), |reason| Err(reason.to_owned()))
    };
    let answer = tokio::time::timeout(within, answered)
        .await
        .unwrap_or_else(|_| Err(format!("image-cache did not answer within {within:?}")));
    answer.inspect_err(|reason| run.fail(reason))
}

async fn find(proxy: &Arc<Proxy>, pid: i32, fits: impl Fn(&Run) -> bool) -> Result<Active, String> {
    let deadline = tokio::time::Instant::now() + CONNECTED_WITHIN;
    // It may have failed already, e.g. with its link.
    let over = || proxy.failure_of_announced(pid);
    loop {
        proxy.frontier.settled().await;
        match proxy.run_of_script(pid, &fits).await {
            Ok(active) => return Ok(active),
            Err(e) if matches!(e, RunError::NotConnected(_)) && over().is_some() => {
                return Err(over().unwrap_or_default());
            }
            Err(e) if tokio::time::Instant::now() >= deadline => return Err(e.to_string()),
            Err(_) => tokio::time::sleep(CONNECTED_WITHIN / 50).await,
        }
    }
}

/// The verdict on which the kill depends: CRIU waits, the tasks are frozen. `script` is the
/// connection of the action script: if that is gone, CRIU goes on without our verdict.
async fn commit(
    proxy: &Arc<Proxy>,
    script: &UnixStream,
    pid: i32,
    dir: Option<OwnedFd>,
    deadline: tokio::time::Instant,
    within: Duration,
) -> Result<(), String> {
    let late = || format!("not committed within {within:?}");
    let gated = |run: &Run| run.state().gated && run.state().commit == Commit::No;
    let active = match proxy.run_of_files(pid) {
        Some(active) => active,
        None => tokio::time::timeout_at(deadline, find(proxy, pid, gated))
            .await
            .unwrap_or_else(|_| Err(late()))?,
    };
    let Active { run, session } = active;
    // Until the cache holds the set, anything may stop this.
    let held = tokio::select! {
        held = tokio::time::timeout_at(deadline, hold(&session, &run, dir)) => {
            held.unwrap_or_else(|_| Err(late()))
        }
        () = hung_up(script) => Err("the action script is gone".to_owned()),
    };
    let confirmed = match held {
        Ok(_) if has_hung_up(script) => Err("the action script is gone".to_owned()),
        Ok(link) => confirm(&link, &run).await,
        Err(reason) => Err(reason),
    };
    match confirmed {
        Ok(()) => {
            run.commit(Commit::Confirmed);
            tracing::info!(session = %session.name, snapshot = %run.snapshot, "committed");
            Ok(())
        }
        Err(reason) => {
            run.fail(&reason);
            Err(format!(
                "snapshot {} of session {}: {reason}",
                run.snapshot, session.name
            ))
        }
    }
}

/// Waits until the cache holds everything and says so.
async fn hold(
    session: &Arc<Session>,
    run: &Arc<Run>,
    dir: Option<OwnedFd>,
) -> Result<Arc<Link>, String> {
    if let Some(dir) = dir.filter(|_| run.state().dialect == Dialect::PageServer) {
        let shipped = ship(session, run, &dir).await;
        let shipped = shipped.map_err(|e| format!("CRIU's images directory: {e}"))?;
        tracing::info!(session = %session.name, snapshot = %run.snapshot, shipped, "image files sent");
    }
    everything_stored(run).await?;
    let link = session.link().await?;
    run.commit(Commit::Asked);
    let State { images, bytes, .. } = run.state();
    link.send_now(&Message::Commit {
        set: run.set,
        images,
        bytes,
    })
    .await?;
    let answered = |s: &State| s.commit != Commit::Asked || s.failure().is_some();
    let state = run.wait_for(answered).await;
    if let Some(reason) = state.failure() {
        return Err(reason.to_owned());
    }
    match state.commit {
        Commit::Refused(reason) => Err(reason),
        _ => Ok(link),
    }
}

/// Tells the cache that CRIU is being told to go on. Not to be cancelled: a CONFIRM that may
/// or may not be on its way leaves the cache in doubt, and then the link must go, so that it
/// knows. The process then goes on here: an operator may have to clean up, but nothing is
/// lost or doubled.
async fn confirm(link: &Link, run: &Run) -> Result<(), String> {
    const WITHIN: Duration = Duration::from_secs(4);
    let confirm = Message::Confirm { set: run.set };
    match tokio::time::timeout(WITHIN, link.send_now(&confirm)).await {
        Ok(sent) => sent,
        Err(_) => {
            link.fail("the link hangs at the confirmation");
            Err(link.why())
        }
    }
}

async fn everything_stored(run: &Run) -> Result<(), String> {
    let begun = |s: &State| s.is_whole() || s.open > 0 || s.failure().is_some();
    if tokio::time::timeout(INVENTORY_WITHIN, run.wait_for(begun))
        .await
        .is_err()
    {
        return Err("inventory.img has not come: CRIU did not dump through image-proxy".to_owned());
    }
    let state = run
        .wait_for(|s| s.is_stored() || s.failure().is_some())
        .await;
    state
        .failure()
        .map_or(Ok(()), |reason| Err(reason.to_owned()))
}
