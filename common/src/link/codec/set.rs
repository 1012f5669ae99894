//! Frames about a set: its begin, its completion, its commit.

use bytes::{BufMut, BytesMut};

use crate::criu::dialect::Dialect;
use crate::criu::inventory::SetKind;
use crate::image::SnapshotId;
use crate::link::codec::error::LinkError;
use crate::link::codec::fields::{put_reason, put_text, Fields};
use crate::link::codec::kind;
use crate::link::codec::message::{CommitOn, Message, SetNumber};

pub fn encode(message: &Message, out: &mut BytesMut) {
    match message {
        Message::SetOpen {
            gated,
            dialect,
            parent,
            snapshot,
            ..
        } => {
            out.put_u8(u8::from(*gated));
            out.put_u8(dialect.number());
            out.put_u16_le(0);
            out.put_u32_le(parent.map_or(0, |p| p.0));
            put_text(out, snapshot.as_str());
        }
        Message::SetDialect { dialect, .. } => out.put_u8(dialect.number()),
        Message::SetComplete { images, bytes, .. } => {
            out.put_u32_le(*images);
            out.put_u64_le(*bytes);
        }
        Message::Prepare {
            images,
            bytes,
            digest,
            ..
        } => {
            out.put_u32_le(*images);
            out.put_u64_le(*bytes);
            out.put_u64_le(*digest);
        }
        Message::PrepareTrial {
            images,
            bytes,
            digest,
            on,
            ..
        } => {
            out.put_u32_le(*images);
            out.put_u64_le(*bytes);
            out.put_u64_le(*digest);
            out.put_u8(code_of_commit_on(*on));
        }
        Message::SetStored { kind, .. } => out.put_u8(kind.number()),
        Message::SetAbort { reason, .. }
        | Message::SetDoubt { reason, .. }
        | Message::PrepareRefused { reason, .. }
        | Message::TrialFailed { reason, .. } => put_reason(out, reason),
        // Those without a payload.
        _ => {}
    }
}

/// `channel`: of the header.
pub fn decode(channel: u32, fields: &mut Fields<'_>) -> Result<Message, LinkError> {
    let set = SetNumber(channel);
    Ok(match fields.kind {
        kind::SET_OPEN => open(set, fields)?,
        kind::SET_DIALECT => Message::SetDialect {
            set,
            dialect: dialect_of_number(fields.u8()?)?,
        },
        kind::SET_GATE => Message::SetGate { set },
        kind::SET_GATED => Message::SetGated { set },
        kind::SET_COMPLETE => Message::SetComplete {
            set,
            images: fields.u32()?,
            bytes: fields.u64()?,
        },
        kind::SET_STORED => Message::SetStored {
            set,
            kind: kind_of_number(fields.u8()?)?,
        },
        kind::PREPARE => Message::Prepare {
            set,
            images: fields.u32()?,
            bytes: fields.u64()?,
            digest: fields.u64()?,
        },
        kind::PREPARE_TRIAL => Message::PrepareTrial {
            set,
            images: fields.u32()?,
            bytes: fields.u64()?,
            digest: fields.u64()?,
            on: commit_on_of_code(fields.u8()?)?,
        },
        kind::TRIAL => Message::Trial { set },
        kind::HOLDING => Message::Holding { set },
        kind::TRIAL_FAILED => Message::TrialFailed {
            set,
            reason: fields.reason()?,
        },
        kind::PREPARED => Message::Prepared { set },
        kind::PREPARE_REFUSED => Message::PrepareRefused {
            set,
            reason: fields.reason()?,
        },
        kind::COMMIT => Message::Commit { set },
        kind::SET_CLOSE => Message::SetClose { set },
        kind::SET_ABORT => Message::SetAbort {
            set,
            reason: fields.reason()?,
        },
        kind::SET_DOUBT => Message::SetDoubt {
            set,
            reason: fields.reason()?,
        },
        other => return Err(LinkError::UnknownType(other)),
    })
}

fn open(set: SetNumber, fields: &mut Fields<'_>) -> Result<Message, LinkError> {
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
    let dialect = dialect_of_number(fields.u8()?)?;
    if fields.u16()? != 0 {
        return Err(LinkError::Reserved(fields.kind));
    }
    let parent = fields.u32()?;
    Ok(Message::SetOpen {
        set,
        gated,
        dialect,
        parent: (parent != 0).then_some(SetNumber(parent)),
        snapshot: fields.name(SnapshotId::new)?,
    })
}

fn dialect_of_number(value: u8) -> Result<Dialect, LinkError> {
    let bad = || LinkError::Value {
        field: "dialect",
        value,
    };
    Dialect::of_number(value).ok_or_else(bad)
}

fn code_of_commit_on(on: CommitOn) -> u8 {
    match on {
        CommitOn::Auto => 1,
        CommitOn::Restored => 2,
    }
}

fn commit_on_of_code(value: u8) -> Result<CommitOn, LinkError> {
    match value {
        1 => Ok(CommitOn::Auto),
        2 => Ok(CommitOn::Restored),
        value => Err(LinkError::Value {
            field: "commit on",
            value,
        }),
    }
}

fn kind_of_number(value: u8) -> Result<SetKind, LinkError> {
    let bad = || LinkError::Value {
        field: "kind",
        value,
    };
    SetKind::of_number(value).ok_or_else(bad)
}
