//! What the store has to keep through a restart, in a file in memory that outlives this process (`--keep-through-restart`).
//!
//! Records are appended: a session with its first set, a set with the places of its images in the arena, and then each change
//! of where the set stands, before a source, a restore or an operator is told. The last record may be torn, when the process is
//! killed while it writes; what it would have said was then not told either.
//!
//! ```text
//! 0        magic
//! 64, 128  two anchors: u64 generation, u64 start, u32 CRC-32C of both. The valid one of the higher generation counts
//! start    records: u32 length, u32 CRC-32C of the record, the record
//! ```
//!
//! When most of it is of no use any more, what is left is written behind the end, and an anchor is set there. The old part is
//! punched out of the file, which is sparse: offsets only grow.

pub mod record;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FallocateFlags;

use record::{Record, SessionRecord, SetRecord, StateRecord};

/// With the version of the records.
const MAGIC: [u8; 16] = *b"image-cache  \0\0\x01";
const ANCHORS: [u64; 2] = [64, 128];
const ANCHOR_BYTES: usize = 20;
const FIRST_START: u64 = 4096;
const HEAD_BYTES: u64 = 8;

/// A set of a million images has less.
const MOST_RECORD_BYTES: u32 = 1 << 30;

/// Before so much is of no use, nothing is written anew.
const LEAST_WASTE: u64 = 1 << 20;

/// What a journal has.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub sessions: BTreeMap<u64, KeptSession>,
    /// What could not be read, for the log.
    pub faults: Vec<String>,
    /// Records are missing in the middle, so what the others say may be out of date.
    pub has_gaps: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub struct KeptSession {
    pub session: SessionRecord,
    pub restored: bool,
    pub sets: BTreeMap<u32, SetRecord>,
}

/// Why there is no journal.
#[derive(Debug, thiserror::Error)]
pub enum BadJournal {
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    #[error("it is not a journal of this version of image-cache")]
    Magic,
    #[error("it has no valid beginning")]
    Anchor,
}

#[derive(Debug)]
pub struct Journal {
    file: File,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    generation: u64,
    start: u64,
    end: u64,
    live: BTreeMap<u64, Live>,
    /// The file says what is here, and not what an earlier process had.
    settled: bool,
    /// It cannot be written any more, and says so itself.
    broken: bool,
}

/// What has to be written again when the journal is made shorter.
#[derive(Debug)]
struct Live {
    session: SessionRecord,
    restored: bool,
    sets: BTreeMap<u32, LiveSet>,
}

#[derive(Debug, Clone, Copy)]
struct LiveSet {
    /// Where its record is, with its head.
    at: u64,
    len: u64,
    state: StateRecord,
    /// The one in the record.
    written: StateRecord,
}

impl Journal {
    /// A new one in an empty file of the kernel's memory.
    pub fn new(file: File) -> io::Result<Self> {
        file.write_all_at(&MAGIC, 0)?;
        let journal = Self::at(file, FIRST_START);
        journal.state().set_anchor(&journal.file)?;
        Ok(journal)
    }

    fn at(file: File, start: u64) -> Self {
        Self {
            file,
            state: Mutex::new(State {
                generation: 1,
                start,
                end: start,
                live: BTreeMap::new(),
                settled: true,
                broken: false,
            }),
        }
    }

    /// That of an earlier process, which has nothing any more: what is to be kept of it is written anew.
    ///
    /// Until [`Self::taken_over`] the file says what it said.
    pub fn from(file: File) -> Result<(Self, Kept), BadJournal> {
        let (generation, start) = anchor(&file)?;
        let (kept, end) = read(&file, start)?;
        let end = behind(end).ok_or(BadJournal::Anchor)?;
        let journal = Self::at(file, start);
        let mut state = journal.state();
        (state.generation, state.end, state.settled) = (generation, end, false);
        drop(state);
        Ok((journal, kept))
    }

    /// What is to be kept of an earlier process is written: that, and nothing else, is what the file says now.
    pub fn taken_over(&self) {
        let mut state = self.state();
        if !state.broken {
            let compacted = state.compact(&self.file);
            state.check(&self.file, compacted);
        }
    }

    /// For the process that keeps it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many sets are kept.
    pub fn sets(&self) -> usize {
        self.state().live.values().map(|live| live.sets.len()).sum()
    }

    /// Whether sets of this session are kept.
    pub fn keeps(&self, session: u64) -> bool {
        let state = self.state();
        let live = state.live.get(&session);
        !state.broken && live.is_some_and(|live| !live.sets.is_empty())
    }

    /// The set is kept from now on.
    fn set(&self, session: &SessionRecord, set: SetRecord) {
        let (owner, number, written) = (set.session, set.number, set.state);
        let bytes = Record::Set(set).encode();
        self.change(|state, file| {
            if !state.live.contains_key(&owner) {
                state.append(file, &Record::Session(session.clone()).encode())?;
                let live = Live {
                    session: session.clone(),
                    restored: false,
                    sets: BTreeMap::new(),
                };
                state.live.insert(owner, live);
            }
            let at = state.append(file, &bytes)?;
            let set = LiveSet {
                at,
                len: state.end - at,
                state: written,
                written,
            };
            if let Some(live) = state.live.get_mut(&owner) {
                live.sets.insert(number, set);
            }
            Ok(())
        });
    }

    fn stands(&self, session: u64, number: u32, now: StateRecord) {
        self.change(|state, file| {
            let live = state.live.get_mut(&session);
            let Some(set) = live.and_then(|live| live.sets.get_mut(&number)) else {
                return Ok(());
            };
            set.state = now;
            let record = Record::State {
                session,
                number,
                state: now,
            };
            state.append(file, &record.encode()).map(drop)
        });
    }

    fn set_gone(&self, session: u64, number: u32) {
        self.change(|state, file| {
            let live = state.live.get_mut(&session);
            match live.and_then(|live| live.sets.remove(&number)) {
                Some(_) => {
                    let record = Record::SetGone { session, number };
                    state.append(file, &record.encode()).map(drop)
                }
                None => Ok(()),
            }
        });
    }

    fn session_gone(&self, session: u64) {
        self.change(|state, file| match state.live.remove(&session) {
            Some(_) => state
                .append(file, &Record::SessionGone { session }.encode())
                .map(drop),
            None => Ok(()),
        });
    }

    fn restored(&self, session: u64) {
        self.change(|state, file| {
            let Some(live) = state.live.get_mut(&session) else {
                return Ok(());
            };
            live.restored = true;
            state
                .append(file, &Record::Restored { session }.encode())
                .map(drop)
        });
    }

    fn change(&self, change: impl FnOnce(&mut State, &File) -> io::Result<()>) {
        let mut state = self.state();
        if state.broken {
            return;
        }
        let mut changed = change(&mut state, &self.file);
        if changed.is_ok() && state.is_wasteful() {
            changed = state.compact(&self.file);
        }
        state.check(&self.file, changed);
    }
}

impl State {
    /// A journal that lacks a change would have a set restored that was dropped: rather it says nothing.
    fn check(&mut self, file: &File, written: io::Result<()>) {
        let Err(e) = written else {
            return;
        };
        self.broken = true;
        // No new memory is needed for that.
        let nothing = [0; ANCHOR_BYTES];
        let cleared: io::Result<()> = ANCHORS
            .iter()
            .try_for_each(|&at| file.write_all_at(&nothing, at));
        tracing::error!(
            "the journal cannot be written: {e}. If image-cache ends before the sets here are restored, they are lost with it: \
             --keep-through-restart is off from now on{}",
            if cleared.is_ok() { "" } else { ", and what the journal says is out of date" }
        );
    }

    /// Gives where it is.
    fn append(&mut self, file: &File, record: &[u8]) -> io::Result<u64> {
        let len = u32::try_from(record.len()).ok();
        let len = len.filter(|&len| len <= MOST_RECORD_BYTES);
        let len = len.ok_or_else(|| io::Error::other("a set has too many images"))?;
        let at = self.end;
        let mut bytes = Vec::with_capacity(record.len() + 8);
        bytes.extend(len.to_le_bytes());
        bytes.extend(crc32c::crc32c(record).to_le_bytes());
        bytes.extend_from_slice(record);
        file.write_all_at(&bytes, at)?;
        self.end = at + bytes.len() as u64;
        Ok(at)
    }

    fn is_wasteful(&self) -> bool {
        let sets = self.live.values().flat_map(|live| live.sets.values());
        let used: u64 = sets.map(|set| set.len).sum();
        self.settled && self.end - self.start > LEAST_WASTE + 2 * used
    }

    fn set_anchor(&mut self, file: &File) -> io::Result<()> {
        let place = usize::from(self.generation % 2 == 0);
        let anchor = encode_anchor(self.generation, self.start);
        file.write_all_at(&anchor, ANCHORS[place])
    }

    /// Writes what is left behind the end, and begins there.
    fn compact(&mut self, file: &File) -> io::Result<()> {
        let before = self.start;
        let start = behind(self.end).ok_or(io::ErrorKind::FileTooLarge)?;
        (self.end, self.settled) = (start, true);
        let mut live = std::mem::take(&mut self.live);
        for (&session, of) in &mut live {
            self.append(file, &Record::Session(of.session.clone()).encode())?;
            if of.restored {
                self.append(file, &Record::Restored { session }.encode())?;
            }
            for (&number, set) in &mut of.sets {
                let mut record = vec![0; usize::try_from(set.len).unwrap_or(usize::MAX)];
                file.read_exact_at(&mut record, set.at)?;
                set.at = self.end;
                file.write_all_at(&record, set.at)?;
                self.end += set.len;
                if set.state != set.written {
                    let state = Record::State {
                        session,
                        number,
                        state: set.state,
                    };
                    self.append(file, &state.encode())?;
                }
            }
        }
        self.live = live;
        self.generation += 1;
        self.start = start;
        self.set_anchor(file)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let before = before.max(FIRST_START);
        Ok(rustix::fs::fallocate(file, flags, before, start - before)?)
    }
}

/// Where new records may begin that no reader of those before `end` must take for more of them: zeros are between.
fn behind(end: u64) -> Option<u64> {
    end.checked_add(HEAD_BYTES)?.checked_next_multiple_of(4096)
}

fn encode_anchor(generation: u64, start: u64) -> [u8; ANCHOR_BYTES] {
    let mut bytes = [0; ANCHOR_BYTES];
    bytes[..8].copy_from_slice(&generation.to_le_bytes());
    bytes[8..16].copy_from_slice(&start.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..16]);
    bytes[16..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn anchor(file: &File) -> Result<(u64, u64), BadJournal> {
    let mut magic = [0; MAGIC.len()];
    let read = file.read_exact_at(&mut magic, 0);
    if read.is_err() || magic != MAGIC {
        return Err(BadJournal::Magic);
    }
    let valid = ANCHORS.iter().filter_map(|&at| {
        let mut bytes = [0; ANCHOR_BYTES];
        file.read_exact_at(&mut bytes, at).ok()?;
        let (mut generation, mut start) = ([0; 8], [0; 8]);
        generation.copy_from_slice(&bytes[..8]);
        start.copy_from_slice(&bytes[8..16]);
        let (generation, start) = (u64::from_le_bytes(generation), u64::from_le_bytes(start));
        let valid = encode_anchor(generation, start) == bytes;
        let can_be = (FIRST_START..1 << 62).contains(&start);
        (valid && generation > 0 && can_be).then_some((generation, start))
    });
    valid.max().ok_or(BadJournal::Anchor)
}

/// Reads the records from `start` on; gives also the end.
fn read(file: &File, start: u64) -> Result<(Kept, u64), BadJournal> {
    let size = file.metadata()?.len();
    let mut kept = Kept::default();
    let mut at = start;
    // Of bytes that are no record: where they begin.
    let mut bad: Option<u64> = None;
    while let Some(head_end) = at.checked_add(HEAD_BYTES).filter(|&end| end <= size) {
        let mut head = [0; 8];
        file.read_exact_at(&mut head, at)?;
        let [a, b, c, d, e, f, g, h] = head;
        let (len, crc) = (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        );
        let end = head_end + u64::from(len);
        if len == 0 || len > MOST_RECORD_BYTES || end > size {
            break;
        }
        let mut bytes = vec![0; len as usize];
        file.read_exact_at(&mut bytes, head_end)?;
        if crc32c::crc32c(&bytes) == crc {
            if let Some(from) = bad.take() {
                let text = format!("{} bytes at {from} are damaged", at - from);
                kept.faults.push(text);
                kept.has_gaps = true;
            }
            match Record::decode(&bytes) {
                Ok(record) => kept.take(record, at),
                Err(e) => kept.fault(at, &e.to_string()),
            }
        } else {
            bad.get_or_insert(at);
        }
        at = end;
    }
    // What is at the end alone was being written.
    Ok((kept, at.max(size)))
}

impl Kept {
    fn fault(&mut self, at: u64, why: &str) {
        self.faults.push(format!("the record at {at}: {why}"));
        self.has_gaps = true;
    }

    fn take(&mut self, record: Record, at: u64) {
        match record {
            Record::Session(session) => {
                let number = session.number;
                let kept = KeptSession {
                    session,
                    restored: false,
                    sets: BTreeMap::new(),
                };
                self.sessions.entry(number).or_insert(kept);
            }
            Record::Set(set) => match self.sessions.get_mut(&set.session) {
                Some(session) => drop(session.sets.insert(set.number, set)),
                None => self.fault(at, "a set of a session that is not there"),
            },
            Record::State {
                session,
                number,
                state,
            } => match self.set(session, number) {
                Some(set) => set.state = state,
                None => self.fault(at, "where a set stands that is not there"),
            },
            Record::SetGone { session, number } => {
                let session = self.sessions.get_mut(&session);
                session.and_then(|session| session.sets.remove(&number));
            }
            Record::SessionGone { session } => drop(self.sessions.remove(&session)),
            Record::Restored { session } => {
                if let Some(session) = self.sessions.get_mut(&session) {
                    session.restored = true;
                }
            }
        }
    }

    fn set(&mut self, session: u64, number: u32) -> Option<&mut SetRecord> {
        self.sessions.get_mut(&session)?.sets.get_mut(&number)
    }
}

/// A session's part of the journal.
#[derive(Debug)]
pub struct Ledger {
    journal: Arc<Journal>,
    session: SessionRecord,
    gone: AtomicBool,
}

impl Ledger {
    pub fn new(journal: &Arc<Journal>, session: SessionRecord) -> Arc<Self> {
        Arc::new(Self {
            journal: journal.clone(),
            session,
            gone: AtomicBool::new(false),
        })
    }

    /// See [`SessionRecord::number`].
    pub fn session(&self) -> u64 {
        self.session.number
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    /// The set is kept from now on.
    pub fn set(&self, set: SetRecord) {
        if !self.is_gone() {
            self.journal.set(&self.session, set);
        }
    }

    /// Where a set that is kept stands now.
    pub fn stands(&self, number: u32, state: StateRecord) {
        self.journal.stands(self.session.number, number, state);
    }

    pub fn set_gone(&self, number: u32) {
        self.journal.set_gone(self.session.number, number);
    }

    /// It is in the store no more.
    pub fn session_gone(&self) {
        self.gone.store(true, Ordering::Release);
        self.journal.session_gone(self.session.number);
    }

    pub fn restored(&self) {
        self.journal.restored(self.session.number);
    }

    /// Whether its sets are there after a restart.
    pub fn keeps(&self) -> bool {
        self.journal.keeps(self.session.number)
    }
}

#[cfg(test)]
mod tests;
