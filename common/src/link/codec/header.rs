//! Frame headers, and their checksums.

use bytes::{Buf, BufMut, BytesMut};
use crc32c::crc32c;

use crate::link::codec::error::LinkError;
use crate::link::codec::kind;
use crate::link::codec::message::StreamNumber;
use crate::link::{MAX_CONTROL_BYTES, MAX_DATA_BYTES};

/// Length of a header without checks.
pub const HEADER_BYTES: usize = 16;

/// A header and its checksums: CRC-32C of the header, CRC-32C of the payload.
pub const CHECKED_HEADER_BYTES: usize = HEADER_BYTES + 8;

/// A checked frame header: the type is known and the length within its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub(super) kind: u8,
    pub length: u32,
    /// Set or stream number, by type.
    pub(super) channel: u32,
    /// Image data: the frame's number within its image, modulo 2^32. Else 0.
    pub sequence: u32,
}

impl Header {
    /// Header of an image data frame of `length` bytes.
    pub fn data(stream: StreamNumber, sequence: u32, length: u32) -> Self {
        debug_assert!(length > 0 && length <= MAX_DATA_BYTES);
        Self {
            kind: kind::IMAGE_DATA,
            length,
            channel: stream.0,
            sequence,
        }
    }

    /// The stream, if this is an image data frame.
    pub fn as_data(&self) -> Option<StreamNumber> {
        (self.kind == kind::IMAGE_DATA).then_some(StreamNumber(self.channel))
    }

    pub fn encode(&self, out: &mut BytesMut) {
        out.put_u8(self.kind);
        out.put_u8(0);
        out.put_u16_le(0);
        out.put_u32_le(self.length);
        out.put_u32_le(self.channel);
        out.put_u32_le(self.sequence);
    }

    /// Decodes a header that has checksums; gives the one that the payload must have.
    pub fn decode_checked(bytes: &[u8; CHECKED_HEADER_BYTES]) -> Result<(Self, u32), LinkError> {
        let Some((header, mut checksums)) = bytes.split_first_chunk() else {
            unreachable!("it is longer than that")
        };
        if crc32c(header) != checksums.get_u32_le() {
            return Err(LinkError::HeaderCheck);
        }
        Ok((Self::decode(header)?, checksums.get_u32_le()))
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, LinkError> {
        let mut bytes = &bytes[..];
        let kind = bytes.get_u8();
        let flags = bytes.get_u8();
        let reserved = bytes.get_u16_le();
        let length = bytes.get_u32_le();
        let channel = bytes.get_u32_le();
        let sequence = bytes.get_u32_le();
        if !kind::ALL.contains(&kind) {
            return Err(LinkError::UnknownType(kind));
        }
        let numbered = kind == kind::IMAGE_DATA;
        if flags != 0 || reserved != 0 || (sequence != 0 && !numbered) {
            return Err(LinkError::Reserved(kind));
        }
        let limit = match kind {
            kind::IMAGE_DATA => MAX_DATA_BYTES,
            _ => MAX_CONTROL_BYTES,
        };
        if length > limit {
            return Err(LinkError::TooLong {
                kind,
                length,
                limit,
            });
        }
        if kind == kind::IMAGE_DATA && length == 0 {
            return Err(LinkError::Short(kind));
        }
        Ok(Self {
            kind,
            length,
            channel,
            sequence,
        })
    }
}
