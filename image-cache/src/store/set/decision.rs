//! What an operator may decide about a set, and what the source may still say about it afterwards.
//!
//! | the set | `release` | `drop` |
//! | --- | --- | --- |
//! | arrives or is complete, with a script, not committed | not possible: nothing whole is here, its process goes on | at once: the dump fails |
//! | the same without a script | not possible | with the operator's word that the process lives: its CRIU may have killed it |
//! | a pre-dump | not possible | at once: its process goes on |
//! | prepared, its source may speak | with the operator's word that the process is dead | with their word that it lives |
//! | in doubt | at once | at once |
//! | may be restored | not needed | at once |
//! | a restore of it may run here | at once, when the operator has looked | at once |
//!
//! So in every state there is a command. All of it is looked at and done under the set's lock, so that what the source
//! says at the same moment comes before or after it, and not in between.

use image_common::criu::inventory::SetKind;
use image_common::link::phase::{Event, Phase};

use crate::store::set::given::Given;
use crate::store::set::{Set, SetError, SetState};

/// Why `release` does not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReleased {
    #[error("prepared, and not committed: its image-proxy is connected and says by itself when the process is dead. If you have looked, and the process is dead there, add --process-is-dead")]
    SourceMaySay,
    #[error(
        "not whole yet, and no source was told to kill its process: there is nothing to restore"
    )]
    NotWhole,
    #[error("in trial: a restore of it is being built, and no source was told to kill its process. The process goes on there if that fails")]
    InTrial,
    #[error("a pre-dump, which cannot be restored")]
    PreDump,
    #[error("restorable already: criu restore gets it")]
    Restorable,
    #[error("being restored: a reader has it, or tasks of a restore are left. The next restore gets it when these have ended without success")]
    BeingRestored,
    #[error("given up")]
    GivenUp,
}

/// Why `drop` does not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotDropped {
    #[error("prepared, and not committed: its source was told that it may kill the process. If you have looked, and the process lives there and its CRIU has ended, add --process-lives")]
    MayBeKilled,
    #[error("being received without an action script, so its CRIU may kill the process whatever happens here. End that CRIU first (or run `image-proxy abort` there); if the process lives then, add --process-lives")]
    NoScript,
}

/// What COMMIT means for a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Committed {
    Committed,
    /// It was in doubt, and is not any more.
    DoubtEnded,
    /// An operator has said so before.
    AlreadyReleased,
    /// It is not here any more: the process is lost.
    GivenUp(String),
}

/// What the source's doubt means for a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubted {
    InDoubt,
    /// An operator has decided before.
    Decided,
}

impl SetState {
    fn is_a_pre_dump(&self) -> bool {
        self.kind == Some(SetKind::PreDump)
    }

    /// It can never be restored, and no process depends on it.
    fn is_a_round(&self) -> bool {
        let pages_alone = self.phase == Phase::Receiving && self.images == 0 && self.open == 0;
        self.is_a_pre_dump() || (self.followed && pages_alone)
    }

    fn not_released(&self, process_is_dead: bool) -> Option<NotReleased> {
        match self.phase {
            _ if self.in_doubt || self.given.is_in_doubt() => None,
            Phase::Prepared | Phase::Holding if process_is_dead => None,
            Phase::Prepared | Phase::Holding => Some(NotReleased::SourceMaySay),
            Phase::Committed if self.given.is_under_way() => Some(NotReleased::BeingRestored),
            Phase::Committed => Some(NotReleased::Restorable),
            Phase::Aborted => Some(NotReleased::GivenUp),
            _ if self.is_a_pre_dump() => Some(NotReleased::PreDump),
            Phase::Receiving | Phase::Complete => Some(NotReleased::NotWhole),
            Phase::Trial => Some(NotReleased::InTrial),
        }
    }

    fn not_dropped(&self, process_lives: bool) -> Option<NotDropped> {
        match self.phase {
            _ if self.in_doubt || process_lives => None,
            Phase::Prepared | Phase::Holding => Some(NotDropped::MayBeKilled),
            Phase::Receiving | Phase::Complete if !self.gated && !self.is_a_round() => {
                Some(NotDropped::NoScript)
            }
            _ => None,
        }
    }
}

impl Set {
    /// Prepared, and waits for the source's word, in doubt or not.
    pub fn waits_for_word(&self) -> bool {
        let state = self.state();
        state.in_doubt || state.phase.waits_for_word()
    }

    /// An operator's word is of use: it waits for the source's, or whether a restore of it runs is not known.
    pub fn waits_for_decision(&self) -> bool {
        self.waits_for_word() || self.state().given.is_in_doubt()
    }

    /// A restore may be reading it.
    pub fn is_restorable(&self) -> bool {
        let state = self.state();
        state.phase == Phase::Committed && !state.in_doubt && !state.given.is_in_doubt()
    }

    /// Its source has committed it.
    pub fn is_committed(&self) -> bool {
        let state = self.state();
        state.phase == Phase::Committed && !state.decided
    }

    /// An operator has decided about it, and its source has not said anything since.
    pub fn is_decided(&self) -> bool {
        self.state().decided
    }

    /// The source knows that it is in doubt, and holds its link for the decision alone.
    pub fn source_doubts(&self) -> bool {
        self.state().source_doubts
    }

    /// Why `release` alone does not do it, if it does not.
    pub fn why_not_released(&self) -> Option<NotReleased> {
        self.state().not_released(false)
    }

    /// An operator says that the source's process is dead, and that no restore of it runs: the set may be restored.
    pub fn release(&self, process_is_dead: bool) -> Result<(), NotReleased> {
        let mut state = self.state();
        if let Some(why) = state.not_released(process_is_dead) {
            return Err(why);
        }
        if state.given.is_in_doubt() {
            state.given = Given::No;
        }
        if state.in_doubt || state.phase != Phase::Committed {
            (state.in_doubt, state.decided) = (false, true);
            state.phase = Phase::Committed;
        }
        drop(state);
        self.changes.bump();
        Ok(())
    }

    /// Whether an operator may drop it.
    pub fn may_be_dropped(&self, process_lives: bool) -> Result<(), NotDropped> {
        self.state().not_dropped(process_lives).map_or(Ok(()), Err)
    }

    /// An operator drops it. Restores that read it go on with what they hold.
    pub fn drop_decided(&self, process_lives: bool, reason: &str) -> Result<(), NotDropped> {
        let mut state = self.state();
        if let Some(why) = state.not_dropped(process_lives) {
            return Err(why);
        }
        // Of one that may be restored the phases know no way back: that is the source's, not ours.
        state.give_up(reason);
        state.decided = true;
        self.forget_images();
        drop(state);
        self.changes.bump();
        Ok(())
    }

    /// The source says that its process is dead.
    pub fn commit(&self) -> Result<Committed, SetError> {
        let mut state = self.state();
        if state.phase == Phase::Committed && state.decided {
            state.decided = false;
            return Ok(Committed::AlreadyReleased);
        }
        state.advance(Event::Commit)?;
        state.decided = false;
        let doubted = std::mem::take(&mut state.in_doubt);
        if state.phase == Phase::Aborted {
            return Ok(Committed::GivenUp(
                state.aborted.clone().unwrap_or_default(),
            ));
        }
        drop(state);
        self.changes.bump();
        Ok(match doubted {
            true => Committed::DoubtEnded,
            false => Committed::Committed,
        })
    }

    /// The source does not know whether its process is dead.
    pub fn doubt(&self) -> Result<Doubted, SetError> {
        let mut state = self.state();
        if state.decided {
            state.decided = false;
            return Ok(Doubted::Decided);
        }
        // It may have been told that the set is prepared, and not have seen the process die.
        if !state.phase.waits_for_word() {
            state.advance(Event::Prepare)?;
        }
        // A set that was given up meanwhile stays that.
        state.in_doubt = state.phase.waits_for_word();
        state.source_doubts = state.in_doubt;
        drop(state);
        self.changes.bump();
        Ok(Doubted::InDoubt)
    }

    /// The source says nothing any more, though its link is there. `true` if that is news: the set
    /// is prepared, and now in doubt. COMMIT still ends that.
    pub fn doubt_silence(&self) -> bool {
        let mut state = self.state();
        let news = state.phase.waits_for_word() && !state.in_doubt;
        state.in_doubt |= news;
        drop(state);
        if news {
            self.changes.bump();
        }
        news
    }
}

#[cfg(test)]
pub mod tests;
