//! What a restore is told of a set, and what becomes of the set with the restore.

use std::sync::Arc;

use image_common::criu::inventory::SetKind;
use image_common::image::ImageName;
use image_common::link::phase::Phase;

use crate::store::image::Image;
use crate::store::set::given::{Given, Holds, Reader, RestoreId};
use crate::store::set::{Set, SetState};

const IN_DOUBT: &str = "it is in doubt";

/// To others than the restore that has it.
const RESTORED: &str = "another restore has restored it";
const RESTORE_IN_DOUBT: &str = "it is in doubt whether a restore of it runs here";

fn undecided(why: &str) -> String {
    format!(
        "{why}: `image-cache status` shows its id, `image-cache release ID` or `drop ID` decides"
    )
}

const TAKEN: &str =
    "it is gone: a restore took the set's memory along as it read it (--release-on-read)";

/// What a reader of an image is told.
pub enum Lookup {
    Ready(Arc<Image>),
    /// The set is known to be complete without it.
    Missing,
    /// Not known yet; look again after the next change.
    Wait,
    /// It will never be known: the set was aborted.
    Gone(String),
}

/// The wish of a restore to take a set's memory along as it reads it (`--release-on-read`).
///
/// Until the first memory really goes ([`Self::take`]) it is a wish: a restore that fails before
/// that leaves a whole set behind.
pub struct Taking {
    set: Arc<Set>,
    restore: RestoreId,
}

impl Taking {
    /// To be asked before any memory goes. `false` if another restore was first.
    pub fn take(&self) -> bool {
        let mut state = self.set.state();
        let first = state.taken_by.is_none();
        if first {
            tracing::warn!(
                snapshot = %self.set.snapshot,
                "from here on the set goes back as it is read (--release-on-read): if this restore fails, it is lost"
            );
        }
        *state.taken_by.get_or_insert(self.restore) == self.restore
    }
}

impl Set {
    /// What a restore is told of an image.
    pub fn lookup(&self, name: &ImageName, reader: impl Into<Reader>) -> Lookup {
        let reader = reader.into();
        let restore = reader.restore;
        let state = self.state();
        if state.lost || (state.taken_by.is_some() && state.taken_by != restore) {
            return Lookup::Gone(TAKEN.to_owned());
        }
        if let Some(reason) = &state.aborted {
            return Lookup::Gone(reason.clone());
        }
        if state.in_doubt {
            return Lookup::Gone(undecided(IN_DOUBT));
        }
        if state.given.to() != restore {
            match state.given {
                Given::Doubt(_) => return Lookup::Gone(undecided(RESTORE_IN_DOUBT)),
                Given::Restored(_) => return Lookup::Gone(RESTORED.to_owned()),
                Given::To(_) | Given::Left(_) if name.is_inventory() => return Lookup::Wait,
                Given::No | Given::To(_) | Given::Left(_) => {}
            }
        }
        if state.withholds(name, reader) {
            return Lookup::Wait;
        }
        if let Some(image) = self.images.get(name) {
            return match image.is_released() {
                true => Lookup::Gone(TAKEN.to_owned()),
                false => Lookup::Ready(image),
            };
        }
        if let Some(image) = state.arriving_pages.get(name) {
            return Lookup::Ready(image.clone());
        }
        match state.knows_all_images() {
            true => Lookup::Missing,
            false => Lookup::Wait,
        }
    }

    /// Gives the set to this restore. `false` if another one has it: it may still come free.
    pub fn give(&self, restore: RestoreId) -> bool {
        let mut state = self.state();
        match state.given {
            Given::No => state.is_given_to(restore),
            given => return given.to() == Some(restore),
        }
        true
    }

    /// Which restore has it.
    pub fn given_to(&self) -> Option<RestoreId> {
        self.state().given.to()
    }

    /// It is known what became of this restore. `false` if another one has the set.
    pub fn settle(&self, restore: RestoreId, restored: bool) -> bool {
        let mut state = self.state();
        let taken = state.given.to().is_some_and(|id| id != restore);
        if taken || (!restored && state.given == Given::Restored(restore)) {
            return false;
        }
        state.given = match restored {
            true => Given::Restored(restore),
            false => Given::No,
        };
        drop(state);
        self.changes.bump();
        true
    }

    /// Nothing will settle this restore any more. `true` if it had the set, which is in doubt now.
    pub fn abandoned_by(&self, restore: RestoreId) -> bool {
        let mut state = self.state();
        let own = [Given::To(restore), Given::Left(restore)].contains(&state.given);
        if own && state.phase != Phase::Aborted {
            state.given = Given::Doubt(restore);
            drop(state);
            self.changes.bump();
            return true;
        }
        false
    }

    /// CRIU has ended, and tasks are left of what it restored.
    pub fn is_left(&self, restore: RestoreId) {
        let mut state = self.state();
        if state.given == Given::To(restore) {
            state.given = Given::Left(restore);
        }
    }

    /// Nothing will tell what became of this restore. `false` if it does not have the set.
    pub fn doubt_restore(&self, restore: RestoreId) -> bool {
        let mut state = self.state();
        let own = state.given.to() == Some(restore);
        if own {
            state.given = Given::Doubt(restore);
            drop(state);
            self.changes.bump();
        }
        own
    }

    /// Whether it is being restored: CRIU runs, or has left tasks behind (`true`).
    pub fn is_being_restored(&self) -> Option<bool> {
        match self.state().given {
            Given::To(_) => Some(false),
            Given::Left(_) => Some(true),
            Given::No | Given::Doubt(_) | Given::Restored(_) => None,
        }
    }

    /// Whether a `--stream` restore that asks for `first` can be about this set.
    pub fn answers_stream(&self, first: &ImageName, holds: Holds) -> bool {
        let reader = Reader {
            restore: None,
            holds,
        };
        matches!(
            self.lookup(first, reader),
            Lookup::Ready(_) | Lookup::Missing
        )
    }

    /// Why no restore can begin any more, if one has taken the set along.
    pub fn why_taken(&self) -> Option<&'static str> {
        self.state().taken_by.map(|_| TAKEN)
    }

    /// What a restore needs to take `image` of this set along, if that may be: nothing else needs
    /// it any more. The source has said that its process is dead, and nothing arrives.
    pub fn to_be_taken(self: &Arc<Self>, image: &Image, restore: RestoreId) -> Option<Taking> {
        let state = self.state();
        let committed = state.gated && !state.gated_late;
        let its = state.given.to().is_none_or(|id| id == restore);
        let over = committed && its && state.phase == Phase::Committed && !state.in_doubt;
        let dump = state.kind.is_some_and(SetKind::is_dump);
        (over && dump && image.name.is_pages() && image.is_complete()).then(|| Taking {
            set: self.clone(),
            restore,
        })
    }

    /// A restore is over, and not known to have succeeded. If it has taken memory along, nothing
    /// can be done with the rest: gives that back too. `true` if so.
    pub fn is_lost_with(&self, restore: RestoreId) -> bool {
        let mut state = self.state();
        if state.taken_by != Some(restore) {
            return false;
        }
        state.lost = true;
        self.images.clear();
        drop(state);
        self.changes.bump();
        true
    }

    /// Nothing tells whether a restore of it runs.
    pub fn doubts_a_restore(&self) -> bool {
        self.state().given.is_in_doubt()
    }

    /// Why it is not served, if an operator has to decide that.
    pub fn why_doubted(&self) -> Option<&'static str> {
        let state = self.state();
        match state.given {
            _ if state.in_doubt => Some(IN_DOUBT),
            Given::Doubt(_) => Some(RESTORE_IN_DOUBT),
            _ => None,
        }
    }
}

impl SetState {
    fn is_given_to(&mut self, restore: RestoreId) {
        self.given = Given::To(restore);
        if self.phase == Phase::Trial {
            self.tried_by = Some(restore);
        }
    }

    /// Restore reads the inventory first: as long as it is withheld, nothing can be restored.
    pub(super) fn withholds_inventory(&self) -> bool {
        self.gated && self.phase != Phase::Committed && self.kind != Some(SetKind::PreDump)
    }

    /// Whether an image that is not here does not exist.
    fn knows_all_images(&self) -> bool {
        match self.phase {
            Phase::Receiving => false,
            // A gated dump waits for its commit and a `--remote` one says FINISH; a pre-dump
            // says nothing after its inventory.
            Phase::Complete | Phase::Prepared => {
                self.kind == Some(SetKind::PreDump) || (!self.gated && !self.dialect.says_finish())
            }
            // What is asked for by a restore that reads before the commit is known: the set is whole.
            Phase::Trial | Phase::Holding | Phase::Committed | Phase::Aborted => true,
        }
    }
}
