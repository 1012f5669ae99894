//! One CRIU run, and the set it writes.
//!
//! The state is changed by whoever learns something: the frontends (an image begins, CRIU is
//! gone), the senders (an image ended), the link (acknowledgements, answers), the control
//! socket (gate, commit). What follows from it is decided in one place, [`State::next_step`],
//! and done by one task, [`crate::session::drive`].
//!
//! ```text
//!   images come ... inventory ended, none open  -> AskComplete -> (stored: what kind?)
//!     pre-dump                                  -> Done, the session waits for the next run
//!     dump, gated     script told, process dead -> Done
//!                     told, and then a failure  -> InDoubt
//!                     CRIU gone without commit  -> Fail
//!     dump, ungated   --stream                  -> Hold: the cache keeps it, and does not serve it
//!                     FINISH / end of stream    -> Judge: CRIU's end decides
//!                     it has killed             -> CloseSet, Done
//!                     it has failed, all live   -> Fail
//!                     else                      -> Doubt
//!                     CRIU gone without FINISH  -> Fail
//!   CRIU gone without inventory                 -> Fail
//!   page server: rounds alone, CRIU gone or gone on -> Done, as after a pre-dump
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image_common::control::status;
use image_common::criu::dialect::{Dialect, Stop};
use image_common::criu::inventory::SetKind;
use image_common::criu::options::FinalState;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::SetNumber;
use image_common::link::digest;
use image_common::procfs::dumped::DumpedTree;
use image_common::procfs::process::{related, Process};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::session::evidence::{end_of, CriuEnd, Dumped};
use crate::transfer::source::Source;

/// Images of a run that wait for their end before its next one is taken from CRIU. Each is a task,
/// a descriptor and a pipe, and CRIU opens small ones faster than a link takes them: 10,000 of them
/// were 20 MiB. CRIU itself keeps some twenty open at once.
const OPEN_IMAGES: u32 = 256;

/// How long nothing may end before the next image is taken all the same: who keeps more open than
/// any known CRIU must not wait for ever.
const PATIENCE: Duration = Duration::from_millis(50);

/// Images that were sent and not acknowledged, at most. The cache reads no further when it has 1 MiB
/// of answers that it does not know to have arrived, and what would tell it is behind the images that
/// are on their way; this many answers are half of that.
const UNANSWERED_IMAGES: u32 = 16 << 10;

/// How far the commit of a gated set is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Commit {
    No,
    Preparing,
    /// The cache holds the set.
    Prepared,
    Refused(String),
    /// CRIU was told to go on, or is being told. Its process is dead, or dies now.
    Told,
    /// The process is dead, and the cache knows.
    Committed,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    PreDump,
    Dump,
    /// All sent, and nobody knows whether CRIU came to the kill.
    InDoubt(String),
    Failed(String),
}

/// Whom the answer to the commit is about, as far as it can be watched from here.
#[derive(Debug, Clone, Default)]
pub struct Told {
    /// What CRIU kills.
    pub tree: Option<Arc<DumpedTree>>,
    /// The process that has the tree stopped; else the one that ran the script.
    pub criu: Option<Arc<Process>>,
}

#[derive(Debug, Clone)]
pub struct State {
    pub gated: bool,
    gate_answered: bool,
    /// The cache was told that the set begins.
    pub opened: bool,
    /// Images that CRIU has opened and whose end was not sent yet.
    pub open: u32,
    /// Images whose end was sent, and their bytes.
    pub images: u32,
    pub bytes: u64,
    /// Of those images, with checksums.
    pub digest: u64,
    acked: u32,
    inventory_ended: bool,
    /// Images other than pagemaps and pages.
    others: u32,
    /// Page server connections that are under way, and rounds that the cache has merged.
    rounds_open: u32,
    rounds_merged: u32,
    /// Number of images when the cache was last told "complete".
    asked_at: Option<u32>,
    stored: Option<SetKind>,
    pub commit: Commit,
    /// CRIU will open no more images: its connection ended, or it exited.
    pub source_ended: bool,
    /// FINISH of a `--remote` dump.
    pub finish: bool,
    /// How the CRIU of a run without script has ended.
    criu_end: Option<CriuEnd>,
    /// Another run of the same CRIU or series follows: a dump would have said FINISH first.
    followed: bool,
    pub dialect: Dialect,
    failed: Option<String>,
    pub ended: Option<Ended>,
    /// The failed run's CRIU can open nothing more, or need not be stopped.
    drainable: bool,
}

/// What the driver does next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Wait,
    AskComplete,
    /// Have the cache hold the set of a run without script: it is whole, and CRIU kills.
    Hold,
    /// Wait for CRIU's end.
    Judge,
    CloseSet,
    Doubt(String),
    Done(Ended),
}

impl State {
    fn new(dialect: Dialect) -> Self {
        Self {
            gated: false,
            gate_answered: false,
            opened: false,
            open: 0,
            images: 0,
            bytes: 0,
            digest: 0,
            acked: 0,
            inventory_ended: false,
            others: 0,
            rounds_open: 0,
            rounds_merged: 0,
            asked_at: None,
            stored: None,
            commit: Commit::No,
            source_ended: false,
            finish: false,
            criu_end: None,
            followed: false,
            dialect,
            failed: None,
            ended: None,
            drainable: false,
        }
    }

    /// The inventory ended and nothing is open.
    pub fn is_whole(&self) -> bool {
        self.inventory_ended && self.open == 0
    }

    /// Pages came through the page server.
    pub fn has_rounds(&self) -> bool {
        self.rounds_open + self.rounds_merged > 0
    }

    /// The cache holds it and has seen what it is: a dump.
    pub fn is_dump(&self) -> bool {
        self.stored.is_some_and(SetKind::is_dump)
    }

    /// Pre-dumps before CRIU's commit 688ffa50f (April 2018) write pagemaps and pages, and no
    /// inventory; the cache checks that they are whole. Such a CRIU has gone, or gone on.
    fn is_old_pre_dump(&self) -> bool {
        let memory_alone = self.images > 0 && self.others == 0 && self.open == 0;
        memory_alone && self.dialect.is_remote() && self.source_ended && !self.finish
    }

    /// It has ended, and CRIU has nothing more to say: after its commit a `--remote` one still
    /// says FINISH.
    pub fn is_over(&self) -> bool {
        let more = self.ended == Some(Ended::Dump) && self.dialect.says_finish();
        self.ended.is_some() && (!more || self.finish || self.source_ended)
    }

    /// The cache has answered for so many images that another may be sent.
    pub fn may_send_more(&self) -> bool {
        self.images.saturating_sub(self.acked) < UNANSWERED_IMAGES
    }

    /// All was sent, and the cache has not said that it is a pre-dump: CRIU may have killed.
    fn may_be_a_whole_dump(&self) -> bool {
        self.is_whole()
            && self.asked_at == Some(self.images)
            && self.stored != Some(SetKind::PreDump)
    }

    /// Without script CRIU kills when it has written, so what may be whole on the target is never given up.
    pub fn outlives_failure(&self) -> bool {
        let held = matches!(self.commit, Commit::Preparing | Commit::Prepared);
        !self.gated && (held || self.may_be_a_whole_dump())
    }

    /// The cache has answered for everything that was sent.
    pub fn is_stored(&self) -> bool {
        self.is_whole()
            && self.asked_at == Some(self.images)
            && self.stored.is_some()
            && self.acked == self.images
    }

    pub fn failure(&self) -> Option<&str> {
        match &self.ended {
            Some(Ended::Failed(reason)) => Some(reason),
            _ => self.failed.as_deref(),
        }
    }

    pub fn next_step(&self) -> Step {
        let fail = |reason: &str| Step::Done(Ended::Failed(reason.to_owned()));
        if self.commit == Commit::Committed {
            return Step::Done(Ended::Dump);
        }
        if self.commit == Commit::Told {
            return match &self.failed {
                Some(reason) => Step::Done(Ended::InDoubt(reason.clone())),
                None => Step::Wait,
            };
        }
        if let Some(reason) = &self.failed {
            // Without script CRIU kills when it has written, whatever becomes of us.
            return match self.outlives_failure() {
                true => Step::Done(Ended::InDoubt(reason.clone())),
                false => fail(reason),
            };
        }
        if self.is_whole() && self.asked_at != Some(self.images) {
            return Step::AskComplete;
        }
        if self.open > 0 || self.rounds_open > 0 {
            return Step::Wait;
        }
        let round_alone = self.rounds_merged > 0 && self.images == 0;
        if self.dialect.is_rounds_alone() && round_alone {
            // A dump asks for its commit; one that did not get it left only its pages here,
            // which are as good a parent as a pre-dump's.
            return match self.source_ended || self.followed {
                true => Step::Done(Ended::PreDump),
                false => Step::Wait,
            };
        }
        let over = self.source_ended || self.finish;
        if !self.inventory_ended && !self.is_old_pre_dump() {
            return match over {
                true => fail("CRIU ended without writing inventory.img: the dump failed"),
                false => Step::Wait,
            };
        }
        if !self.inventory_ended && self.asked_at != Some(self.images) {
            return Step::AskComplete;
        }
        match self.stored {
            None => Step::Wait,
            Some(SetKind::Unclear) if self.followed => Step::Done(Ended::PreDump),
            Some(SetKind::PreDump) => Step::Done(Ended::PreDump),
            Some(SetKind::Dump | SetKind::Unclear) if self.gated => {
                match self.source_ended || self.finish {
                    true => fail("CRIU ended without asking for the commit: the dump failed"),
                    false => Step::Wait,
                }
            }
            Some(SetKind::Dump | SetKind::Unclear) => self.next_without_script(),
        }
    }

    fn next_without_script(&self) -> Step {
        let finish_comes = self.dialect.says_finish();
        match &self.commit {
            Commit::No if !finish_comes => return Step::Hold,
            Commit::Preparing => return Step::Wait,
            // CRIU kills all the same, and this may be the only copy.
            Commit::Refused(reason) => return Step::Doubt(reason.clone()),
            _ => {}
        }
        match &self.criu_end {
            Some(CriuEnd::Killed) => Step::CloseSet,
            Some(CriuEnd::Failed(reason)) => Step::Done(Ended::Failed(reason.clone())),
            Some(CriuEnd::InDoubt(reason)) => Step::Doubt(reason.clone()),
            // FINISH of `--remote` comes after the kill, so that it has not come says nothing.
            None if self.finish || self.source_ended => Step::Judge,
            None => Step::Wait,
        }
    }
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
    state: watch::Sender<State>,
    /// Images stop being taken from CRIU.
    stop: CancellationToken,
    /// The last write of each name; cancelled when it is over.
    writes: Mutex<HashMap<ImageName, CancellationToken>>,
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
            state: watch::Sender::new(State {
                gated,
                ..State::new(dialect)
            }),
            stop: CancellationToken::new(),
            writes: Mutex::default(),
        })
    }

    pub fn state(&self) -> State {
        self.state.borrow().clone()
    }

    /// Waits until the state is as wanted, and gives it. Cancel safe.
    pub async fn wait_for(&self, wanted: impl FnMut(&State) -> bool) -> State {
        let mut states = self.state.subscribe();
        let state = states.wait_for(wanted).await;
        // The sender is in `self`, so it cannot be gone.
        state.map_or_else(|_| self.state(), |s| s.clone())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        self.state.send_modify(change);
    }

    pub fn is_criu(&self, pid: i32) -> bool {
        self.pid == Some(pid)
    }

    pub fn status(&self) -> status::Set {
        let state = self.state.borrow();
        let doing = match (&state.ended, state.failure()) {
            (_, Some(_)) => "failed",
            (Some(_), None) => "sent",
            (None, None) if state.commit == Commit::Preparing => "preparing",
            (None, None) if state.commit == Commit::Told => "committed",
            (None, None) if state.commit == Commit::Prepared && !state.gated => {
                "waits for CRIU's end"
            }
            (None, None) if state.is_whole() => "complete",
            (None, None) => "sending",
        };
        status::Set {
            snapshot: self.snapshot.to_string(),
            protocol: state.dialect.name().to_owned(),
            state: doing.to_owned(),
            gated: state.gated,
            images: state.images.into(),
            bytes: state.bytes,
            digests: None,
        }
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
        let nothing = state.images == 0 && state.open == 0 && state.rounds_merged == 0;
        self.is_active() && state.gated && state.commit == Commit::No && nothing
    }

    /// Images still belong to the set: it has not failed, and nobody asked for its commit.
    pub fn takes_images(&self) -> bool {
        self.is_active() && self.state.borrow().commit == Commit::No
    }

    pub fn is_active(&self) -> bool {
        let state = self.state.borrow();
        state.ended.is_none() && state.failed.is_none()
    }

    // --- what the frontends and senders report ------------------------------------------

    /// Gives the image's place among the writes of its name.
    pub fn image_begins(self: &Arc<Self>, name: &ImageName) -> Turn {
        self.change(|s| s.open += 1);
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
        let mut open = self.state.borrow().open;
        while open >= OPEN_IMAGES {
            // Half of it: the tasks that end them then run without us in between.
            let room = self.wait_for(|s| s.open <= OPEN_IMAGES / 2);
            let _ = tokio::time::timeout(PATIENCE, room).await;
            let now = self.state.borrow().open;
            if now >= open {
                return;
            }
            open = now;
        }
    }

    /// The image's end was sent.
    /// With its digest, if the link has checksums.
    pub fn image_ended(&self, name: &ImageName, bytes: u64, digest: Option<u32>) {
        self.change(|s| {
            s.open -= 1;
            s.images += 1;
            s.bytes += bytes;
            if let Some(digest) = digest {
                let more = digest::of_image(name.as_str(), bytes, digest);
                s.digest = s.digest.wrapping_add(more);
            }
            s.inventory_ended |= name.is_inventory();
            s.others += u32::from(!name.is_pagemap() && !name.is_pages());
        });
    }

    /// The image was not sent, and is no part of the set.
    pub fn image_dropped(&self) {
        self.change(|s| s.open = s.open.saturating_sub(1));
    }

    /// Gives `true` if this is news.
    pub fn uses_dialect(&self, dialect: Dialect) -> bool {
        self.state
            .send_if_modified(|s| std::mem::replace(&mut s.dialect, dialect) != dialect)
    }

    pub fn source_ended(&self) {
        self.change(|s| s.source_ended = true);
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
        if self.state.borrow().gated || self.looks.swap(true, Ordering::Relaxed) {
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
        let killed = self.state.borrow().gated || self.after() == FinalState::Killed;
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
            failing.fail(&format!("image {image}: copying its pages: {e}"))
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
        self.change(|s| s.criu_end = Some(end));
    }

    pub fn finish(&self) {
        self.change(|s| s.finish = true);
    }

    pub fn followed(&self) {
        self.change(|s| s.followed = true);
    }

    // --- what the link reports ----------------------------------------------------------

    pub fn acknowledged(&self, _total: u64) {
        self.change(|s| s.acked += 1);
    }

    pub fn stored(&self, kind: SetKind) {
        self.change(|s| s.stored = Some(kind));
    }

    pub fn opened(&self) {
        self.change(|s| s.opened = true);
    }

    pub fn gate_answered(&self) {
        self.change(|s| s.gate_answered = true);
    }

    pub fn prepare_answered(&self, answer: Result<(), String>) {
        self.change(|s| {
            // An answer that nobody waits for changes nothing: least of all when CRIU was told.
            if s.commit == Commit::Preparing {
                s.commit = match answer {
                    Ok(()) => Commit::Prepared,
                    Err(reason) => Commit::Refused(reason),
                }
            }
        });
    }

    /// A connection to the page server begins to send pages.
    pub fn round_begins(&self) {
        self.change(|s| s.rounds_open += 1);
    }

    pub fn round_ended(&self, merged: bool) {
        self.change(|s| {
            s.rounds_open -= 1;
            s.rounds_merged += u32::from(merged);
        });
    }

    // --- gate and commit ----------------------------------------------------------------

    pub fn gate(&self) {
        self.change(|s| s.gated = true);
    }

    pub fn gate_is_answered(state: &State) -> bool {
        state.gate_answered || state.failure().is_some()
    }

    pub fn commit(&self, commit: Commit) {
        self.change(|s| s.commit = commit);
    }

    /// CRIU is being told, from now on: a failure does not give the set up any more. `Err`: it
    /// has failed before.
    pub fn tell(&self, whom: Told) -> Result<(), String> {
        let mut failed = None;
        self.change(|s| match s.failure() {
            Some(reason) => failed = Some(reason.to_owned()),
            None => s.commit = Commit::Told,
        });
        match failed {
            Some(reason) => Err(reason),
            None => {
                *self.told.lock().unwrap_or_else(PoisonError::into_inner) = whom;
                Ok(())
            }
        }
    }

    /// Whether this CRIU was told that it may kill the tree of `root`, and may do so still.
    pub fn was_told(&self, criu: i32, root: Option<i32>) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |c: &Arc<Process>| !c.has_exited() && related(c.pid(), criu);
        let tree = told.tree.as_ref().map(|tree| tree.root());
        let state = self.state.borrow();
        let told = told.criu.as_ref().is_some_and(same) && tree == root;
        told && state.commit == Commit::Told && state.failed.is_none()
    }

    /// Who was told, for whoever must decide what becomes of the set.
    pub fn take_told(&self) -> Told {
        std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The script is gone without its answer: nobody was told.
    pub fn untold(&self, reason: &str) {
        self.change(|s| s.commit = Commit::Refused(reason.to_owned()));
        self.fail(reason);
    }

    // --- the driver ---------------------------------------------------------------------

    /// The cache is being told "complete"; its earlier answer, if any, is out of date.
    pub fn asks_complete(&self) -> (u32, u64) {
        let mut counts = (0, 0);
        self.change(|s| {
            s.asked_at = Some(s.images);
            s.stored = None;
            counts = (s.images, s.bytes);
        });
        counts
    }

    /// Nothing of this run can be saved any more. The first reason is the one that counts.
    pub fn fail(&self, reason: &str) {
        self.state.send_if_modified(|s| {
            let first = s.ended.is_none() && s.failed.is_none();
            if first {
                s.failed = Some(reason.to_owned());
            }
            first
        });
        self.stop.cancel();
    }

    pub fn end(&self, ended: Ended) {
        match ended {
            // Without script nobody was told; what CRIU does counts all the same.
            Ended::InDoubt(_) => {
                let dumped = self.dumped.borrow().clone().unwrap_or_default();
                let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.criu = told.criu.take().or(self.criu());
                told.tree = told.tree.take().or(dumped.tree);
            }
            _ => drop(self.take_told()),
        }
        self.change(|s| s.ended = Some(ended));
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

    /// Waits until CRIU's next connection would be refused: as long as nobody reads what it
    /// writes now, it does not come to the kill.
    pub async fn may_drain(&self) {
        let wait = self
            .wait_for(|s| s.drainable || s.gated || s.dialect.stop() != Stop::RefusedConnection);
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), wait).await;
    }

    /// Resolves when images should no longer be taken.
    pub async fn stopped(&self) {
        self.stop.cancelled().await;
    }
}

#[cfg(test)]
mod tests;
