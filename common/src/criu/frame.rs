//! The framing of every CRIU message: `u32` length (the byte order of the CRIU build; all
//! that CRIU runs on today are little-endian, s390x excepted), then one protobuf message.

use prost::Message;

/// Longest message taken from a CRIU. The largest legitimate one carries two strings of 4095
/// bytes; the original streamer refuses 10 KiB and more.
pub const MAX_MESSAGE_BYTES: u32 = 16 * 1024;

/// A peer's bytes that are not what CRIU sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("a message of {0} bytes is announced, the limit is {MAX_MESSAGE_BYTES}")]
    TooLong(u32),
    #[error("the message is not a valid protobuf")]
    Protobuf(#[from] prost::DecodeError),
    #[error("the message lacks its required field `{0}`")]
    Missing(&'static str),
    #[error("bad image name")]
    ImageName(#[source] crate::image::NameError),
    #[error("bad snapshot id")]
    SnapshotId(#[source] crate::image::NameError),
    #[error("open mode {mode:#x} is not valid for `{what}`")]
    Mode { what: &'static str, mode: u32 },
    #[error("the name is not one of those that go without a snapshot id")]
    NoSnapshot,
}

/// Checks a length prefix and gives the number of bytes to read next.
pub fn body_length(prefix: [u8; 4]) -> Result<usize, MessageError> {
    match u32::from_le_bytes(prefix) {
        n if n > MAX_MESSAGE_BYTES => Err(MessageError::TooLong(n)),
        n => Ok(n as usize),
    }
}

/// One framed message. It must reach the socket in a single write: CRIU reads the prefix and
/// the body with one plain `read` each and takes a short one as an error (`protobuf.c`).
pub fn encode(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(4 + length);
    // Our own messages are a few bytes, or hold a snapshot id of at most 4095.
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
    // Vec<u8> grows as needed, so encoding cannot run out of space.
    let _ = message.encode(&mut out);
    out
}
