//! The commit: what CRIU's action script asks for at post-dump, when the tasks are frozen.
//!
//! 1. The cache holds every image (COMMIT, COMMITTED). Until here any failure fails the dump,
//!    and the process goes on.
//! 2. The script is told, and it has taken the answer: now CRIU kills the tasks. Whatever fails
//!    from here on leaves the set in doubt, never served and never dropped by itself.
//! 3. The process is dead: CONFIRM. The set may be restored.
//!
//! So nothing can be restored while its process may still run, whoever dies in between. What
//! each of them knows then is in `docs/commit.md`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::control::{self, Answer, ControlError};
use image_common::fdpass::{has_hung_up, hung_up};
use image_common::link::codec::{Dialect, Message};
use image_common::process::Process;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::link::Link;
use crate::proxy::{Active, Proxy, RunError};
use crate::run::{Commit, Run, State, Told};
use crate::session::Session;
use crate::ship::ship;

/// CRIU connected before it ran the script, so its connection is at most waiting for us.
const CONNECTED_WITHIN: Duration = Duration::from_millis(500);

/// At post-dump all images are closed; if the inventory is not even begun by then, no more
/// comes. (A CRIU that is configured with the script and dumps somewhere else.)
const INVENTORY_WITHIN: Duration = Duration::from_secs(5);

/// How long a script may take to read its answer and exit, which is all that it has to do.
const TAKEN_WITHIN: Duration = Duration::from_secs(5);

/// After the end of what seemed to be CRIU, how long the kill may still take.
pub const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// How long the link may take for the last message, while it is whole.
const CONFIRMED_WITHIN: Duration = Duration::from_secs(4);

/// Who asks.
pub struct Asked {
    /// CRIU.
    pub pid: i32,
    /// The same if the kernel tells it: the script's word may be of another pid namespace, where
    /// that number is somebody else.
    pub seen: Option<i32>,
    /// The root of the tree that it dumps, if the script knows it and means the same by it.
    pub root: Option<i32>,
    pub deadline: tokio::time::Instant,
    pub within: Duration,
}

/// The cache holds the set, and nobody was told yet.
pub struct Held {
    active: Active,
    link: Arc<Link>,
    told: Told,
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

/// Brings the cache to hold the set: the verdict on which the kill depends. CRIU waits, the
/// tasks are frozen. `script` is the connection of the action script: if that is gone, CRIU
/// goes on without our verdict.
pub async fn commit(
    proxy: &Arc<Proxy>,
    script: &UnixStream,
    asked: Asked,
    dir: Option<OwnedFd>,
) -> Result<Held, String> {
    let (deadline, within) = (asked.deadline, asked.within);
    let late = || format!("not committed within {within:?}");
    let gated = |run: &Run| run.state().gated && run.state().commit == Commit::No;
    let active = match proxy.run_of_files(asked.pid) {
        Some(active) => active,
        None => tokio::time::timeout_at(deadline, find(proxy, asked.pid, gated))
            .await
            .unwrap_or_else(|_| Err(late()))?,
    };
    let Active { run, session } = &active;
    // Until the cache holds the set, anything may stop this.
    let held = tokio::select! {
        held = tokio::time::timeout_at(deadline, hold(session, run, dir)) => {
            held.unwrap_or_else(|_| Err(late()))
        }
        () = hung_up(script) => Err("the action script is gone".to_owned()),
    };
    let held = match held {
        Ok(_) if has_hung_up(script) => Err("the action script is gone".to_owned()),
        held => held,
    };
    // It is frozen, so it is there; what cannot be watched now is not given the word to die.
    let root = match asked.root.map(|pid| (pid, Process::open(pid))) {
        Some((pid, None)) => Err(format!("process {pid} cannot be watched")),
        Some((_, root)) => Ok(root),
        None => Ok(None),
    };
    match held.and_then(|link| Ok((link, root?))) {
        Ok((link, root)) => Ok(Held {
            link,
            told: Told {
                root: root.map(Arc::new),
                criu: asked.seen.and_then(Process::open).map(Arc::new),
            },
            active: active.clone(),
        }),
        Err(reason) => {
            run.fail(&reason);
            Err(format!(
                "snapshot {} of session {}: {reason}",
                run.snapshot, session.name
            ))
        }
    }
}

impl Held {
    pub fn run(&self) -> Arc<Run> {
        self.active.run.clone()
    }

    /// Tells the script, and when its process is dead the cache. Not to be cancelled.
    pub async fn conclude(self, script: &mut UnixStream) -> Result<(), ControlError> {
        let run = &self.active.run;
        // Before the answer can be read: from here on no failure may give the set up.
        if let Err(reason) = run.tell(self.told.clone()) {
            return control::reply(script, &Answer::Failed { reason }).await;
        }
        let read = match self.link.heard_during(self.told(script)).await {
            Ok(read) => read,
            Err(e) => {
                // CRIU takes the end of its script for a refusal: the process goes on.
                run.untold(&format!("the action script did not take the answer: {e}"));
                return Err(e);
            }
        };
        let Active { run, session } = &self.active;
        tracing::info!(session = %session.name, snapshot = %run.snapshot, "committed");
        let died = match self.told.root.is_some() || read {
            true => self.link.heard_during(self.process_died()).await,
            false => Err("the action script has its answer and does not end".to_owned()),
        };
        let confirmed = match died {
            Ok(()) => self.confirm().await,
            Err(reason) => Err(reason),
        };
        match confirmed {
            Ok(()) => run.commit(Commit::Confirmed),
            Err(reason) => run.fail(&reason),
        }
        Ok(())
    }

    /// Gives the answer, and waits until the script has read it. `false`: it has the answer
    /// before it and does not end, so what it will do is not known.
    async fn told(&self, script: &mut UnixStream) -> Result<bool, ControlError> {
        control::reply(script, &Answer::Done).await?;
        // A reset instead of an end: it was closed with the answer unread.
        match tokio::time::timeout(TAKEN_WITHIN, script.read(&mut [0; 1])).await {
            Ok(read) => Ok(read.map(|_| true)?),
            Err(_) => Ok(false),
        }
    }

    /// Waits until CRIU has killed the process. An error: it has not, or it cannot be known.
    async fn process_died(&self) -> Result<(), String> {
        let run = &self.active.run;
        let Some(root) = &self.told.root else {
            // Told to die is all that can be known: CRIU is in another pid namespace, or an old
            // one that does not name the process.
            return Ok(());
        };
        let criu_ended = async {
            match &self.told.criu {
                Some(criu) => criu.exited().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = root.exited() => return Ok(()),
            () = criu_ended => {}
            _ = run.wait_for(|s| s.failure().is_some()) => {
                let state = run.state();
                return Err(state.failure().unwrap_or("the link is lost").to_owned());
            }
        }
        // What CRIU kills is dead before it exits; but it may be a shell around the script that
        // has ended, and CRIU itself is about to kill.
        match tokio::time::timeout(KILLED_WITHIN, root.exited()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(format!(
                "CRIU ended and process {} is still there: it was not killed",
                root.pid()
            )),
        }
    }

    /// Tells the cache that the set may be restored.
    async fn confirm(&self) -> Result<(), String> {
        let confirm = Message::Confirm {
            set: self.active.run.set,
        };
        let sent = self.link.send_now(&confirm);
        let within = CONFIRMED_WITHIN + self.link.patience();
        match tokio::time::timeout(within, sent).await {
            Ok(sent) => sent,
            Err(_) => {
                self.link.fail("the link hangs at the confirmation");
                Err(self.link.why())
            }
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
    let link = session.link().await?;
    link.awaited(everything_stored(run)).await?;
    run.commit(Commit::Asked);
    let State {
        images,
        bytes,
        digest,
        ..
    } = run.state();
    link.send_now(&Message::Commit {
        set: run.set,
        images,
        bytes,
        digest,
    })
    .await?;
    let answered = |s: &State| s.commit != Commit::Asked || s.failure().is_some();
    let state = link.awaited(run.wait_for(answered)).await;
    if let Some(reason) = state.failure() {
        return Err(reason.to_owned());
    }
    match state.commit {
        Commit::Refused(reason) => Err(reason),
        _ => Ok(link),
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
