//! The commit: what CRIU's action script asks for at post-dump, when the tasks are frozen.
//!
//! 1. The cache holds every image (PREPARE, PREPARED); with a trial, a restore of it stands on the target, asleep
//!    (PREPARE_TRIAL, TRIAL, HOLDING). Until here any failure fails the dump, and the process goes on.
//! 2. The script is told, and it has taken the answer: now CRIU kills the tasks. Whatever fails
//!    from here on leaves the set in doubt, never served and never dropped by itself.
//! 3. CRIU has killed all that it dumped, which [`crate::session::evidence`] proves: COMMIT. The set may be restored.
//!
//! So nothing can be restored while its process may still run, whichever process dies in between. What
//! each of them knows then is in `docs/commit.md`.

use std::future::Future;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::{self, Answer, ControlError};
use image_common::criu::dialect::SetEnd;
use image_common::criu_io::fdpass::{has_hung_up, hung_up};
use image_common::link::codec::{CommitOn, Message};
use image_common::link::TRIAL_VERSION;
use image_common::procfs::dumped::{DumpedTree, HeldBack};
use image_common::procfs::process::{ancestors, related, Process};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::cli;
use crate::dumps::{Active, Proxy, RunError};
use crate::failure::Failure;
use crate::frontend::images_dir::ship;
use crate::link::Link;
use crate::session::evidence::{hold_back, killed};
use crate::session::phase::Phase;
use crate::session::run::{Run, Told};
use crate::session::state::RunState;
use crate::session::Session;

/// CRIU connected before it ran the script, so its connection is at most waiting for us.
const CONNECTED_WITHIN: Duration = Duration::from_millis(500);

/// At post-dump all images are closed; if the inventory is not even begun by then, no more
/// comes. (A CRIU that is configured with the script and dumps somewhere else.)
const INVENTORY_WITHIN: Duration = Duration::from_secs(5);

/// How long the link may take for the last message, while it is whole.
const COMMITTED_WITHIN: Duration = Duration::from_secs(4);

/// The commit that a script asks for.
pub struct Asked {
    /// The process that started the script, in the numbers of our pid namespace: CRIU, or a shell that CRIU runs.
    pub pid: i32,
    /// The root of the tree that it dumps, in the numbers of our pid namespace.
    pub root: Option<i32>,
    pub deadline: tokio::time::Instant,
    pub within: Duration,
}

/// The cache holds the set, and CRIU was not told yet.
pub struct Held {
    proxy: Arc<Proxy>,
    active: Active,
    link: Arc<Link>,
    told: Told,
}

/// Which trial the cache is asked for. `None`: it is to hold the set, and no restore is tried.
pub fn trial(link: &Link, on: cli::CommitOn) -> Result<Option<CommitOn>, Failure> {
    let version = link.version();
    match on {
        cli::CommitOn::Held => Ok(None),
        cli::CommitOn::Auto => Ok((version >= TRIAL_VERSION).then_some(CommitOn::Auto)),
        cli::CommitOn::Restored if version >= TRIAL_VERSION => Ok(Some(CommitOn::Restored)),
        cli::CommitOn::Restored => Err(Failure::peer(format!(
            "image-cache at {} speaks version {version} of the link protocol, and a restore before the kill \
             (--commit-on restored) needs version {TRIAL_VERSION}: update image-cache there, or start image-proxy with \
             --commit-on auto",
            link.peer
        ))),
    }
}

/// The time for the commit is over.
fn late(trial: bool, within: Duration) -> Failure {
    Failure::limit(match trial {
        false => {
            format!("image-cache did not prepare the set within {within:?} (--commit-timeout)")
        }
        true => format!(
            "the restore on the target did not stand within {within:?} (--commit-timeout): look at CRIU's log there"
        ),
    })
}

async fn exited(process: Option<&Process>) {
    match process {
        Some(process) => process.exited().await,
        None => std::future::pending().await,
    }
}

/// The run that is to be committed. `None`: this CRIU was told already that it may kill what it dumps. It has the
/// script twice, e.g. out of a configuration file that it reads twice, and gets the same answer.
async fn find(proxy: &Arc<Proxy>, asked: &Asked) -> Result<Option<Active>, Failure> {
    let pid = asked.pid;
    let fits = |run: &Run| run.state().is_gated() && run.state().phase == Phase::Sending;
    let deadline = tokio::time::Instant::now() + CONNECTED_WITHIN;
    // It may have failed already, e.g. with its link.
    let over = || proxy.failure_of_announced(pid);
    loop {
        proxy.arrival_order.settled().await;
        match proxy.run_of_script(pid, &fits).await {
            Ok(active) => return Ok(Some(active)),
            Err(RunError::NotConnected(_)) if proxy.told_before(pid, asked.root) => {
                return Ok(None);
            }
            Err(e) => {
                let failed = over().filter(|_| matches!(e, RunError::NotConnected(_)));
                if let Some(failure) = failed {
                    return Err(failure);
                }
                if tokio::time::Instant::now() >= deadline {
                    return Err(Failure::criu(e.to_string()));
                }
                tokio::time::sleep(CONNECTED_WITHIN / 50).await;
            }
        }
    }
}

/// Brings the cache to hold the set: the verdict on which the kill depends. CRIU waits, the
/// tasks are frozen. `None`: it was given before. `script` is the connection of the action script: if that is gone, CRIU
/// goes on without our verdict.
pub async fn commit(
    proxy: &Arc<Proxy>,
    script: &UnixStream,
    asked: Asked,
    dir: Option<OwnedFd>,
) -> Result<Option<Held>, Failure> {
    let (deadline, within) = (asked.deadline, asked.within);
    let active = match proxy.run_of_files(asked.pid) {
        Some(active) => Some(active),
        None => tokio::time::timeout_at(deadline, find(proxy, &asked))
            .await
            .unwrap_or_else(|_| Err(late(false, within)))?,
    };
    let Some(active) = active else {
        return Ok(None);
    };
    let Active { run, session } = &active;
    // Beside the link's round trip: of a large tree it takes a moment.
    let (starter, root) = (asked.pid, asked.root);
    let watched = tokio::task::spawn_blocking(move || watch(starter, root));
    // Until the cache holds the set, anything may stop this.
    let on = proxy.settings.commit_on;
    let held = tokio::select! {
        held = verdict(session, run, dir, on, (deadline, within)) => held,
        () = hung_up(script) => Err(Failure::criu("the action script ended before its answer")),
    };
    let held = match held {
        Ok(_) if has_hung_up(script) => {
            Err(Failure::criu("the action script ended before its answer"))
        }
        held => held,
    };
    let watched = watched
        .await
        .unwrap_or_else(|e| Err(Failure::bug(e.to_string())));
    match held.and_then(|link| Ok((link, watched?))) {
        Ok((link, told)) => Ok(Some(Held {
            proxy: proxy.clone(),
            link,
            told,
            active: active.clone(),
        })),
        Err(reason) => {
            run.fail(reason.clone());
            Err(reason.of(format!(
                "snapshot {} of session {}",
                run.snapshot, session.name
            )))
        }
    }
}

/// What is dumped, and the CRIU that dumps it. What cannot be watched is not given the word to die.
fn watch(starter: i32, root: Option<i32>) -> Result<Told, Failure> {
    let tree = match root {
        Some(root) => DumpedTree::watch(root).map_err(|e| Failure::criu(e.to_string()))?,
        // Its numbers are of another pid namespace, or it names none: what it has stopped is what it dumps.
        None => ancestors(starter).find_map(DumpedTree::of_tracer).ok_or_else(|| {
            Failure::criu("CRIU does not say which process it dumps, and has none stopped that can be seen from here")
        })?,
    };
    // The process that has the tree stopped is the one that kills. Between it and our script there may be a shell.
    let tracer = tree.tracer();
    if let Some(tracer) = tracer.filter(|&tracer| !related(tracer, starter)) {
        let root = tree.root();
        return Err(Failure::criu(format!(
            "process {root} is held by process {tracer}, which has not started this script"
        )));
    }
    let pid = tracer.unwrap_or(starter);
    let gone = || Failure::criu(format!("CRIU (pid {pid}) has ended while its script runs"));
    let criu = Process::open(pid).ok_or_else(gone)?.with_status();
    Ok(Told {
        tree: Some(Arc::new(tree)),
        criu: Some(Arc::new(criu)),
    })
}

impl Held {
    pub fn run(&self) -> Arc<Run> {
        self.active.run.clone()
    }

    /// Tells the script, and when its process is dead the cache. Not to be cancelled.
    pub async fn conclude(self, script: &mut UnixStream) -> Result<(), ControlError> {
        let run = &self.active.run;
        let _concluding = self.proxy.concludes();
        // Before the answer can be read: from here on no failure may give the set up.
        if let Err(failure) = run.tell(self.told.clone()) {
            let reason = failure.text();
            return control::reply(script, &Answer::Failed { reason }).await;
        }
        let Active { run, session } = &self.active;
        // Before CRIU can go on, and until it is known what it did.
        let held_back = match (&self.told.criu, &self.told.tree) {
            (Some(criu), Some(tree)) => hold_back(criu, tree).await,
            _ => None,
        };
        let taken = match self.link.heard_during(self.told(script)).await {
            Ok(taken) => taken,
            Err(e) => {
                // CRIU takes the end of its script for a refusal: the process goes on.
                run.untold(Failure::criu(format!(
                    "the action script did not take the answer: {e}"
                )));
                return Err(e);
            }
        };
        tracing::info!(session = %session.name, snapshot = %run.snapshot, "committed");
        let killed = match taken {
            true => {
                let killed = self.killed(held_back.as_ref());
                self.link.heard_during(killed).await
            }
            false => Err(Failure::criu("CRIU has ended before its action script")),
        };
        drop(held_back);
        match killed {
            Ok(()) => {
                match self.commit().await {
                    Ok(()) => run.committed(),
                    Err(reason) => run.fail(reason),
                }
                self.proxy.killed(&self.active).await;
            }
            Err(reason) => {
                if run.state().failure().is_some() {
                    tracing::error!(session = %session.name, snapshot = %run.snapshot, "{}", reason.text());
                }
                run.fail(reason);
            }
        }
        Ok(())
    }

    /// Gives the answer, and waits until the script has read it and ended. `false`: CRIU ended first, so whether it
    /// heard of the answer is not known.
    async fn told(&self, script: &mut UnixStream) -> Result<bool, ControlError> {
        control::reply(script, &Answer::Done).await?;
        let mut byte = [0; 1];
        // A reset instead of an end: it was closed with the answer unread. For as long as it takes: a script that is
        // stopped may still go either way.
        tokio::select! {
            biased;
            read = script.read(&mut byte) => read?,
            () = exited(self.told.criu.as_deref()) => match script.try_read(&mut byte) {
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                read => read?,
            },
        };
        Ok(true)
    }

    /// Waits until CRIU has killed what it dumped, also when the link is lost meanwhile: the target is to hear what is
    /// known here. An error: CRIU has not killed, or it cannot be known.
    async fn killed(&self, held_back: Option<&HeldBack>) -> Result<(), Failure> {
        let Told { tree, criu } = &self.told;
        let (Some(criu), Some(tree)) = (criu, tree) else {
            return Err(Failure::criu(
                "CRIU, or what it dumps, cannot be seen from here",
            ));
        };
        killed(criu, tree, held_back).await
    }

    /// Tells the cache that the set may be restored.
    async fn commit(&self) -> Result<(), Failure> {
        let message = Message::Commit {
            set: self.active.run.set,
        };
        let sent = self.link.send_now(&message);
        let within = COMMITTED_WITHIN + self.link.patience();
        match tokio::time::timeout(within, sent).await {
            Ok(sent) => sent,
            Err(_) => {
                self.link.fail(Failure::link("the link hangs at COMMIT"));
                Err(self.link.why())
            }
        }
    }
}

/// What the cache says of the set, in time.
async fn verdict(
    session: &Arc<Session>,
    run: &Arc<Run>,
    dir: Option<OwnedFd>,
    on: cli::CommitOn,
    time: (tokio::time::Instant, Duration),
) -> Result<Arc<Link>, Failure> {
    in_time(run, time, hold(session, run, dir, on)).await
}

async fn in_time(
    run: &Run,
    (deadline, within): (tokio::time::Instant, Duration),
    held: impl Future<Output = Result<Arc<Link>, Failure>>,
) -> Result<Arc<Link>, Failure> {
    let held = tokio::time::timeout_at(deadline, held).await;
    held.unwrap_or_else(|_| Err(late(run.state().phase == Phase::Trial, within)))
}

/// Waits until the cache holds everything and says so; with a trial, until a restore of it stands there.
async fn hold(
    session: &Arc<Session>,
    run: &Arc<Run>,
    dir: Option<OwnedFd>,
    commit_on: cli::CommitOn,
) -> Result<Arc<Link>, Failure> {
    if let Some(dir) = dir.filter(|_| run.state().dialect.end() == SetEnd::Script) {
        let shipped = ship(session, run, &dir).await;
        let shipped = shipped.map_err(|e| Failure::criu("CRIU's images directory").caused_by(e))?;
        tracing::info!(session = %session.name, snapshot = %run.snapshot, shipped, "image files sent");
    }
    let link = session.link().await?;
    let trial = trial(&link, commit_on)?;
    link.awaited(everything_stored(run)).await?;
    let prepares = match trial {
        Some(on) => run.prepares_trial(on),
        None => run.prepares(),
    };
    link.send_now(&prepares).await?;
    let answered = async {
        let state = run.wait_for(|s| s.phase != Phase::Preparing).await;
        if state.phase == Phase::Trial {
            tracing::info!(
                session = %session.name, snapshot = %run.snapshot,
                "in trial: a restore on the target reads the set"
            );
        }
        run.wait_for(|s| !s.phase.waits_for_verdict()).await
    };
    let state = link.awaited(answered).await;
    if let Some(reason) = state.failure() {
        return Err(reason.clone());
    }
    match state.phase {
        Phase::Prepared if trial == Some(CommitOn::Restored) => Err(Failure::peer(format!(
            "image-cache at {} holds the set and has tried no restore, which --commit-on restored wants",
            link.peer
        ))),
        Phase::Prepared => Ok(link),
        Phase::Holding => {
            tracing::info!(
                session = %session.name, snapshot = %run.snapshot,
                "restored on the target and held; CRIU is told to kill"
            );
            Ok(link)
        }
        Phase::Refused(reason) => Err(reason),
        other => Err(Failure::bug(format!(
            "no answer to PREPARE, and the run is {other:?}"
        ))),
    }
}

async fn everything_stored(run: &Run) -> Result<(), Failure> {
    let begun = |s: &RunState| s.is_whole() || s.images.open > 0 || s.failure().is_some();
    if tokio::time::timeout(INVENTORY_WITHIN, run.wait_for(begun))
        .await
        .is_err()
    {
        return Err(Failure::criu(
            "inventory.img has not come: CRIU did not dump through image-proxy",
        ));
    }
    let state = run
        .wait_for(|s| s.is_stored() || s.failure().is_some())
        .await;
    state.failure().map_or(Ok(()), |reason| Err(reason.clone()))
}

#[cfg(test)]
mod tests;
