//! Digests of images and sets (`--checksum`).
//!
//! An image's digest is the CRC-32C of its bytes. It is put together from those of its frames,
//! which each side computes anyhow, so nothing is read twice. A set's digest is the sum of one
//! number per image, so the order in which images ended does not matter.

use crc32c::{crc32c, crc32c_append, crc32c_combine};

/// CRC-32C of what is put together from pieces.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest {
    crc: u32,
    bytes: u64,
}

impl Digest {
    /// Of one piece.
    pub fn of(piece: &[u8]) -> Self {
        Self {
            crc: crc32c(piece),
            bytes: piece.len() as u64,
        }
    }

    /// Of a piece whose checksum is known.
    pub fn known(crc: u32, bytes: usize) -> Self {
        Self {
            crc,
            bytes: bytes as u64,
        }
    }

    /// More of the same piece.
    pub fn update(&mut self, more: &[u8]) {
        self.crc = crc32c_append(self.crc, more);
        self.bytes += more.len() as u64;
    }

    /// `next` follows.
    pub fn then(&mut self, next: Self) {
        self.crc = match (self.bytes, next.bytes) {
            (0, _) => next.crc,
            (_, 0) => self.crc,
            (_, n) => crc32c_combine(self.crc, next.crc, usize::try_from(n).unwrap_or(usize::MAX)),
        };
        self.bytes += next.bytes;
    }

    pub fn crc(self) -> u32 {
        self.crc
    }
}

/// What an image adds to the digest of its set: name, length and digest, each 32 bits of it
/// covering all of them.
pub fn of_image(name: &str, bytes: u64, digest: u32) -> u64 {
    let low = crc32c_append(crc32c(name.as_bytes()), &bytes.to_le_bytes());
    let low = crc32c_append(low, &digest.to_le_bytes());
    let high = crc32c_append(low, name.as_bytes());
    u64::from(high) << 32 | u64::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_give_the_digest_of_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 0..2000),
            cuts in proptest::collection::vec(0..2000usize, 0..6),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).collect();
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let mut whole = Digest::default();
            for pair in cuts.windows(2) {
                whole.then(Digest::of(&bytes[pair[0]..pair[1]]));
            }
            prop_assert_eq!(whole, Digest::of(&bytes));
            let mut updated = Digest::default();
            cuts.windows(2).for_each(|pair| updated.update(&bytes[pair[0]..pair[1]]));
            prop_assert_eq!(updated, whole);
        }
    }

    #[test]
    fn a_set_tells_names_lengths_and_bytes_apart() {
        let base = of_image("a.img", 5, 7);
        for other in [
            of_image("b.img", 5, 7),
            of_image("a.img", 6, 7),
            of_image("a.img", 5, 8),
        ] {
            assert_ne!(other, base);
        }
    }

    #[test]
    fn the_polynomial_is_castagnoli() {
        // RFC 3720 B.4: 32 bytes of zeroes.
        assert_eq!(Digest::of(&[0; 32]).crc(), 0x8a91_36aa);
    }
}
