//! A set as the journal has it, and made of that again ([`crate::store::journal`]).
//!
//! From its completion on a set is noted with its images, and behind that each change of where it stands: by the lock of its
//! state, so in the order in which the changes happen, and before a source, a restore or an operator
//! is told.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use image_common::criu::dialect::Dialect;
use image_common::criu::inventory::SetKind;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::SetNumber;
use image_common::link::phase::Phase;

use crate::store::changes::Changes;
use crate::store::image::{Image, Slab, FILLER_OVERHEAD_BYTES};
use crate::store::journal::record::{
    FileRecord, PieceRecord, RegionRecord, SetRecord, StateRecord,
};
use crate::store::journal::Ledger;
use crate::store::memory::arena::{Arena, Extent};
use crate::store::memory::budget::{Budget, IMAGE_OVERHEAD_BYTES, PIECE_OVERHEAD_BYTES};
use crate::store::memory::segment::{Piece, Refound};
use crate::store::set::digests::Digests;
use crate::store::set::given::{Given, RestoreId};
use crate::store::set::images::Images;
use crate::store::set::{Set, SetState, SET_BYTES};

/// Why a set is not made again.
#[derive(Debug, thiserror::Error)]
pub enum NotRefound {
    #[error("the number {number} is none of its {what}")]
    Number { what: &'static str, number: u8 },
    #[error("a name in it is none: {0}")]
    Name(#[from] image_common::image::NameError),
    #[error("{0}: its bytes are not in the memory that it names")]
    Piece(ImageName),
    #[error("the memory at {offset} of {len} bytes cannot be its own")]
    Region { offset: u64, len: u64 },
    #[error("its memory cannot be mapped")]
    Map(#[source] std::io::Error),
    #[error("it has {there} images of {bytes} bytes where more are noted")]
    Count { there: usize, bytes: u64 },
}

/// Which number a phase has; `None`: a set in it is not kept.
fn code_of_phase(phase: Phase) -> Option<u8> {
    match phase {
        Phase::Receiving | Phase::Aborted => None,
        Phase::Complete => Some(1),
        Phase::Prepared => Some(2),
        Phase::Committed => Some(3),
        Phase::Trial => Some(4),
        Phase::Holding => Some(5),
    }
}

fn phase_of_code(code: u8) -> Option<Phase> {
    match code {
        1 => Some(Phase::Complete),
        2 => Some(Phase::Prepared),
        3 => Some(Phase::Committed),
        4 => Some(Phase::Trial),
        5 => Some(Phase::Holding),
        _ => None,
    }
}

/// It is not known yet.
const NO_KIND: u8 = 0;

const GIVEN: u8 = 1;
const GIVEN_IN_DOUBT: u8 = 2;
const GIVEN_RESTORED: u8 = 3;

impl SetState {
    /// `None`: not kept.
    fn record(&self) -> Option<StateRecord> {
        Some(StateRecord {
            phase: code_of_phase(self.phase)?,
            dialect: self.dialect.number(),
            kind: self.kind.map_or(NO_KIND, SetKind::number),
            given: match self.given {
                Given::No => 0,
                Given::To(_) | Given::Left(_) => GIVEN,
                Given::Doubt(_) => GIVEN_IN_DOUBT,
                Given::Restored(_) => GIVEN_RESTORED,
            },
            gated: self.gated,
            gated_late: self.gated_late,
            followed: self.followed,
            in_doubt: self.in_doubt,
            source_doubts: self.source_doubts,
            decided: self.decided,
            taken: self.taken_by.is_some(),
            lost: self.lost,
        })
    }

    fn of_record(record: &SetRecord) -> Result<Self, NotRefound> {
        let state = record.state;
        let bad = |what, number| NotRefound::Number { what, number };
        let dialect = Dialect::of_number(state.dialect);
        let kind = match state.kind {
            NO_KIND => None,
            number => Some(SetKind::of_number(number).ok_or(bad("kinds", number))?),
        };
        let given = match state.given {
            0 => Given::No,
            // It read from a process that is gone, and nothing saw what became of it.
            GIVEN | GIVEN_IN_DOUBT => Given::Doubt(RestoreId::EARLIER),
            GIVEN_RESTORED => Given::Restored(RestoreId::EARLIER),
            number => return Err(bad("ways to be given", number)),
        };
        Ok(Self {
            phase: phase_of_code(state.phase).ok_or(bad("phases", state.phase))?,
            gated: state.gated,
            gated_late: state.gated_late,
            followed: state.followed,
            dialect: dialect.ok_or(bad("dialects", state.dialect))?,
            kind,
            arriving_pages: HashMap::new(),
            open: 0,
            images: record.images,
            bytes: record.bytes,
            aborted: None,
            rounds: record.rounds,
            in_doubt: state.in_doubt,
            // It is in doubt, or it would have been refused.
            flaw: None,
            source_doubts: false,
            decided: state.decided,
            given,
            // A script that holds still comes by itself.
            tried_by: None,
            scripts: 0,
            trial_failed: None,
            held_elsewhere: false,
            taken_by: state.taken.then_some(RestoreId::EARLIER),
            // What the restore took along before this process ended is not known.
            lost: state.lost || state.taken,
            noted: None,
        })
    }
}

impl Set {
    pub fn noted_in(self, ledger: Option<&Arc<Ledger>>) -> Self {
        Self {
            ledger: ledger.cloned(),
            ..self
        }
    }

    /// Whether it is there after a restart of image-cache.
    pub fn is_kept_through_restart(&self) -> bool {
        let noted = self.state().noted.is_some();
        noted && self.ledger.as_ref().is_some_and(|ledger| ledger.keeps())
    }

    /// Notes that it is kept, and everything that is needed for it, or what has changed since.
    pub(super) fn note(&self, ledger: &Ledger, state: &mut SetState) {
        let now = state.record();
        match (state.noted, now) {
            (None, Some(now)) => match self.record(ledger.session(), state, now) {
                Some(record) => ledger.set(record),
                None => {
                    tracing::warn!(snapshot = %self.snapshot, "not kept through a restart of image-cache: some of it is in memory of this process alone");
                    return;
                }
            },
            (Some(_), None) => ledger.set_gone(self.number.0),
            (Some(before), Some(now)) if before != now => ledger.stands(self.number.0, now),
            _ => {}
        }
        state.noted = now;
    }

    /// Notes it in the journal of this process.
    pub fn note_again(&self) {
        // The guard does it.
        let mut state = self.state();
        state.noted = None;
    }

    fn record(&self, session: u64, state: &SetState, now: StateRecord) -> Option<SetRecord> {
        let (mut digests, digest) = self.digests.all();
        let mut regions = Vec::new();
        let mut numbers: HashMap<Extent, u32> = HashMap::new();
        let mut files = Vec::new();
        for image in self.images.named(|_| true) {
            let mut pieces = Vec::new();
            for place in image.places()? {
                let next = u32::try_from(regions.len()).ok()?;
                let region = *numbers.entry(place.region).or_insert(next);
                if region == next {
                    regions.push(RegionRecord {
                        extent: place.region,
                        held: place.held,
                    });
                }
                pieces.push(PieceRecord {
                    region,
                    start: place.start,
                    len: place.len,
                });
            }
            files.push(FileRecord {
                name: image.name.to_string(),
                digest: digests.remove(image.name.as_str()),
                pieces,
            });
        }
        Some(SetRecord {
            session,
            number: self.number.0,
            snapshot: self.snapshot.to_string(),
            parent: self.parent.map(|parent| parent.0),
            images: state.images,
            bytes: state.bytes,
            rounds: state.rounds,
            digest,
            regions,
            files,
            state: now,
        })
    }

    /// Makes a set again. Its images are in `memory`, which several sets may share.
    pub fn refound(
        record: &SetRecord,
        memory: &mut Memory,
        changes: Arc<Changes>,
        budget: &Arc<Budget>,
        ledger: Option<&Arc<Ledger>>,
    ) -> Result<Self, NotRefound> {
        let state = SetState::of_record(record)?;
        let snapshot = SnapshotId::new(&record.snapshot)?;
        let images = Images::default();
        let mut digests = BTreeMap::new();
        // Of one whose memory was taken along nothing can be read any more.
        let files = if state.lost { &[][..] } else { &record.files };
        let mut regions = Vec::new();
        if !state.lost {
            for region in &record.regions {
                memory.map(region, budget)?;
                regions.push(region.extent);
            }
        }
        for file in files {
            let name = ImageName::new(&file.name)?;
            let mut charge = budget.exceed(IMAGE_OVERHEAD_BYTES);
            let mut pieces = Vec::with_capacity(file.pieces.len());
            for piece in &file.pieces {
                let region = regions.get(piece.region as usize);
                let found = region.and_then(|&region| memory.piece(region, piece));
                let (piece, new) = found.ok_or_else(|| NotRefound::Piece(name.clone()))?;
                // A segment that is held is charged for itself.
                let bytes = if new { piece.len() as u64 } else { 0 };
                charge.absorb(budget.exceed(bytes + PIECE_OVERHEAD_BYTES));
                pieces.push(piece);
            }
            if let Some(digest) = file.digest {
                digests.insert(file.name.clone(), digest);
            }
            images.insert(Image::of_pieces(name, pieces, charge));
        }
        let (there, bytes) = images.totals();
        if there != files.len() {
            return Err(NotRefound::Count { there, bytes });
        }
        Ok(Self {
            number: SetNumber(record.number),
            snapshot,
            parent: record.parent.map(SetNumber),
            images,
            digests: Digests::refound(digests, record.digest),
            slab: Arc::<Slab>::default(),
            state: std::sync::Mutex::new(state),
            changes,
            _charge: budget.exceed(SET_BYTES + record.snapshot.len() as u64),
            ledger: ledger.cloned(),
        })
    }

    /// The record it was made of may be out of date: only an operator may say what becomes of it.
    pub fn doubt_record(&self) {
        let mut state = self.state();
        let dump = state.kind.is_some_and(SetKind::is_dump);
        state.in_doubt |= dump && !state.lost;
    }
}

/// Memory of an earlier process, as far as it is mapped again.
pub struct Memory {
    arena: Arc<Arena>,
    regions: BTreeMap<u64, Region>,
}

struct Region {
    extent: Extent,
    found: Refound,
    /// Where pieces are, each with its length.
    used: Vec<(u64, u64)>,
    held: bool,
    /// For what is charged with an image already.
    charged: std::collections::HashSet<(u64, u64)>,
}

impl Memory {
    pub fn new(arena: Arc<Arena>) -> Self {
        Self {
            arena,
            regions: BTreeMap::new(),
        }
    }

    fn map(&mut self, region: &RegionRecord, budget: &Arc<Budget>) -> Result<(), NotRefound> {
        let extent = region.extent;
        let bad = || NotRefound::Region {
            offset: extent.offset,
            len: extent.len,
        };
        let own = extent.footprint().ok_or_else(bad)?;
        let before = self.regions.range(..own.end).next_back();
        match before.map(|(_, region)| region.extent) {
            Some(same) if same == extent => return Ok(()),
            Some(other) if other.footprint().is_none_or(|other| other.end > own.start) => {
                return Err(bad());
            }
            _ => {}
        }
        let charge = region
            .held
            .then(|| budget.exceed(FILLER_OVERHEAD_BYTES as u64));
        let found = Refound::new(&self.arena, extent, charge).map_err(NotRefound::Map)?;
        let region = Region {
            extent,
            found,
            used: Vec::new(),
            held: region.held,
            charged: std::collections::HashSet::new(),
        };
        self.regions.insert(extent.offset, region);
        Ok(())
    }

    /// A piece, and whether its image is to be charged for it.
    fn piece(&mut self, region: Extent, piece: &PieceRecord) -> Option<(Piece, bool)> {
        let region = self.regions.get_mut(&region.offset)?;
        let found = region.found.piece(piece.start, piece.len)?;
        let offset = region.extent.offset + piece.start;
        if !self.arena.has_data(offset, piece.len) {
            return None;
        }
        let new = region.charged.insert((piece.start, piece.len));
        if region.held {
            if new {
                region.found.charge(piece.len);
            }
            region.used.push((piece.start, piece.len));
            return Some((found, false));
        }
        region.used.push((piece.start, piece.len));
        Some((found, new))
    }

    /// What no set has goes back to the kernel.
    pub fn give_back_unused(mut self) {
        for region in self.regions.values_mut() {
            region.found.give_back_unused(&mut region.used);
        }
        let kept = self.regions.values();
        let kept: Vec<_> = kept.filter_map(|r| r.extent.footprint()).collect();
        self.arena.punch_all_but(&kept);
    }
}
