//! Frames in memory, gathered until they are sent together.

use bytes::{BufMut, Bytes, BytesMut};
use image_common::link::codec::{FrameFormat, Header, Message, StreamNumber};
use image_common::link::MAX_DATA_BYTES;

use crate::link::retransmit::BUFFER_BYTES;

/// The writer sends when more than this is gathered. The retransmit buffer keeps a whole buffer for any
/// unacknowledged byte of it.
const GATHER_BYTES: usize = 64 << 10;

pub struct FrameBuffer {
    bytes: BytesMut,
    format: FrameFormat,
}

impl FrameBuffer {
    pub fn new(format: FrameFormat) -> Self {
        Self {
            bytes: BytesMut::new(),
            format,
        }
    }

    pub fn format(&self) -> FrameFormat {
        self.format
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// More is gathered than should be.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= GATHER_BYTES
    }

    /// Whether a frame with so many more bytes can be gathered without growing the buffer. What the
    /// retransmit buffer keeps of it then takes no more memory than it has bytes.
    pub fn has_space(&self, more: usize) -> bool {
        let space = self.bytes.capacity() - self.bytes.len();
        self.bytes.is_empty() || space >= more + self.format.head_bytes()
    }

    /// How long the payload of one frame in the empty buffer may be.
    pub fn payload_space(&self) -> usize {
        self.bytes.capacity() - self.format.head_bytes()
    }

    /// Takes another buffer if this one is empty, and what is left of it is too short for a frame with
    /// `payload` bytes: a spare one, or else a new one.
    pub fn renew(&mut self, payload: usize, spare: impl FnOnce() -> Option<BytesMut>) {
        let least = payload + self.format.head_bytes();
        if self.bytes.is_empty() && self.bytes.capacity() < least {
            let spare = spare().filter(|buffer| buffer.capacity() >= least);
            self.bytes = spare.unwrap_or_else(|| BytesMut::with_capacity(BUFFER_BYTES.max(least)));
        }
    }

    /// Takes out all that is gathered.
    pub fn take(&mut self) -> Bytes {
        self.bytes.split().freeze()
    }

    /// Lets a buffer go that has grown: splitting and joining makes it wander and grow. What is left
    /// of a buffer of the usual length stays in use: the retransmit buffer keeps all of a buffer for any byte
    /// in it, and so keeps one buffer for many small frames.
    pub fn release_grown(&mut self) {
        if self.bytes.capacity() > BUFFER_BYTES {
            self.bytes = BytesMut::new();
        }
    }

    pub fn put_message(&mut self, message: &Message) {
        message.encode_with(&mut self.bytes, self.format);
    }

    /// A whole data frame.
    pub fn put_data(&mut self, stream: StreamNumber, sequence: u32, payload: &[u8]) {
        let start = self.begin_frame();
        self.bytes.extend_from_slice(payload);
        self.end_frame(start, stream, sequence);
    }

    /// The header of a data frame without checksums, whose payload follows by other means.
    pub fn put_header(&mut self, header: Header) {
        debug_assert!(!self.format.is_checked());
        header.encode(&mut self.bytes);
    }

    /// More of the payload of a frame whose header was sent.
    pub fn put_payload<R>(&mut self, read: impl FnOnce(&mut BytesMut) -> R) -> R {
        read(&mut self.bytes)
    }

    /// The same, of zeros.
    pub fn put_padding(&mut self, bytes: usize) {
        self.bytes.put_bytes(0, bytes);
    }

    /// Makes a data frame of what `read` appends to a buffer with space for `most` bytes. Gives the payload, too; it is
    /// empty, and there is no frame, if nothing was read.
    pub fn read_frame<R>(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        most: usize,
        read: impl FnOnce(&mut BytesMut) -> R,
    ) -> (R, &[u8]) {
        let start = self.begin_frame();
        let payload = self.bytes.len();
        self.bytes.reserve(most);
        let mut behind = self.bytes.split_off(payload);
        let read = read(&mut behind);
        let n = behind.len();
        self.bytes.unsplit(behind);
        match n {
            0 => self.bytes.truncate(start),
            _ => self.end_frame(start, stream, sequence),
        }
        (read, &self.bytes[self.bytes.len() - n..])
    }

    /// Makes a data frame of exactly the `length` bytes that `read` appends, and gives them. `None`: they were fewer, and
    /// there is no frame.
    pub fn read_exactly<E>(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        length: usize,
        read: impl FnOnce(&mut BytesMut) -> Result<usize, E>,
    ) -> Result<Option<&[u8]>, E> {
        let start = self.begin_frame();
        let payload = self.bytes.len();
        let read = read(&mut self.bytes);
        if !matches!(read, Ok(n) if n == length) {
            self.bytes.truncate(start);
            return read.map(|_| None);
        }
        self.end_frame(start, stream, sequence);
        Ok(Some(&self.bytes[payload..]))
    }

    /// Makes space for the head of a frame whose payload is put behind it.
    fn begin_frame(&mut self) -> usize {
        let start = self.bytes.len();
        self.bytes.put_bytes(0, self.format.head_bytes());
        start
    }

    /// Writes the head of the data frame that is in the buffer.
    fn end_frame(&mut self, start: usize, stream: StreamNumber, sequence: u32) {
        let payload = start + self.format.head_bytes();
        let length = u32::try_from(self.bytes.len() - payload).unwrap_or(u32::MAX);
        debug_assert!(length <= MAX_DATA_BYTES);
        let mut header = BytesMut::with_capacity(payload - start);
        Header::data(stream, sequence, length).encode(&mut header);
        self.bytes[start..start + header.len()].copy_from_slice(&header);
        self.format.seal(&mut self.bytes[start..]);
    }

    #[cfg(test)]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image_common::link::codec::{SetNumber, CHECKED_HEADER_BYTES, HEADER_BYTES};

    const STREAM: StreamNumber = StreamNumber(7);

    /// Every way to make a data frame gives the same bytes, in both formats.
    #[test]
    fn a_frame_is_the_same_however_it_is_made() {
        let payload: Vec<u8> = (0..5000u32).flat_map(u32::to_le_bytes).collect();
        for format in [FrameFormat::Plain, FrameFormat::Checked] {
            let mut put = FrameBuffer::new(format);
            put.put_data(STREAM, 3, &payload);
            assert_eq!(put.len(), format.head_bytes() + payload.len());
            match format {
                FrameFormat::Plain => {
                    let head = put.bytes().first_chunk::<HEADER_BYTES>().unwrap();
                    let length = u32::try_from(payload.len()).unwrap();
                    assert_eq!(Header::decode(head), Ok(Header::data(STREAM, 3, length)));
                    let mut spliced = FrameBuffer::new(format);
                    spliced.put_header(Header::data(STREAM, 3, length));
                    spliced.put_payload(|out| out.extend_from_slice(&payload));
                    assert!(spliced.bytes() == put.bytes());
                }
                FrameFormat::Checked => {
                    let head = put.bytes().first_chunk::<CHECKED_HEADER_BYTES>().unwrap();
                    let (header, expected) = Header::decode_checked(head).unwrap();
                    assert_eq!(header.length as usize, payload.len());
                    assert_eq!(expected, format.digest_of(&payload).unwrap().crc());
                }
            }
            let mut read = FrameBuffer::new(format);
            let (n, got) = read.read_frame(STREAM, 3, payload.len(), |out| {
                out.extend_from_slice(&payload);
                out.len()
            });
            assert!(n == payload.len() && got == payload);
            let mut exactly = FrameBuffer::new(format);
            let got = exactly.read_exactly(STREAM, 3, payload.len(), |out| {
                out.extend_from_slice(&payload);
                Ok::<_, ()>(payload.len())
            });
            assert!(got.unwrap().unwrap() == payload);
            assert!(read.bytes() == put.bytes() && exactly.bytes() == put.bytes());
        }
    }

    /// A read that gives nothing, too little or an error leaves no head behind.
    #[test]
    fn a_failed_read_leaves_no_part_of_a_frame() {
        for format in [FrameFormat::Plain, FrameFormat::Checked] {
            let mut frames = FrameBuffer::new(format);
            frames.put_message(&Message::SetClose { set: SetNumber(1) });
            let before = frames.bytes().to_vec();
            let (read, got) = frames.read_frame(STREAM, 0, 100, |_| Err::<(), _>("no"));
            assert!(read == Err("no") && got.is_empty());
            assert_eq!(frames.bytes(), before);
            let short = frames.read_exactly(STREAM, 0, 100, |out| {
                out.put_bytes(1, 99);
                Ok::<_, &str>(99)
            });
            assert_eq!(short, Ok(None));
            assert_eq!(frames.bytes(), before);
            let failed = frames.read_exactly(STREAM, 0, 100, |_| Err("no"));
            assert_eq!(failed, Err("no"));
            assert_eq!(frames.bytes(), before);
        }
    }

    #[test]
    fn a_buffer_is_renewed_only_when_it_is_empty_and_too_short() {
        let mut frames = FrameBuffer::new(FrameFormat::Plain);
        frames.renew(1, || None);
        assert!(frames.payload_space() >= BUFFER_BYTES - HEADER_BYTES);
        let begins = frames.bytes().as_ptr();
        frames.renew(1000, || unreachable!("it has space"));
        frames.put_data(STREAM, 0, &[1; 1000]);
        frames.renew(BUFFER_BYTES, || unreachable!("it is not empty"));
        assert_eq!(frames.bytes().as_ptr(), begins);
        let sent = frames.take();
        assert_eq!(sent.len(), HEADER_BYTES + 1000);
        let spare = BytesMut::with_capacity(BUFFER_BYTES);
        let at = spare.as_ptr();
        frames.renew(BUFFER_BYTES - HEADER_BYTES, || Some(spare));
        assert_eq!(frames.bytes().as_ptr(), at);
        // One that is too short is of no use.
        let short = BytesMut::with_capacity(10);
        frames.renew(2 * BUFFER_BYTES, || Some(short));
        assert!(frames.payload_space() >= 2 * BUFFER_BYTES);
        frames.release_grown();
        assert_eq!(frames.bytes.capacity(), 0);
    }
}
