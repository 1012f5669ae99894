//! Did a restore succeed? CRIU hardly says, and the answer decides whether the only copy of a
//! process is given back, or given to another restore.
//!
//! Signs, each from CRIU's behaviour (`restore_root_task` in `cr-restore.c`):
//! - its action script at `post-resume`, and its exit status 0: the tasks run;
//! - its main process closes the `--stream` connection and goes on: it does that when it has detached
//!   from the tasks, and nowhere else. A CRIU that fails, or is killed, exits with the connection open;
//! - an exit status that is not 0: CRIU has killed what it had built;
//! - its action script has not come to `post-restore`: nothing that was built runs before that;
//! - the tasks: each asks for its own images, so they are known ([`super::restored_tasks`]).
//!
//! `pre-resume` is none: CRIU detaches from the tasks behind it, and kills them all if that fails.
//! What was not read proves nothing either against one of these: memory can come by other ways
//! (`--inherit-fd`), and an images directory can hold what no task needs.
//!
//! None of this rests on a clock. As long as it is not known, the set belongs to its restore.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use image_common::control::RestoreStep;
use image_common::image::{ImageName, INVENTORY};
use image_common::procfs::append_log;
use image_common::procfs::exit_status::ExitStatus;
use image_common::procfs::pidfd;
use image_common::procfs::process::{descends, peer_pid, related, Process};
use image_common::tasks;
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio_util::task::AbortOnDropHandle;

use crate::frontend::criu_log::{hint, last_error};
use crate::frontend::restored_tasks::{Stand, Task};
use crate::store::session::Session;
use crate::store::set::trial::Trial;
use crate::store::set::{Holds, Reader, RestoreId, Set};
use crate::store::Store;

/// How often tasks are looked at that are on their way: nothing tells when they arrive.
const FIRST_LOOK: Duration = Duration::from_millis(5);
const LAST_LOOK: Duration = Duration::from_secs(1);

/// How long the next restore waits for numbers that are taken by the dead.
const REAPED_WITHIN: Duration = Duration::from_secs(2);

/// When the log says that tasks are not on their way any more. Nothing else follows from it.
const SAID_AFTER: Duration = Duration::from_secs(3);

/// What one restore has done so far.
pub struct Restore {
    pub id: RestoreId,
    pub session: Arc<Session>,
    pub set: Arc<Set>,
    /// CRIU itself, if the kernel tells which process that is.
    criu: Option<Arc<Process>>,
    /// Its executable.
    executable: Option<PathBuf>,
    state: Mutex<RestoreState>,
    /// The script has come to `post-resume`.
    resumed: Notify,
    /// One conclusion at a time.
    concluding: AtomicBool,
    /// Waits for its CRIU's end, and ends with this.
    watch: OnceLock<AbortOnDropHandle<()>>,
    /// It was given its set before the source had committed that.
    tried: AtomicBool,
}

#[derive(Default)]
struct RestoreState {
    asked: HashSet<ImageName>,
    tasks: HashMap<i32, Task>,
    /// There are tasks that are not in there.
    unseen: bool,
    /// The last that its script said.
    step: Option<RestoreStep>,
    /// Its script was told to hold, and not to go on.
    asleep: bool,
    /// Whether it can stand still at `post-restore`.
    holds: Holds,
    /// CRIU's log. What follows a trial outlives the restore.
    log: Arc<Mutex<Option<Arc<File>>>>,
}

/// What the action script of a restore says of itself.
#[derive(Debug, Default)]
pub struct Script {
    /// It can hold.
    pub holds: bool,
    /// CRIU's log, open for reading.
    pub log: Option<File>,
}

/// What has come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// CRIU has closed the `--stream` connection, or died.
    Closed,
    /// The connection was broken off here.
    CutOff,
    /// CRIU has said FINISH, which builds before May 2020 do after a failure, too.
    Finished,
    /// CRIU has exited without a word.
    Exited,
}

/// How a restore ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Restored,
    /// It has not even read what it would restore.
    NotRead,
    /// Nothing of it runs, or ever will.
    Failed,
    Unknown,
}

/// Why there is no verdict yet, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Undecided {
    LeftWaiting,
    Unclear,
}

impl Restore {
    pub fn new(session: Arc<Session>, set: Arc<Set>, criu: Option<Process>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let criu = criu.map(Process::with_status).map(Arc::new);
        Arc::new(Self {
            id: RestoreId(NEXT.fetch_add(1, Ordering::Relaxed)),
            session,
            set,
            executable: criu.as_deref().and_then(Process::executable),
            criu,
            state: Mutex::default(),
            resumed: Notify::new(),
            concluding: AtomicBool::new(false),
            watch: OnceLock::new(),
            tried: AtomicBool::new(false),
        })
    }

    /// A restore that another image-cache has served, and that holds now: which tasks it has built is not known.
    pub fn held(session: Arc<Session>, set: Arc<Set>, criu: Option<Process>) -> Arc<Self> {
        let restore = Self::new(session, set, criu);
        let mut state = restore.state();
        state.step = Some(RestoreStep::PostRestore);
        state.asleep = true;
        state.unseen = true;
        let read = [INVENTORY, "pstree.img", "core-1.img"];
        state
            .asked
            .extend(read.iter().filter_map(|name| ImageName::new(name).ok()));
        drop(state);
        restore
    }

    /// Concludes when its CRIU has ended, if the kernel tells that.
    pub fn watch(self: &Arc<Self>, store: &Arc<Store>) {
        let Some(criu) = self.criu.clone() else {
            return;
        };
        let (restore, store) = (Arc::downgrade(self), store.clone());
        let watch = tokio::spawn(async move {
            criu.exited().await;
            if let Some(restore) = restore.upgrade() {
                restore.conclude(&store, End::Exited).await;
            }
            // It may have been all that holds a session that was dropped.
            store.session_changes.bump();
        });
        let _ = self.watch.set(AbortOnDropHandle::new(watch)); // once
    }

    /// Resolves when its CRIU has ended. A task of it may still hold the connection.
    pub async fn criu_ended(&self) {
        match &self.criu {
            Some(criu) => criu.exited().await,
            None => std::future::pending().await,
        }
    }

    pub fn is_watched(&self) -> bool {
        let watch = self.watch.get();
        watch.is_some_and(|watch| !watch.is_finished())
    }

    fn state(&self) -> MutexGuard<'_, RestoreState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn criu_pid(&self) -> Option<i32> {
        self.visible_criu().map(Process::pid)
    }

    /// CRIU, if it is in a pid namespace that we see into.
    fn visible_criu(&self) -> Option<&Process> {
        self.criu.as_deref().filter(|criu| criu.is_visible())
    }

    pub fn has_asked(&self, name: &ImageName) -> bool {
        self.state().asked.contains(name)
    }

    /// Its CRIU runs, so it may ask for more.
    pub fn goes_on(&self) -> bool {
        self.visible_criu().is_some_and(Process::has_memory)
    }

    /// The kernel tells when its CRIU ends.
    pub fn has_criu(&self) -> bool {
        self.criu.is_some()
    }

    /// Whether `pid` is its CRIU, or one of the tasks that this restores.
    pub fn is_of(&self, pid: Option<i32>) -> bool {
        pid.zip(self.criu_pid())
            .is_some_and(|(pid, criu)| related(pid, criu))
    }

    /// Whether its CRIU is the process at the other end.
    pub fn is_by(&self, peer: &Peer) -> bool {
        let Some(criu) = self.criu.as_ref().filter(|criu| !criu.has_exited()) else {
            return false;
        };
        let same = |pidfd: &OwnedFd| criu.is(pidfd.as_fd());
        (peer.pid.is_some() && peer.pid == self.criu_pid()) || peer.pidfd.as_ref().is_some_and(same)
    }

    /// No task has asked for anything, and none can have done so unseen.
    pub fn has_built_nothing(&self) -> bool {
        let state = self.state();
        self.visible_criu().is_some() && state.tasks.is_empty() && !state.unseen
    }

    /// `reader` asked for an image.
    pub fn asks(&self, name: &ImageName, reader: Option<i32>) {
        let mut state = self.state();
        state.asked.insert(name.clone());
        let criu = self.criu_pid();
        let Some(pid) = reader.filter(|&pid| pid > 0 && Some(pid) != criu) else {
            return;
        };
        if let std::collections::hash_map::Entry::Vacant(entry) = state.tasks.entry(pid) {
            match Task::open(pid) {
                Ok(task) => drop(task.map(|task| entry.insert(task))),
                Err(e) => {
                    tracing::error!(
                        pid,
                        "cannot read the state of a restored task, so it counts as alive: {e}"
                    );
                    state.unseen = true;
                }
            }
        }
    }

    /// It is over, and not known to have succeeded. `true` if that costs the set, which is
    /// said in the log.
    pub fn failed(&self) -> bool {
        let lost = self.set.is_lost_with(self.id);
        if lost {
            tracing::error!(
                session = %self.session.name, snapshot = %self.set.snapshot,
                "a restore that took the set's memory along (--release-on-read) is not known to have succeeded: the set is gone; \
                 unless what was restored runs, or its source still lives, the process is lost"
            );
        }
        lost
    }

    /// Its action script says that the tasks run.
    pub fn said_so(&self) -> bool {
        self.state().step == Some(RestoreStep::PostResume)
    }

    /// Its action script speaks.
    pub fn comes_to(&self, step: RestoreStep, script: Script) {
        let mut state = self.state();
        state.step = state.step.max(Some(step)); // CRIU runs a script twice that it was told of twice
        state.asleep &= step <= RestoreStep::PostRestore;
        if script.holds && self.criu.is_some() {
            state.holds = Holds::Promised;
        }
        if let Some(log) = script.log {
            let mut known = state.log.lock().unwrap_or_else(PoisonError::into_inner);
            // At `pre-stream` CRIU has not opened its log, and its script has other output.
            if step != RestoreStep::PreStream || known.is_none() {
                *known = Some(Arc::new(log));
            }
        }
        drop(state);
        if step == RestoreStep::PostResume {
            self.resumed.notify_one();
        }
    }

    /// By its command line its action script is image-cache.
    pub fn is_named_to_hold(&self) {
        if self.criu.is_some() {
            let mut state = self.state();
            state.holds = state.holds.max(Holds::Named);
        }
    }

    /// It was given its set before the source had committed that, so it has to hold.
    pub fn is_tried(&self) -> bool {
        self.tried.load(Ordering::Relaxed)
    }

    /// As which it asks for images.
    pub fn reader(&self) -> Reader {
        Reader {
            restore: Some(self.id),
            holds: self.state().holds,
        }
    }

    /// It was given a set before its source has committed that: when its CRIU ends, the trial is over, and the source hears why.
    pub fn follow_trial(self: &Arc<Self>) {
        let Some(criu) = self.criu.clone() else {
            return; // then it has not been given any
        };
        if self.tried.swap(true, Ordering::Relaxed) {
            return;
        }
        let (log, set, id) = (self.state().log.clone(), self.set.clone(), self.id);
        let follow = async move {
            let pid = criu.is_visible().then(|| criu.pid());
            let opened = tokio::task::spawn_blocking(move || pid.and_then(append_log::of_process));
            let early = opened.await.ok().flatten();
            criu.exited().await;
            if set.trial() == Trial::Decided {
                return;
            }
            let status = criu.exit_status().await;
            let how = match status {
                Some(status) => format!("CRIU has ended with {status}"),
                None => "CRIU has ended".to_owned(),
            };
            // Killed, CRIU has not said why.
            let said_why = status.is_none_or(|status| status.code().is_some());
            let read = move || {
                if !said_why {
                    return None;
                }
                let said = log.lock().unwrap_or_else(PoisonError::into_inner).take();
                let said = said.and_then(|log| last_error(&log));
                said.or_else(|| last_error(&early?))
            };
            let line = tokio::task::spawn_blocking(read);
            let why = match line.await.ok().flatten() {
                Some(line) => {
                    let hint = hint(&line).map(|hint| format!(" ({hint})"));
                    format!("{how}: {line}{}", hint.unwrap_or_default())
                }
                None => format!("{how}; its log on the target says why"),
            };
            set.trial_over(
                Some(id),
                &format!("the restore on the target failed: {why}"),
            );
        };
        let (set, broken) = (self.set.clone(), Some(self.id));
        tasks::spawn("following a trial", follow, move |why| {
            set.trial_over(broken, why);
        });
    }

    fn has_script(&self) -> bool {
        self.state().step.is_some()
    }

    /// Its action script speaks, and has not come so far that anything could run.
    fn is_unbuilt(&self) -> bool {
        let state = self.state();
        let before = matches!(
            state.step,
            Some(RestoreStep::PreStream | RestoreStep::PreRestore)
        );
        before || state.asleep
    }

    /// Whether its script holds: then nothing of it runs. To be said before the script is told.
    pub fn is_asleep(&self, asleep: bool) {
        self.state().asleep = asleep;
    }

    /// Whether it has read what no restore is without: what the tree is, and registers.
    fn has_read_tree(&self) -> bool {
        let state = self.state();
        let asked = |test: fn(&str) -> bool| state.asked.iter().any(|name| test(name.as_str()));
        asked(|name| name == INVENTORY)
            && asked(|name| name == "pstree.img")
            && asked(|name| name.starts_with("core-"))
    }

    fn has_read_all(&self) -> bool {
        self.set.restored_by(&self.state().asked)
    }

    fn stands(&self) -> Vec<(Task, Stand)> {
        let tasks: Vec<Task> = self.state().tasks.values().copied().collect();
        let look = |task: Task| (task, task.look(self.executable.as_deref()));
        tasks.into_iter().map(look).collect()
    }

    /// What became of it, when that is known. `say` is called once or twice if it takes long.
    async fn verdict(&self, end: End, say: &mut (dyn FnMut(Undecided, &[Task]) + Send)) -> Verdict {
        // Now or never: CRIU may exit at once.
        let goes_on = self.goes_on();
        if self.said_so() {
            return Verdict::Restored;
        }
        let end = match end {
            // CRIU closes the connection, or says FINISH, when it has detached from the tasks. Before the commit it cannot have.
            End::Closed | End::Finished if self.set.is_tried() => End::CutOff,
            end => end,
        };
        match end {
            End::Closed if goes_on && !self.has_exited() => {
                let tasks = !self.state().tasks.is_empty();
                return match self.has_read_all() || (tasks && self.has_read_tree()) {
                    true => Verdict::Restored,
                    false => Verdict::NotRead,
                };
            }
            // One that is a process alone is believed.
            End::Finished if self.has_built_nothing() && self.has_read_all() => {
                return Verdict::Restored;
            }
            End::Finished | End::CutOff if goes_on && !self.has_read_tree() => {
                return Verdict::NotRead;
            }
            _ => {}
        }
        let status = tokio::select! {
            () = self.resumed.notified() => return Verdict::Restored,
            // The tasks of one that has failed are killed, or about to be, which is seen.
            () = self.seen_to_run(), if end == End::Finished => return Verdict::Restored,
            status = self.exit() => status,
        };
        tracing::debug!(session = %self.session.name, ?status, "the CRIU of a restore has ended");
        if self.said_so() {
            return Verdict::Restored;
        }
        if !self.has_read_tree() {
            return Verdict::NotRead;
        }
        if status.is_some_and(ExitStatus::is_success) {
            return Verdict::Restored;
        }
        if self.visible_criu().is_none() {
            // What its tasks do is not seen.
            return match self.is_unbuilt() {
                true => Verdict::Failed,
                false => Verdict::Unknown,
            };
        }
        tokio::select! {
            () = self.resumed.notified() => Verdict::Restored,
            verdict = self.by_tasks(status, say) => verdict,
        }
    }

    fn has_exited(&self) -> bool {
        self.criu.as_deref().is_none_or(Process::has_exited)
    }

    /// Waits for CRIU's end.
    async fn exit(&self) -> Option<ExitStatus> {
        self.criu.as_ref()?.exit_status().await
    }

    /// Resolves when a task runs without CRIU.
    async fn seen_to_run(&self) {
        let mut pause = FIRST_LOOK;
        while !self.stands().iter().any(|(_, stand)| *stand == Stand::Runs) {
            tokio::time::sleep(pause).await;
            pause = LAST_LOOK.min(pause * 2);
        }
    }

    /// CRIU has ended, and not with success: the tasks tell.
    async fn by_tasks(
        &self,
        status: Option<ExitStatus>,
        say: &mut (dyn FnMut(Undecided, &[Task]) + Send),
    ) -> Verdict {
        // Nothing that was built, if anything was, can run; or CRIU has killed it.
        let unbuilt = self.is_unbuilt();
        let killed = status.and_then(ExitStatus::code).is_some();
        let known = status.is_some();
        let mut waited = false;
        let mut pause = FIRST_LOOK;
        let began = Instant::now();
        let mut said = HashSet::new();
        loop {
            let stands = self.stands();
            let none = stands.is_empty();
            if !unbuilt && stands.iter().any(|(_, stand)| *stand == Stand::Runs) {
                return Verdict::Restored;
            }
            let living: Vec<(Task, Stand)> = stands
                .into_iter()
                .filter(|(_, stand)| *stand != Stand::Ended)
                .collect();
            let Some(&(first, _)) = living.first() else {
                let unseen = self.state().unseen;
                let sure = unbuilt || killed || (!unseen && (waited || (none && known)));
                if sure || (!unseen && !self.has_read_all()) {
                    self.reaped().await;
                    return Verdict::Failed;
                }
                return Verdict::Unknown;
            };
            let wait = unbuilt || living.iter().all(|(_, stand)| *stand == Stand::Waits);
            waited |= wait;
            let undecided = match wait {
                true => Undecided::LeftWaiting,
                false => Undecided::Unclear,
            };
            // A CRIU that exits by itself has killed them, so they are ending.
            let late = began.elapsed() >= SAID_AFTER;
            if (late || (wait && !killed)) && said.insert(undecided as u8) {
                let tasks: Vec<Task> = living.iter().map(|&(task, _)| task).collect();
                say(undecided, &tasks);
            }
            tokio::select! {
                () = first.ended() => {}
                () = tokio::time::sleep(pause), if !wait || !late => {}
            }
            pause = LAST_LOOK.min(pause * 2);
        }
    }

    /// All tasks have ended: waits until the next restore can have their numbers. A parent that does not
    /// wait for them is its own matter.
    async fn reaped(&self) {
        let tasks: Vec<Task> = self.state().tasks.values().copied().collect();
        let all = async {
            while tasks.iter().any(Task::has_number) {
                tokio::time::sleep(FIRST_LOOK).await;
            }
        };
        let _ = tokio::time::timeout(REAPED_WITHIN, all).await;
    }

    /// Follows what becomes of it, and does with its set what follows from that.
    pub async fn conclude(&self, store: &Arc<Store>, end: End) -> Option<Verdict> {
        if self.concluding.swap(true, Ordering::AcqRel) {
            return None;
        }
        let (session, set) = (&self.session, &self.set);
        let mut say = |undecided, tasks: &[Task]| self.say(undecided, tasks);
        let verdict = tokio::select! {
            verdict = self.verdict(end, &mut say) => Some(verdict),
            // No restore settles a set that an operator has dropped.
            () = gone(store, session) => None,
        };
        match verdict {
            Some(Verdict::Restored) => {
                if store.keeps() {
                    // One that was tried had the set for itself.
                    set.settle(self.id, false);
                } else if !set.settle(self.id, true) {
                    tracing::error!(session = %session.name, snapshot = %set.snapshot,
                        "a restore that was in doubt has succeeded: its process runs here. If the set was restored once more meanwhile, end that one");
                }
                store.restored(session);
            }
            Some(_) if self.failed() => {}
            Some(Verdict::NotRead) => {
                tracing::info!(session = %session.name, "a reader left before it had read what a restore needs; the set is kept");
                set.settle(self.id, false);
            }
            Some(Verdict::Failed) => {
                tracing::warn!(session = %session.name, snapshot = %set.snapshot,
                    "the restore failed, and nothing of it runs: CRIU's log says why. The set is kept and can be restored again");
                set.settle(self.id, false);
            }
            Some(Verdict::Unknown) => self.doubt(store),
            None => {}
        }
        self.concluding.store(false, Ordering::Release);
        verdict
    }

    /// Nothing tells what became of it, and nothing will.
    pub fn doubt(&self, store: &Store) {
        let (session, set) = (&self.session, &self.set);
        let advice = match self.has_script() {
            true => "",
            false => " (`criu restore --action-script image-cache` makes it known)",
        };
        if store.keeps() {
            tracing::warn!(session = %session.name, snapshot = %set.snapshot,
                "whether a restore succeeded is not known{advice}; the set is kept (--keep)");
        } else if set.doubt_restore(self.id) {
            tracing::error!(session = %session.name, snapshot = %set.snapshot,
                "in doubt: whether the restore succeeded is not known{advice}, so the set is kept and not served. Look at the process here: \
                 if it runs, run `image-cache drop {0}`; if not, end what is left of it, and run `image-cache release {0}` to restore it again",
                session.id);
        }
    }

    fn say(&self, undecided: Undecided, tasks: &[Task]) {
        let (session, snapshot) = (&self.session.name, &self.set.snapshot);
        let mut pids: Vec<i32> = tasks.iter().map(|task| task.pid).collect();
        pids.sort_unstable();
        pids.truncate(16); // enough to look
        match undecided {
            Undecided::LeftWaiting => {
                self.set.is_left(self.id);
                tracing::warn!(%session, %snapshot, ?pids,
                    "CRIU ended in the middle of a restore, and tasks are left that wait for it for ever, so the set is kept. \
                     End them (kill -9); then it can be restored again");
            }
            Undecided::Unclear => {
                self.set.is_left(self.id);
                tracing::warn!(%session, %snapshot, ?pids,
                    "CRIU ended in a restore, and it is not seen whether its tasks run, so the set is kept and not served. \
                     If they run, run `image-cache drop {}`; if not, end them (kill -9)", self.session.id);
            }
        }
    }
}

impl Drop for Restore {
    /// A fault of ours may end it without a verdict: then an operator decides, and the set is not held for ever.
    fn drop(&mut self) {
        let dropped = self.session.removed.load(Ordering::Acquire);
        if !dropped && self.set.abandoned_by(self.id) {
            tracing::error!(session = %self.session.name, id = %self.session.id, snapshot = %self.set.snapshot,
                "in doubt: nothing follows what became of a restore any more, so the set is kept and not served. Look at the process \
                 here: if it runs, run `image-cache drop {0}`; if not, run `image-cache release {0}` to restore it again", self.session.id);
        }
    }
}

/// Resolves when the session is not in the store any more.
async fn gone(store: &Store, session: &Session) {
    let mut changes = store.session_changes.subscribe();
    while store.holds(session) {
        // The sender lives in the store, so this only returns for a change.
        let _ = changes.changed().await;
    }
}

/// A process as the kernel names it: by its number where that is seen, and by a pidfd.
#[derive(Debug, Default)]
pub struct Peer {
    pub pid: Option<i32>,
    pub pidfd: Option<OwnedFd>,
}

impl Peer {
    pub fn of(stream: &UnixStream) -> Self {
        Self {
            pid: peer_pid(stream),
            pidfd: pidfd::of_peer(stream).ok(),
        }
    }
}

/// The restores under way: a script carries no name. Weak, so that one which never says how it
/// ended holds no memory.
#[derive(Default)]
pub struct Restores {
    under_way: Mutex<Vec<Weak<Restore>>>,
    /// CRIUs whose script has spoken before they connected.
    announced: Mutex<Vec<Announced>>,
}

/// A CRIU whose script has spoken before it connected.
struct Announced {
    criu: Process,
    holds: bool,
}

impl Announced {
    fn is(&self, peer: &Peer) -> bool {
        // Its number may be that of another process by now.
        let same = (self.criu.is_visible() && Some(self.criu.pid()) == peer.pid)
            || (peer.pidfd.as_ref()).is_some_and(|fd| self.criu.is(fd.as_fd()));
        same && !self.criu.has_exited()
    }
}

/// A script that belongs to no restore.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("no restore of CRIU {0} reads from here: it has neither --stream nor --remote, or another -D than this image-cache; or it is in another pid namespace, which Linux tells from 6.9 on")]
pub struct NoRestore(pub i32);

impl Restores {
    fn under_way(&self) -> MutexGuard<'_, Vec<Weak<Restore>>> {
        self.under_way
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn announced(&self) -> MutexGuard<'_, Vec<Announced>> {
        self.announced
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note(&self, restore: &Arc<Restore>, peer: &Peer) {
        let mut announced = self.announced();
        announced.retain(|known| !known.criu.has_exited());
        if let Some(known) = announced.iter().find(|known| known.is(peer)) {
            let holds = known.holds;
            restore.comes_to(RestoreStep::PreStream, Script { holds, log: None });
        }
        drop(announced);
        let mut under_way = self.under_way();
        under_way.retain(|r| r.strong_count() > 0);
        under_way.push(Arc::downgrade(restore));
    }

    /// Whether the script of this CRIU has said that it can hold.
    pub fn holds(&self, criu: &Peer) -> Holds {
        let announced = self.announced();
        let promised = announced.iter().any(|known| known.holds && known.is(criu));
        match promised {
            true => Holds::Promised,
            false => Holds::No,
        }
    }

    /// The restore of this CRIU that has the set.
    pub fn of_set(&self, set: &Set, criu: &Peer) -> Option<Arc<Restore>> {
        let under_way = self.under_way();
        let mut restores = under_way.iter().filter_map(Weak::upgrade);
        restores.find(|r| std::ptr::eq(&*r.set, set) && r.is_by(criu))
    }

    /// How many are over and have no verdict yet, e.g. because their CRIU has not ended.
    pub fn undecided(&self) -> usize {
        let under_way = self.under_way();
        let restores = under_way.iter().filter_map(Weak::upgrade);
        restores
            .filter(|r| r.concluding.load(Ordering::Acquire))
            .count()
    }

    /// The script of `criu` speaks, which says that its number is `said`.
    /// Gives the restore that this is about.
    pub fn speaks(
        &self,
        criu: Peer,
        said: i32,
        step: RestoreStep,
        script: Script,
    ) -> Result<Option<Arc<Restore>>, NoRestore> {
        let restores: Vec<Arc<Restore>> = {
            let under_way = self.under_way();
            under_way.iter().rev().filter_map(Weak::upgrade).collect()
        };
        let own = restores.iter().find(|r| r.is_by(&criu));
        // A shell may stand between them.
        let behind = |r: &&Arc<Restore>| {
            let both = criu.pid.zip(r.criu_pid()).filter(|_| r.goes_on());
            both.is_some_and(|(script, criu)| descends(script, criu))
        };
        let own = own.or_else(|| restores.iter().find(behind));
        match (own, step) {
            (Some(restore), _) => restore.comes_to(step, script),
            (None, RestoreStep::PreStream) => {
                let process = match (criu.pid, criu.pidfd) {
                    (Some(pid), _) => Process::open(pid),
                    (None, Some(pidfd)) => Process::of_pidfd(0, pidfd),
                    (None, None) => None,
                };
                let mut announced = self.announced();
                announced.retain(|known| !known.criu.has_exited());
                announced.extend(process.map(|criu| Announced {
                    criu,
                    holds: script.holds,
                }));
            }
            // The set has been released.
            (None, RestoreStep::PostResume) => {}
            (None, _) => return Err(NoRestore(said)),
        }
        Ok(own.cloned())
    }
}
