//! The layout of frames that a session has agreed on.

use crc32c::crc32c;

use super::header::{CHECKED_HEADER_BYTES, HEADER_BYTES};
use crate::link::digest::Digest;

/// The proxy chooses it in HELLO; all frames of the session have it, both ways.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum FrameFormat {
    /// Header, payload.
    #[default]
    Plain,
    /// Header, CRC-32C of the header, CRC-32C of the payload, payload (`--checksum`).
    Checked,
}

impl FrameFormat {
    pub const fn with_checksums(checksums: bool) -> Self {
        match checksums {
            true => Self::Checked,
            false => Self::Plain,
        }
    }

    pub const fn is_checked(self) -> bool {
        matches!(self, Self::Checked)
    }

    /// How many bytes come before the payload of a frame.
    pub const fn head_bytes(self) -> usize {
        match self {
            Self::Plain => HEADER_BYTES,
            Self::Checked => CHECKED_HEADER_BYTES,
        }
    }

    /// Writes the checksums of `frame`, if it has any: header, space for checksums, payload.
    pub fn seal(self, frame: &mut [u8]) {
        if self == Self::Plain {
            return;
        }
        let (head, payload) = frame.split_at_mut(CHECKED_HEADER_BYTES);
        let (header, checksums) = head.split_at_mut(HEADER_BYTES);
        checksums[..4].copy_from_slice(&crc32c(header).to_le_bytes());
        checksums[4..].copy_from_slice(&crc32c(payload).to_le_bytes());
    }

    /// The digest of image data, if the session computes digests.
    pub fn digest_of(self, data: &[u8]) -> Option<Digest> {
        self.is_checked().then(|| Digest::of(data))
    }
}
