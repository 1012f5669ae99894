//! `image-proxy abort`: an operator on the source wants no copy of a process on the target.
//!
//! Two things must not happen. A set is given up whose process is dead, or dies in a moment:
//! so nothing is given up as long as a CRIU that was told to kill may still do it, and a process
//! that can be seen is looked at, whatever the operator says. And a set stays restorable while
//! its process goes on: so it is `Done` only if the target has heard it.

use std::sync::Arc;
use std::time::Duration;

use image_common::error_chain::chain;
use image_common::link::codec::Message;
use image_common::link::session_id::Wanted;
use image_common::procfs::dumped::Seen;

use crate::dumps::in_doubt::Found;
use crate::dumps::proxy::Doubt;
use crate::dumps::{Active, Proxy};
use crate::failure::Failure;
use crate::link::decision::Decision;
use crate::session::phase::Ended;

/// How long all of it may take.
pub const ABORTED_WITHIN: Duration = Duration::from_secs(60);

/// How long a link that is being repaired may keep an operator waiting.
const SAID_WITHIN: Duration = Duration::from_secs(5);

/// How long an operator waits for a CRIU that was told: mostly it kills, or ends without it, at once.
const DECIDED_WITHIN: Duration = Duration::from_secs(5);

const ABORTED: &str = "aborted by the operator on the source";

/// Gives a session up. An error says what holds instead, and what can be done.
pub async fn abort(proxy: &Arc<Proxy>, name: &str, process_lives: bool) -> Result<(), Failure> {
    let wanted: Wanted = name
        .parse()
        .map_err(|e| Failure::operator(format!("{name:?}: {e}")))?;
    let found = proxy.find(&wanted)?;
    let id = found.as_ref().map(|found| found.session().handle());
    let done = match found {
        None => Err(Failure::operator(format!(
            "there is no session {wanted} here. What was in doubt when an image-proxy ended is for the target: \
             look whether the process lives; if it does, `image-cache status` there shows the set, and \
             `image-cache drop ID` forgets it"
        ))),
        Some(Found::Running(active)) => running(proxy, &active, process_lives).await,
        Some(Found::Announced(session)) => {
            // It stays announced: what comes of it belongs to a session that has ended, and fails.
            session.close(Some(ABORTED)).await;
            Ok(())
        }
        Some(Found::Waiting(session)) => match proxy.leave_series(&session) {
            true => {
                session.close(Some(ABORTED)).await;
                Ok(())
            }
            false => Err(Failure::operator(format!("a run of session {wanted} has just begun; ask again"))),
        },
        Some(Found::InDoubt(doubt)) => in_doubt(proxy, &doubt, process_lives).await,
    };
    if done.is_ok() {
        tracing::warn!(session = %wanted, id, "aborted by the operator");
    }
    done
}

async fn running(proxy: &Arc<Proxy>, active: &Active, process_lives: bool) -> Result<(), Failure> {
    let Active { run, session } = active;
    let name = &session.name;
    let state = run.state();
    let told = state.phase.was_told();
    if !told {
        if !state.is_gated() && !process_lives {
            return Err(Failure::operator(format!(
                "this run of session {name} has no action script, so whether its CRIU kills the process is not in our \
                 hands: end CRIU first; or, if it is a pre-dump, or the process will go on, add --process-lives"
            )));
        }
        run.fail(Failure::operator(ABORTED));
    }
    if tokio::time::timeout(DECIDED_WITHIN, proxy.over(run))
        .await
        .is_err()
    {
        return Err(Failure::operator(match told {
            true => format!(
                "CRIU was told that it may kill the process, and has neither done it nor ended: end CRIU, then ask \
                 again (session {name})"
            ),
            false => format!("session {name} does not come to its end; ask again"),
        }));
    }
    match run.state().ended() {
        Some(Ended::Failed(_)) => Ok(()),
        Some(Ended::Dump) => Err(Failure::operator(format!(
            "the dump of session {name} is done: CRIU has killed the process or does it now, and the target has it"
        ))),
        Some(Ended::PreDump) => Err(Failure::operator(format!("the pre-dump of session {name} was done before; ask again"))),
        Some(Ended::InDoubt(_)) | None => match proxy.doubt_of(run) {
            Some(doubt) => in_doubt(proxy, &doubt, process_lives).await,
            None => Err(Failure::operator(format!("image-proxy is stopping; decide on the target (session {name})"))),
        },
    }
}

async fn in_doubt(proxy: &Arc<Proxy>, doubt: &Doubt, process_lives: bool) -> Result<(), Failure> {
    let Active { run, session } = &doubt.active;
    let handle = session.handle();
    if let Some(late) = &doubt.late {
        let why = late
            .why
            .as_ref()
            .map_or_else(String::new, |why| format!(" ({why})"));
        let command = late.command(&handle);
        let process = late.process();
        return Err(Failure::operator(match late.decision {
            Decision::Commit => format!(
                "{process}: the set on the target is all that is left of it. image-proxy goes on to tell the target \
                 so{why}; `{command}` there does the same"
            ),
            Decision::Abort(_) => format!(
                "{process}, but the target has not heard it{why}: run `{command}` there; image-proxy goes on to tell it"
            ),
        }));
    }
    if let Some(criu) = doubt.told.criu.as_ref().filter(|c| !c.has_exited()) {
        return Err(Failure::operator(format!(
            "CRIU (pid {}) was told that it may kill the process, and still runs: end it, then ask again",
            criu.pid()
        )));
    }
    match &doubt.told.tree {
        Some(tree) => {
            let dead = |what: String| {
                format!(
                    "{what} dead here: the set on the target is all that is left of it. `image-cache release {handle}` \
                     there lets it be restored"
                )
            };
            match tree.look() {
                Seen::Dying => {
                    return Err(Failure::operator(dead(format!(
                        "process {} is",
                        tree.root()
                    ))))
                }
                Seen::Lives { dying: 0, .. } => {}
                Seen::Lives { pid, dying } => {
                    return Err(Failure::operator(format!(
                        "of the tree of process {} {dying} are dead and process {pid} lives: end that, then ask again; \
                         or decide on the target (session {handle})",
                        tree.root()
                    )));
                }
            }
            // It may take its time, and it has the word already.
            if let Some(tracer) = tree.any_tracer() {
                return Err(Failure::operator(format!(
                    "process {} is held by process {tracer} still: if that is a CRIU it kills at any moment. End it, \
                     then ask again",
                    tree.root()
                )));
            }
        }
        None if process_lives => {}
        None => {
            return Err(Failure::operator(format!(
                "which process it was, and whether it lives, is not known here. Look: if it lives, add \
                 --process-lives; if it is dead, run `image-cache release {handle}` on the target"
            )));
        }
    }
    let there = |why: &str| {
        Err(Failure::operator(format!(
            "the process lives, but the target has not heard it ({why}): run `image-cache drop {handle}` there"
        )))
    };
    let reason = format!("{ABORTED}, where the process lives");
    let link = match (session.link().await, session.address()) {
        (Ok(link), _) => link,
        (Err(why), None) => return there(&why.text()),
        (Err(_), Some(address)) => {
            let abort = Decision::Abort(reason);
            return match address.bring(run.set, &abort).await {
                Ok(()) => {
                    proxy.forget_doubt(doubt);
                    Ok(())
                }
                Err(why) => there(&chain(&why)),
            };
        }
    };
    let abort = Message::SetAbort {
        set: run.set,
        reason,
    };
    // If the link comes back the target hears it later, which is what the operator wants.
    match tokio::time::timeout(SAID_WITHIN, link.send_now(&abort)).await {
        Ok(Ok(())) => {}
        Ok(Err(why)) => return there(&why.text()),
        Err(_) => return there("the link is broken"),
    }
    // The cache answers the farewell when it has read everything before it.
    let closed = tokio::time::timeout(SAID_WITHIN, session.close(Some(ABORTED))).await;
    if closed != Ok(true) {
        return there("it does not answer");
    }
    proxy.forget_doubt(doubt);
    Ok(())
}
