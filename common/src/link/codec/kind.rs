//! Frame types. Explicit numbers: they are the protocol.

pub const SET_OPEN: u8 = 0x01;
pub const SET_DIALECT: u8 = 0x02;
pub const SET_GATE: u8 = 0x03;
pub const SET_COMPLETE: u8 = 0x04;
pub const PREPARE: u8 = 0x05;
pub const COMMIT: u8 = 0x06;
pub const SET_CLOSE: u8 = 0x07;
pub const SET_ABORT: u8 = 0x08;
pub const SET_DOUBT: u8 = 0x09;
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
pub const IMAGE_ACK: u8 = 0x50;
pub const IMAGE_REFUSED: u8 = 0x51;
pub const ROUND_ACK: u8 = 0x52;

pub const ALL: [u8; 26] = [
    SET_OPEN,
    SET_DIALECT,
    SET_GATE,
    SET_COMPLETE,
    PREPARE,
    COMMIT,
    SET_CLOSE,
    SET_ABORT,
    SET_DOUBT,
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
    IMAGE_ACK,
    IMAGE_REFUSED,
    ROUND_ACK,
];
