//! What the link needs of the image that it sends.

use std::io;
use std::os::fd::AsFd;

use bytes::BytesMut;

/// The bytes of one image, in the order in which CRIU wrote them.
pub trait ImageData {
    /// Appends a few bytes to `into`, without waiting.
    fn read(&self, into: &mut BytesMut) -> io::Result<ReadOutcome>;

    /// Moves the bytes that are there into an empty pipe, without waiting: by reference, but for a few bytes.
    fn move_into(&mut self, pipe: impl AsFd) -> io::Result<ReadOutcome>;
}

/// What a read that does not wait gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadOutcome {
    Bytes(usize),
    /// Nothing now; more may come.
    WouldBlock,
    /// The end of the image.
    End,
}
