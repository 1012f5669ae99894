//! The framing of CRIU's images: magics, then one protobuf message behind the other.
//!
//! ```text
//! ordinary image   u32 common magic, u32 magic of its kind, messages...
//! until CRIU 2.0   u32 magic of its kind, messages...      (img_version 1)
//! message          u32 length, so many bytes
//! ```
//!
//! The bytes are a peer's. Nothing is reserved for a length that is only announced.

const COMMON_MAGIC: u32 = 0x5456_4319;

/// Joined in memory at most. `mm-*.img` of a million mappings has 45 MiB.
const MAX_MESSAGE_BYTES: usize = 64 << 20;

/// Why an image cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// No known CRIU wrote it, so nothing can be said about the one that did.
    #[error("no known CRIU writes such an image")]
    Foreign,
    #[error("it is cut off")]
    Cut,
    #[error("it cannot be decoded")]
    Broken,
    /// Of a task with millions of mappings, say. It is not looked at.
    #[error("it is longer than the limit for such an image")]
    TooLong,
}

impl From<prost::DecodeError> for ImageError {
    fn from(_: prost::DecodeError) -> Self {
        Self::Broken
    }
}

/// The messages of an image that lies in memory in pieces.
pub struct Messages<'a, I> {
    pieces: I,
    rest: &'a [u8],
    /// A message that lies in several pieces.
    joined: Vec<u8>,
}

impl<'a, I: Iterator<Item = &'a [u8]>> Messages<'a, I> {
    /// Reads the magics. An empty image is cut: CRIU writes at least these.
    pub fn open(pieces: impl IntoIterator<IntoIter = I>, magic: u32) -> Result<Self, ImageError> {
        let mut messages = Self {
            pieces: pieces.into_iter(),
            rest: &[],
            joined: Vec::new(),
        };
        let first = messages.magic(&[COMMON_MAGIC, magic])?;
        match first {
            COMMON_MAGIC if messages.magic(&[magic])? == magic => Ok(messages),
            COMMON_MAGIC => Err(ImageError::Foreign),
            first if first == magic => Ok(messages),
            _ => Err(ImageError::Foreign),
        }
    }

    /// `known`: with which an image may go on here. What does not begin as one of them is foreign, however short.
    fn magic(&mut self, known: &[u32]) -> Result<u32, ImageError> {
        let mut bytes = [0; 4];
        for have in 0..bytes.len() {
            let begins = |magic: &u32| magic.to_le_bytes().starts_with(&bytes[..have]);
            match self.take(1)? {
                Some(&[byte]) => bytes[have] = byte,
                _ if known.iter().any(begins) => return Err(ImageError::Cut),
                _ => return Err(ImageError::Foreign),
            }
        }
        Ok(u32::from_le_bytes(bytes))
    }

    /// `None` at the end of the image.
    pub fn message(&mut self) -> Result<Option<&[u8]>, ImageError> {
        let length = match self.take(4)? {
            Some(&[a, b, c, d]) => u32::from_le_bytes([a, b, c, d]) as usize,
            _ => return Ok(None),
        };
        if length > MAX_MESSAGE_BYTES {
            return Err(ImageError::TooLong);
        }
        match self.take(length)? {
            Some(message) => Ok(Some(message)),
            None => Err(ImageError::Cut),
        }
    }

    /// The next `n` bytes; `None` if not one is left and one is wanted.
    fn take(&mut self, n: usize) -> Result<Option<&[u8]>, ImageError> {
        while self.rest.is_empty() && n > 0 {
            match self.pieces.next() {
                Some(piece) => self.rest = piece,
                None => return Ok(None),
            }
        }
        if let Some((taken, rest)) = self.rest.split_at_checked(n) {
            self.rest = rest;
            return Ok(Some(taken));
        }
        self.joined.clear();
        while self.joined.len() < n {
            if self.rest.is_empty() {
                self.rest = self.pieces.next().ok_or(ImageError::Cut)?;
            }
            let wanted = (n - self.joined.len()).min(self.rest.len());
            let (taken, rest) = self.rest.split_at(wanted);
            self.joined.extend_from_slice(taken);
            self.rest = rest;
        }
        Ok(Some(&self.joined))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAGIC: u32 = 0x5027_3030;

    fn image(messages: &[Vec<u8>]) -> Vec<u8> {
        let mut image = COMMON_MAGIC.to_le_bytes().to_vec();
        image.extend(MAGIC.to_le_bytes());
        for message in messages {
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
        }
        image
    }

    fn read<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Vec<u8>>, ImageError> {
        let mut messages = Messages::open(pieces, MAGIC)?;
        let mut read = Vec::new();
        while let Some(message) = messages.message()? {
            read.push(message.to_vec());
        }
        Ok(read)
    }

    #[test]
    fn with_and_without_the_common_magic() {
        let whole = image(&[b"abc".to_vec(), Vec::new()]);
        let expected = Ok(vec![b"abc".to_vec(), Vec::new()]);
        assert_eq!(read([&whole[..]]), expected);
        assert_eq!(read([&whole[4..]]), expected, "img_version 1");
        assert_eq!(read([&b"another format"[..]]), Err(ImageError::Foreign));
        assert_eq!(read([]), Err(ImageError::Cut));
    }

    #[test]
    fn a_length_that_is_only_announced_costs_nothing() {
        let mut liar = image(&[]);
        liar.extend(u32::MAX.to_le_bytes());
        assert_eq!(read([&liar[..]]), Err(ImageError::TooLong));
        let mut liar = image(&[]);
        liar.extend((60u32 << 20).to_le_bytes());
        liar.push(1);
        assert_eq!(read([&liar[..]]), Err(ImageError::Cut));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter_and_a_cut_is_seen(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..6),
            piece in 1usize..50,
            cut in any::<prop::sample::Index>(),
        ) {
            let whole = image(&messages);
            prop_assert_eq!(read(whole.chunks(piece)), Ok(messages.clone()));
            let cut = cut.index(whole.len());
            let border = (0..=messages.len()).any(|n| image(&messages[..n]).len() == cut);
            let got = read(whole[..cut].chunks(piece));
            match border {
                true => prop_assert!(messages.starts_with(&got.unwrap())),
                // The common magic alone may be the beginning of an old image.
                false => prop_assert_eq!(got, Err(ImageError::Cut)),
            }
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), piece in 1usize..50) {
            let _ = read(bytes.chunks(piece));
            let _ = read(image(&[bytes]).chunks(piece));
        }
    }
}
