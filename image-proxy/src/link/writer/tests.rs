use std::time::Duration;

use image_common::link::codec::HEADER_BYTES;
use image_common::net::socket::Socket;
use rustix::pipe::{pipe_with, PipeFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;
use crate::pipe_budget::Pipes;

const STREAM: StreamNumber = StreamNumber(7);

fn socket() -> (Socket, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Socket::Unix(ours), theirs)
}

fn writer(resumable: bool) -> (Writer, Arc<Wire>, UnixStream) {
    let (ours, theirs) = socket();
    let wire = Wire::new(ours);
    let window = resumable.then_some(64 << 20);
    let writer = Writer::new(wire.clone(), window, false).unwrap();
    (writer, wire, theirs)
}

/// A frame with numbers in it, and its bytes.
fn put(writer: &mut Writer, number: u32, sent: &mut Vec<u8>) {
    let bytes: Vec<u8> = (0..50_000u32)
        .flat_map(|n| (n ^ number << 20).to_le_bytes())
        .collect();
    let at = writer.out.len();
    writer.put_data(STREAM, &bytes);
    sent.extend_from_slice(&writer.out[at..]);
    assert_eq!(writer.out.len() - at, HEADER_BYTES + bytes.len());
}

async fn read(theirs: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut got = vec![0; n];
    theirs.read_exact(&mut got).await.unwrap();
    got
}

/// Whoever stops to wait leaves nothing half sent behind: the next one goes on with it.
#[tokio::test]
async fn a_stopped_flush_leaves_the_stream_whole() {
    for resumable in [false, true] {
        let (mut writer, _wire, mut theirs) = writer(resumable);
        let mut sent = Vec::new();
        // More than the socket takes, less than what may be kept unacknowledged.
        for number in 0..10 {
            put(&mut writer, number, &mut sent);
        }
        let stopped = tokio::time::timeout(Duration::from_millis(50), writer.flush()).await;
        assert!(stopped.is_err());
        put(&mut writer, 10, &mut sent);
        let (flushed, got) = tokio::join!(writer.flush(), read(&mut theirs, sent.len()));
        flushed.unwrap();
        assert!(got == sent, "{resumable}");
    }
}

/// What is kept of a buffer keeps all of it: pieces that come one by one must not have one each.
#[tokio::test]
async fn small_pieces_of_a_round_share_a_buffer() {
    let (mut writer, _wire, mut theirs) = writer(true);
    let (criu, mut peer) = socket();
    for n in 0..100 {
        peer.write_all(&[7; 1000]).await.unwrap();
        let from = match &criu {
            Socket::Unix(stream) => stream,
            Socket::Tcp(_) => unreachable!("a pair of unix sockets"),
        };
        from.readable().await.unwrap();
        let at = writer.out.as_ptr();
        let taken = writer.take_round(STREAM, 128 << 10, &criu).unwrap();
        assert_eq!(taken.unwrap().len(), 1000);
        let begins = writer.out.as_ptr();
        assert!(n == 0 || begins == at, "piece {n} has a buffer of its own");
        let frame = writer.out.len();
        writer.flush().await.unwrap();
        assert_eq!(writer.out.as_ptr(), begins.wrapping_add(frame));
        read(&mut theirs, frame).await;
    }
}

/// The same while what is kept is sent on another socket: on that nothing can follow.
#[tokio::test]
async fn stopped_while_what_is_kept_is_sent_again() {
    let (mut writer, wire, mut theirs) = writer(true);
    let mut sent = Vec::new();
    for number in 0..20 {
        put(&mut writer, number, &mut sent);
    }
    let (flushed, got) = tokio::join!(writer.flush(), read(&mut theirs, sent.len()));
    flushed.unwrap();
    assert!(got == sent);

    // It says that half of it has not arrived.
    let half = sent.len() / 2;
    wire.detach(io::ErrorKind::ConnectionReset.into());
    let (again, _second) = socket();
    wire.attach(again, half as u64);
    let stopped = tokio::time::timeout(Duration::from_millis(50), writer.flush()).await;
    assert!(stopped.is_err());
    put(&mut writer, 20, &mut sent);
    let third = async {
        let mut changes = wire.watch();
        changes
            .wait_for(|state| state.half.is_none())
            .await
            .unwrap();
        let (third, mut theirs) = socket();
        wire.attach(third, half as u64);
        read(&mut theirs, sent.len() - half).await
    };
    let (flushed, got) = tokio::join!(writer.flush(), third);
    flushed.unwrap();
    assert!(got == sent[half..]);
}

/// Pages go by reference, are kept, and come again from where the other side stands.
#[tokio::test]
async fn pages_are_sent_again_from_any_byte() {
    let size = 300_000;
    let bytes: Vec<u8> = (0..size).map(|n: usize| n.to_le_bytes()[n % 2]).collect();
    for at in [0, 1, HEADER_BYTES, 70_000, size + HEADER_BYTES] {
        let (mut writer, wire, mut theirs) = writer(true);
        let (reader, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
        image_common::criu_io::fdpass::enlarge_pipe(&into, 1 << 20);
        assert_eq!(rustix::io::write(&into, &bytes).unwrap(), size);
        let (sent, got) = tokio::join!(
            writer.splice_numbered(STREAM, 3, &reader, size),
            read(&mut theirs, HEADER_BYTES + size)
        );
        assert_eq!(sent.unwrap().bytes, size);
        assert!(got[HEADER_BYTES..] == bytes);
        for _ in 0..2 {
            wire.detach(io::ErrorKind::ConnectionReset.into());
            let (again, mut theirs) = socket();
            wire.attach(again, at as u64);
            let rest = got.len() - at;
            let (flushed, anew) = tokio::join!(writer.flush(), read(&mut theirs, rest));
            flushed.unwrap();
            assert!(anew == got[at..], "from {at}");
        }
        // What it has, it cannot want again.
        wire.detach(io::ErrorKind::ConnectionReset.into());
        let (again, _theirs) = socket();
        wire.attach(again, 0);
        if at > 0 {
            writer.flush().await.unwrap_err();
        }
    }
}

/// Pages that are kept in as many pipes as there are, in one, or in none: all of it arrives, and
/// nobody waits for an acknowledgement that does not come.
#[tokio::test]
async fn few_pipes_or_none() {
    static FEW: [Pipes; 4] = [
        Pipes::new(0),
        Pipes::new(128 << 10),
        Pipes::new(512 << 10),
        Pipes::new(3 << 20),
    ];
    const FRAME: usize = 1 << 20;
    for (at, pipes) in FEW.iter().enumerate() {
        let (mut writer, wire, mut theirs) = writer(true);
        writer.retransmit = Some(RetransmitBuffer::with_pipes(16 << 20, pipes));
        let bytes: Vec<u8> = (0..=250).cycle().take(FRAME).collect();
        let sending = async {
            let mut sequence = 0;
            for _ in 0..20 {
                let (from, into) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                image_common::criu_io::fdpass::enlarge_pipe(&into, FRAME);
                assert_eq!(rustix::io::write(&into, &bytes), Ok(FRAME));
                // What is copied goes in shorter frames.
                let mut left = FRAME;
                while left > 0 {
                    let sent = writer.splice_numbered(STREAM, sequence, &from, left);
                    left -= sent.await.unwrap().bytes;
                    sequence += 1;
                }
            }
        };
        let receiving = async {
            // As image-cache acknowledges: at the end of a frame behind which nothing is there.
            let (mut total, mut told) = (0, 0);
            let (mut came, mut expected) = (0, 0);
            while came < 20 * FRAME {
                let header = read(&mut theirs, HEADER_BYTES).await;
                let header = Header::decode(header[..].try_into().unwrap()).unwrap();
                assert_eq!(header.sequence, expected);
                expected += 1;
                let length = header.length as usize;
                let frame = read(&mut theirs, length).await;
                let at = came % FRAME;
                assert!(frame[..] == bytes[at..at + length]);
                came += length;
                total += (HEADER_BYTES + length) as u64;
                if total - told >= image_common::link::resumable::ACK_WAITING_BYTES {
                    told = total;
                    wire.acknowledge(total);
                }
            }
        };
        let both = async { tokio::join!(sending, receiving) };
        let done = tokio::time::timeout(Duration::from_secs(60), both).await;
        assert!(done.is_ok(), "FEW[{at}]");
    }
}
