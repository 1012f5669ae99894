//! An image from memory to whoever reads it, on a pipe or a socket.
//!
//! One copy: from the image's memory into the pipe (or socket) buffer, by `writev`.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::fdpass::enlarge_pipe;
use tokio::net::unix::pipe;
use tokio::net::UnixStream;

use crate::store::image::{Image, Next};

/// What a pipe is enlarged to, for images that do not fit a default one: the most that an
/// unprivileged process may ask for. Page images need no more, they are read in a loop.
const PIPE_BYTES: usize = 1 << 20;

/// Other images that CRIU does not buffer (pipes-data, sk-queues, ghost files, ...) it reads
/// with single `read`s, and takes a short one as an error ("Img trimmed"). A read is short
/// where one write ended and the next has not come, so an image goes into the pipe with as few
/// writes as can be: all of it, if root may have a pipe that large.
const WHOLE_IMAGE_BYTES: usize = 16 << 20;

/// Pieces of one write. Larger images have larger pieces, not more of them.
const MAX_PIECES: usize = 64;

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
    fn try_write_vectored(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize>;
}

impl Sink for pipe::Sender {
    async fn writable(&self) -> io::Result<()> {
        pipe::Sender::writable(self).await
    }
    fn try_write_vectored(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        pipe::Sender::try_write_vectored(self, bytes)
    }
}

impl Sink for UnixStream {
    async fn writable(&self) -> io::Result<()> {
        UnixStream::writable(self).await
    }
    fn try_write_vectored(&self, bytes: &[IoSlice<'_>]) -> io::Result<usize> {
        UnixStream::try_write_vectored(self, bytes)
    }
}

/// A checked pipe as a sink for an image.
pub fn pipe_sink(fd: OwnedFd, image: &Image) -> io::Result<pipe::Sender> {
    if image.size() > DEFAULT_PIPE_BYTES {
        enlarge_pipe(&fd, PIPE_BYTES);
        let len = usize::try_from(image.size()).unwrap_or(usize::MAX);
        if len > PIPE_BYTES && !image.name.is_pages() {
            enlarge_pipe(&fd, len.min(WHOLE_IMAGE_BYTES));
        }
    }
    pipe::Sender::from_owned_fd(fd)
}

/// Writes the whole image, waiting for what has not arrived yet.
///
/// Cancel safe in the sense that nothing is lost but this transfer.
pub async fn pump(image: &Arc<Image>, sink: &impl Sink) -> io::Result<Served> {
    let mut reader = image.read();
    loop {
        let pieces = match reader.next(MAX_PIECES).await {
            Next::Pieces(pieces) => pieces,
            Next::End => return Ok(Served::Whole),
            Next::Broken => return Ok(Served::Broken),
        };
        let slices: Vec<_> = pieces.iter().map(|p| IoSlice::new(p)).collect();
        match sink.try_write_vectored(&slices) {
            Ok(n) => reader.consume(n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => sink.writable().await?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Served::ClosedEarly),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Served::ClosedEarly),
            Err(e) => return Err(e),
        }
    }
}
