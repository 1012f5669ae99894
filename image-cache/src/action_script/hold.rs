//! The hold: a restore stands, asleep, until it is decided whether it may run.
//!
//! No clock decides. These do, the first of them: image-cache; while that is gone the source, by HELLO of kind 4 on the
//! link's port, or an operator on the socket of the hold, or another image-cache that takes the hold over; and the end of
//! CRIU, without which nothing of the restore can run.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::hold::Hold;
use image_common::control::{script, Conversation};
use image_common::log::say;
use rustix::process::geteuid;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::action_script::criu::Criu;
use crate::action_script::daemon::Daemons;
use crate::action_script::link::Link;
use crate::action_script::operator::{self, Operators};
use crate::action_script::state::{Decision, State};

/// A decision that was taken is told to the peer that has brought it, if that listens. Nothing depends on it.
const TOLD_WITHIN: Duration = Duration::from_secs(1);

/// Holds until it is decided. `Err`: the restore fails, and why. `criu`: the parent of this script.
pub fn hold(
    hold: Hold,
    conversation: Conversation,
    socket: PathBuf,
    criu: (i32, OwnedFd),
) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime.map_err(|e| format!("cannot hold: {e}"))?;
    let outcome = runtime.block_on(held(hold, conversation, socket, criu));
    // What is left serves nothing any more.
    runtime.shutdown_background();
    outcome
}

async fn held(
    hold: Hold,
    conversation: Conversation,
    socket: PathBuf,
    (pid, pidfd): (i32, OwnedFd),
) -> Result<(), String> {
    let daemon_uid = conversation.peer_uid().map_err(|e| e.to_string())?;
    let again = pidfd.as_fd().try_clone_to_owned();
    let again = again.map_err(|e| format!("cannot hold: {e}"))?;
    let criu = Criu::watch((pid, pidfd), script::root_pid());
    if let Some(why) = criu.unwatched() {
        say(&format!("image-cache: post-restore: if CRIU ends in the hold, its tasks are left asleep, as {why}"));
    }
    let believed: HashSet<u32> = [0, geteuid().as_raw(), daemon_uid].into();
    let (state, answering) = (State::default(), TaskTracker::new());
    let operators = Operators {
        held: hold.held.clone(),
        dir: hold.dir.clone(),
        daemon_uid,
        believed: believed.clone(),
        began: Instant::now(),
        answering: answering.clone(),
    };
    let operators = operator::serve(Arc::new(operators), state.clone());
    let link = Link::prepare(&hold, daemon_uid, &answering);
    let link = link.inspect_err(|why| {
        say(&format!("image-cache: post-restore: if image-cache ends in the hold, image-proxy cannot reach this script: {why}"));
    });
    let link = async {
        match link {
            Ok(link) => Arc::new(link).serve(state.clone()).await,
            // Without either of these only another image-cache could reach it.
            Err(why) => {
                state.until(|hold| hold.socket == Some(false)).await;
                let _ = state.decide(Decision::GiveUp(format!(
                    "no decision could reach this script if image-cache ended: {why}, and no socket can be made in its directory"
                )));
            }
        }
    };
    let daemons = Daemons {
        hold,
        socket,
        believed,
        criu: again,
    };
    let (stream, read) = conversation.into_parts();
    let daemons = daemons.follow(state.clone(), stream, read);
    let waiting = async {
        tokio::join!(operators, link, daemons);
        std::future::pending::<()>().await;
    };
    let told = async {
        let decision = state.decided().await;
        answering.close();
        let _ = tokio::time::timeout(TOLD_WITHIN, answering.wait()).await;
        decision
    };
    let ended = tokio::select! {
        biased;
        () = criu.ended() => None,
        decision = told => Some(decision),
        () = waiting => None,
    };
    match ended {
        Some(Decision::GoOn(by)) => {
            say(&format!(
                "image-cache: post-restore: the restore goes on, as {by} has decided"
            ));
            Ok(())
        }
        Some(Decision::GiveUp(reason)) => Err(reason),
        None => {
            let _ = state.decide(Decision::GiveUp("CRIU has ended in the hold".to_owned()));
            let done = criu.end_tasks().await;
            Err(format!("CRIU has ended in the hold: {done}"))
        }
    }
}
