//! A connection of the link whose sockets break at any byte: what image-proxy's writer puts into it
//! comes out of the reader at the other end, every frame once and in its order, and no more is kept
//! than the retransmit buffer.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::input::Input;
use crate::link::of_the_cache;
use crate::world;
use image_common::link::codec::{FrameFormat, Message, StreamNumber};
use image_common::link::reader::FrameReader;
use image_common::link::resumable::{Claim, ResumableReader, ResumableStream};
use image_common::net::socket::Socket;
use image_proxy::link::writer::Writer;
use tokio::net::UnixStream;

#[derive(Debug, Clone, PartialEq)]
enum Frame {
    Message(Message),
    Data(u32, Vec<u8>),
}

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let format = FrameFormat::with_checksums(input.u8() & 1 != 0);
        let buffer = 4 << 20;
        let (proxy, cache) = sockets();
        let (sending, receiving) = (ResumableStream::new(proxy), ResumableStream::new(cache));
        let mut writer = Writer::new(sending.clone(), Some(buffer), format).expect("a writer");
        let read = Arc::new(Mutex::new(Vec::new()));
        let reader = FrameReader::new(ResumableReader::new(
            receiving.clone(),
            Some(Duration::from_secs(9)),
        ));
        let reading = tokio::spawn(receive(reader.with_format(format), read.clone()));
        let mut said = Vec::new();
        while !input.is_empty() {
            match input.below(8) {
                0 | 1 => {
                    let message = of_the_cache(&mut input);
                    writer.put(&message);
                    said.push(Frame::Message(message));
                }
                2 | 3 => {
                    let stream = input.u8().into();
                    let bytes = vec![input.u8(); 1 + usize::from(input.any::<u16>())];
                    writer.put_data(StreamNumber(stream), &bytes);
                    said.push(Frame::Data(stream, bytes));
                }
                // Whoever sends may be stopped at any wait, and another goes on.
                4 => drop(tokio::time::timeout(Duration::ZERO, writer.flush()).await),
                5 => world::turn().await,
                6 => {
                    sending.acknowledge(receiving.received());
                    world::turn().await;
                }
                _ => resume(&sending, &receiving),
            }
        }
        // One more socket, for what the last one left; then no end is missing.
        resume(&sending, &receiving);
        let flushing = tokio::spawn(async move {
            writer.flush().await.expect("there is a socket");
            writer
        });
        while !flushing.is_finished() {
            world::turn().await;
            sending.acknowledge(receiving.received());
        }
        world::turn().await;
        while read.lock().expect("no panic").len() < said.len() && !reading.is_finished() {
            world::turn().await;
        }
        drop(flushing.await);
        sending.detach(io::ErrorKind::NotConnected.into());
        world::ended().await;
        let read = std::mem::take(&mut *read.lock().expect("no panic"));
        let same = read.iter().zip(&said).take_while(|(a, b)| a == b).count();
        assert!(
            read == said,
            "the first {same} of {} frames are right",
            said.len()
        );
    });
}

fn sockets() -> (Socket, Socket) {
    let (a, b) = UnixStream::pair().expect("sockets");
    (Socket::Unix(a), Socket::Unix(b))
}

/// As the handshake of a resumed connection does it: the receiver first stops to read.
fn resume(sending: &ResumableStream, receiving: &ResumableStream) {
    let (proxy, cache) = sockets();
    let reset = || io::ErrorKind::ConnectionReset.into();
    let taken = |wire: &ResumableStream, received| {
        let claim = Claim {
            received,
            attempt: 0,
        };
        wire.take_over(claim, reset())
            .expect("nobody has closed it, and it is not late")
    };
    let arrived = taken(receiving, sending.received());
    let answered = taken(sending, arrived.received);
    assert!(receiving.attach_taken(&arrived, cache, answered.received));
    assert!(sending.attach_taken(&answered, proxy, arrived.received));
}

async fn receive(mut reader: FrameReader<ResumableReader>, read: Arc<Mutex<Vec<Frame>>>) {
    while let Ok(Some(header)) = reader.header().await {
        let frame = match header.as_data() {
            None => Frame::Message(reader.message(header).await.expect("our own")),
            Some(stream) => {
                let mut bytes = vec![0; header.length as usize];
                let mut done = 0;
                while done < bytes.len() {
                    match reader.data(&mut bytes[done..]).await {
                        Ok(n) => done += n,
                        Err(_) => return,
                    }
                }
                Frame::Data(stream.0, bytes)
            }
        };
        read.lock().expect("no panic").push(frame);
    }
}
