//! What an operator is shown of a set.

use std::fmt;

use image_common::control::status;
use image_common::criu::inventory::SetKind;
use image_common::link::phase::Phase;

use crate::store::set::given::Given;
use crate::store::set::{Set, SetState};

/// Where a set stands. Scripts read these texts, so they stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SetStatus {
    InDoubt,
    HeldElsewhere,
    Lost,
    RestoreInDoubt,
    Taken,
    BeingRestored,
    LeftBehind,
    Receiving,
    Complete,
    Prepared,
    Trial,
    Holding,
    Ready,
    GivenUp,
}

impl SetStatus {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InDoubt => "in doubt",
            Self::HeldElsewhere => {
                "in doubt: held by a restore here; its images were with an image-cache that is gone"
            }
            Self::Lost => "lost with the restore that took its memory",
            Self::RestoreInDoubt => "in doubt: a restore of it may run here",
            Self::Taken => "taken by a restore as it is read",
            Self::BeingRestored => "being restored",
            Self::LeftBehind => "held by what a restore has left behind",
            Self::Receiving => "receiving",
            Self::Complete => "complete",
            Self::Prepared => "prepared: waits for the commit",
            Self::Trial => "in trial: a restore is to stand before its source kills",
            Self::Holding => "restored and held: waits for the commit",
            Self::Ready => "ready to be restored",
            Self::GivenUp => "given up",
        }
    }
}

impl fmt::Display for SetStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl SetState {
    fn stands(&self) -> SetStatus {
        match (self.phase, self.given) {
            _ if self.in_doubt && self.held_elsewhere => SetStatus::HeldElsewhere,
            _ if self.in_doubt => SetStatus::InDoubt,
            _ if self.lost => SetStatus::Lost,
            (Phase::Trial, _) => SetStatus::Trial,
            (Phase::Holding, _) => SetStatus::Holding,
            (_, Given::Doubt(_)) => SetStatus::RestoreInDoubt,
            _ if self.taken_by.is_some() => SetStatus::Taken,
            (_, Given::To(_)) => SetStatus::BeingRestored,
            (_, Given::Left(_)) => SetStatus::LeftBehind,
            (Phase::Receiving, _) => SetStatus::Receiving,
            (Phase::Complete, _) => SetStatus::Complete,
            (Phase::Prepared, _) => SetStatus::Prepared,
            (Phase::Committed, _) => SetStatus::Ready,
            (Phase::Aborted, _) => SetStatus::GivenUp,
        }
    }
}

impl Set {
    /// Where it stands.
    pub fn stands(&self) -> SetStatus {
        self.state().stands()
    }

    pub fn status(&self) -> status::Set {
        let (images, bytes) = self.totals();
        let state = self.state();
        let stands = state.stands();
        let kind = match state.kind {
            Some(SetKind::Dump | SetKind::Unclear) => "dump ",
            Some(SetKind::PreDump) => "pre-dump ",
            None => "",
        };
        status::Set {
            snapshot: self.snapshot.to_string(),
            protocol: state.dialect.name().to_owned(),
            state: format!("{kind}{stands}"),
            gated: state.gated,
            images: images as u64,
            bytes,
            digests: self.digests.status(),
        }
    }
}
