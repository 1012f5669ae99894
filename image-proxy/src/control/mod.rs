//! `image-proxy-control.sock`: the action script announces a dump and asks for its commit.

mod abort;
mod commit;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::{self, Answer, ControlError, Request};
use image_common::criu_io::fdpass::{recv_handover, Handover, RequestError};
use image_common::error_chain::chain;
use image_common::image::SnapshotId;
use image_common::link::codec::Message;
use image_common::procfs::process::{hold_starter, Process};
use image_common::tasks;
use tokio::net::UnixStream;

use crate::cli::CommitOn;
use crate::control::abort::{abort, ABORTED_WITHIN};
use crate::control::commit::{commit, trial, Asked};
use crate::dumps::page_server::unnamed;
use crate::dumps::{Active, Proxy, RunError};
use crate::failure::Failure;
use crate::session::lineage::Lineage;
use crate::session::run::Run;
use crate::session::state::RunState;
use crate::session::Session;

/// Without it, which dump a script speaks for, and whether CRIU has killed, would be a guess.
const UNSEEN: &str = "CRIU is in a pid namespace that image-proxy cannot see: run image-proxy in the same one, or in one \
     above it";

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
            Request::Abort {
                session,
                process_lives,
            } => {
                let within_ms = u64::try_from(ABORTED_WITHIN.as_millis()).unwrap_or(u64::MAX);
                control::reply(&mut stream, &Answer::Accepted { within_ms }).await?;
                let aborted = abort(&proxy, session, *process_lives);
                let aborted = tokio::time::timeout(ABORTED_WITHIN, aborted).await;
                let late = || {
                    Err(Failure::limit(format!(
                        "not done within {ABORTED_WITHIN:?}; ask again, or decide on the target"
                    )))
                };
                let answer = match aborted.unwrap_or_else(|_| late()) {
                    Ok(()) => Answer::Done,
                    Err(failure) => Answer::Failed {
                        reason: failure.text(),
                    },
                };
                return control::reply(&mut stream, &answer).await;
            }
            Request::Release { .. }
            | Request::Drop { .. }
            | Request::Import { .. }
            | Request::Holds
            | Request::Holding(_)
            | Request::YieldPort
            | Request::Restoring(_) => {
                let reason =
                    "this is image-proxy; that request is for image-cache on the target".to_owned();
                return control::reply(&mut stream, &Answer::Failed { reason }).await;
            }
        };
        // The verdict on an announcement comes when memory is ready for the dump.
        let reserving = match &request {
            Request::Announce(_) => proxy.settings.reserve_timeout,
            _ => Duration::ZERO,
        };
        let all = within.saturating_add(reserving);
        let within_ms = u64::try_from(all.as_millis()).unwrap_or(u64::MAX);
        control::reply(&mut stream, &Answer::Accepted { within_ms }).await?;
        let deadline = tokio::time::Instant::now() + within;
        // The script's parent is CRIU. What the kernel says is in the numbers of our own pid
        // namespace, as are the pids of the connections; the script's word may not be.
        let (pid, criu) = match hold_starter(&stream, run.criu_pid) {
            Ok(Some((pid, process))) => (pid, process.map(Arc::new)),
            unseen => {
                let reason = match unseen {
                    Err(orphaned) => orphaned.to_string(),
                    Ok(_) => UNSEEN.to_owned(),
                };
                tracing::error!("action script: {reason}");
                return control::reply(&mut stream, &Answer::Failed { reason }).await;
            }
        };
        let dir = async {
            let received = match run.images_dir {
                Some(_) => tokio::time::timeout_at(deadline, received_dir(&stream))
                    .await
                    .unwrap_or(Err(RequestError::Descriptors(0))),
                None => Ok(None),
            };
            received.map_err(|e| Failure::criu("the images directory did not come").caused_by(e))
        };
        let verdict = match &request {
            Request::Announce(_) => match proxy.check_memory() {
                Ok(()) => {
                    let lineage = async { Ok(Lineage::of_script(Some(pid), dir.await?).await) };
                    let announced =
                        announce(&proxy, (pid, criu), snapshot_of(run), lineage, within).await;
                    match (announced, run.expected_bytes) {
                        (Ok(Some(fresh)), Some(bytes)) => fresh.reserve(bytes, reserving).await,
                        (announced, _) => announced.map(drop),
                    }
                }
                // The script has sent it all the same, and must not find us gone.
                Err(reason) => dir.await.and(Err(reason)),
            },
            _ => {
                let asked = Asked {
                    pid,
                    // A number that the script has from CRIU means what it means there.
                    root: run.root_pid.filter(|_| pid == run.criu_pid),
                    deadline,
                    within,
                };
                let committed = async { commit(&proxy, &stream, asked, dir.await?).await };
                match committed.await {
                    Ok(Some(held)) => {
                        let run = held.run();
                        let conclude = held.conclude(&mut stream);
                        let concluded = tasks::caught("the end of a commit", conclude).await;
                        return concluded.unwrap_or_else(|e| {
                            // In doubt, if the script may have its answer.
                            run.fail(Failure::bug(e.to_string()));
                            Ok(())
                        });
                    }
                    Ok(None) => Ok(()),
                    Err(reason) => Err(reason),
                }
            }
        };
        let answer = match verdict {
            Ok(()) => Answer::Done,
            Err(failure) => {
                let reason = failure.text();
                tracing::error!("action script of CRIU {pid}: {reason}");
                Answer::Failed { reason }
            }
        };
        control::reply(&mut stream, &answer).await
    };
    match outcome.await {
        // The client closed without a request, e.g. another daemon that checks if the socket is in use.
        Ok(()) | Err(ControlError::Gone) => {}
        Err(e) => tracing::warn!("control socket: {}", chain(&e)),
    }
}

/// A set that comes as files is named by the directory that they are in.
fn snapshot_of(run: &control::ScriptRun) -> SnapshotId {
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

/// Why a script is refused if its dump cannot begin or be found.
fn refused(e: RunError) -> Failure {
    match e {
        RunError::Stopping => Failure::stopped(e.to_string()),
        _ => Failure::criu(e.to_string()),
    }
}

/// Makes the set of this run gated, which shows that the cache answers. `lineage` comes with the
/// images directory, and takes a moment; a run that has begun must be gated before that. Gives the
/// session if this is the first run of it: then nothing of the tree is on the target.
async fn announce(
    proxy: &Arc<Proxy>,
    (pid, criu): (i32, Option<Arc<Process>>),
    snapshot: SnapshotId,
    lineage: impl std::future::Future<Output = Result<Lineage, Failure>>,
    within: Duration,
) -> Result<Option<Arc<Session>>, Failure> {
    // What comes through the page server of a dump with a script comes after the script.
    let not_gated = |run: &Run| {
        let state = run.state();
        !state.is_gated() && !state.dialect.is_rounds_alone()
    };
    let on = proxy.settings.commit_on;
    proxy.arrival_order.absorbed().await;
    let Active { run, session } = match proxy.run_of_script(pid, not_gated).await {
        Ok(active) => active,
        // CRIU connects to a page server only after the script; and it may have connected to
        // us, with the connection still waiting to be accepted.
        Err(RunError::NotConnected(_)) => {
            if let Some(Active { run, session }) = proxy.announced_before(pid) {
                let gated = gated(&run, &session, lineage, within, on);
                return gated.await.map(|()| None);
            }
            if proxy.announced_unconnected_before(pid, &snapshot).is_some() {
                return lineage.await.map(|_| None);
            }
            let session = proxy
                .announce_unconnected((pid, criu), snapshot, lineage.await?)
                .await
                .map_err(refused)?;
            let connected = tokio::time::timeout(within, session.link()).await;
            let connected = connected.unwrap_or_else(|_| {
                Err(Failure::limit(format!(
                    "image-cache did not answer within {within:?}"
                )))
            });
            // What would be refused at the end is refused before the tasks are frozen.
            return match connected.and_then(|link| trial(&link, on)) {
                Ok(_) => Ok((session.runs() == 0).then_some(session)),
                Err(reason) => {
                    proxy.forget_announced(&session);
                    Err(reason)
                }
            };
        }
        Err(e) => return Err(refused(e)),
    };
    // From here on the run fails unless it is committed, whatever becomes of the answer.
    run.gate();
    gated(&run, &session, lineage, within, on).await?;
    Ok((session.runs() == 1).then_some(session))
}

/// Has the cache hold the set back until its commit. A second time, as for a CRIU that has its script twice, is the
/// same to the cache.
async fn gated(
    run: &Run,
    session: &Session,
    lineage: impl std::future::Future<Output = Result<Lineage, Failure>>,
    within: Duration,
    on: CommitOn,
) -> Result<(), Failure> {
    let answered = async {
        // The script has sent it all the same, and must not find us gone.
        lineage.await?;
        let link = session.link().await?;
        trial(&link, on)?;
        run.wait_for(|s| s.opened || s.is_decided()).await;
        link.send_now(&Message::SetGate { set: run.set }).await?;
        let state = run.wait_for(RunState::gate_is_answered).await;
        state.failure().map_or(Ok(()), |reason| Err(reason.clone()))
    };
    let answer = tokio::time::timeout(within, answered)
        .await
        .unwrap_or_else(|_| {
            Err(Failure::limit(format!(
                "image-cache did not answer within {within:?}"
            )))
        });
    if let Err(reason) = &answer {
        run.fail(reason.clone());
    }
    answer
}
