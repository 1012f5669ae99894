//! Frames and messages of the link as bytes. No I/O in here.
//!
//! Numbers are little-endian and written one by one; type 0 is invalid; a reserved field that
//! is not zero is refused, so that a later version can give it a meaning.

use bytes::{Buf, BufMut, BytesMut};

use crate::criu::dialect::Dialect;
use crate::criu::inventory::SetKind;
use crate::criu::page_server::Layout;
use crate::image::{ImageName, NameError, SnapshotId};
use crate::link::MAX_REASON_BYTES;
use crate::text::is_unseen;

mod header;
mod kind;

pub use header::{head_bytes, seal, Header, CHECKED_HEADER_BYTES, HEADER_BYTES};

/// A size that is not known before the end of the image.
const STREAMED: u64 = u64::MAX;

/// A peer's bytes that are not this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("unknown frame type {0:#04x}")]
    UnknownType(u8),
    #[error("a frame of type {kind:#04x} announces {length} bytes, the limit is {limit}")]
    TooLong { kind: u8, length: u32, limit: u32 },
    #[error("a reserved field of a frame of type {0:#04x} is not zero")]
    Reserved(u8),
    #[error("the payload of a frame of type {0:#04x} is too short")]
    Short(u8),
    #[error("the payload of a frame of type {0:#04x} has bytes too many")]
    Trailing(u8),
    #[error("a text in a frame of type {0:#04x} is not UTF-8")]
    Utf8(u8),
    #[error("bad name in a frame of type {kind:#04x}: {source}")]
    Name { kind: u8, source: NameError },
    #[error("a {0} is not possible")]
    Pages(&'static str),
    #[error("a frame's header was damaged on its way: wrong checksum")]
    HeaderCheck,
    #[error("a frame of type {0:#04x} was damaged on its way: wrong checksum")]
    PayloadCheck(u8),
    #[error("value {value} of `{field}` is not defined")]
    Value { field: &'static str, value: u8 },
}

/// Number of a set within its connection; chosen by the proxy, never 0, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetNumber(pub u32);

/// Number of an image transfer within its connection; chosen by the proxy, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamNumber(pub u32);

/// What a merged page server round did, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundPages {
    /// Came, and were not there before.
    pub new: u64,
    /// Came in the place of older ones.
    pub replaced: u64,
    /// Stayed as they were.
    pub unchanged: u64,
    /// No pagemap names them any more.
    pub dropped: u64,
}

/// Every message but image data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// proxy: a CRIU run begins to write a set.
    SetOpen {
        set: SetNumber,
        gated: bool,
        dialect: Dialect,
        /// The set whose pages this one may refer to.
        parent: Option<SetNumber>,
        snapshot: SnapshotId,
    },
    /// proxy: which dialect a RemoteUnknown set turned out to use.
    SetDialect { set: SetNumber, dialect: Dialect },
    /// proxy: hand out no inventory of this set before its commit.
    SetGate { set: SetNumber },
    /// proxy: the inventory ended and no image is open.
    SetComplete {
        set: SetNumber,
        images: u32,
        bytes: u64,
    },
    /// proxy: CRIU waits in its post-dump script, the tasks are frozen. Is it all there?
    Prepare {
        set: SetNumber,
        images: u32,
        bytes: u64,
        /// Of all its images, see [`super::digest`]; 0 without checksums.
        digest: u64,
    },
    /// proxy: PREPARED arrived and CRIU is told to go on; the set may be restored.
    Commit { set: SetNumber },
    /// proxy: an ungated set's CRIU has finished.
    SetClose { set: SetNumber },
    /// proxy: the set is complete, and whether its process was killed is not known.
    SetDoubt { set: SetNumber, reason: String },
    /// Either side: this set will not become whole.
    SetAbort { set: SetNumber, reason: String },

    /// proxy: an image begins.
    ImageOpen {
        stream: StreamNumber,
        set: SetNumber,
        path: ImageName,
        /// CRIU's open mode; O_APPEND (0x400) continues the image of that name.
        mode: u32,
        /// `None`: streamed, known at its end.
        size: Option<u64>,
    },
    /// proxy: the image is over; `total` bytes were sent for this stream.
    ImageEnd {
        stream: StreamNumber,
        total: u64,
        /// CRC-32C of those bytes; 0 without checksums.
        digest: u32,
    },
    /// proxy: the image will not be whole.
    ImageAbort {
        stream: StreamNumber,
        reason: String,
    },

    /// proxy: a page server round begins (one connection of a CRIU to the page server).
    /// What it sends follows as image data, byte by byte.
    RoundOpen {
        stream: StreamNumber,
        set: SetNumber,
        page_bytes: u32,
        /// Of the requests' headers.
        layout: Layout,
    },
    /// proxy: CRIU said CLOSE; so many entries, and pages that are present, were sent.
    RoundEnd {
        stream: StreamNumber,
        entries: u64,
        pages: u64,
    },

    /// Either side: this connection ends here on purpose. The cache answers it.
    Goodbye { reason: String },
    /// Either side: so many bytes of what you sent on this connection have arrived.
    Received { connection: u16, total: u64 },

    /// proxy: the session's first set will have about so many bytes; make memory ready for them.
    Reserve { bytes: u64 },
    /// cache: answers Reserve; so many are ready.
    Reserved { bytes: u64 },

    /// cache: answers a gated SetOpen and SetGate.
    SetGated { set: SetNumber },
    /// cache: answers SetComplete; every image of the set is held.
    SetStored { set: SetNumber, kind: SetKind },
    /// cache: the set is whole, and every image is in memory; it waits for COMMIT.
    Prepared { set: SetNumber },
    /// cache: the set cannot be prepared.
    PrepareRefused { set: SetNumber, reason: String },
    /// cache: the image is whole and held.
    ImageAck { stream: StreamNumber, total: u64 },
    /// cache: the round is merged; what became of its pages.
    RoundAck {
        stream: StreamNumber,
        pages: RoundPages,
    },
    /// cache: the image, or round, cannot be held.
    ImageRefused {
        stream: StreamNumber,
        reason: String,
    },
}

impl Message {
    /// Appends the whole frame.
    pub fn encode(&self, out: &mut BytesMut) {
        self.encode_with(out, false);
    }

    /// Appends the whole frame, with checksums or without.
    pub fn encode_with(&self, out: &mut BytesMut, checks: bool) {
        let (kind, channel) = self.kind_and_channel();
        let start = out.len();
        Header {
            kind,
            length: 0,
            channel,
            sequence: 0,
        }
        .encode(out);
        let head_bytes = head_bytes(checks);
        out.put_bytes(0, head_bytes - HEADER_BYTES);
        self.encode_payload(out);
        // Names and reasons are bounded, so a payload is far below u32::MAX.
        let length = u32::try_from(out.len() - start - head_bytes).unwrap_or(u32::MAX);
        out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
        if checks {
            seal(&mut out[start..]);
        }
    }

    fn kind_and_channel(&self) -> (u8, u32) {
        match self {
            Self::SetOpen { set, .. } => (kind::SET_OPEN, set.0),
            Self::SetDialect { set, .. } => (kind::SET_DIALECT, set.0),
            Self::SetGate { set } => (kind::SET_GATE, set.0),
            Self::SetComplete { set, .. } => (kind::SET_COMPLETE, set.0),
            Self::Prepare { set, .. } => (kind::PREPARE, set.0),
            Self::Commit { set } => (kind::COMMIT, set.0),
            Self::SetClose { set } => (kind::SET_CLOSE, set.0),
            Self::SetAbort { set, .. } => (kind::SET_ABORT, set.0),
            Self::SetDoubt { set, .. } => (kind::SET_DOUBT, set.0),
            Self::ImageOpen { stream, .. } => (kind::IMAGE_OPEN, stream.0),
            Self::ImageEnd { stream, .. } => (kind::IMAGE_END, stream.0),
            Self::ImageAbort { stream, .. } => (kind::IMAGE_ABORT, stream.0),
            Self::RoundOpen { stream, .. } => (kind::ROUND_OPEN, stream.0),
            Self::RoundEnd { stream, .. } => (kind::ROUND_END, stream.0),
            Self::RoundAck { stream, .. } => (kind::ROUND_ACK, stream.0),
            Self::Goodbye { .. } => (kind::GOODBYE, 0),
            Self::Received { connection, .. } => (kind::RECEIVED, u32::from(*connection)),
            Self::Reserve { .. } => (kind::RESERVE, 0),
            Self::Reserved { .. } => (kind::RESERVED, 0),
            Self::SetGated { set } => (kind::SET_GATED, set.0),
            Self::SetStored { set, .. } => (kind::SET_STORED, set.0),
            Self::Prepared { set } => (kind::PREPARED, set.0),
            Self::PrepareRefused { set, .. } => (kind::PREPARE_REFUSED, set.0),
            Self::ImageAck { stream, .. } => (kind::IMAGE_ACK, stream.0),
            Self::ImageRefused { stream, .. } => (kind::IMAGE_REFUSED, stream.0),
        }
    }

    fn encode_payload(&self, out: &mut BytesMut) {
        match self {
            Self::SetOpen {
                gated,
                dialect,
                parent,
                snapshot,
                ..
            } => {
                out.put_u8(u8::from(*gated));
                out.put_u8(dialect_code(*dialect));
                out.put_u16_le(0);
                out.put_u32_le(parent.map_or(0, |p| p.0));
                put_text(out, snapshot.as_str());
            }
            Self::SetDialect { dialect, .. } => out.put_u8(dialect_code(*dialect)),
            Self::SetComplete { images, bytes, .. } => {
                out.put_u32_le(*images);
                out.put_u64_le(*bytes);
            }
            Self::Prepare {
                images,
                bytes,
                digest,
                ..
            } => {
                out.put_u32_le(*images);
                out.put_u64_le(*bytes);
                out.put_u64_le(*digest);
            }
            Self::ImageOpen {
                set,
                path,
                mode,
                size,
                ..
            } => {
                out.put_u32_le(set.0);
                out.put_u32_le(*mode);
                out.put_u64_le(size.unwrap_or(STREAMED));
                put_text(out, path.as_str());
            }
            Self::ImageEnd { total, digest, .. } => {
                out.put_u64_le(*total);
                out.put_u32_le(*digest);
            }
            Self::ImageAck { total, .. } | Self::Received { total, .. } => {
                out.put_u64_le(*total);
            }
            Self::Reserve { bytes } | Self::Reserved { bytes } => out.put_u64_le(*bytes),
            Self::RoundOpen {
                set,
                page_bytes,
                layout,
                ..
            } => {
                out.put_u32_le(set.0);
                out.put_u32_le(*page_bytes);
                out.put_u8(match layout {
                    Layout::Bytes24 => 1,
                    Layout::Bytes32 => 2,
                });
            }
            Self::RoundEnd { entries, pages, .. } => {
                out.put_u64_le(*entries);
                out.put_u64_le(*pages);
            }
            Self::RoundAck { pages, .. } => {
                for n in [pages.new, pages.replaced, pages.unchanged, pages.dropped] {
                    out.put_u64_le(n);
                }
            }
            Self::SetStored { kind, .. } => out.put_u8(kind_code(*kind)),
            Self::SetAbort { reason, .. }
            | Self::SetDoubt { reason, .. }
            | Self::ImageAbort { reason, .. }
            | Self::Goodbye { reason }
            | Self::PrepareRefused { reason, .. }
            | Self::ImageRefused { reason, .. } => put_text(out, cut(reason)),
            Self::SetGate { .. }
            | Self::Commit { .. }
            | Self::SetClose { .. }
            | Self::SetGated { .. }
            | Self::Prepared { .. } => {}
        }
    }

    /// Decodes the payload of a frame that is not image data.
    pub fn decode(header: Header, payload: &[u8]) -> Result<Self, LinkError> {
        let mut fields = Fields {
            kind: header.kind,
            rest: payload,
        };
        let set = SetNumber(header.channel);
        let stream = StreamNumber(header.channel);
        let message = match header.kind {
            kind::SET_OPEN => {
                let gated = match fields.u8()? {
                    0 => false,
                    1 => true,
                    value => {
                        return Err(LinkError::Value {
                            field: "gated",
                            value,
                        })
                    }
                };
                let dialect = dialect_of(fields.u8()?)?;
                if fields.u16()? != 0 {
                    return Err(LinkError::Reserved(header.kind));
                }
                let parent = fields.u32()?;
                Self::SetOpen {
                    set,
                    gated,
                    dialect,
                    parent: (parent != 0).then_some(SetNumber(parent)),
                    snapshot: fields.name(SnapshotId::new)?,
                }
            }
            kind::SET_DIALECT => Self::SetDialect {
                set,
                dialect: dialect_of(fields.u8()?)?,
            },
            kind::SET_GATE => Self::SetGate { set },
            kind::SET_COMPLETE => Self::SetComplete {
                set,
                images: fields.u32()?,
                bytes: fields.u64()?,
            },
            kind::PREPARE => Self::Prepare {
                set,
                images: fields.u32()?,
                bytes: fields.u64()?,
                digest: fields.u64()?,
            },
            kind::COMMIT => Self::Commit { set },
            kind::SET_CLOSE => Self::SetClose { set },
            kind::SET_ABORT => Self::SetAbort {
                set,
                reason: fields.text()?,
            },
            kind::SET_DOUBT => Self::SetDoubt {
                set,
                reason: fields.text()?,
            },
            kind::IMAGE_OPEN => {
                let set = SetNumber(fields.u32()?);
                let mode = fields.u32()?;
                let size = fields.u64()?;
                Self::ImageOpen {
                    stream,
                    set,
                    mode,
                    size: (size != STREAMED).then_some(size),
                    path: fields.name(ImageName::new)?,
                }
            }
            kind::IMAGE_END => Self::ImageEnd {
                stream,
                total: fields.u64()?,
                digest: fields.u32()?,
            },
            kind::IMAGE_ABORT => Self::ImageAbort {
                stream,
                reason: fields.text()?,
            },
            kind::ROUND_OPEN => Self::RoundOpen {
                stream,
                set: SetNumber(fields.u32()?),
                page_bytes: match fields.u32()? {
                    n @ (0x1000 | 0x4000 | 0x10000) => n,
                    _ => return Err(LinkError::Pages("page size")),
                },
                layout: match fields.u8()? {
                    1 => Layout::Bytes24,
                    2 => Layout::Bytes32,
                    value => {
                        let field = "layout";
                        return Err(LinkError::Value { field, value });
                    }
                },
            },
            kind::ROUND_END => Self::RoundEnd {
                stream,
                entries: fields.u64()?,
                pages: fields.u64()?,
            },
            kind::ROUND_ACK => Self::RoundAck {
                stream,
                pages: RoundPages {
                    new: fields.u64()?,
                    replaced: fields.u64()?,
                    unchanged: fields.u64()?,
                    dropped: fields.u64()?,
                },
            },
            kind::GOODBYE => Self::Goodbye {
                reason: fields.text()?,
            },
            kind::RECEIVED => Self::Received {
                connection: u16::try_from(header.channel)
                    .map_err(|_| LinkError::Reserved(header.kind))?,
                total: fields.u64()?,
            },
            kind::RESERVE | kind::RESERVED if header.channel != 0 => {
                return Err(LinkError::Reserved(header.kind))
            }
            kind::RESERVE => Self::Reserve {
                bytes: fields.u64()?,
            },
            kind::RESERVED => Self::Reserved {
                bytes: fields.u64()?,
            },
            kind::SET_GATED => Self::SetGated { set },
            kind::SET_STORED => Self::SetStored {
                set,
                kind: kind_of_code(fields.u8()?)?,
            },
            kind::PREPARED => Self::Prepared { set },
            kind::PREPARE_REFUSED => Self::PrepareRefused {
                set,
                reason: fields.text()?,
            },
            kind::IMAGE_ACK => Self::ImageAck {
                stream,
                total: fields.u64()?,
            },
            kind::IMAGE_REFUSED => Self::ImageRefused {
                stream,
                reason: fields.text()?,
            },
            other => return Err(LinkError::UnknownType(other)),
        };
        match fields.rest.is_empty() {
            true => Ok(message),
            false => Err(LinkError::Trailing(header.kind)),
        }
    }
}

/// What is left of a payload.
struct Fields<'a> {
    kind: u8,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], LinkError> {
        let (head, tail) = self
            .rest
            .split_at_checked(n)
            .ok_or(LinkError::Short(self.kind))?;
        self.rest = tail;
        Ok(head)
    }
    fn u8(&mut self) -> Result<u8, LinkError> {
        Ok(self.take(1)?.get_u8())
    }
    fn u16(&mut self) -> Result<u16, LinkError> {
        Ok(self.take(2)?.get_u16_le())
    }
    fn u32(&mut self) -> Result<u32, LinkError> {
        Ok(self.take(4)?.get_u32_le())
    }
    fn u64(&mut self) -> Result<u64, LinkError> {
        Ok(self.take(8)?.get_u64_le())
    }
    fn str(&mut self) -> Result<&'a str, LinkError> {
        let length = usize::from(self.u16()?);
        std::str::from_utf8(self.take(length)?).map_err(|_| LinkError::Utf8(self.kind))
    }
    /// A reason: a peer's words, made harmless for a log line.
    fn text(&mut self) -> Result<String, LinkError> {
        let clean = |c: char| if is_unseen(c) { '?' } else { c };
        Ok(cut(self.str()?).chars().map(clean).collect())
    }
    fn name<T>(&mut self, new: impl Fn(&str) -> Result<T, NameError>) -> Result<T, LinkError> {
        let kind = self.kind;
        new(self.str()?).map_err(|source| LinkError::Name { kind, source })
    }
}

fn put_text(out: &mut BytesMut, text: &str) {
    // Names have at most 4095 bytes and reasons MAX_REASON_BYTES.
    out.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
    out.put_slice(text.as_bytes());
}

fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

fn dialect_code(dialect: Dialect) -> u8 {
    match dialect {
        Dialect::Stream => 1,
        Dialect::RemoteUnknown => 2,
        Dialect::RemoteSocket => 3,
        Dialect::RemotePipe => 4,
        Dialect::PageServer => 5,
    }
}

fn dialect_of(value: u8) -> Result<Dialect, LinkError> {
    match value {
        1 => Ok(Dialect::Stream),
        2 => Ok(Dialect::RemoteUnknown),
        3 => Ok(Dialect::RemoteSocket),
        4 => Ok(Dialect::RemotePipe),
        5 => Ok(Dialect::PageServer),
        value => Err(LinkError::Value {
            field: "dialect",
            value,
        }),
    }
}

fn kind_code(kind: SetKind) -> u8 {
    match kind {
        SetKind::Dump => 1,
        SetKind::PreDump => 2,
        SetKind::Unclear => 3,
    }
}

fn kind_of_code(value: u8) -> Result<SetKind, LinkError> {
    match value {
        1 => Ok(SetKind::Dump),
        2 => Ok(SetKind::PreDump),
        3 => Ok(SetKind::Unclear),
        value => Err(LinkError::Value {
            field: "kind",
            value,
        }),
    }
}

#[cfg(test)]
mod tests;
