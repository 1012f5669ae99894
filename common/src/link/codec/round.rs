//! Frames about a page server round. Its pages are image data.

use bytes::{BufMut, BytesMut};

use crate::criu::page_server::Layout;
use crate::link::codec::error::LinkError;
use crate::link::codec::fields::Fields;
use crate::link::codec::kind;
use crate::link::codec::message::{Message, RoundPages, SetNumber, StreamNumber};

pub fn encode(message: &Message, out: &mut BytesMut) {
    match message {
        Message::RoundOpen {
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
        Message::RoundEnd { entries, pages, .. } => {
            out.put_u64_le(*entries);
            out.put_u64_le(*pages);
        }
        Message::RoundAck { pages, .. } => {
            for n in [pages.new, pages.replaced, pages.unchanged, pages.dropped] {
                out.put_u64_le(n);
            }
        }
        _ => {}
    }
}

/// `channel`: of the header.
pub fn decode(channel: u32, fields: &mut Fields<'_>) -> Result<Message, LinkError> {
    let stream = StreamNumber(channel);
    Ok(match fields.kind {
        kind::ROUND_OPEN => Message::RoundOpen {
            stream,
            set: SetNumber(fields.u32()?),
            page_bytes: match fields.u32()? {
                n @ (0x1000 | 0x4000 | 0x10000) => n,
                n => return Err(LinkError::PageSize(n)),
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
        kind::ROUND_END => Message::RoundEnd {
            stream,
            entries: fields.u64()?,
            pages: fields.u64()?,
        },
        kind::ROUND_ACK => Message::RoundAck {
            stream,
            pages: RoundPages {
                new: fields.u64()?,
                replaced: fields.u64()?,
                unchanged: fields.u64()?,
                dropped: fields.u64()?,
            },
        },
        other => return Err(LinkError::UnknownType(other)),
    })
}
