//! The records of the journal, and their bytes.
//!
//! They are ours, of an earlier process, perhaps of another version. They are read like a peer's bytes all the same: nothing panics,
//! and no count is believed beyond the bytes that are there.
//!
//! A number is a varint (LEB128), a text its length and its bytes. The first byte is the kind of record.

use crate::store::memory::arena::Extent;

/// A session, from its first set that is kept on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionRecord {
    /// Order of arrival; names it in the other records.
    pub number: u64,
    pub name: String,
    pub key: u64,
    pub proxy: u64,
    pub opening: u64,
    pub peer: String,
    /// Seconds since 1970.
    pub began: u64,
}

/// A set with all its images: what does not change any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetRecord {
    pub session: u64,
    pub number: u32,
    pub snapshot: String,
    pub parent: Option<u32>,
    pub images: u32,
    pub bytes: u64,
    pub rounds: u32,
    /// See `Digests`; 0 without checksums.
    pub digest: u64,
    pub regions: Vec<RegionRecord>,
    pub files: Vec<FileRecord>,
    pub state: StateRecord,
}

/// Memory that images of a set are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionRecord {
    pub extent: Extent,
    /// It is charged as a whole.
    pub held: bool,
}

/// An image: its name, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRecord {
    pub name: String,
    /// Bytes and CRC-32C, as they came.
    pub digest: Option<(u64, u32)>,
    pub pieces: Vec<PieceRecord>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PieceRecord {
    /// Place in the list of the set's regions.
    pub region: u32,
    pub start: u64,
    pub len: u64,
}

/// Where a set stands. `store::set::kept` gives the numbers of phases, and says that no kind is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StateRecord {
    pub phase: u8,
    pub dialect: u8,
    pub kind: u8,
    /// To a restore: 0 no, 1 under way, 2 in doubt, 3 restored.
    pub given: u8,
    pub gated: bool,
    pub gated_late: bool,
    pub followed: bool,
    pub in_doubt: bool,
    pub source_doubts: bool,
    pub decided: bool,
    /// A restore takes the memory along.
    pub taken: bool,
    pub lost: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    Session(SessionRecord),
    Set(SetRecord),
    State {
        session: u64,
        number: u32,
        state: StateRecord,
    },
    /// The set is not kept any more.
    SetGone {
        session: u64,
        number: u32,
    },
    SessionGone {
        session: u64,
    },
    /// It was restored, and is kept all the same.
    Restored {
        session: u64,
    },
}

/// Why a record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadRecord {
    #[error("it ends too early")]
    Short,
    #[error("it has bytes behind its end")]
    Long,
    #[error("a number in it is too large")]
    Number,
    #[error("a text in it is not UTF-8")]
    Text,
    #[error("there is no kind {0} of records")]
    Kind(u8),
}

const SESSION: u8 = 1;
const SET: u8 = 2;
const STATE: u8 = 3;
const SET_GONE: u8 = 4;
const SESSION_GONE: u8 = 5;
const RESTORED: u8 = 6;

impl Record {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Out(Vec::new());
        match self {
            Self::Session(session) => {
                out.0.push(SESSION);
                out.number(session.number);
                out.text(&session.name);
                out.number(session.key);
                out.number(session.proxy);
                out.number(session.opening);
                out.text(&session.peer);
                out.number(session.began);
            }
            Self::Set(set) => out.set(set),
            Self::State {
                session,
                number,
                state,
            } => {
                out.0.push(STATE);
                out.number(*session);
                out.number((*number).into());
                out.state(*state);
            }
            Self::SetGone { session, number } => {
                out.0.push(SET_GONE);
                out.number(*session);
                out.number((*number).into());
            }
            Self::SessionGone { session } => {
                out.0.push(SESSION_GONE);
                out.number(*session);
            }
            Self::Restored { session } => {
                out.0.push(RESTORED);
                out.number(*session);
            }
        }
        out.0
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, BadRecord> {
        let mut fields = Fields(bytes);
        let record = match fields.byte()? {
            SESSION => Self::Session(SessionRecord {
                number: fields.number()?,
                name: fields.text()?,
                key: fields.number()?,
                proxy: fields.number()?,
                opening: fields.number()?,
                peer: fields.text()?,
                began: fields.number()?,
            }),
            SET => Self::Set(fields.set()?),
            STATE => Self::State {
                session: fields.number()?,
                number: fields.small()?,
                state: fields.state()?,
            },
            SET_GONE => Self::SetGone {
                session: fields.number()?,
                number: fields.small()?,
            },
            SESSION_GONE => Self::SessionGone {
                session: fields.number()?,
            },
            RESTORED => Self::Restored {
                session: fields.number()?,
            },
            kind => return Err(BadRecord::Kind(kind)),
        };
        match fields.0.is_empty() {
            true => Ok(record),
            false => Err(BadRecord::Long),
        }
    }
}

struct Out(Vec<u8>);

impl Out {
    fn number(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push((n & 0x7f) as u8 | 0x80);
            n >>= 7;
        }
        self.0.push((n & 0x7f) as u8);
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.extend_from_slice(text.as_bytes());
    }

    fn state(&mut self, state: StateRecord) {
        self.0
            .extend([state.phase, state.dialect, state.kind, state.given]);
        let flags = [
            state.gated,
            state.gated_late,
            state.followed,
            state.in_doubt,
            state.source_doubts,
            state.decided,
            state.taken,
            state.lost,
        ];
        let flags = flags.iter().rev();
        self.0
            .push(flags.fold(0, |all, &flag| all << 1 | u8::from(flag)));
    }

    fn set(&mut self, set: &SetRecord) {
        self.0.push(SET);
        self.number(set.session);
        self.number(set.number.into());
        self.text(&set.snapshot);
        // 0 is no number of a set.
        self.number(set.parent.unwrap_or(0).into());
        self.number(set.images.into());
        self.number(set.bytes);
        self.number(set.rounds.into());
        self.number(set.digest);
        self.state(set.state);
        self.number(set.regions.len() as u64);
        for region in &set.regions {
            self.number(region.extent.offset);
            self.number(region.extent.len << 1 | u64::from(region.held));
        }
        self.number(set.files.len() as u64);
        for file in &set.files {
            self.text(&file.name);
            self.number(file.digest.is_some().into());
            if let Some((bytes, crc)) = file.digest {
                self.number(bytes);
                self.0.extend(crc.to_le_bytes());
            }
            self.number(file.pieces.len() as u64);
            for piece in &file.pieces {
                self.number(piece.region.into());
                self.number(piece.start);
                self.number(piece.len);
            }
        }
    }
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take(&mut self, n: usize) -> Result<&[u8], BadRecord> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(BadRecord::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, BadRecord> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Result<u64, BadRecord> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return Err(BadRecord::Number);
            }
            n |= bits << shift;
            if byte < 0x80 {
                return Ok(n);
            }
        }
        Err(BadRecord::Number)
    }

    fn small(&mut self) -> Result<u32, BadRecord> {
        self.number()?.try_into().map_err(|_| BadRecord::Number)
    }

    /// So many things follow, each of so many bytes at least.
    fn count(&mut self, least: usize) -> Result<usize, BadRecord> {
        let count = usize::try_from(self.number()?).map_err(|_| BadRecord::Number)?;
        match count <= self.0.len() / least {
            true => Ok(count),
            false => Err(BadRecord::Short),
        }
    }

    fn text(&mut self) -> Result<String, BadRecord> {
        let len = self.count(1)?;
        let text = std::str::from_utf8(self.take(len)?);
        Ok(text.map_err(|_| BadRecord::Text)?.to_owned())
    }

    fn state(&mut self) -> Result<StateRecord, BadRecord> {
        let (phase, dialect) = (self.byte()?, self.byte()?);
        let (kind, given) = (self.byte()?, self.byte()?);
        let flags = self.byte()?;
        let flag = |bit: u8| flags >> bit & 1 == 1;
        Ok(StateRecord {
            phase,
            dialect,
            kind,
            given,
            gated: flag(0),
            gated_late: flag(1),
            followed: flag(2),
            in_doubt: flag(3),
            source_doubts: flag(4),
            decided: flag(5),
            taken: flag(6),
            lost: flag(7),
        })
    }

    fn set(&mut self) -> Result<SetRecord, BadRecord> {
        let session = self.number()?;
        let number = self.small()?;
        let snapshot = self.text()?;
        let parent = Some(self.small()?).filter(|&parent| parent != 0);
        let images = self.small()?;
        let bytes = self.number()?;
        let rounds = self.small()?;
        let digest = self.number()?;
        let state = self.state()?;
        let count = self.count(2)?;
        let mut regions = Vec::with_capacity(count);
        for _ in 0..count {
            let offset = self.number()?;
            let len = self.number()?;
            regions.push(RegionRecord {
                extent: Extent {
                    offset,
                    len: len >> 1,
                },
                held: len & 1 == 1,
            });
        }
        // No vector is made larger than what its elements can be at most: an image has three bytes or more.
        let count = self.count(3)?;
        let mut files = Vec::new();
        for _ in 0..count {
            files.push(self.file()?);
        }
        Ok(SetRecord {
            session,
            number,
            snapshot,
            parent,
            images,
            bytes,
            rounds,
            digest,
            regions,
            files,
            state,
        })
    }

    fn file(&mut self) -> Result<FileRecord, BadRecord> {
        let name = self.text()?;
        let digest = match self.number()? {
            0 => None,
            1 => {
                let bytes = self.number()?;
                let mut crc = [0; 4];
                crc.copy_from_slice(self.take(4)?);
                Some((bytes, u32::from_le_bytes(crc)))
            }
            _ => return Err(BadRecord::Number),
        };
        let count = self.count(3)?;
        let mut pieces = Vec::with_capacity(count);
        for _ in 0..count {
            pieces.push(PieceRecord {
                region: self.small()?,
                start: self.number()?,
                len: self.number()?,
            });
        }
        Ok(FileRecord {
            name,
            digest,
            pieces,
        })
    }
}
