//! An image from memory to its reader, on a pipe or a socket.
//!
//! Pages go into a pipe by reference (`vmsplice`), no copy of ours. All other images, and every
//! image on a socket, are copied once, by `writev`.

use std::future::Future;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::criu_io::fdpass::enlarge_pipe;
use tokio::io::unix::AsyncFd;
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::store::image::{Image, ImageReader, Next};
use crate::store::memory::segment::{vmsplice, Piece};
use crate::store::set::Taking;

/// What a pipe is enlarged to, for images that do not fit a default one: the most that an
/// unprivileged process may ask for. Page images need no more, they are read in a loop.
const PIPE_BYTES: usize = 1 << 20;

/// Other images that CRIU does not buffer (pipes-data, sk-queues, ghost files, ...) it reads
/// with single `read`s, and takes a short one as an error ("Img trimmed"). A read is short
/// where one write ended and the next has not come, so an image goes into the pipe with as few
/// writes as can be: all of it, if root may have a pipe that large. They are copied: a pipe has
/// room for so many pages, and referred to, an image that begins within a page takes one more.
const WHOLE_IMAGE_BYTES: usize = 16 << 20;

/// Pieces of one write. Large images have large pieces; those of page server rounds may have
/// pieces of single pages.
const MAX_PIECES: usize = 256;

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
    /// Another restore takes the set's memory along: the same.
    Taken,
}

/// Something that takes bytes.
pub trait Sink {
    /// Takes at least one byte of the front of `pieces`, waiting for room. Cancel safe.
    fn write(&mut self, pieces: &[Piece]) -> impl Future<Output = io::Result<usize>> + Send;
}

/// CRIU's pipe.
pub struct PipeSink {
    pipe: Pipe,
    by_reference: bool,
}

/// Most images fit into their pipe at once, so epoll hears of a pipe when it was full.
enum Pipe {
    Unwatched(OwnedFd),
    Watched(AsyncFd<OwnedFd>),
    /// It could not be watched.
    Closed,
}

impl PipeSink {
    /// A sink for `image` of a pipe that was checked, and does not block.
    pub fn new(fd: OwnedFd, image: &Image) -> Self {
        let large = image.size() > DEFAULT_PIPE_BYTES || !image.is_complete();
        if large {
            enlarge_pipe(&fd, PIPE_BYTES);
            let len = usize::try_from(image.size()).unwrap_or(usize::MAX);
            if len > PIPE_BYTES && !image.name.is_pages() {
                enlarge_pipe(&fd, len.min(WHOLE_IMAGE_BYTES));
            }
        }
        Self {
            pipe: Pipe::Unwatched(fd),
            by_reference: large && image.name.is_pages(),
        }
    }

    fn put(&self, fd: &OwnedFd, pieces: &[Piece]) -> io::Result<usize> {
        match self.by_reference {
            true => vmsplice(fd, pieces),
            false => Ok(rustix::io::writev(fd, &slices(pieces))?),
        }
    }

    /// From now on epoll tells when there is room.
    fn watch(&mut self) -> io::Result<()> {
        if let Pipe::Unwatched(fd) = std::mem::replace(&mut self.pipe, Pipe::Closed) {
            // SAFETY: the AsyncFd owns the pipe, which stays the same open descriptor until
            // the AsyncFd is dropped; `OwnedFd` has no way to close or replace it in between.
            let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::WRITABLE) }?;
            self.pipe = Pipe::Watched(fd);
        }
        Ok(())
    }
}

impl Sink for PipeSink {
    async fn write(&mut self, pieces: &[Piece]) -> io::Result<usize> {
        if let Pipe::Unwatched(fd) = &self.pipe {
            match self.put(fd, pieces) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.watch()?,
                done => return done,
            }
        }
        let Pipe::Watched(fd) = &self.pipe else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        loop {
            let mut ready = fd.writable().await?;
            if let Ok(done) = ready.try_io(|fd| self.put(fd.get_ref(), pieces)) {
                return done;
            }
        }
    }
}

impl Sink for &UnixStream {
    async fn write(&mut self, pieces: &[Piece]) -> io::Result<usize> {
        loop {
            match self.try_write_vectored(&slices(pieces)) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                done => return done,
            }
        }
    }
}

fn slices(pieces: &[Piece]) -> Vec<IoSlice<'_>> {
    pieces.iter().map(|p| IoSlice::new(p)).collect()
}

/// Writes the whole image, waiting for what has not arrived yet. With `taking`, what was
/// written leaves the store.
///
/// Cancel safe in the sense that nothing is lost but this transfer.
pub async fn pump(
    image: &Arc<Image>,
    sink: &mut impl Sink,
    taking: Option<&Taking>,
) -> io::Result<Served> {
    let mut reader = image.read();
    loop {
        let pieces = match reader.next(MAX_PIECES).await {
            Next::Pieces(pieces) => pieces,
            Next::End => {
                let last = taking.is_none_or(|t| take(t, &mut reader, 0));
                return Ok(if last { Served::Whole } else { Served::Taken });
            }
            Next::Broken => return Ok(Served::Broken),
            Next::Released => return Ok(Served::Taken),
        };
        match sink.write(&pieces).await {
            Ok(n) => reader.consume(n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(Served::ClosedEarly),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(Served::ClosedEarly),
            Err(e) => return Err(e),
        }
        // Ours too must be gone for a piece's memory to go.
        drop(pieces);
        if !taking.is_none_or(|t| take(t, &mut reader, PIPE_BYTES as u64)) {
            return Ok(Served::Taken);
        }
    }
}

/// Gives back what was read. `keep` may still be in the pipe: a restore that fails before it
/// has read anything leaves the whole set behind. `false` if it belongs to another restore.
fn take(taking: &Taking, reader: &mut ImageReader, keep: u64) -> bool {
    if !reader.can_release(keep) {
        return true;
    }
    let ours = taking.take();
    if ours {
        reader.release(keep);
    }
    ours
}

/// Says in the log how the serving of an image has ended.
pub fn report(image: &Image, served: io::Result<Served>) {
    match served {
        Ok(Served::Whole) => tracing::debug!(image = %image.name, "served"),
        Ok(Served::ClosedEarly) => tracing::debug!(image = %image.name, "closed early by CRIU"),
        Ok(Served::Broken) => {
            tracing::error!(image = %image.name, "the image broke off while CRIU read it; the restore fails");
        }
        Ok(Served::Taken) => {
            tracing::error!(image = %image.name, "another restore takes the memory of the set (--release-on-read); this restore fails");
        }
        Err(e) => {
            tracing::error!(image = %image.name, "the image cannot be written to CRIU, so the restore fails: {e}")
        }
    }
}

#[cfg(test)]
mod tests;
