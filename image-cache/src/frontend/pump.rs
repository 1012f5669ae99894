//! An image from memory to whoever reads it, on a pipe or a socket.
//!
//! One copy: from the image's memory into the pipe (or socket) buffer, by `write`.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::fdpass::enlarge_pipe;
use tokio::net::unix::pipe;
use tokio::net::UnixStream;

use crate::store::image::{Image, Next};

/// What a pipe is enlarged to, for images that do not fit a default one: the most that an
/// unprivileged process may ask for.
const PIPE_BYTES: usize = 1 << 20;
const DEFAULT_PIPE_BYTES: u64 = 64 << 10;

/// How a transfer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    Whole,
    /// CRIU stops after the last page it needs, which is normal.
    ClosedEarly,
    /// The image broke while it was followed: CRIU sees a pages image that ends early, which
    /// it reports.
    Broken,
}

/// Something that takes bytes without blocking.
pub trait Sink {
    fn writable(&self) -> impl std::future::Future<Output = io::Result<()>> + Send;
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
}

impl Sink for pipe::Sender {
    async fn writable(&self) -> io::Result<()> {
        pipe::Sender::writable(self).await
    }
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        pipe::Sender::try_write(self, bytes)
    }
}

impl Sink for UnixStream {
    async fn writable(&self) -> io::Result<()> {
        UnixStream::writable(self).await
    }
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        UnixStream::try_write(self, bytes)
    }
}

/// A checked pipe as a sink for an image.
pub fn pipe_sink(fd: OwnedFd, image: &Image) -> io::Result<pipe::Sender> {
    if image.len() > DEFAULT_PIPE_BYTES {
        enlarge_pipe(&fd, PIPE_BYTES);
    }
    pipe::Sender::from_owned_fd(fd)
}

/// Writes the whole image, waiting for what has not arrived yet.
///
/// Cancel safe in the sense that nothing is lost but this transfer.
pub async fn pump(image: &Arc<Image>, sink: &impl Sink) -> io::Result<Served> {
    let mut reader = image.read();
    loop {
        let piece = match reader.next().await {
            Next::Piece(piece) => piece,
            Next::End => return Ok(Served::Whole),
            Next::Broken => return Ok(Served::Broken),
        };
        match sink.try_write(&piece) {
            Ok(n) => reader.consume(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => sink.writable().await?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Served::ClosedEarly),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Served::ClosedEarly),
            Err(e) => return Err(e),
        }
    }
}
