//! Frames about a whole session, or one of its connections.

use bytes::{BufMut, BytesMut};

use crate::link::codec::error::LinkError;
use crate::link::codec::fields::{put_reason, Fields};
use crate::link::codec::kind;
use crate::link::codec::message::Message;

pub fn encode(message: &Message, out: &mut BytesMut) {
    match message {
        Message::Received { total, .. } => out.put_u64_le(*total),
        Message::Reserve { bytes } | Message::Reserved { bytes } => out.put_u64_le(*bytes),
        Message::Goodbye { reason } => put_reason(out, reason),
        _ => {}
    }
}

/// `channel`: of the header.
pub fn decode(channel: u32, fields: &mut Fields<'_>) -> Result<Message, LinkError> {
    Ok(match fields.kind {
        kind::GOODBYE => Message::Goodbye {
            reason: fields.reason()?,
        },
        kind::RECEIVED => Message::Received {
            connection: u16::try_from(channel).map_err(|_| LinkError::Reserved(fields.kind))?,
            total: fields.u64()?,
        },
        kind::RESERVE | kind::RESERVED if channel != 0 => {
            return Err(LinkError::Reserved(fields.kind))
        }
        kind::RESERVE => Message::Reserve {
            bytes: fields.u64()?,
        },
        kind::RESERVED => Message::Reserved {
            bytes: fields.u64()?,
        },
        other => return Err(LinkError::UnknownType(other)),
    })
}
