//! What can be wrong with a peer's bytes.

use crate::image::NameError;

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
    #[error("the payload of a frame of type {0:#04x} is too long")]
    Trailing(u8),
    #[error("a text in a frame of type {0:#04x} is not UTF-8")]
    Utf8(u8),
    #[error("bad name in a frame of type {kind:#04x}: {source}")]
    Name { kind: u8, source: NameError },
    #[error("no architecture has pages of {0} bytes")]
    PageSize(u32),
    #[error("a frame's header was damaged on its way: wrong checksum")]
    HeaderCheck,
    #[error("a frame of type {0:#04x} was damaged on its way: wrong checksum")]
    PayloadCheck(u8),
    #[error("value {value} of `{field}` is not defined")]
    Value { field: &'static str, value: u8 },
}
