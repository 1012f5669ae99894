//! Frames from anything that reads: a TCP stream, and an in-memory one in tests.
//!
//! Copies: control frames go through the small buffer. Of image data only what happened to be
//! read together with a header is copied out of it; the rest is read straight into the
//! caller's memory.

use std::io;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::link::codec::{
    FrameFormat, Header, LinkError, Message, CHECKED_HEADER_BYTES, HEADER_BYTES,
};
use crate::link::digest::Digest;
use crate::link::handshake::{self, Answer, HandshakeError, Hello, HEAD_BYTES};

/// Bytes asked for when a header is wanted: many control frames, and small images or single
/// pages whole, for one system call.
const BUFFER_BYTES: usize = 64 << 10;

/// Behind a data frame longer than this the next is likely to be long as well: then little more
/// than headers is read, and the data to where they stay, without the copy out of the buffer.
const LONG_FRAME_BYTES: u32 = 16 << 10;

/// Space for the control frames that come between two long data frames.
const FEW_BYTES: usize = 128;

/// A frame of a round that is shorter than this has requests and no pages.
const FEW_FRAME_BYTES: u32 = 128;

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("reading from the link")]
    Io(#[from] io::Error),
    #[error("the peer closed the link in the middle of a frame")]
    Truncated,
    #[error("the peer broke the link protocol")]
    Protocol(#[from] LinkError),
    #[error("the peer named connection {0}, which the session does not have")]
    Connection(u16),
}

/// Why a handshake failed.
#[derive(Debug, thiserror::Error)]
pub enum ShakeError {
    #[error("handshake on the link")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] HandshakeError),
}

/// Reads frames. One task owns it.
pub struct FrameReader<R> {
    inner: R,
    buffer: BytesMut,
    /// How much is read at once when a header or a message is wanted.
    ask: usize,
    checks: Option<Checks>,
}

/// The frame that is being read (`--checksum`).
#[derive(Default)]
struct Checks {
    expected: u32,
    left: usize,
    kind: u8,
    read: Digest,
}

impl Checks {
    /// Some of the payload was read. An error: it is damaged.
    fn read(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        self.read.update(bytes);
        self.left = self.left.saturating_sub(bytes.len());
        match self.left == 0 && self.read.crc() != self.expected {
            true => Err(LinkError::PayloadCheck(self.kind)),
            false => Ok(()),
        }
    }
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            buffer: BytesMut::with_capacity(BUFFER_BYTES),
            ask: BUFFER_BYTES,
            checks: None,
        }
    }

    /// The same for frames of this format. With checksums a damaged payload is an error when its
    /// last byte is read.
    pub fn with_format(mut self, format: FrameFormat) -> Self {
        self.checks = format.is_checked().then(Checks::default);
        self
    }

    pub fn get_ref(&self) -> &R {
        &self.inner
    }

    /// Digest of the payload that was read last, if there are checksums.
    pub fn digest(&self) -> Option<Digest> {
        self.checks.as_ref().map(|checks| checks.read)
    }

    /// The next frame's header; `None` when the peer closed between two frames.
    ///
    /// Cancel safe: what was read stays in the buffer.
    pub async fn header(&mut self) -> Result<Option<Header>, ReadError> {
        let format = FrameFormat::with_checksums(self.checks.is_some());
        if !self.fill(format.head_bytes()).await? {
            return Ok(None);
        }
        let header = match &mut self.checks {
            None => {
                let mut bytes = [0; HEADER_BYTES];
                self.buffer.copy_to_slice(&mut bytes);
                Header::decode(&bytes)?
            }
            Some(checks) => {
                let mut bytes = [0; CHECKED_HEADER_BYTES];
                self.buffer.copy_to_slice(&mut bytes);
                let (header, expected) = Header::decode_checked(&bytes)?;
                *checks = Checks {
                    expected,
                    left: header.length as usize,
                    kind: bytes[0],
                    read: Digest::default(),
                };
                header
            }
        };
        if header.as_data().is_some() {
            self.ask = match header.length {
                // Between the pages of a round's long entries: says nothing of what is next.
                n if n < FEW_FRAME_BYTES => self.ask,
                n if n <= LONG_FRAME_BYTES => BUFFER_BYTES,
                _ => FEW_BYTES,
            };
        }
        Ok(Some(header))
    }

    /// The message of a header that is not image data.
    pub async fn message(&mut self, header: Header) -> Result<Message, ReadError> {
        let length = header.length as usize;
        if !self.fill(length).await? && length > 0 {
            return Err(ReadError::Truncated);
        }
        let payload = self.buffer.split_to(length);
        if let Some(checks) = &mut self.checks {
            checks.read(&payload)?;
        }
        Ok(Message::decode(header, &payload)?)
    }

    /// Some bytes of an image data frame into `into`, which must be no longer than what is
    /// left of the frame.
    pub async fn data(&mut self, into: &mut [u8]) -> Result<usize, ReadError> {
        let n = if self.buffer.is_empty() {
            match self.inner.read(into).await? {
                0 if !into.is_empty() => return Err(ReadError::Truncated),
                n => n,
            }
        } else {
            let n = self.buffer.len().min(into.len());
            self.buffer.copy_to_slice(&mut into[..n]);
            n
        };
        if let Some(checks) = &mut self.checks {
            // Fresh from the kernel's copy, so these bytes are still in the cache.
            checks.read(&into[..n])?;
        }
        Ok(n)
    }

    /// What is in the buffer of a data frame's bytes, at most `most`, which must be no more than
    /// what is left of the frame; at least one byte.
    pub async fn some(&mut self, most: usize) -> Result<BytesMut, ReadError> {
        self.ask = BUFFER_BYTES;
        if !self.fill(1).await? {
            return Err(ReadError::Truncated);
        }
        let n = self.buffer.len().min(most);
        let bytes = self.buffer.split_to(n);
        if let Some(checks) = &mut self.checks {
            checks.read(&bytes)?;
        }
        Ok(bytes)
    }

    /// Whether what comes next has to be read from the connection.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// At least `wanted` bytes in the buffer; `false` at an end of file before the first.
    async fn fill(&mut self, wanted: usize) -> Result<bool, ReadError> {
        while self.buffer.len() < wanted {
            let missing = self.ask.max(wanted) - self.buffer.len();
            self.buffer.reserve(missing);
            let mut limited = (&mut self.buffer).limit(missing);
            if self.inner.read_buf(&mut limited).await? == 0 {
                return match self.buffer.is_empty() {
                    true => Ok(false),
                    false => Err(ReadError::Truncated),
                };
            }
        }
        Ok(true)
    }
}

/// The proxy's half of the handshake.
pub async fn greet<S>(stream: &mut S, hello: &Hello) -> Result<Answer, ShakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(&hello.encode()).await?;
    let (head, body) = read_handshake(stream).await?;
    Ok(Answer::decode(&head, &body, &hello.versions)?)
}

/// The cache's first half: what the proxy wants.
pub async fn receive_hello<S>(stream: &mut S) -> Result<Hello, ShakeError>
where
    S: AsyncRead + Unpin,
{
    let (head, body) = read_handshake(stream).await?;
    Ok(Hello::decode(&head, &body)?)
}

async fn read_handshake<S>(stream: &mut S) -> Result<([u8; HEAD_BYTES], Vec<u8>), ShakeError>
where
    S: AsyncRead + Unpin,
{
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head).await?;
    let mut body = vec![0; handshake::body_length(&head)?];
    stream.read_exact(&mut body).await?;
    Ok((head, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageName;
    use crate::link::codec::{SetNumber, StreamNumber};
    use crate::link::handshake::Place;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
    }

    /// Rebuilds the images of a conversation.
    async fn rebuild<R: AsyncRead + Unpin>(
        reader: &mut FrameReader<R>,
    ) -> Result<BTreeMap<u32, Vec<u8>>, ReadError> {
        let mut images: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
        while let Some(header) = reader.header().await? {
            if let Some(StreamNumber(n)) = header.as_data() {
                let mut left = header.length as usize;
                while left > 0 {
                    if left % 3 == 0 {
                        let piece = reader.some(left).await?;
                        left -= piece.len();
                        images.entry(n).or_default().extend_from_slice(&piece);
                        continue;
                    }
                    let mut piece = vec![0; left.min(1000)];
                    let got = reader.data(&mut piece).await?;
                    images
                        .entry(n)
                        .or_default()
                        .extend_from_slice(&piece[..got]);
                    left -= got;
                }
            } else {
                match reader.message(header).await? {
                    Message::ImageOpen { stream, .. } => {
                        images.insert(stream.0, Vec::new());
                    }
                    Message::ImageEnd { stream, total, .. } => {
                        assert_eq!(images[&stream.0].len() as u64, total);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        Ok(images)
    }

    /// The frames of `images`, whose data are cut and interleaved as `order` says.
    fn interleave(images: &[Vec<u8>], order: &[(usize, usize)]) -> BytesMut {
        let mut out = BytesMut::new();
        let stream = |i: usize| StreamNumber(u32::try_from(i).unwrap());
        let mut sent = vec![0; images.len()];
        for i in 0..images.len() {
            let path = ImageName::new(&format!("pages-{i}.img")).unwrap();
            Message::ImageOpen {
                stream: stream(i),
                set: SetNumber(1),
                path,
                mode: 1,
                size: None,
            }
            .encode(&mut out);
        }
        let rest = (0..images.len()).map(|i| (i, usize::MAX));
        for (i, n) in order
            .iter()
            .copied()
            .filter(|o| o.0 < images.len())
            .chain(rest)
        {
            let n = n.min(images[i].len() - sent[i]);
            if n > 0 {
                Header::data(stream(i), 0, u32::try_from(n).unwrap()).encode(&mut out);
                out.put_slice(&images[i][sent[i]..sent[i] + n]);
                sent[i] += n;
            }
        }
        for (i, image) in images.iter().enumerate() {
            Message::ImageEnd {
                stream: stream(i),
                total: image.len() as u64,
                digest: 0,
            }
            .encode(&mut out);
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_interleaving_and_chunking_rebuilds_the_same_images(
            images in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..5000), 1..6),
            order in proptest::collection::vec((0..6usize, 1..700usize), 0..60),
            chunk in 1..4000usize,
        ) {
            let wire = interleave(&images, &order);
            let rebuilt = runtime().block_on(async {
                let (mut tx, rx) = tokio::io::duplex(chunk);
                let send = async move { tx.write_all(&wire).await.unwrap(); };
                let mut reader = FrameReader::new(rx);
                tokio::join!(send, rebuild(&mut reader)).1.unwrap()
            });
            for (i, image) in images.iter().enumerate() {
                prop_assert_eq!(&rebuilt[&u32::try_from(i).unwrap()], image);
            }
        }
    }

    #[test]
    fn a_cut_anywhere_inside_a_frame_is_an_error() {
        let wire = interleave(&[vec![7; 300], vec![]], &[(0, 100)]);
        let mut borders = vec![0];
        while let Some(rest) = wire
            .get(*borders.last().unwrap()..)
            .filter(|r| !r.is_empty())
        {
            let length = u32::from_le_bytes(rest[4..8].try_into().unwrap()) as usize;
            borders.push(borders.last().unwrap() + HEADER_BYTES + length);
        }
        for cut in 0..=wire.len() {
            let outcome = runtime()
                .block_on(async { rebuild_unchecked(&mut FrameReader::new(&wire[..cut])).await });
            match outcome {
                Ok(()) => assert!(borders.contains(&cut), "clean end at {cut}"),
                Err(ReadError::Truncated) => assert!(!borders.contains(&cut), "error at {cut}"),
                Err(e) => panic!("{e}"),
            }
        }
    }

    async fn rebuild_unchecked(reader: &mut FrameReader<&[u8]>) -> Result<(), ReadError> {
        while let Some(header) = reader.header().await? {
            match header.as_data() {
                None => drop(reader.message(header).await?),
                Some(_) => {
                    let mut left = vec![0; header.length as usize];
                    let mut done = 0;
                    while done < left.len() {
                        done += reader.data(&mut left[done..]).await?;
                    }
                }
            }
        }
        Ok(())
    }

    #[tokio::test]
    async fn handshake_over_a_stream() {
        let (mut proxy, mut cache) = tokio::io::duplex(7);
        let hello = Hello {
            versions: crate::link::VERSIONS,
            proxy: 1,
            place: Place::First { opening: 1 },
            connections: 2,
            frame_format: FrameFormat::Plain,
            patience: std::time::Duration::ZERO,
            session: "web".parse().unwrap(),
            software: "test".into(),
        };
        let answer = Answer::Welcome {
            version: *crate::link::VERSIONS.end(),
            key: 7,
            received: 0,
            patience: std::time::Duration::ZERO,
            software: "cache".into(),
        };
        let (got, heard) = tokio::join!(greet(&mut proxy, &hello), async {
            let heard = receive_hello(&mut cache).await.unwrap();
            cache.write_all(&answer.encode()).await.unwrap();
            heard
        });
        assert_eq!((got.unwrap(), heard), (answer, hello));
    }
}
