//! A set: the images that one CRIU run writes, and what may be said about it when.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::criu::dialect::{Dialect, Listing};
use image_common::criu::inventory::{self, SetKind};
use image_common::image::{ImageName, SnapshotId, INVENTORY};
use image_common::link::codec::SetNumber;
use image_common::link::phase::{self, Event, OutOfOrder, Phase};

use crate::store::changes::Changes;
pub use crate::store::image::OpenError;
use crate::store::image::{Image, ImageWriter, Slab, WriteError, FILLER_OVERHEAD_BYTES};
use crate::store::journal::record::StateRecord;
use crate::store::journal::Ledger;
use crate::store::memory::budget::{
    Budget, Charge, OutOfMemory, IMAGE_OVERHEAD_BYTES, PIECE_OVERHEAD_BYTES,
};
use crate::store::memory::segment::Tail;
use crate::store::page_rounds::FlatPagemap;
use crate::store::set::digests::Digests;
use crate::store::set::given::Given;
pub use crate::store::set::given::{Holds, Reader, RestoreId};
use crate::store::set::images::{Images, INVENTORY_HEAD_BYTES};
use crate::store::set::squash::{Snapshot, SquashError};
use restorable::{Allowed, Flaw, Pages, View};
pub use serving::{Lookup, Taking};

pub mod decision;
pub mod digests;
pub mod given;
pub mod held;
pub mod images;
pub mod kept;
pub mod needed;
pub mod restorable;
pub mod serving;
pub mod squash;
pub mod status;
#[cfg(test)]
mod testing;
pub mod trial;

/// What a proxy asks of a set that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    #[error(transparent)]
    Order(#[from] OutOfOrder),
    #[error("the source counts {theirs} {what}, and {ours} are here")]
    Count {
        what: &'static str,
        theirs: u64,
        ours: u64,
    },
    #[error("images are still arriving")]
    Open,
    #[error("there is no {INVENTORY}")]
    NoInventory,
    #[error("{INVENTORY} is cut off: CRIU was stopped while it wrote it")]
    CutInventory,
    #[error("the set was given up: {0}")]
    Aborted(String),
    #[error(transparent)]
    Unrestorable(#[from] Flaw),
}

pub struct Set {
    pub number: SetNumber,
    pub snapshot: SnapshotId,
    pub parent: Option<SetNumber>,
    /// Complete images.
    images: Images,
    pub digests: Digests,
    slab: Arc<Slab>,
    state: Mutex<SetState>,
    changes: Arc<Changes>,
    _charge: Charge,
    /// Where it is noted what outlives this process.
    ledger: Option<Arc<Ledger>>,
}

/// What a set costs besides its images and its name.
pub const SET_BYTES: u64 = 4 << 10;

struct SetState {
    phase: Phase,
    gated: bool,
    /// Gated when the inventory was here: not by a script, but by an image-proxy whose CRIU kills without asking.
    gated_late: bool,
    /// A later run of the page server's series has begun.
    followed: bool,
    dialect: Dialect,
    kind: Option<SetKind>,
    /// Pages images that still arrive: CRIU notices by itself if one ends early, so restore
    /// may follow them. For all others a cut can look like an end, so they wait.
    arriving_pages: HashMap<ImageName, Arc<Image>>,
    open: u32,
    images: u32,
    bytes: u64,
    aborted: Option<String>,
    /// Page server rounds that were merged.
    rounds: u32,
    /// The link went when only the source could say whether its process was killed, or it does not say; or it may
    /// have been killed, and a restore of this set does not give it back.
    in_doubt: bool,
    /// Why a restore does not.
    flaw: Option<Flaw>,
    /// The source has said so itself.
    source_doubts: bool,
    /// An operator has decided, and the source has said nothing since.
    decided: bool,
    /// Which restore it is given to.
    given: Given,
    /// The restore that has had it in a trial.
    tried_by: Option<RestoreId>,
    /// Scripts of restores that hold, and have not read a decision.
    scripts: u32,
    /// Why the trial was over before the source had committed the set.
    trial_failed: Option<String>,
    /// The restore that takes the memory along as it reads it.
    taken_by: Option<RestoreId>,
    /// That restore is over, and it is not known to have succeeded.
    lost: bool,
    /// A restore holds it, and its images went with another image-cache.
    held_elsewhere: bool,
    /// What the ledger says of it.
    noted: Option<StateRecord>,
}

/// The state of a set, locked. What is changed by it is noted at its end.
struct StateGuard<'a> {
    set: &'a Set,
    state: MutexGuard<'a, SetState>,
    touched: bool,
}

impl Deref for StateGuard<'_> {
    type Target = SetState;

    fn deref(&self) -> &SetState {
        &self.state
    }
}

impl DerefMut for StateGuard<'_> {
    fn deref_mut(&mut self) -> &mut SetState {
        self.touched = true;
        &mut self.state
    }
}

impl Drop for StateGuard<'_> {
    fn drop(&mut self) {
        if let (true, Some(ledger)) = (self.touched, &self.set.ledger) {
            self.set.note(ledger, &mut self.state);
        }
    }
}

/// What a lost link leaves of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkLoss {
    Committed,
    InDoubt,
    Aborted,
}

impl Set {
    pub fn new(
        number: SetNumber,
        snapshot: SnapshotId,
        parent: Option<SetNumber>,
        gated: bool,
        dialect: Dialect,
        changes: Arc<Changes>,
        budget: &Arc<Budget>,
    ) -> Result<Self, OutOfMemory> {
        let charge = budget.charge(SET_BYTES + snapshot.as_str().len() as u64)?;
        let state = SetState {
            phase: Phase::Receiving,
            gated,
            gated_late: false,
            followed: false,
            dialect,
            kind: None,
            arriving_pages: HashMap::new(),
            open: 0,
            images: 0,
            bytes: 0,
            aborted: None,
            rounds: 0,
            in_doubt: false,
            flaw: None,
            source_doubts: false,
            decided: false,
            given: Given::No,
            tried_by: None,
            scripts: 0,
            trial_failed: None,
            taken_by: None,
            lost: false,
            held_elsewhere: false,
            noted: None,
        };
        Ok(Self {
            number,
            snapshot,
            parent,
            images: Images::default(),
            digests: Digests::default(),
            slab: Arc::default(),
            state: Mutex::new(state),
            changes,
            _charge: charge,
            ledger: None,
        })
    }

    /// What is changed in it is noted when it is dropped.
    fn state(&self) -> StateGuard<'_> {
        // No panic happens between two changes that belong together.
        StateGuard {
            set: self,
            state: self.state.lock().unwrap_or_else(PoisonError::into_inner),
            touched: false,
        }
    }

    // --- the receiving side -------------------------------------------------------------

    pub fn open_image(
        &self,
        name: &ImageName,
        announced: Option<u64>,
        append: bool,
        budget: &Arc<Budget>,
    ) -> Result<ImageWriter, OpenError> {
        let base = match append {
            true => self.images.get(name),
            false => None,
        };
        let mut state = self.state();
        state.advance(Event::ImageOpen)?;
        let writer = ImageWriter::new(name.clone(), announced, base, self.slab.clone(), budget)?;
        state.open += 1;
        if name.is_pages() && !append {
            let image = writer.image().clone();
            state.arriving_pages.insert(name.clone(), image);
        }
        drop(state);
        if name.is_pages() {
            self.changes.bump();
        }
        Ok(writer)
    }

    /// An image is whole: from now on it is the image of its name.
    pub fn finish_image(&self, writer: ImageWriter, total: u64) -> Result<(), WriteError> {
        let name = writer.image().name.clone();
        let finished = writer.finish(total);
        let mut state = self.state();
        state.open -= 1;
        state.arriving_pages.remove(&name);
        let image = match finished {
            Ok(image) => image,
            Err(e) => {
                drop(state);
                self.changes.bump();
                return Err(e);
            }
        };
        // Under the lock: `abort` empties the map under it too, and must not be overtaken.
        if state.phase != Phase::Aborted {
            state.images += 1;
            state.bytes += total;
            self.images.insert(image);
        }
        drop(state);
        self.changes.bump();
        Ok(())
    }

    /// Takes the flat pagemaps and pages of a page server's rounds as images of this set. The
    /// pages are held and charged already, so no limit stops this.
    pub fn adopt(&self, flat: Vec<FlatPagemap>, budget: &Arc<Budget>) -> Result<(), WriteError> {
        for map in flat {
            let lists = map.pages.len() as u64 * PIECE_OVERHEAD_BYTES;
            let own = map.pagemap.len() as u64 + FILLER_OVERHEAD_BYTES as u64;
            let mut charge = budget.exceed(IMAGE_OVERHEAD_BYTES * 2 + own + lists);
            let mut tail = Tail::from(&budget.memory, map.pagemap.len().max(1), 0)
                .map_err(WriteError::Kernel)?;
            tail.spare()[..map.pagemap.len()].copy_from_slice(&map.pagemap);
            let pagemap = vec![tail.advance(map.pagemap.len())];
            charge.absorb(map.charge);
            for (name, pieces, charge) in [
                (map.pagemap_name, pagemap, budget.nothing()),
                (map.pages_name, map.pages, charge),
            ] {
                // Numbers in a fixed frame: always a name.
                if let Ok(name) = ImageName::new(&name) {
                    self.images.insert(Image::of_pieces(name, pieces, charge));
                }
            }
        }
        Ok(())
    }

    /// Makes this set stand by itself: what its pagemaps have in `parents` (nearest first)
    /// becomes its own.
    pub fn squash(&self, parents: &[Arc<Set>], budget: &Arc<Budget>) -> Result<(), SquashError> {
        let mut chain: Vec<&dyn Snapshot> = vec![&self.images];
        chain.extend(parents.iter().map(|p| &p.images as &dyn Snapshot));
        let mut flats = Vec::new();
        for map in self.images.named(ImageName::is_pagemap) {
            flats.extend(squash::squash(&map.name, &chain, &self.slab, budget)?);
        }
        for flat in flats {
            flat.take_over();
            for image in [flat.pagemap, flat.pages] {
                self.images.insert(image);
            }
        }
        Ok(())
    }

    /// What the inventory that is here says; a dump if nothing else.
    pub fn expected_kind(&self) -> SetKind {
        self.images.inventory().map_or(SetKind::Unclear, |i| {
            inventory::kind_of(&i.head(INVENTORY_HEAD_BYTES))
        })
    }

    pub fn has_round(&self) {
        self.state().rounds += 1;
    }

    pub fn rounds(&self) -> u32 {
        self.state().rounds
    }

    /// An image will not be whole.
    pub fn drop_image(&self, writer: ImageWriter) {
        let mut state = self.state();
        state.open -= 1;
        state.arriving_pages.remove(&writer.image().name);
        drop(state);
        drop(writer);
        self.changes.bump();
    }

    /// Another run follows in the same session: if this set is complete, and its inventory
    /// did not tell what it is, it was a pre-dump.
    pub fn was_a_pre_dump(&self) {
        let mut state = self.state();
        let unclear = state.kind == Some(SetKind::Unclear);
        if unclear && state.phase == Phase::Complete && state.dialect.says_finish() {
            state.kind = Some(SetKind::PreDump);
        }
    }

    /// Another run of the same series begins. Of a page server's run without script nothing but its pages ever comes, and
    /// the next run takes them over: it is no dump by itself.
    pub fn a_run_follows(&self, next: Dialect) {
        let mut state = self.state();
        state.followed |= state.dialect.is_rounds_alone() && next.is_rounds_alone();
    }

    pub fn set_dialect(&self, dialect: Dialect) {
        self.state().dialect = dialect;
    }

    pub fn gate(&self) -> Result<(), SetError> {
        let mut state = self.state();
        state.advance(Event::Gate)?;
        let whole = self.images.inventory().is_some();
        state.gated_late |= whole && !state.gated;
        state.gated = true;
        Ok(())
    }

    /// The source says that this was all.
    pub fn complete(&self, images: u32, bytes: u64) -> Result<SetKind, SetError> {
        let mut state = self.state();
        state.check_whole(images, bytes)?;
        let kind = match self.images.inventory() {
            Some(inventory) => {
                let head = inventory.head(INVENTORY_HEAD_BYTES);
                if inventory::is_cut(&head) {
                    return Err(SetError::CutInventory);
                }
                inventory::kind_of(&head)
            }
            // Pre-dumps before CRIU's commit 688ffa50f (April 2018) have none.
            None if self.images.is_memory_alone() => SetKind::PreDump,
            None => return Err(SetError::NoInventory),
        };
        state.advance(Event::Complete)?;
        state.kind = Some(kind);
        drop(state);
        self.changes.bump();
        Ok(kind)
    }

    /// Checks whether `criu restore` can read it. `parents`: as for [`Self::judge`].
    pub fn check(&self, parents: &[Arc<Set>], allowed: Allowed, pages: Pages) -> Result<(), Flaw> {
        let view = View {
            snapshot: &self.snapshot,
            dialect: self.dialect(),
            images: &self.images,
        };
        let parents: Vec<&Images> = parents.iter().map(|parent| &parent.images).collect();
        restorable::check(view, &parents, allowed, pages)
    }

    /// Judges a dump before it is called complete. A flaw refuses its commit. Without a commit CRIU
    /// does not ask before it kills: then the set is in doubt, and is not served.
    ///
    /// `parents`: what its pagemaps may refer to, nearest first.
    pub fn judge(&self, parents: &[Arc<Set>], allowed: Allowed) -> Result<(), Flaw> {
        let inventory = self.images.inventory().is_some();
        // Neither a pre-dump nor one of a CRIU that writes no inventory then.
        let dump = inventory && self.expected_kind().is_dump();
        let found = match dump {
            true => self.check(parents, allowed, Pages::Here),
            false => Ok(()),
        };
        let mut state = self.state();
        state.flaw = found.clone().err();
        state.in_doubt = found.is_err() && !state.gated && state.phase != Phase::Aborted;
        found
    }

    /// The source's tasks are frozen and it asks whether they may be killed.
    pub fn prepare(&self, images: u32, bytes: u64) -> Result<(), SetError> {
        let mut state = self.state();
        state.check_prepared(images, bytes)?;
        state.advance(Event::Prepare)?;
        Ok(())
    }

    pub fn close(&self) -> Result<(), SetError> {
        let mut state = self.state();
        state.advance(Event::Close)?;
        drop(state);
        self.changes.bump();
        Ok(())
    }

    /// Gives the set up and its memory back.
    pub fn abort(&self, reason: &str) -> Result<(), OutOfOrder> {
        let mut state = self.state();
        state.advance(Event::Abort)?;
        state.give_up(reason);
        self.forget_images();
        drop(state);
        self.changes.bump();
        Ok(())
    }

    fn forget_images(&self) {
        self.images.clear();
        self.digests.forget();
        self.slab.forget();
    }

    /// The link is gone. What that means depends on what the source may know by now.
    pub fn link_lost(&self, reason: &str) -> LinkLoss {
        let mut state = self.state();
        let outcome = match (state.phase, state.kind) {
            (Phase::Committed, _) => LinkLoss::Committed,
            (Phase::Aborted, _) => LinkLoss::Aborted,
            // PREPARED may have been heard: its process may be dead.
            (Phase::Prepared | Phase::Holding, _) => LinkLoss::InDoubt,
            // No source was told yet.
            (Phase::Trial, _) => LinkLoss::Aborted,
            // CRIU kills without asking.
            (Phase::Complete, Some(k)) if k.is_dump() && state.gated_late => LinkLoss::InDoubt,
            (Phase::Complete, Some(k)) if k.is_dump() && state.gated => LinkLoss::Aborted,
            // Without a gate CRIU kills when it is done writing, whatever we say, and a
            // streamed set is served from its completion on.
            (Phase::Complete, Some(k)) if k.is_dump() && !state.dialect.says_finish() => {
                LinkLoss::Committed
            }
            (Phase::Complete, Some(k)) if k.is_dump() => LinkLoss::InDoubt,
            (Phase::Complete, _) | (Phase::Receiving, _) => LinkLoss::Aborted,
        };
        match outcome {
            LinkLoss::Committed => state.phase = Phase::Committed,
            LinkLoss::InDoubt => state.in_doubt = true,
            LinkLoss::Aborted => {
                state.give_up(reason);
                self.forget_images();
            }
        }
        drop(state);
        self.changes.bump();
        outcome
    }

    pub fn dialect(&self) -> Dialect {
        self.state().dialect
    }

    /// Whether the snapshot list names it. Of page server rounds only the dump is a snapshot.
    pub fn is_listed(&self) -> bool {
        let listed = match self.dialect().listing() {
            Listing::All => true,
            Listing::FinalDump => self.is_final_dump(),
            Listing::No => false,
        };
        listed && !self.is_aborted()
    }

    pub fn is_pre_dump(&self) -> bool {
        self.state().kind == Some(SetKind::PreDump)
    }

    pub fn is_aborted(&self) -> bool {
        self.state().phase == Phase::Aborted
    }

    /// The source may depend on it: it may have been told that the set is prepared, or may be restored.
    pub fn is_depended_on(&self) -> bool {
        self.state().phase.is_depended_on()
    }

    /// All is here, and the source has not said yet that its process is dead.
    pub fn is_prepared(&self) -> bool {
        self.state().phase == Phase::Prepared
    }

    pub fn is_in_doubt(&self) -> bool {
        let state = self.state();
        state.in_doubt || matches!(state.given, Given::Doubt(_))
    }

    /// A dump that may be restored, or may have to be.
    pub fn is_only_copy(&self) -> bool {
        let state = self.state();
        state.kind.is_some_and(SetKind::is_dump) && state.phase.is_depended_on() && !state.lost
    }

    pub fn is_final_dump(&self) -> bool {
        let state = self.state();
        state.kind.is_some_and(SetKind::is_dump) && state.phase == Phase::Committed
    }

    /// Number and bytes of the images that arrived, as [`Self::complete`] compares them.
    pub fn received(&self) -> (u32, u64) {
        let state = self.state();
        (state.images, state.bytes)
    }

    /// Number of images and their bytes.
    pub fn totals(&self) -> (usize, u64) {
        self.images.totals()
    }

    pub fn image(&self, name: &str) -> Option<Arc<Image>> {
        self.images.image(name)
    }

    /// See [`needed::needed`].
    pub fn needed(&self) -> HashSet<ImageName> {
        needed::needed(&self.images)
    }

    /// Whether `asked` holds all of [`Self::needed`].
    pub fn restored_by(&self, asked: &HashSet<ImageName>) -> bool {
        if matches!(self.state().phase, Phase::Receiving | Phase::Aborted) {
            return false;
        }
        self.needed().is_subset(asked)
    }

    /// Tasks whose memory is described here.
    pub fn tasks(&self) -> BTreeSet<u64> {
        self.images.tasks()
    }

    /// See [`Images::tasks_without_pages`].
    pub fn tasks_without_pages(&self) -> BTreeSet<u64> {
        self.images.tasks_without_pages()
    }
}

impl SetState {
    fn advance(&mut self, event: Event) -> Result<(), OutOfOrder> {
        self.phase = phase::next(self.phase, self.gated, event)?;
        Ok(())
    }

    fn give_up(&mut self, reason: &str) {
        self.phase = Phase::Aborted;
        self.aborted.get_or_insert_with(|| reason.to_owned());
        self.arriving_pages.clear();
        self.in_doubt = false;
    }

    fn check_prepared(&self, images: u32, bytes: u64) -> Result<(), SetError> {
        self.check_whole(images, bytes)?;
        match &self.flaw {
            Some(flaw) => Err(flaw.clone().into()),
            None => Ok(()),
        }
    }

    fn check_whole(&self, images: u32, bytes: u64) -> Result<(), SetError> {
        if let Some(reason) = &self.aborted {
            return Err(SetError::Aborted(reason.clone()));
        }
        if self.open > 0 {
            return Err(SetError::Open);
        }
        let counts = [
            ("images", u64::from(images), u64::from(self.images)),
            ("bytes", bytes, self.bytes),
        ];
        for (what, theirs, ours) in counts {
            if theirs != ours {
                return Err(SetError::Count { what, theirs, ours });
            }
        }
        Ok(())
    }
}
