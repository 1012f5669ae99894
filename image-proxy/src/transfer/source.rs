//! Where an image comes from: CRIU's pipe, or its socket in the old dialect.
//!
//! The bytes are in a pipe of the kernel in either case, because `splice` moves them from a pipe to the link without
//! copying them into this process.

mod copied;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{catch_unwind, AssertUnwindSafe};

use bytes::{BufMut, BytesMut};
use rustix::pipe::{pipe_with, splice, PipeFlags, SpliceFlags};
use tokio::io::Interest;
use tokio::net::unix::pipe;
use tokio::net::UnixStream;

use image_common::criu_io::fdpass::enlarge_pipe;

use crate::link::image_data::{ImageData, ReadOutcome};
use crate::pipe_budget::{EnlargedPipe, PipeBudget, PIPE_BYTES};

/// From this many bytes in the pipe on, a splice is cheaper than a read and a copy.
const SPLICE_MIN_BYTES: usize = 32 << 10;

/// The most that is read in search of the end of an image. A write of this size to a pipe is atomic.
const PEEK_BYTES: usize = 4096;

/// What can be read now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Available {
    /// At least this many bytes, worth a splice from [`Source::pipe`].
    Splice(usize),
    /// A few, to be read with [`ImageData::read`].
    Few,
}

pub struct Source {
    pipe: pipe::Receiver,
    /// The pipe was seen full; it is enlarged if the budget allowed it.
    enlarged: Option<Option<EnlargedPipe>>,
    feeder: Option<Feeder>,
    size: Option<u64>,
    /// Read in search of the end; it comes before what is in the pipe.
    peeked: BytesMut,
}

/// Moves what arrives on a socket into the pipe that the image is taken from.
struct Feeder {
    stream: UnixStream,
    into: Option<OwnedFd>,
}

impl Source {
    /// From the pipe that CRIU passed; the caller has checked it.
    pub fn from_pipe(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            pipe: pipe::Receiver::from_owned_fd(fd)?,
            enlarged: None,
            feeder: None,
            size: None,
            peeked: BytesMut::new(),
        })
    }

    /// The same, by copy: CRIU may resume the tasks before the link has sent the image. `emptied` is called when CRIU's pipe
    /// is empty, `failed` before a reader can mistake the bytes copied so far for the whole image.
    pub fn copied(
        fd: OwnedFd,
        emptied: impl FnOnce() + Send + 'static,
        failed: impl FnOnce(io::Error) + Send + 'static,
    ) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        enlarge_pipe(&writer, PIPE_BYTES);
        tokio::task::spawn_blocking(move || {
            let writer = std::fs::File::from(writer);
            let copying = AssertUnwindSafe(|| copied::copy(fd, &writer, emptied));
            let copied = catch_unwind(copying)
                .unwrap_or_else(|_| Err(io::Error::other("the copying thread panicked")));
            if let Err(e) = copied {
                failed(e);
            }
        });
        Self::from_pipe(reader)
    }

    /// From the socket itself; `first` was read to detect the dialect.
    pub fn from_socket(stream: UnixStream, first: u8) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        rustix::io::write(&writer, &[first])?; // into an empty pipe: it fits
        let mut feeder = Feeder {
            stream,
            into: Some(writer),
        };
        // The rest is usually there: a frame for one byte alone would be a waste.
        feeder.feed_now()?;
        Ok(Self {
            pipe: pipe::Receiver::from_owned_fd(reader)?,
            enlarged: None,
            feeder: Some(feeder),
            size: None,
            peeked: BytesMut::new(),
        })
    }

    /// From a file of CRIU's images directory. Its size is announced, so that a file which
    /// cannot be read to its end is not taken for a shorter one.
    pub fn from_file(mut file: std::fs::File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut writer = std::fs::File::from(writer);
        // Files may block, pipes need not: a thread of the pool carries one into the other.
        tokio::task::spawn_blocking(move || io::copy(&mut file, &mut writer));
        Ok(Self {
            size: Some(size),
            ..Self::from_pipe(reader)?
        })
    }

    /// How long the image is, if that is known before its end: CRIU does not say.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Waits until there is something to take, or the end. Cancel safe.
    pub async fn available(&mut self) -> io::Result<Available> {
        loop {
            let n = usize::try_from(rustix::io::ioctl_fionread(&self.pipe)?).unwrap_or(usize::MAX);
            if n >= SPLICE_MIN_BYTES {
                // A default pipe that is full: this is a large image.
                if self.enlarged.is_none() && n >= 60 << 10 {
                    self.enlarged = Some(PipeBudget::of_images().enlarge(&self.pipe));
                }
                return Ok(Available::Splice(n));
            }
            match &mut self.feeder {
                Some(feeder) if n == 0 && feeder.into.is_some() => feeder.feed().await?,
                _ => {
                    // Also when there are bytes: `read` works only after tokio saw the event.
                    // A stale readiness is cleared by a `read` that finds nothing.
                    self.pipe.readable().await?;
                    return Ok(Available::Few);
                }
            }
        }
    }

    /// Whether there are bytes for [`Self::move_into`], or the end is reached.
    pub fn peek(&mut self) -> io::Result<ReadOutcome> {
        let there = rustix::io::ioctl_fionread(&self.pipe)?;
        let there = usize::try_from(there).unwrap_or(usize::MAX) + self.peeked.len();
        if there > 0 {
            return Ok(ReadOutcome::Bytes(there));
        }
        // The end, and an empty pipe, are left to tokio: it must know of them. What comes just
        // now is read with that.
        self.peeked.reserve(PEEK_BYTES);
        match self
            .pipe
            .try_read_buf(&mut (&mut self.peeked).limit(PEEK_BYTES))
        {
            Ok(0) => Ok(ReadOutcome::End),
            Ok(n) => Ok(ReadOutcome::Bytes(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(ReadOutcome::WouldBlock),
            Err(e) => Err(e),
        }
    }

    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// In the socket dialect closing early would kill CRIU by SIGPIPE in the middle of its
    /// dump (`criu-remote.md` 2.2): reads to the end and discards it.
    pub async fn drain(mut self) {
        let Some(feeder) = self.feeder.take() else {
            return; // a pipe is simply closed: CRIU ignores SIGPIPE and sees EPIPE
        };
        drain_socket(&feeder.stream).await;
    }
}

impl ImageData for Source {
    fn read(&self, into: &mut BytesMut) -> io::Result<ReadOutcome> {
        // tokio reads only after it saw the pipe become readable; bytes that are there now need
        // not wait for that. The end, and an empty pipe, are left to it: it must know of them.
        let there = rustix::io::ioctl_fionread(&self.pipe)?;
        if there > 0 {
            let start = into.len();
            let space = into.capacity() - start;
            into.resize(
                start + space.min(usize::try_from(there).unwrap_or(space)),
                0,
            );
            let read = rustix::io::read(&self.pipe, &mut into[start..]);
            into.truncate(start + read.unwrap_or(0));
            return Ok(match read? {
                0 => ReadOutcome::End,
                n => ReadOutcome::Bytes(n),
            });
        }
        match self.pipe.try_read_buf(into) {
            Ok(0) => Ok(ReadOutcome::End),
            Ok(n) => Ok(ReadOutcome::Bytes(n)),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(ReadOutcome::WouldBlock),
            Err(e) => Err(e),
        }
    }

    fn move_into(&mut self, into: impl AsFd) -> io::Result<ReadOutcome> {
        let few = self.peeked.split().freeze();
        let mut moved = 0;
        if !few.is_empty() {
            moved = rustix::io::write(&into, &few)?; // at most a page into an empty pipe: it fits
        }
        if rustix::io::ioctl_fionread(&self.pipe)? > 0 {
            let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
            match splice(&self.pipe, None, &into, None, PIPE_BYTES - moved, flags) {
                Ok(n) => moved += n,
                // The other pipe has space, so another process reads this one; nothing is lost yet.
                Err(rustix::io::Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(match moved {
            0 => ReadOutcome::WouldBlock,
            n => ReadOutcome::Bytes(n),
        })
    }
}

impl Feeder {
    /// Waits for bytes, or the end.
    async fn feed(&mut self) -> io::Result<()> {
        while self.into.is_some() {
            self.stream.readable().await?;
            if self.feed_now()? {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Moves what is there; `false` if nothing is.
    fn feed_now(&mut self) -> io::Result<bool> {
        let Some(into) = &self.into else {
            return Ok(false);
        };
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        let moved = self.stream.try_io(Interest::READABLE, || {
            Ok(splice(&self.stream, None, into, None, PIPE_BYTES, flags)?)
        });
        match moved {
            Ok(0) => {
                self.into = None; // the end reaches the reader through the pipe
                Ok(true)
            }
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => Err(e),
        }
    }
}

/// Reads a socket to its end.
pub async fn drain_socket(stream: &UnixStream) {
    let mut scratch = vec![0; 64 << 10];
    loop {
        match stream.try_read(&mut scratch) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                if stream.readable().await.is_err() {
                    return;
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use tokio::io::AsyncWriteExt;

    async fn read_all(mut source: Source) -> Vec<u8> {
        let mut out = BytesMut::new();
        loop {
            source.available().await.unwrap();
            out.reserve(1 << 20);
            if source.read(&mut out).unwrap() == ReadOutcome::End {
                return out.to_vec();
            }
        }
    }

    #[tokio::test]
    async fn a_pipe_to_its_end() {
        for size in [0, 1, SPLICE_MIN_BYTES - 1, SPLICE_MIN_BYTES, 300_000] {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let mut writer = std::fs::File::from(writer);
            let bytes: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let expected = bytes.clone();
            let writing = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
            let fd = image_common::criu_io::fdpass::checked_pipe(
                reader,
                image_common::criu_io::fdpass::PipeEnd::Read,
            );
            assert!(
                read_all(Source::from_pipe(fd.unwrap()).unwrap()).await == expected,
                "{size}"
            );
            writing.join().unwrap();
        }
    }

    #[tokio::test]
    async fn a_socket_to_its_end() {
        for size in [1, 4096, 500_000] {
            let (mut criu, us) = UnixStream::pair().unwrap();
            let bytes: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let expected = bytes.clone();
            let write = async move {
                criu.write_all(&bytes[1..]).await.unwrap();
                drop(criu);
            };
            let source = Source::from_socket(us, expected[0]).unwrap();
            let (_, got) = tokio::join!(write, read_all(source));
            assert!(got == expected, "{size}");
        }
    }
}
