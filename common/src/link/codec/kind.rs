//! Frame types: their numbers, which message has which, and their groups. Explicit numbers: they are the protocol.

use crate::link::codec::message::Message;

pub const SET_OPEN: u8 = 0x01;
pub const SET_DIALECT: u8 = 0x02;
pub const SET_GATE: u8 = 0x03;
pub const SET_COMPLETE: u8 = 0x04;
pub const PREPARE: u8 = 0x05;
pub const COMMIT: u8 = 0x06;
pub const SET_CLOSE: u8 = 0x07;
pub const SET_ABORT: u8 = 0x08;
pub const SET_DOUBT: u8 = 0x09;
pub const PREPARE_TRIAL: u8 = 0x0A;
pub const IMAGE_OPEN: u8 = 0x10;
pub const IMAGE_DATA: u8 = 0x11;
pub const IMAGE_END: u8 = 0x12;
pub const IMAGE_ABORT: u8 = 0x13;
pub const ROUND_OPEN: u8 = 0x14;
pub const ROUND_END: u8 = 0x17;
pub const GOODBYE: u8 = 0x20;
pub const RESERVE: u8 = 0x22;
pub const SET_GATED: u8 = 0x41;
pub const SET_STORED: u8 = 0x42;
pub const PREPARED: u8 = 0x43;
pub const PREPARE_REFUSED: u8 = 0x44;
pub const RECEIVED: u8 = 0x21;
pub const RESERVED: u8 = 0x45;
pub const TRIAL: u8 = 0x46;
pub const HOLDING: u8 = 0x47;
pub const TRIAL_FAILED: u8 = 0x48;
pub const IMAGE_ACK: u8 = 0x50;
pub const IMAGE_REFUSED: u8 = 0x51;
pub const ROUND_ACK: u8 = 0x52;

pub const ALL: [u8; 30] = [
    SET_OPEN,
    SET_DIALECT,
    SET_GATE,
    SET_COMPLETE,
    PREPARE,
    COMMIT,
    SET_CLOSE,
    SET_ABORT,
    SET_DOUBT,
    PREPARE_TRIAL,
    IMAGE_OPEN,
    IMAGE_DATA,
    IMAGE_END,
    IMAGE_ABORT,
    ROUND_OPEN,
    ROUND_END,
    GOODBYE,
    RECEIVED,
    RESERVE,
    SET_GATED,
    SET_STORED,
    PREPARED,
    PREPARE_REFUSED,
    RESERVED,
    TRIAL,
    HOLDING,
    TRIAL_FAILED,
    IMAGE_ACK,
    IMAGE_REFUSED,
    ROUND_ACK,
];

/// The frame types that one file encodes and decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    Set,
    Image,
    Round,
    Session,
}

pub fn group(kind: u8) -> Option<Group> {
    match kind {
        SET_OPEN | SET_DIALECT | SET_GATE | SET_GATED | SET_COMPLETE | SET_STORED | PREPARE
        | PREPARED | PREPARE_REFUSED | COMMIT | SET_CLOSE | SET_ABORT | SET_DOUBT
        | PREPARE_TRIAL | TRIAL | HOLDING | TRIAL_FAILED => Some(Group::Set),
        IMAGE_OPEN | IMAGE_DATA | IMAGE_END | IMAGE_ABORT | IMAGE_ACK | IMAGE_REFUSED => {
            Some(Group::Image)
        }
        ROUND_OPEN | ROUND_END | ROUND_ACK => Some(Group::Round),
        GOODBYE | RECEIVED | RESERVE | RESERVED => Some(Group::Session),
        _ => None,
    }
}

/// The type of a message, and the number in its header: of the set, the stream or the connection, or 0.
pub fn of(message: &Message) -> (u8, u32) {
    match message {
        Message::SetOpen { set, .. } => (SET_OPEN, set.0),
        Message::SetDialect { set, .. } => (SET_DIALECT, set.0),
        Message::SetGate { set } => (SET_GATE, set.0),
        Message::SetComplete { set, .. } => (SET_COMPLETE, set.0),
        Message::Prepare { set, .. } => (PREPARE, set.0),
        Message::PrepareTrial { set, .. } => (PREPARE_TRIAL, set.0),
        Message::Commit { set } => (COMMIT, set.0),
        Message::SetClose { set } => (SET_CLOSE, set.0),
        Message::SetAbort { set, .. } => (SET_ABORT, set.0),
        Message::SetDoubt { set, .. } => (SET_DOUBT, set.0),
        Message::ImageOpen { stream, .. } => (IMAGE_OPEN, stream.0),
        Message::ImageEnd { stream, .. } => (IMAGE_END, stream.0),
        Message::ImageAbort { stream, .. } => (IMAGE_ABORT, stream.0),
        Message::RoundOpen { stream, .. } => (ROUND_OPEN, stream.0),
        Message::RoundEnd { stream, .. } => (ROUND_END, stream.0),
        Message::RoundAck { stream, .. } => (ROUND_ACK, stream.0),
        Message::Goodbye { .. } => (GOODBYE, 0),
        Message::Received { connection, .. } => (RECEIVED, u32::from(*connection)),
        Message::Reserve { .. } => (RESERVE, 0),
        Message::Reserved { .. } => (RESERVED, 0),
        Message::SetGated { set } => (SET_GATED, set.0),
        Message::SetStored { set, .. } => (SET_STORED, set.0),
        Message::Prepared { set } => (PREPARED, set.0),
        Message::PrepareRefused { set, .. } => (PREPARE_REFUSED, set.0),
        Message::Trial { set } => (TRIAL, set.0),
        Message::Holding { set } => (HOLDING, set.0),
        Message::TrialFailed { set, .. } => (TRIAL_FAILED, set.0),
        Message::ImageAck { stream, .. } => (IMAGE_ACK, stream.0),
        Message::ImageRefused { stream, .. } => (IMAGE_REFUSED, stream.0),
    }
}
