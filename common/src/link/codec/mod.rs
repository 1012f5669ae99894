//! Frames and messages of the link as bytes. No I/O in here.
//!
//! Numbers are little-endian and written one by one; type 0 is invalid; a reserved field that
//! is not zero is refused, so that a later version can give it a meaning.
//!
//! A new message is a variant in `message.rs`, its number and group in `kind.rs`, its payload in the file of its group
//! (`set`, `image`, `round`, `session`), and a line of golden bytes in the tests.

use bytes::{BufMut, BytesMut};

use fields::Fields;
use kind::Group;

mod error;
mod fields;
mod frame_format;
mod header;
mod image;
mod kind;
mod message;
mod round;
mod session;
mod set;

pub use error::LinkError;
pub use frame_format::FrameFormat;
pub use header::{Header, CHECKED_HEADER_BYTES, HEADER_BYTES};
pub use message::{CommitOn, Message, RoundPages, SetNumber, StreamNumber};

impl Message {
    /// Appends the whole frame.
    pub fn encode(&self, out: &mut BytesMut) {
        self.encode_with(out, FrameFormat::Plain);
    }

    /// Appends the whole frame in this format.
    pub fn encode_with(&self, out: &mut BytesMut, format: FrameFormat) {
        let (kind, channel) = kind::of(self);
        let start = out.len();
        Header {
            kind,
            length: 0,
            channel,
            sequence: 0,
        }
        .encode(out);
        let head_bytes = format.head_bytes();
        out.put_bytes(0, head_bytes - HEADER_BYTES);
        match kind::group(kind) {
            Some(Group::Set) => set::encode(self, out),
            Some(Group::Image) => image::encode(self, out),
            Some(Group::Round) => round::encode(self, out),
            Some(Group::Session) => session::encode(self, out),
            None => {}
        }
        // Names and reasons are bounded, so a payload is far below u32::MAX.
        let length = u32::try_from(out.len() - start - head_bytes).unwrap_or(u32::MAX);
        out[start + 4..start + 8].copy_from_slice(&length.to_le_bytes());
        format.seal(&mut out[start..]);
    }

    /// Decodes the payload of a frame that is not image data.
    pub fn decode(header: Header, payload: &[u8]) -> Result<Self, LinkError> {
        let mut fields = Fields {
            kind: header.kind,
            rest: payload,
        };
        let message = match kind::group(header.kind) {
            Some(Group::Set) => set::decode(header.channel, &mut fields)?,
            Some(Group::Image) => image::decode(header.channel, &mut fields)?,
            Some(Group::Round) => round::decode(header.channel, &mut fields)?,
            Some(Group::Session) => session::decode(header.channel, &mut fields)?,
            None => return Err(LinkError::UnknownType(header.kind)),
        };
        match fields.rest.is_empty() {
            true => Ok(message),
            false => Err(LinkError::Trailing(header.kind)),
        }
    }
}

#[cfg(test)]
mod tests;
