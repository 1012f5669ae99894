//! A set in trial: a restore of it stands on the target before the source kills.
//!
//! One restore reads the set, and its action script holds it at `post-restore`, where all tasks are built and asleep. Only
//! then the source is told that it may kill. COMMIT lets the restore go on; until that is heard nothing of it runs.

use std::sync::Arc;

use image_common::image::ImageName;
use image_common::link::phase::{Event, Phase};

use crate::store::set::given::{Holds, Reader, RestoreId};
use crate::store::set::{Set, SetError, SetState};

/// Where a trial is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trial {
    /// `read`: a restore has begun to read the set.
    Running { read: bool },
    /// The restore holds.
    Holding,
    /// The restore has failed, or what held is gone: why.
    Failed(String),
    /// The source, or an operator, has decided.
    Decided,
}

/// What a restore whose action script is at `post-restore` may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AtHold {
    /// The process is dead on the source, or no trial was made of it.
    GoOn,
    /// The decision is still to come.
    Hold,
    /// The set is given up: the process goes on at the source.
    GivenUp(String),
}

const NOT_TRIED: &str = "this restore was given the set for a trial, and the trial is over";

impl Set {
    /// The source has sent everything, and wants a restore to stand before it kills.
    pub fn begin_trial(&self, images: u32, bytes: u64) -> Result<(), SetError> {
        let mut state = self.state();
        state.check_prepared(images, bytes)?;
        state.advance(Event::Try)?;
        state.trial_failed = None;
        drop(state);
        self.changes.bump();
        Ok(())
    }

    pub fn trial(&self) -> Trial {
        let state = self.state();
        match (state.phase, &state.trial_failed) {
            (Phase::Trial, _) => Trial::Running {
                read: state.tried_by.is_some(),
            },
            (Phase::Holding, _) => Trial::Holding,
            (Phase::Complete | Phase::Prepared, Some(why)) => Trial::Failed(why.clone()),
            _ => Trial::Decided,
        }
    }

    /// Whether a restore has it, or may have it, before its source has committed it.
    pub fn is_tried(&self) -> bool {
        matches!(self.state().phase, Phase::Trial | Phase::Holding)
    }

    /// The restore that was given the set before its commit.
    pub fn tried_by(&self) -> Option<RestoreId> {
        self.state().tried_by
    }

    /// Whether this restore was given the set before its commit.
    pub fn was_tried_by(&self, restore: RestoreId) -> bool {
        self.state().tried_by == Some(restore)
    }

    /// The action script of `restore`, which was given the set before its commit, is at `post-restore`: what it restored
    /// stands, and nothing of it runs.
    pub fn at_hold(&self, restore: RestoreId) -> AtHold {
        let state = self.state();
        if state.tried_by != Some(restore) {
            return AtHold::GivenUp(NOT_TRIED.to_owned());
        }
        match state.phase {
            Phase::Committed => AtHold::GoOn,
            // Prepared: what held is not gone after all. It still has the set, and no other restore can have it.
            Phase::Trial | Phase::Holding | Phase::Prepared => AtHold::Hold,
            Phase::Aborted => {
                let why = state.aborted.clone();
                AtHold::GivenUp(why.unwrap_or_else(|| NOT_TRIED.to_owned()))
            }
            Phase::Receiving | Phase::Complete => {
                let why = state.trial_failed.clone();
                AtHold::GivenUp(why.unwrap_or_else(|| NOT_TRIED.to_owned()))
            }
        }
    }

    /// The script of `restore` stands still, and the decision can reach it also without this image-cache: the source may be told.
    pub fn holds(&self, restore: RestoreId) {
        let mut state = self.state();
        let its = state.tried_by == Some(restore) && state.phase == Phase::Trial;
        if its && state.advance(Event::Hold).is_ok() {
            drop(state);
            self.changes.bump();
        }
    }

    /// A script is being told to hold. As long as what this gives lives, it has not read the decision.
    pub fn script_holds(self: &Arc<Self>) -> ScriptHolds {
        self.state().scripts += 1;
        ScriptHolds(self.clone())
    }

    /// The set is decided, and a script that holds has not read that.
    pub fn has_unread_decision(&self) -> bool {
        let state = self.state();
        state.scripts > 0 && matches!(state.phase, Phase::Committed | Phase::Aborted)
    }

    /// The CRIU of `restore` has ended, and the source has not committed the set. `None`: no restore has begun, and none
    /// will. `true` if that is news for the source.
    pub fn trial_over(&self, restore: Option<RestoreId>, why: &str) -> bool {
        let mut state = self.state();
        if state.tried_by != restore || !matches!(state.phase, Phase::Trial | Phase::Holding) {
            return false;
        }
        if state.advance(Event::TrialOver).is_err() {
            return false;
        }
        state.trial_failed = Some(why.to_owned());
        drop(state);
        self.changes.bump();
        true
    }
}

/// The script of a restore stands still.
pub struct ScriptHolds(Arc<Set>);

impl Drop for ScriptHolds {
    fn drop(&mut self) {
        self.0.state().scripts -= 1;
        self.0.changes.bump();
    }
}

impl SetState {
    /// What of the set is withheld from this reader until the process is dead on the source.
    pub(super) fn withholds(&self, name: &ImageName, reader: Reader) -> bool {
        match (self.phase, reader.holds) {
            (Phase::Trial | Phase::Holding, Holds::Promised) => false,
            // A restore reads what the tree is before its script can speak, and no task is built without its memory.
            (Phase::Trial | Phase::Holding, Holds::Named) => name.is_pagemap() || name.is_pages(),
            _ => name.is_inventory() && self.withholds_inventory(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::set::decision::tests::open;
    use crate::store::set::Lookup;
    use crate::store::{Policy, Store};
    use image_common::image::INVENTORY;

    const FIRST: RestoreId = RestoreId(1);
    const SECOND: RestoreId = RestoreId(2);

    fn reader(restore: RestoreId, holds: Holds) -> Reader {
        Reader {
            restore: Some(restore),
            holds,
        }
    }

    fn tried() -> (
        std::sync::Arc<Store>,
        std::sync::Arc<crate::store::session::Session>,
        std::sync::Arc<Set>,
    ) {
        let store = Store::new(1 << 24, Policy::default());
        let session = store.open_session("web".parse().unwrap(), 1, "10.0.0.1:5".to_owned());
        let session = session.unwrap();
        let set = open(&session, 1, "complete, script");
        let (images, bytes) = set.received();
        set.begin_trial(images, bytes).unwrap();
        (store, session, set)
    }

    fn sees(set: &Set, name: &str, reader: Reader) -> bool {
        let name = ImageName::new(name).unwrap();
        matches!(set.lookup(&name, reader), Lookup::Ready(_))
    }

    #[test]
    fn only_a_restore_that_holds_reads_a_set_in_trial() {
        let (_store, _session, set) = tried();
        assert!(!sees(&set, INVENTORY, reader(FIRST, Holds::No)));
        assert!(sees(&set, INVENTORY, reader(FIRST, Holds::Named)));
        assert!(sees(&set, INVENTORY, reader(FIRST, Holds::Promised)));
        let pages = ImageName::new("pages-1.img").unwrap();
        let withheld = |holds| set.state().withholds(&pages, reader(FIRST, holds));
        assert!(withheld(Holds::Named) && !withheld(Holds::Promised));
        assert!(set.give(FIRST));
        assert!(!set.give(SECOND), "one at a time");
        assert!(!sees(&set, INVENTORY, reader(SECOND, Holds::Promised)));
    }

    #[test]
    fn what_holds_goes_on_when_the_source_has_committed() {
        let (_store, _session, set) = tried();
        assert_eq!(set.trial(), Trial::Running { read: false });
        assert!(set.give(FIRST));
        assert_eq!(set.trial(), Trial::Running { read: true });
        assert!(matches!(set.at_hold(SECOND), AtHold::GivenUp(_)));
        assert_eq!(set.at_hold(FIRST), AtHold::Hold);
        set.holds(FIRST);
        assert_eq!(set.trial(), Trial::Holding);
        set.commit().unwrap();
        assert_eq!(set.trial(), Trial::Decided);
        assert_eq!(set.at_hold(FIRST), AtHold::GoOn);
        // Until it is known to run no other restore has it; if it fails, the next one does.
        assert!(!sees(&set, INVENTORY, reader(SECOND, Holds::No)));
        assert!(set.settle(FIRST, false));
        assert!(sees(&set, INVENTORY, reader(SECOND, Holds::No)));
    }

    #[test]
    fn a_source_that_gives_up_ends_the_hold() {
        let (_store, _session, set) = tried();
        assert!(set.give(FIRST));
        assert_eq!(set.at_hold(FIRST), AtHold::Hold);
        set.holds(FIRST);
        set.abort("the source gave it up").unwrap();
        let given_up = AtHold::GivenUp("the source gave it up".to_owned());
        assert_eq!(set.at_hold(FIRST), given_up);
    }

    /// The source was told nothing, so it need not be asked; behind HOLDING it may have killed.
    #[test]
    fn a_restore_that_ends_takes_the_trial_along_and_never_the_set() {
        let (_store, _session, set) = tried();
        assert!(set.give(FIRST));
        assert!(!set.trial_over(Some(SECOND), "another one's"));
        assert!(set.trial_over(Some(FIRST), "Can't fork for 31: File exists"));
        let failed = Trial::Failed("Can't fork for 31: File exists".to_owned());
        assert_eq!(set.trial(), failed);
        assert!(matches!(set.at_hold(FIRST), AtHold::GivenUp(_)), "late");
        assert!(!set.is_depended_on());
        let (_store, _session, set) = tried();
        assert!(set.give(FIRST));
        assert_eq!(set.at_hold(FIRST), AtHold::Hold);
        set.holds(FIRST);
        assert!(set.trial_over(Some(FIRST), "CRIU was killed"));
        assert!(set.is_prepared() && set.is_depended_on());
        set.commit().unwrap();
        assert!(
            !sees(&set, INVENTORY, reader(SECOND, Holds::No)),
            "its tasks may be left"
        );
        assert!(set.settle(FIRST, false));
        assert!(sees(&set, INVENTORY, reader(SECOND, Holds::No)));
    }

    #[test]
    fn a_lost_link_gives_up_a_trial_and_doubts_a_hold() {
        use crate::store::set::LinkLoss;
        let (_store, _session, set) = tried();
        assert_eq!(set.link_lost("cut"), LinkLoss::Aborted);
        let (_store, _session, set) = tried();
        assert!(set.give(FIRST));
        assert_eq!(set.at_hold(FIRST), AtHold::Hold);
        set.holds(FIRST);
        assert_eq!(set.link_lost("cut"), LinkLoss::InDoubt);
        assert_eq!(
            set.at_hold(FIRST),
            AtHold::Hold,
            "the decision is still to come"
        );
        set.release(false).unwrap();
        assert_eq!(set.at_hold(FIRST), AtHold::GoOn);
    }
}
