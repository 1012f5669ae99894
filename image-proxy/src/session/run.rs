//! One CRIU run, and the set it writes.
//!
//! The state is changed by the frontends (an image begins, CRIU is
//! gone), the senders (an image ended), the link (acknowledgements, answers), the control
//! socket (gate, commit). What follows from it is decided in one place, [`RunState::next_step`],
//! and done by one task, [`crate::session::drive::drive`].

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image_common::control::status;
use image_common::criu::dialect::Dialect;
use image_common::criu::inventory::SetKind;
use image_common::criu::options::FinalState;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::{CommitOn, Message, SetNumber};
use image_common::procfs::dumped::DumpedTree;
use image_common::procfs::process::{related, Process};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::failure::Failure;
use crate::link::answers::SetAnswers;
use crate::session::evidence::{end_of, Dumped};
use crate::session::phase::{Ended, Event, Phase};
use crate::session::state::{Complete, Dumper, Gate, Images, RunState};
use crate::transfer::source::Source;

/// Images of a run that wait for their end before its next one is taken from CRIU. Each is a task,
/// a descriptor and a pipe, and CRIU opens small ones faster than a link takes them: 10,000 of them
/// were 20 MiB. CRIU itself keeps some twenty open at once.
const OPEN_IMAGES: u32 = 256;

/// How long nothing may end before the next image is taken all the same: a CRIU that keeps more open than
/// any known one must not wait for ever.
const PATIENCE: Duration = Duration::from_millis(50);

/// The processes that the answer to the commit is about, as far as they can be watched from here.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// What CRIU kills.
    pub tree: Option<Arc<DumpedTree>>,
    /// The process that has the tree stopped; else the one that ran the script.
    pub criu: Option<Arc<Process>>,
}

/// The pages of a run without script, which are copied out of CRIU's pipes.
#[derive(Debug, Default)]
struct Copied {
    /// Images.
    under_way: u32,
    /// There was one. Those of a socket are not copied.
    any: bool,
    /// The tasks were seen stopped when all had been copied.
    frozen: bool,
}

pub struct Run {
    pub set: SetNumber,
    pub snapshot: SnapshotId,
    /// The process that connected or pushed. `None`: it cannot be seen from here.
    pub pid: Option<i32>,
    /// The same, held as long as it matters what becomes of it.
    criu: Mutex<Option<Arc<Process>>>,
    told: Mutex<Told>,
    /// Of a run without script: what its CRIU has stopped. `None`: not looked for yet.
    dumped: watch::Sender<Option<Dumped>>,
    looks: AtomicBool,
    copied: Mutex<Copied>,
    /// What CRIU does with the tasks behind its dump, by its options.
    after: Mutex<FinalState>,
    state: watch::Sender<RunState>,
    /// Images stop being taken from CRIU.
    stop: CancellationToken,
    /// The last write of each name; cancelled when it is over.
    writes: Mutex<HashMap<ImageName, CancellationToken>>,
}

/// What the cache says of the set.
impl SetAnswers for Run {
    fn image_acknowledged(&self) {
        self.change(|s| s.images.acknowledged += 1);
    }

    fn stored(&self, kind: SetKind) {
        self.change(|s| s.complete.stored(kind));
    }

    fn gate_answered(&self) {
        self.change(|s| {
            // Of a run without script the cache was told to hold the set back, and no script waits.
            if s.is_gated() {
                s.gate = Gate::Answered;
            }
        });
    }

    fn prepare_answered(&self, answer: Result<(), Failure>) {
        if answer.is_err() {
            self.change(|s| s.may_be_held = false);
        }
        self.on(match answer {
            Ok(()) => Event::Prepared,
            Err(reason) => Event::Refused(reason),
        });
    }

    fn in_trial(&self) {
        self.on(Event::Trial);
    }

    fn holding(&self) {
        self.on(Event::Holding);
    }

    fn trial_failed(&self, reason: Failure) {
        if self.on(Event::TrialFailed(reason.clone())) {
            return self.stop.cancel();
        }
        // One that has failed or ended needs no second reason.
        if self.state.borrow().phase.was_told() {
            let snapshot = &self.snapshot;
            tracing::warn!(
                %snapshot,
                "{}; CRIU was told to kill before that. The target keeps the set, and another `criu restore` gets it \
                 when the process is dead here",
                reason.text()
            );
        }
    }

    fn fail(&self, failure: Failure) {
        Run::fail(self, failure);
    }
}

/// The place of an image among the writes of its name: the later one is the one that counts,
/// and an append needs what it continues.
pub struct Turn {
    earlier: Option<CancellationToken>,
    _own: DropGuard,
}

impl Turn {
    /// Waits until the earlier write of this name is over.
    pub async fn comes(&self) {
        if let Some(earlier) = &self.earlier {
            earlier.cancelled().await;
        }
    }
}

impl Run {
    pub fn new(
        set: SetNumber,
        snapshot: SnapshotId,
        dialect: Dialect,
        gated: bool,
        pid: Option<i32>,
        criu: Option<Arc<Process>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            set,
            snapshot,
            pid,
            criu: Mutex::new(criu),
            told: Mutex::default(),
            dumped: watch::Sender::new(None),
            looks: AtomicBool::new(false),
            copied: Mutex::default(),
            after: Mutex::default(),
            state: watch::Sender::new(RunState::new(dialect, gated)),
            stop: CancellationToken::new(),
            writes: Mutex::default(),
        })
    }

    pub fn state(&self) -> RunState {
        self.state.borrow().clone()
    }

    /// Waits until the state is as wanted, and gives it. Cancel safe.
    pub async fn wait_for(&self, wanted: impl FnMut(&RunState) -> bool) -> RunState {
        let mut states = self.state.subscribe();
        let state = states.wait_for(wanted).await;
        // The sender is in `self`, so it cannot be gone.
        state.map_or_else(|_| self.state(), |s| s.clone())
    }

    fn change(&self, change: impl FnOnce(&mut RunState)) {
        self.state.send_modify(change);
    }

    /// Moves the run to its next phase. `false`: the event changes nothing in this phase.
    fn on(&self, event: Event) -> bool {
        self.state.send_if_modified(|s| {
            let next = s.phase.after(event);
            let news = next.is_some();
            if let Some(next) = next {
                s.phase = next;
            }
            news
        })
    }

    pub fn is_criu(&self, pid: i32) -> bool {
        self.pid == Some(pid)
    }

    pub fn status(&self) -> status::Set {
        self.state.borrow().status(&self.snapshot)
    }

    pub fn criu(&self) -> Option<Arc<Process>> {
        self.criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The process exists and runs, as far as can be seen: one with a pid that could not be
    /// held has exited already.
    pub fn criu_may_live(&self) -> bool {
        self.criu().map_or(self.pid.is_none(), |c| c.has_memory())
    }

    /// Announced by its script, and no image has come.
    pub fn is_announced_alone(&self) -> bool {
        let state = self.state.borrow();
        state.phase == Phase::Sending && state.is_gated() && state.is_empty()
    }

    /// Images still belong to the set: it has not failed, and its commit was not asked for.
    pub fn takes_images(&self) -> bool {
        let phase = &self.state.borrow().phase;
        matches!(
            phase,
            Phase::Sending
                | Phase::Judged {
                    prepared: false,
                    ..
                }
        )
    }

    pub fn is_active(&self) -> bool {
        self.state.borrow().phase.is_active()
    }

    // --- what the frontends and senders report ------------------------------------------

    /// Gives the image's place among the writes of its name.
    pub fn image_begins(self: &Arc<Self>, name: &ImageName) -> Turn {
        self.change(|s| s.images.open += 1);
        // The one image that comes before the tasks are frozen.
        if name.as_str() != "cpuinfo.img" {
            self.look_for_tasks();
        }
        let own = CancellationToken::new();
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let earlier = writes.insert(name.clone(), own.clone());
        // Names whose write is over need not be remembered; sweep when there are many.
        if writes.len() > 1024 && writes.len().is_power_of_two() {
            writes.retain(|_, over| !over.is_cancelled());
        }
        Turn {
            earlier,
            _own: own.drop_guard(),
        }
    }

    /// Waits until another image may be taken from CRIU.
    pub async fn has_room(&self) {
        let mut open = self.state.borrow().images.open;
        while open >= OPEN_IMAGES {
            // Half of it: the tasks that end them then run without us in between.
            let room = self.wait_for(|s| s.images.open <= OPEN_IMAGES / 2);
            let _ = tokio::time::timeout(PATIENCE, room).await;
            let now = self.state.borrow().images.open;
            if now >= open {
                return;
            }
            open = now;
        }
    }

    /// The image's end was sent. With its digest, if the link has checksums.
    pub fn image_ended(&self, name: &ImageName, bytes: u64, digest: Option<u32>) {
        self.change(|s| s.images.sent(name, bytes, digest));
    }

    /// The image was not sent, and is no part of the set.
    pub fn image_dropped(&self) {
        self.change(|s| s.images.open = s.images.open.saturating_sub(1));
    }

    /// Gives `true` if this is news.
    pub fn uses_dialect(&self, dialect: Dialect) -> bool {
        self.state
            .send_if_modified(|s| std::mem::replace(&mut s.dialect, dialect) != dialect)
    }

    pub fn source_ended(&self) {
        self.change(|s| {
            if s.dumper == Dumper::Writes {
                s.dumper = Dumper::Gone;
            }
        });
    }

    /// What CRIU's options say of the tasks behind the dump.
    pub fn after_dump(&self, state: FinalState) {
        *self.after.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn after(&self) -> FinalState {
        *self.after.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without script, the tasks are what CRIU has stopped: found aside, while it writes.
    fn look_for_tasks(self: &Arc<Self>) {
        if self.state.borrow().is_gated() || self.looks.swap(true, Ordering::Relaxed) {
            return;
        }
        let run = self.clone();
        tokio::task::spawn_blocking(move || {
            let dumped = run.criu().map(|criu| Dumped::look(&criu));
            run.dumped.send_replace(Some(dumped.unwrap_or_default()));
            run.look_if_frozen();
        });
    }

    /// An image that comes through CRIU's pipe. Without script its pages are copied, unless CRIU's options say that it
    /// kills: else it may let the tasks go when its last byte is in the pipe.
    pub fn source(self: &Arc<Self>, name: &ImageName, pipe: OwnedFd) -> io::Result<Source> {
        let killed = self.state.borrow().is_gated() || self.after() == FinalState::Killed;
        if killed || !name.is_pages() {
            return Source::from_pipe(pipe);
        }
        {
            let mut copied = self.copied();
            (copied.under_way, copied.frozen) = (copied.under_way + 1, false);
            copied.any = true;
        }
        let (run, failing, image) = (self.clone(), self.clone(), name.clone());
        let taken = move || {
            run.copied().under_way -= 1;
            run.look_if_frozen();
        };
        Source::copied(pipe, taken, move |e| {
            failing.fail(Failure::bug(format!("image {image}: copying its pages")).caused_by(e))
        })
    }

    fn copied(&self) -> MutexGuard<'_, Copied> {
        self.copied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is frozen now has been from the first page on.
    fn look_if_frozen(&self) {
        let dumped = self.dumped.borrow().clone().unwrap_or_default();
        let mut copied = self.copied();
        if copied.any && copied.under_way == 0 {
            copied.frozen |= dumped.tree.is_some_and(|tree| tree.tracer().is_some());
        }
    }

    /// Waits for the end of a CRIU without script, and takes note of it.
    pub async fn judge(&self) {
        let mut looked = self.dumped.subscribe();
        let dumped = match self.looks.load(Ordering::Relaxed) {
            true => tokio::select! {
                looked = looked.wait_for(Option::is_some) => looked.ok().and_then(|d| d.clone()),
                _ = self.wait_for(|s| s.failure().is_some()) => return,
            },
            false => None,
        };
        let (criu, mut dumped) = (self.criu(), dumped.unwrap_or_default());
        dumped.copied_frozen = self.copied().frozen;
        dumped.after = self.after();
        dumped.remote = self.state.borrow().dialect.is_remote();
        let end = tokio::select! {
            end = end_of(criu.as_deref(), &dumped) => end,
            _ = self.wait_for(|s| s.failure().is_some()) => return,
        };
        let tree = dumped.tree;
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Told { tree, criu };
        self.on(Event::Judged(end));
    }

    pub fn finish(&self) {
        self.change(|s| s.dumper = Dumper::Finished);
    }

    pub fn followed(&self) {
        self.change(|s| s.followed = true);
    }

    pub fn opened(&self) {
        self.change(|s| s.opened = true);
    }

    /// A connection to the page server begins to send pages.
    pub fn round_begins(&self) {
        self.change(|s| s.rounds.open += 1);
    }

    pub fn round_ended(&self, merged: bool) {
        self.change(|s| {
            s.rounds.open -= 1;
            s.rounds.merged += u32::from(merged);
        });
    }

    // --- gate and commit ----------------------------------------------------------------

    /// The script has announced the dump.
    pub fn gate(&self) {
        self.change(|s| {
            if !s.is_gated() {
                s.gate = Gate::Asked;
            }
        });
    }

    fn asks_to_hold(&self) -> Images {
        self.on(Event::Prepare);
        self.change(|s| s.may_be_held = true);
        self.state.borrow().images
    }

    /// PREPARE is being sent; gives what it says of the set.
    pub fn prepares(&self) -> Message {
        let images = self.asks_to_hold();
        Message::Prepare {
            set: self.set,
            images: images.sent,
            bytes: images.bytes,
            digest: images.digest,
        }
    }

    /// The same for PREPARE_TRIAL.
    pub fn prepares_trial(&self, on: CommitOn) -> Message {
        let images = self.asks_to_hold();
        Message::PrepareTrial {
            set: self.set,
            images: images.sent,
            bytes: images.bytes,
            digest: images.digest,
            on,
        }
    }

    /// CRIU is being told, from now on: a failure does not give the set up any more. `Err`: it
    /// has failed before.
    pub fn tell(&self, told: Told) -> Result<(), Failure> {
        if self.on(Event::Tell) {
            *self.told.lock().unwrap_or_else(PoisonError::into_inner) = told;
            return Ok(());
        }
        let failure = self.state.borrow().failure().cloned();
        Err(failure.unwrap_or_else(|| Failure::peer("image-cache does not hold the set")))
    }

    /// Whether this CRIU was told that it may kill the tree of `root`, and may do so still.
    pub fn was_told(&self, criu: i32, root: Option<i32>) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |c: &Arc<Process>| !c.has_exited() && related(c.pid(), criu);
        let tree = told.tree.as_ref().map(|tree| tree.root());
        let state = self.state.borrow();
        let told = told.criu.as_ref().is_some_and(same) && tree == root;
        told && state.phase == Phase::Told
    }

    /// The processes that were told, to decide what becomes of the set.
    pub fn take_told(&self) -> Told {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The script is gone without its answer, so CRIU was not told.
    pub fn untold(&self, reason: Failure) {
        self.on(Event::Untold(reason));
        self.stop.cancel();
    }

    /// CRIU has killed what it dumped, and the cache knows.
    pub fn committed(&self) {
        self.on(Event::Commit);
    }

    // --- the driver ---------------------------------------------------------------------

    /// The cache is being told "complete"; its earlier answer, if any, is out of date.
    pub fn asks_complete(&self) -> (u32, u64) {
        let mut counts = (0, 0);
        self.change(|s| {
            counts = (s.images.sent, s.images.bytes);
            s.complete = Complete::Asked(s.images.sent);
        });
        counts
    }

    /// Nothing of this run can be saved any more. The first reason is the one that counts.
    pub fn fail(&self, reason: Failure) {
        self.on(Event::Fail(reason));
        self.stop.cancel();
    }

    pub fn end(&self, ended: Ended) {
        match ended {
            // Without script CRIU was not told, but what CRIU does counts all the same.
            Ended::InDoubt(_) => {
                let dumped = self.dumped.borrow().clone().unwrap_or_default();
                let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.criu = told.criu.take().or(self.criu());
                told.tree = told.tree.take().or(dumped.tree);
            }
            _ => drop(self.take_told()),
        }
        self.on(Event::End(ended));
        self.stop.cancel();
        // Ended runs are remembered for a while, their processes need not be.
        self.criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    pub fn drainable(&self) {
        self.change(|s| s.drainable = true);
    }

    /// Waits until CRIU's next connection would be refused: as long as image-proxy does not read what it
    /// writes now, it does not come to the kill.
    pub async fn may_drain(&self) {
        let wait = self.wait_for(|s| s.drainable || s.is_gated() || !s.stops_by_refusal());
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), wait).await;
    }

    /// Resolves when images should no longer be taken.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }
}

#[cfg(test)]
mod tests;
