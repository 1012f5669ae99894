//! A set that a restore holds, as the script of that restore sees it.

use image_common::link::phase::Phase;

use crate::store::set::given::{Given, RestoreId};
use crate::store::set::Set;

/// What has become of a set that a restore holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HoldEnd {
    /// The process is dead on the source.
    GoOn,
    /// It lives there, or an operator wants no restore.
    GiveUp(String),
}

impl Set {
    /// The source was told that it stands restored.
    pub fn is_held_without_images(&self) {
        let mut state = self.state();
        state.phase = Phase::Holding;
        (state.in_doubt, state.held_elsewhere) = (true, true);
    }

    /// Gives the set to the restore whose script holds: the one that an earlier image-cache had given it to, if any. `false`:
    /// another one has it.
    pub fn give_to_holder(&self, restore: RestoreId) -> bool {
        let mut state = self.state();
        match state.given {
            // Its script is asleep, so nothing of it has run.
            Given::Doubt(RestoreId::EARLIER) => state.given = Given::To(restore),
            Given::No => state.given = Given::To(restore),
            given => return given.to() == Some(restore),
        }
        state.tried_by = Some(restore);
        true
    }

    pub fn is_held_elsewhere(&self) -> bool {
        self.state().held_elsewhere
    }

    /// What is to become of a restore that holds it, once that is decided.
    pub fn end_of_hold(&self) -> Option<HoldEnd> {
        let state = self.state();
        match state.phase {
            _ if state.in_doubt => None,
            Phase::Committed => Some(HoldEnd::GoOn),
            Phase::Aborted => Some(HoldEnd::GiveUp(state.aborted.clone().unwrap_or_default())),
            _ => None,
        }
    }
}
