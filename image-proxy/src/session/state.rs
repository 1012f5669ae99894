//! What is known of a run, and what follows from it.
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

use image_common::control::status;
use image_common::criu::dialect::{Dialect, Stop};
use image_common::criu::inventory::SetKind;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::digest;

use crate::failure::Failure;
use crate::session::evidence::CriuEnd;
use crate::session::phase::{Ended, Phase, Reached};

/// Images that were sent and not acknowledged, at most. The cache reads no further when it has 1 MiB
/// of answers that it does not know to have arrived, and what would tell it is behind the images that
/// are on their way; this many answers are half of that.
const UNANSWERED_IMAGES: u32 = 16 << 10;

#[derive(Debug, Clone)]
pub struct RunState {
    pub dialect: Dialect,
    pub gate: Gate,
    /// The cache was told that the set begins.
    pub opened: bool,
    pub images: Images,
    pub rounds: Rounds,
    pub complete: Complete,
    pub dumper: Dumper,
    /// Another run of the same CRIU or series follows: a dump would have said FINISH first.
    pub followed: bool,
    pub phase: Phase,
    /// The cache was asked to hold the set, and has not refused: it may do so, whatever became of the run.
    pub may_be_held: bool,
    /// The failed run's CRIU can open nothing more, or need not be stopped.
    pub drainable: bool,
}

/// Whether the set waits for the commit that CRIU's script asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    Ungated,
    /// It does; the cache has not answered.
    Asked,
    Answered,
}

/// The images of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Images {
    /// CRIU has opened them, and their end was not sent yet.
    pub open: u32,
    /// Their end was sent.
    pub sent: u32,
    /// Of those that were sent.
    pub bytes: u64,
    /// Of those that were sent, with checksums.
    pub digest: u64,
    pub acknowledged: u32,
    /// Those that are no pagemaps and no pages.
    others: u32,
    /// `inventory.img` was sent.
    pub inventory: bool,
}

/// Page server rounds of a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rounds {
    /// Connections that are under way.
    pub open: u32,
    /// The cache has merged them.
    pub merged: u32,
}

/// What the cache was told of the completeness of the set, and what it said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Complete {
    NotAsked,
    /// With so many images.
    Asked(u32),
    /// With so many images; the cache has seen what the set is.
    Stored(u32, SetKind),
}

/// What CRIU does, as far as its connections and its process tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dumper {
    Writes,
    /// It has said FINISH, with `--remote`.
    Finished,
    /// It has said nothing, and will open no more images: its connection ended, or it exited.
    Gone,
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
    Doubt(Failure),
    Done(Ended),
}

impl Images {
    /// `digest`: with checksums.
    pub fn sent(&mut self, name: &ImageName, bytes: u64, digest: Option<u32>) {
        self.open -= 1;
        self.sent += 1;
        self.bytes += bytes;
        if let Some(digest) = digest {
            let more = digest::of_image(name.as_str(), bytes, digest);
            self.digest = self.digest.wrapping_add(more);
        }
        self.inventory |= name.is_inventory();
        self.others += u32::from(!name.is_pagemap() && !name.is_pages());
    }
}

impl Complete {
    /// With how many images the cache was told "complete" last.
    fn asked(self) -> Option<u32> {
        match self {
            Self::NotAsked => None,
            Self::Asked(images) | Self::Stored(images, _) => Some(images),
        }
    }

    fn kind(self) -> Option<SetKind> {
        match self {
            Self::Stored(_, kind) => Some(kind),
            Self::NotAsked | Self::Asked(_) => None,
        }
    }

    /// The cache says what the set is.
    pub fn stored(&mut self, kind: SetKind) {
        if let Some(images) = self.asked() {
            *self = Self::Stored(images, kind);
        }
    }
}

impl Dumper {
    /// Whether no more images come.
    pub fn is_done(self) -> bool {
        self != Self::Writes
    }
}

/// What `image-proxy status` says of a run. Scripts read these texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunStatus {
    Sending,
    Complete,
    Preparing,
    InTrial,
    Holding,
    WaitsForCriu,
    Committed,
    Sent,
    Failed,
}

impl RunStatus {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sending => "sending",
            Self::Complete => "complete",
            Self::Preparing => "preparing",
            Self::InTrial => "in trial on the target",
            Self::Holding => "restored and held on the target",
            Self::WaitsForCriu => "waits for CRIU's end",
            Self::Committed => "committed",
            Self::Sent => "sent",
            Self::Failed => "failed",
        }
    }
}

impl RunState {
    pub fn new(dialect: Dialect, gated: bool) -> Self {
        Self {
            dialect,
            gate: if gated { Gate::Asked } else { Gate::Ungated },
            opened: false,
            images: Images::default(),
            rounds: Rounds::default(),
            complete: Complete::NotAsked,
            dumper: Dumper::Writes,
            followed: false,
            phase: Phase::Sending,
            may_be_held: false,
            drainable: false,
        }
    }

    /// CRIU's script has announced the dump, and asks for its commit.
    pub fn is_gated(&self) -> bool {
        self.gate != Gate::Ungated
    }

    /// Whether the CRIU of a failed run without script can only be stopped by refusing its next connection.
    pub fn stops_by_refusal(&self) -> bool {
        self.dialect.stop() == Stop::RefusedConnection
    }

    /// The inventory ended and nothing is open.
    pub fn is_whole(&self) -> bool {
        self.images.inventory && self.images.open == 0
    }

    /// Pages came through the page server.
    pub fn has_rounds(&self) -> bool {
        self.rounds.open + self.rounds.merged > 0
    }

    /// Nothing of the dump has come.
    pub fn is_empty(&self) -> bool {
        self.images.sent == 0 && self.images.open == 0 && self.rounds.merged == 0
    }

    /// The cache has stored it and has seen what it is: a dump.
    pub fn is_dump(&self) -> bool {
        self.complete.kind().is_some_and(SetKind::is_dump)
    }

    /// The cache was told "complete" with all images that have come.
    fn all_asked(&self) -> bool {
        self.complete.asked() == Some(self.images.sent)
    }

    /// Pre-dumps before CRIU's commit 688ffa50f (April 2018) write pagemaps and pages, and no
    /// inventory; the cache checks that they are whole. Such a CRIU has gone, or gone on.
    fn is_old_pre_dump(&self) -> bool {
        let Images {
            sent, others, open, ..
        } = self.images;
        let memory_alone = sent > 0 && others == 0 && open == 0;
        memory_alone && self.dialect.is_remote() && self.dumper == Dumper::Gone
    }

    pub fn ended(&self) -> Option<&Ended> {
        self.phase.ended()
    }

    pub fn has_ended(&self) -> bool {
        self.ended().is_some()
    }

    /// It has ended, and CRIU has nothing more to say: after its commit a `--remote` one still
    /// says FINISH.
    pub fn is_over(&self) -> bool {
        let more = self.ended() == Some(&Ended::Dump) && self.dialect.says_finish();
        self.has_ended() && (!more || self.dumper.is_done())
    }

    /// The cache has answered for so many images that another may be sent.
    pub fn may_send_more(&self) -> bool {
        self.images.sent.saturating_sub(self.images.acknowledged) < UNANSWERED_IMAGES
    }

    /// All was sent, and the cache has not said that it is a pre-dump: CRIU may have killed.
    fn may_be_a_whole_dump(&self) -> bool {
        self.is_whole() && self.all_asked() && self.complete.kind() != Some(SetKind::PreDump)
    }

    /// Without script CRIU kills when it has written, so what may be whole on the target is never given up.
    pub fn outlives_failure(&self) -> bool {
        !self.is_gated() && (self.phase.is_held() || self.may_be_a_whole_dump())
    }

    /// The cache has answered for everything that was sent.
    pub fn is_stored(&self) -> bool {
        let Images {
            sent, acknowledged, ..
        } = self.images;
        let answered = self.all_asked() && self.complete.kind().is_some();
        self.is_whole() && answered && acknowledged == sent
    }

    pub fn failure(&self) -> Option<&Failure> {
        self.phase.failure()
    }

    /// It has failed or ended: nothing that is waited for comes any more.
    pub fn is_decided(&self) -> bool {
        !self.phase.is_active()
    }

    /// The gate needs no more waiting for.
    pub fn gate_is_answered(&self) -> bool {
        self.gate == Gate::Answered || self.failure().is_some()
    }

    /// For the operator.
    pub fn status(&self, snapshot: &SnapshotId) -> status::Set {
        let doing = match &self.phase {
            phase if phase.failure().is_some() => RunStatus::Failed,
            Phase::Ended { .. } => RunStatus::Sent,
            Phase::Preparing => RunStatus::Preparing,
            Phase::Trial => RunStatus::InTrial,
            Phase::Holding => RunStatus::Holding,
            Phase::Told | Phase::Committed => RunStatus::Committed,
            Phase::Prepared if !self.is_gated() => RunStatus::WaitsForCriu,
            _ if self.is_whole() => RunStatus::Complete,
            _ => RunStatus::Sending,
        };
        status::Set {
            snapshot: snapshot.to_string(),
            protocol: self.dialect.name().to_owned(),
            state: doing.as_str().to_owned(),
            gated: self.is_gated(),
            images: self.images.sent.into(),
            bytes: self.images.bytes,
            digests: None,
        }
    }

    pub fn next_step(&self) -> Step {
        match &self.phase {
            Phase::Ended { how, .. } => Step::Done(how.clone()),
            Phase::Committed => Step::Done(Ended::Dump),
            Phase::Told => Step::Wait,
            Phase::Failed { reason, after } => {
                // Without script CRIU kills when it has written, whatever becomes of image-proxy.
                let doubt = *after == Reached::Told || self.outlives_failure();
                let reason = reason.clone();
                Step::Done(match doubt {
                    true => Ended::InDoubt(reason),
                    false => Ended::Failed(reason),
                })
            }
            Phase::Sending
            | Phase::Preparing
            | Phase::Prepared
            | Phase::Trial
            | Phase::Holding
            | Phase::Refused(_)
            | Phase::Judged { .. } => self.next_while_active(),
        }
    }

    fn next_while_active(&self) -> Step {
        let fail = |reason: &str| Step::Done(Ended::Failed(Failure::criu(reason)));
        if self.is_whole() && !self.all_asked() {
            return Step::AskComplete;
        }
        if self.images.open > 0 || self.rounds.open > 0 {
            return Step::Wait;
        }
        let round_alone = self.rounds.merged > 0 && self.images.sent == 0;
        if self.dialect.is_rounds_alone() && round_alone {
            // A dump asks for its commit; one that did not get it left only its pages here,
            // which are as good a parent as a pre-dump's.
            return match self.dumper.is_done() || self.followed {
                true => Step::Done(Ended::PreDump),
                false => Step::Wait,
            };
        }
        if !self.images.inventory && !self.is_old_pre_dump() {
            return match self.dumper.is_done() {
                true => fail("CRIU ended without writing inventory.img: the dump failed"),
                false => Step::Wait,
            };
        }
        if !self.images.inventory && !self.all_asked() {
            return Step::AskComplete;
        }
        match self.complete.kind() {
            None => Step::Wait,
            Some(SetKind::Unclear) if self.followed => Step::Done(Ended::PreDump),
            Some(SetKind::PreDump) => Step::Done(Ended::PreDump),
            Some(SetKind::Dump | SetKind::Unclear) if self.is_gated() => {
                match self.dumper.is_done() {
                    true => fail("CRIU ended without asking for the commit: the dump failed"),
                    false => Step::Wait,
                }
            }
            Some(SetKind::Dump | SetKind::Unclear) => self.next_without_script(),
        }
    }

    fn next_without_script(&self) -> Step {
        match &self.phase {
            Phase::Sending if !self.dialect.says_finish() => Step::Hold,
            Phase::Preparing => Step::Wait,
            // CRIU kills all the same, and this may be the only copy.
            Phase::Refused(reason) => Step::Doubt(reason.clone()),
            Phase::Judged { end, .. } => match end {
                CriuEnd::Killed => Step::CloseSet,
                CriuEnd::Failed(reason) => Step::Done(Ended::Failed(reason.clone())),
                CriuEnd::InDoubt(reason) => Step::Doubt(reason.clone()),
            },
            // FINISH of `--remote` comes after the kill, so that it has not come says nothing.
            _ if self.dumper.is_done() => Step::Judge,
            _ => Step::Wait,
        }
    }
}

#[cfg(test)]
mod tests;
