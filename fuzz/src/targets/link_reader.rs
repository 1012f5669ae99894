//! Frames out of a stream that comes in pieces: where it is cut makes no difference, neither to what
//! is read nor to the error at its end, and no more is in memory than what was announced.

use std::pin::Pin;
use std::task::{Context, Poll};

use crate::input::Input;
use crate::world;
use image_common::link::codec::{FrameFormat, Message};
use image_common::link::reader::{receive_hello, FrameReader};
use tokio::io::{AsyncRead, ReadBuf};

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let format = FrameFormat::with_checksums(input.u8() & 1 != 0);
    let sizes = input.short().to_vec();
    let wire = input.rest();
    world::run(async move {
        let whole = Pieces {
            wire,
            sizes: &[],
            at: 0,
        };
        let pieces = Pieces {
            wire,
            sizes: &sizes,
            at: 0,
        };
        assert_eq!(read(whole, format).await, read(pieces, format).await);
        let whole = receive_hello(&mut Pieces {
            wire,
            sizes: &[],
            at: 0,
        })
        .await;
        let pieces = receive_hello(&mut Pieces {
            wire,
            sizes: &sizes,
            at: 0,
        })
        .await;
        assert_eq!(format!("{whole:?}"), format!("{pieces:?}"));
    });
}

#[derive(Debug, PartialEq)]
enum Frame {
    Message(Message),
    Data(u32, u32, Vec<u8>),
}

async fn read(from: Pieces<'_>, format: FrameFormat) -> (Vec<Frame>, String) {
    let mut reader = FrameReader::new(from).with_format(format);
    let mut frames = Vec::new();
    loop {
        let header = match reader.header().await {
            Ok(Some(header)) => header,
            Ok(None) => return (frames, "the end".to_owned()),
            Err(e) => return (frames, format!("{e:?}")),
        };
        let Some(stream) = header.as_data() else {
            match reader.message(header).await {
                Ok(message) => frames.push(Frame::Message(message)),
                Err(e) => return (frames, format!("{e:?}")),
            }
            continue;
        };
        let mut data = vec![0; header.length as usize];
        let mut done = 0;
        while done < data.len() {
            match reader.data(&mut data[done..]).await {
                Ok(n) => done += n,
                Err(e) => return (frames, format!("{e:?}")),
            }
        }
        frames.push(Frame::Data(stream.0, header.sequence, data));
    }
}

/// A stream that is read in pieces of these sizes, over and over.
struct Pieces<'a> {
    wire: &'a [u8],
    sizes: &'a [u8],
    at: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let this = &mut *self;
        let size = match this.sizes.get(this.at % this.sizes.len().max(1)) {
            Some(&size) => usize::from(size).max(1),
            None => usize::MAX,
        };
        this.at += 1;
        assert!(
            into.remaining() <= 1 << 20,
            "more than a frame is asked for"
        );
        let n = size.min(into.remaining()).min(this.wire.len());
        let (piece, rest) = this.wire.split_at(n);
        into.put_slice(piece);
        this.wire = rest;
        Poll::Ready(Ok(()))
    }
}
