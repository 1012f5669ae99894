use bytes::BytesMut;
use image_common::criu::inventory::SetKind;
use image_common::link::codec::HEADER_BYTES;
use image_common::link::MAX_DATA_BYTES;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::*;
use crate::link::testing::{listener, welcome, SOON};

const MAX_DATA: usize = MAX_DATA_BYTES as usize;

/// A link, and the cache's end of it behind the handshake.
async fn linked() -> (Arc<Link>, TcpStream) {
    let (listener, target) = listener().await;
    let target = Target {
        link_timeout: SOON,
        retransmit_buffer: 0, // the least that there is
        ..target
    };
    let accepted = async {
        let (mut cache, _) = listener.accept().await.unwrap();
        welcome(&mut cache, None).await;
        cache
    };
    let session = "web".parse().unwrap();
    let (link, cache) = tokio::join!(Link::connect(&target, &session), accepted);
    (link.unwrap(), cache)
}

/// A task that waits for space in the retransmit buffer holds the writer, and an acknowledgement that is read makes that
/// space. So the reader must not wait for the writer, also when it has to acknowledge what it has read.
#[tokio::test]
async fn a_full_retransmit_buffer_does_not_stop_the_reading() {
    let (link, mut cache) = linked().await;
    let frame_bytes = HEADER_BYTES + MAX_DATA;
    let frames = LEAST_RETRANSMIT_BUFFER / frame_bytes + 1;
    let sending = link.clone();
    let sent = tokio::spawn(async move {
        let mut writer = sending.writer().await;
        for _ in 0..frames {
            writer.put_data(StreamNumber(7), &vec![0; MAX_DATA]);
            writer.flush().await.unwrap();
        }
    });
    // As many as are kept at most: now the writer waits for space.
    let mut unacknowledged = vec![0; LEAST_RETRANSMIT_BUFFER / frame_bytes * frame_bytes];
    cache.read_exact(&mut unacknowledged).await.unwrap();

    let mut answers = BytesMut::new();
    while (answers.len() as u64) < 2 * ANSWERS_ACK_BYTES {
        // Of a run that has ended.
        let (stream, total) = (StreamNumber(9), 0);
        Message::ImageAck { stream, total }.encode(&mut answers);
    }
    let (connection, total) = (0, unacknowledged.len() as u64);
    Message::Received { connection, total }.encode(&mut answers);
    cache.write_all(&answers).await.unwrap();

    let mut reader = FrameReader::new(cache);
    let heard = async {
        loop {
            let header = reader.header().await.unwrap().unwrap();
            if header.as_data().is_some() {
                let mut left = vec![0; header.length as usize];
                while !left.is_empty() {
                    let n = reader.data(&mut left).await.unwrap();
                    left.truncate(left.len() - n);
                }
                continue;
            }
            match reader.message(header).await.unwrap() {
                Message::Received { total, .. } => return total,
                other => panic!("{other:?}"),
            }
        }
    };
    let heard = tokio::time::timeout(SOON, heard)
        .await
        .expect("no deadlock");
    assert!(heard >= ANSWERS_ACK_BYTES && heard <= answers.len() as u64);
    sent.await.unwrap();
}

/// While a set is prepared the cache hears that this process lives; and the task that waits sees the end at once.
#[tokio::test]
async fn it_is_heard_while_it_waits() {
    let (link, cache) = linked().await;
    let (end, ended) = oneshot::channel::<u8>();
    let waits = link.clone();
    let waiting = tokio::spawn(async move { waits.heard_during(ended).await });
    let mut reader = FrameReader::new(cache);
    for _ in 0..2 {
        let header = tokio::time::timeout(SOON, reader.header());
        let header = header.await.expect("it speaks").unwrap().unwrap();
        let heard = reader.message(header).await.unwrap();
        let (connection, total) = (0, 0);
        assert_eq!(heard, Message::Received { connection, total });
    }
    end.send(7).unwrap();
    assert_eq!(waiting.await.unwrap(), Ok(7));
}

/// A task without which the link does nothing any more takes the link, and its runs, with it.
#[tokio::test]
async fn a_panic_of_a_task_of_the_link_is_the_end_of_its_runs() {
    let (link, _cache) = linked().await;
    let (failed, why) = oneshot::channel();
    let run = Arc::new(Failing(Mutex::new(Some(failed))));
    link.add_set(SetNumber(1), run);
    link.spawn("on purpose", async { panic!("a fault of ours") });
    tokio::time::timeout(SOON, link.failed()).await.unwrap();
    let why = tokio::time::timeout(SOON, why).await.unwrap().unwrap();
    assert!(why.contains("a fault of ours"), "{why}");
}

/// A run that hears of nothing but its failure.
struct Failing(Mutex<Option<oneshot::Sender<String>>>);

impl SetAnswers for Failing {
    fn image_acknowledged(&self) {}
    fn gate_answered(&self) {}
    fn stored(&self, _: SetKind) {}
    fn prepare_answered(&self, _: Result<(), Failure>) {}
    fn in_trial(&self) {}
    fn holding(&self) {}
    fn trial_failed(&self, _: Failure) {}

    fn fail(&self, failure: Failure) {
        let first = self.0.lock().unwrap().take();
        first.map(|failed| failed.send(failure.text()));
    }
}
