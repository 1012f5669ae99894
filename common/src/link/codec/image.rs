//! Frames about an image. Its data are no message: only their header is decoded.

use bytes::{BufMut, BytesMut};

use crate::image::ImageName;
use crate::link::codec::error::LinkError;
use crate::link::codec::fields::{put_reason, put_text, Fields};
use crate::link::codec::kind;
use crate::link::codec::message::{Message, SetNumber, StreamNumber};

/// A size that is not known before the end of the image.
const STREAMED: u64 = u64::MAX;

pub fn encode(message: &Message, out: &mut BytesMut) {
    match message {
        Message::ImageOpen {
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
        Message::ImageEnd { total, digest, .. } => {
            out.put_u64_le(*total);
            out.put_u32_le(*digest);
        }
        Message::ImageAck { total, .. } => out.put_u64_le(*total),
        Message::ImageAbort { reason, .. } | Message::ImageRefused { reason, .. } => {
            put_reason(out, reason);
        }
        _ => {}
    }
}

/// `channel`: of the header.
pub fn decode(channel: u32, fields: &mut Fields<'_>) -> Result<Message, LinkError> {
    let stream = StreamNumber(channel);
    Ok(match fields.kind {
        kind::IMAGE_OPEN => {
            let set = SetNumber(fields.u32()?);
            let mode = fields.u32()?;
            let size = fields.u64()?;
            Message::ImageOpen {
                stream,
                set,
                mode,
                size: (size != STREAMED).then_some(size),
                path: fields.name(ImageName::new)?,
            }
        }
        kind::IMAGE_END => Message::ImageEnd {
            stream,
            total: fields.u64()?,
            digest: fields.u32()?,
        },
        kind::IMAGE_ABORT => Message::ImageAbort {
            stream,
            reason: fields.reason()?,
        },
        kind::IMAGE_ACK => Message::ImageAck {
            stream,
            total: fields.u64()?,
        },
        kind::IMAGE_REFUSED => Message::ImageRefused {
            stream,
            reason: fields.reason()?,
        },
        other => return Err(LinkError::UnknownType(other)),
    })
}
