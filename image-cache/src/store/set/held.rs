//! A set that a restore holds, as the script of that restore sees it.

use image_common::link::phase::Phase;

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
