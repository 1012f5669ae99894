use tokio::io::AsyncWriteExt;

use super::testing::{read, socket, writer, STREAM};
use super::*;

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
        let at = writer.frames.bytes().as_ptr();
        let taken = writer.gather_round(STREAM, 128 << 10, &criu).unwrap();
        assert_eq!(taken.unwrap().len(), 1000);
        let begins = writer.frames.bytes().as_ptr();
        assert!(n == 0 || begins == at, "piece {n} has a buffer of its own");
        let frame = writer.frames.len();
        writer.flush().await.unwrap();
        assert_eq!(writer.frames.bytes().as_ptr(), begins.wrapping_add(frame));
        read(&mut theirs, frame).await;
    }
}
