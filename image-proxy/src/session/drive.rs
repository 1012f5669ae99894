//! The task of a run: does what [`RunState::next_step`] says, until the run has ended.

use std::time::Duration;

use image_common::criu::dialect::SetEnd;
use image_common::link::codec::Message;
use image_common::units::human_size;

use crate::failure::Failure;
use crate::session::arrival_order::ArrivalOrder;
use crate::session::phase::Ended;
use crate::session::run::Run;
use crate::session::state::{RunState, Step};
use crate::session::Session;

/// How long the link may take for the last word about a set.
const SAID_WITHIN: Duration = Duration::from_secs(1);

/// What becomes of a run whose [`drive`] ended in a panic: the link ends with it, so that image-cache judges its sets as
/// those of a proxy that died. What CRIU was told to kill is in doubt there, and all else is given up.
pub fn broke(session: &Session, run: &Run, why: Failure) -> Ended {
    run.fail(why.clone());
    session.fail_link(why.clone());
    let state = run.state();
    let doubt = state.phase.was_told() || state.outlives_failure();
    let ended = match (state.ended(), doubt) {
        (Some(ended), _) => ended.clone(),
        (None, true) => Ended::InDoubt(why.clone()),
        (None, false) => Ended::Failed(why.clone()),
    };
    tracing::error!(session = %session.name, snapshot = %run.snapshot, "{}: {}", match &ended {
        Ended::InDoubt(_) => "in doubt",
        _ => "the dump fails, its process goes on",
    }, why.text());
    run.end(ended.clone());
    ended
}

/// Carries a run from its begin to its end. Gives how it ended.
pub async fn drive(session: &Session, run: &Run, order: &ArrivalOrder) -> Ended {
    loop {
        let state = run.wait_for(|s| s.next_step() != Step::Wait).await;
        let outcome = match state.next_step() {
            Step::Wait => continue,
            Step::AskComplete => ask_complete(session, run, order).await,
            Step::Hold => hold(session, run).await,
            Step::Judge => {
                // The cache holds the set meanwhile, and is to hear that this process lives.
                match session.link().await {
                    Ok(link) => link.heard_during(run.judge()).await,
                    Err(_) => run.judge().await,
                }
                None
            }
            Step::CloseSet => close_set(session, run).await,
            Step::Doubt(reason) => doubt(session, run, reason).await,
            Step::Done(ended) => Some(ended),
        };
        if let Some(ended) = outcome {
            log_end(session, run, &state, &ended);
            match &ended {
                Ended::Failed(reason) => give_up(session, run, reason).await,
                // Of the others the cache has been told before.
                Ended::InDoubt(reason) if state.failure().is_some() => {
                    tell_doubt(session, run, reason).await;
                }
                _ => {}
            }
            run.end(ended.clone());
            session.run_over(run);
            return ended;
        }
    }
}

async fn ask_complete(session: &Session, run: &Run, order: &ArrivalOrder) -> Option<Ended> {
    // A connection that CRIU made earlier may still be on its way to becoming an image.
    order.settled().await;
    if run.state().next_step() != Step::AskComplete {
        return None;
    }
    let link = match session.link().await {
        Ok(link) => link,
        Err(reason) => return Some(Ended::Failed(reason)),
    };
    let state = run.state();
    if !state.is_gated() && state.dialect.end() == SetEnd::Inventory {
        // Else it would be served from its completion on, and CRIU has not killed yet.
        link.send(&Message::SetGate { set: run.set }).await;
    }
    let (images, bytes) = run.asks_complete();
    link.send(&Message::SetComplete {
        set: run.set,
        images,
        bytes,
    })
    .await;
    None
}

/// The cache keeps the set from here on, whatever happens: CRIU kills without asking.
async fn hold(session: &Session, run: &Run) -> Option<Ended> {
    let link = match session.link().await {
        Ok(link) => link,
        Err(reason) => return Some(Ended::InDoubt(reason)),
    };
    // The link's failure is the run's.
    let _ = link.send_now(&run.prepares()).await;
    None
}

/// CRIU has killed: the set may be restored.
async fn close_set(session: &Session, run: &Run) -> Option<Ended> {
    let set = run.set;
    let message = match run.state().phase.is_held() {
        true => Message::Commit { set },
        false => Message::SetClose { set },
    };
    let sent = match session.link().await {
        Ok(link) => link.send_now(&message).await,
        Err(reason) => Err(reason),
    };
    // The tasks are dead; the cache keeps the set even if it is not told.
    Some(sent.map_or_else(Ended::InDoubt, |()| Ended::Dump))
}

async fn doubt(session: &Session, run: &Run, failure: Failure) -> Option<Ended> {
    let set = run.set;
    let told = async {
        let link = session.link().await?;
        let state = run.state();
        // A streamed one is gated since it was called complete.
        if !state.phase.is_held() && state.dialect.end() != SetEnd::Inventory {
            link.send_now(&Message::SetGate { set }).await?;
        }
        let reason = failure.text();
        link.send_now(&Message::SetDoubt { set, reason }).await
    };
    // A link that is lost leaves it in doubt, too.
    let _ = told.await;
    Some(Ended::InDoubt(failure))
}

/// CRIU was told, and its process was not seen to die: the cache need not wait for the end of
/// the link to say so to its operator. The link stays, for `image-proxy abort`.
async fn tell_doubt(session: &Session, run: &Run, failure: &Failure) {
    let Ok(link) = session.link().await else {
        return; // then it knows
    };
    let reason = failure.text();
    let message = Message::SetDoubt {
        set: run.set,
        reason,
    };
    let _ = tokio::time::timeout(SAID_WITHIN, link.send_now(&message)).await;
}

async fn give_up(session: &Session, run: &Run, failure: &Failure) {
    // Images that are still open are closed towards CRIU; in the socket dialect they are
    // drained, which may take as long as CRIU likes, so that is not waited for.
    run.fail(failure.clone());
    if let Ok(link) = session.link().await {
        let reason = failure.text();
        let abort = async {
            link.send_now(&Message::SetAbort {
                set: run.set,
                reason,
            })
            .await
        };
        // A link that does not take even this is closed at the end of the session.
        let _ = tokio::time::timeout(SAID_WITHIN, abort).await;
    }
}

fn log_end(session: &Session, run: &Run, state: &RunState, ended: &Ended) {
    let (images, size) = (state.images.sent, human_size(state.images.bytes));
    let handle = session.handle();
    let (session, snapshot) = (&session.name, &run.snapshot);
    match ended {
        Ended::PreDump => tracing::info!(%session, %snapshot, images, size, "pre-dump sent"),
        Ended::Dump => tracing::info!(%session, %snapshot, images, size, "dump sent"),
        Ended::InDoubt(reason) => tracing::error!(
            %session, %snapshot,
            "in doubt: {}; the target keeps the set and does not serve it. If the process is dead here, \
             run `image-cache release {handle}` there; if it lives, `image-proxy abort {handle}` here",
            reason.text()
        ),
        Ended::Failed(reason) => {
            tracing::error!(%session, %snapshot, "{}; if CRIU has not finished its dump, the process stays on this host", reason.text());
        }
    }
}
