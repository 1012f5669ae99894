//! What tests have instead of image-cache: one connection of it, whose answers the test gives.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use image_common::link::codec::{FrameFormat, Message};
use image_common::link::handshake::{Answer, Hello, Place, Refusal};
use image_common::link::reader::{receive_hello, FrameReader};
use image_common::net::dial::System;
use tokio::io::{split, AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpListener;

use crate::link::connect::Target;

/// For what comes at once, on a host that is busy.
pub const SOON: Duration = Duration::from_secs(20);

pub const KEY: u64 = 9;

pub async fn soon<T>(future: impl std::future::Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("in time")
}

/// A cache on this port of this host.
pub fn target(port: u16) -> Target {
    Target {
        host: "127.0.0.1".to_owned(),
        port,
        proxy: 1,
        connect_timeout: SOON,
        connections: 1,
        link_timeout: Duration::ZERO,
        retransmit_buffer: 0,
        frame_format: FrameFormat::Plain,
        tls: None,
        resolver: Arc::new(System),
        openings: Arc::default(),
    }
}

pub async fn listener() -> (TcpListener, Target) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let target = target(listener.local_addr().unwrap().port());
    (listener, target)
}

/// Takes a connection, and chooses this version, or else the newest of image-proxy; gives what the connection wanted.
pub async fn welcome<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    version: Option<u16>,
) -> Hello {
    let hello = receive_hello(stream).await.unwrap();
    let welcome = Answer::Welcome {
        version: version.unwrap_or(*hello.versions.end()),
        key: KEY,
        received: 0,
        patience: hello.patience,
        software: "test".to_owned(),
    };
    stream.write_all(&welcome.encode()).await.unwrap();
    hello
}

/// The cache's end of a connection, behind the handshake.
pub struct Cache<S> {
    reader: FrameReader<ReadHalf<S>>,
    writer: WriteHalf<S>,
    format: FrameFormat,
    pub place: Place,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Cache<S> {
    /// Takes the connection, and chooses this version.
    pub async fn welcomes(mut stream: S, version: u16) -> Self {
        let hello = welcome(&mut stream, Some(version)).await;
        let (reader, writer) = split(stream);
        Self {
            reader: FrameReader::new(reader).with_format(hello.frame_format),
            writer,
            format: hello.frame_format,
            place: hello.place,
        }
    }

    /// The next message of image-proxy. `None`: it has closed the connection.
    pub async fn hears(&mut self) -> Option<Message> {
        loop {
            let header = soon(self.reader.header()).await.unwrap()?;
            match self.reader.message(header).await.unwrap() {
                Message::Received { .. } => {}
                message => return Some(message),
            }
        }
    }

    pub async fn says(&mut self, message: &Message) {
        let mut frame = BytesMut::new();
        message.encode_with(&mut frame, self.format);
        self.writer.write_all(&frame).await.unwrap();
    }
}

/// Refuses a connection; gives what it wanted.
pub async fn refuses<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, why: Refusal) -> Place {
    let hello = receive_hello(&mut stream).await.unwrap();
    let reason = "no such session".to_owned();
    let refusal = Answer::Refused { why, reason };
    stream.write_all(&refusal.encode()).await.unwrap();
    hello.place
}
