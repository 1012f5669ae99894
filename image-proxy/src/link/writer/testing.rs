//! What the tests of the writer share.

use image_common::link::codec::HEADER_BYTES;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::*;

pub const STREAM: StreamNumber = StreamNumber(7);

pub fn socket() -> (Socket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Socket::Unix(ours), theirs)
}

pub fn writer(resumable: bool) -> (Writer, Arc<ResumableStream>, UnixStream) {
    let (ours, theirs) = socket();
    let wire = ResumableStream::new(ours);
    let retransmit_buffer = resumable.then_some(64 << 20);
    let writer = Writer::new(wire.clone(), retransmit_buffer, FrameFormat::Plain).unwrap();
    (writer, wire, theirs)
}

/// A frame with numbers in it, and its bytes.
pub fn put(writer: &mut Writer, number: u32, sent: &mut Vec<u8>) {
    let bytes: Vec<u8> = (0..50_000u32)
        .flat_map(|n| (n ^ number << 20).to_le_bytes())
        .collect();
    let at = writer.frames.len();
    writer.put_data(STREAM, &bytes);
    sent.extend_from_slice(&writer.frames.bytes()[at..]);
    assert_eq!(writer.frames.len() - at, HEADER_BYTES + bytes.len());
}

pub async fn read(theirs: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut got = vec![0; n];
    theirs.read_exact(&mut got).await.unwrap();
    got
}
