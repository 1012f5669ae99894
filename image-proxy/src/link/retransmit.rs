//! What was sent on a connection and may be needed again: everything that the cache has not
//! acknowledged, at most a window of it.
//!
//! Image data are kept as they were sent, by reference: `tee` gives a second pipe the same pages
//! that `splice` moves into the socket. CRIU's pages belong to tasks that are frozen until the
//! commit, and everything is acknowledged before it. (In a pre-dump the tasks run. A page that
//! changes while it is kept is dirty, and the next round brings it again.)

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use bytes::{Buf, Bytes, BytesMut};
use image_common::link::resumable::ACK_WAITING_BYTES;
use rustix::io::Errno;
use rustix::pipe::{splice, tee, SpliceFlags};

use crate::pipe_budget::{Partner, Pipe, Pipes, PIPE_BYTES};

/// So much may always be kept: who waits for room waits for an acknowledgement, and image-cache gives one
/// for so much when nothing more is there.
// Far less than any `usize` has.
#[allow(clippy::cast_possible_truncation)]
const LEAST_BYTES: usize = ACK_WAITING_BYTES as usize;

/// At most so much is kept as copies, whatever the window: that is memory of this process, where
/// pages are references. image-cache acknowledges each MiB, and at the end of a frame.
const COPIED_BYTES: usize = 4 << 20;

/// Empty pipes that are kept for what comes next: acknowledgements come several at once.
const EMPTY: usize = 16;
const EMPTY_AT_REST: usize = 2;

/// As much as one buffer has, but for heads.
pub const COPIED_FRAME_BYTES: u32 = 256 << 10;

/// Shorter frames cost more than copies do.
const LEAST_FRAME_BYTES: usize = 64 << 10;

/// What is gathered is gathered in.
pub const BUFFER_BYTES: usize = 264 << 10;

/// Buffers that are kept for later: as many as one acknowledgement sets free.
const SPARE: usize = 4;

pub struct RetransmitBuffer {
    window: usize,
    parts: VecDeque<Part>,
    /// Where in the stream the first part begins, and the last one ends.
    begin: u64,
    end: u64,
    /// Pipes with kept pages, the oldest first; of the first one the head may be gone.
    pipes: VecDeque<Kept>,
    /// Number of the first of them.
    first_pipe: u64,
    empty: Vec<Pipe>,
    allowed: &'static Pipes,
    /// Capacity of the pipes that it has, the empty ones too.
    capacity: usize,
    /// The others leave it its share of them.
    _partner: Partner,
    null: Option<File>,
    /// Of what is held, the copies.
    copied: usize,
    /// What acknowledged bytes were in, for what is gathered next: fresh memory for each would
    /// cost more than the copy into it.
    spare: Vec<BytesMut>,
}

#[derive(Clone)]
pub enum Part {
    Bytes(Bytes),
    /// So many bytes of the pipe with this number.
    Pages {
        pipe: u64,
        bytes: usize,
    },
}

struct Kept {
    pipe: Pipe,
    bytes: usize,
    /// It has no room for more.
    full: bool,
}

/// What [`RetransmitBuffer::tee`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum Teed {
    /// So many of the bytes that are in the pipe are kept.
    Kept(usize),
    /// There is no pipe for them: they have to be copied.
    NoRoom,
    /// The other pipe is empty.
    Empty,
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Pages { bytes, .. } => *bytes,
        }
    }
}

impl RetransmitBuffer {
    /// Keeps at most `window` bytes, pages of frozen tasks included.
    pub fn new(window: usize) -> Self {
        Self::with_pipes(window, Pipes::of_windows())
    }

    pub fn with_pipes(window: usize, allowed: &'static Pipes) -> Self {
        Self {
            window,
            allowed,
            capacity: 0,
            _partner: allowed.partner(),
            parts: VecDeque::new(),
            begin: 0,
            end: 0,
            pipes: VecDeque::new(),
            first_pipe: 0,
            empty: Vec::new(),
            null: None,
            copied: 0,
            spare: Vec::new(),
        }
    }

    /// A buffer that is not needed any more, if there is one.
    pub fn spare(&mut self) -> Option<BytesMut> {
        self.spare.pop()
    }

    /// Whether so many more copies fit, and so many pages.
    pub fn has_room(&self, copies: usize, pages: usize) -> bool {
        // What is longer than the window goes when nothing else is kept.
        let fits = |held, bytes, most| held == 0 || held + bytes <= most;
        // Without any pipe pages are copies, too.
        let (copies, pages) = match self.most_pages() {
            0 => (copies + pages, 0),
            _ => (copies, pages),
        };
        fits(self.held(), copies + pages, self.window)
            && fits(self.copied, copies, COPIED_BYTES)
            && (self.held() < LEAST_BYTES || pages <= self.room_for_pages())
    }

    /// Bytes of pages for which there are pipes, or may be.
    fn most_pages(&self) -> usize {
        self.allowed.most_of(self.capacity)
    }

    /// So many of them can come now: what is acknowledged of a full pipe makes room when all of it is.
    fn room_for_pages(&self) -> usize {
        let last = self.pipes.back().filter(|kept| !kept.full);
        let last = last.map_or(0, |kept| kept.pipe.bytes().saturating_sub(kept.bytes));
        let empty: usize = self.empty.iter().map(Pipe::bytes).sum();
        let more = match self.has_all_pipes() {
            true => 0,
            false => self.most_pages().saturating_sub(self.capacity),
        };
        more.saturating_add(last + empty)
    }

    /// How long a frame had better be, so that its pages find room while the one before is on its way.
    pub fn frame_bytes(&self) -> usize {
        match self.most_pages() {
            0 => COPIED_FRAME_BYTES as usize,
            bytes => (bytes / 2).max(LEAST_FRAME_BYTES),
        }
    }

    pub fn held(&self) -> usize {
        usize::try_from(self.end - self.begin).unwrap_or(usize::MAX)
    }

    pub fn keep(&mut self, bytes: Bytes) {
        self.end += bytes.len() as u64;
        self.copied += bytes.len();
        self.parts.push_back(Part::Bytes(bytes));
    }

    fn another_pipe(&mut self) -> Option<Pipe> {
        let pipe = match self.empty.pop() {
            Some(pipe) => pipe,
            None if self.has_all_pipes() => return None,
            None => {
                let pipe = self.allowed.another(self.capacity)?;
                self.capacity += pipe.bytes();
                pipe
            }
        };
        Some(pipe)
    }

    /// The window needs no more, and a part of the first one may be gone.
    fn has_all_pipes(&self) -> bool {
        self.capacity >= self.window.saturating_add(PIPE_BYTES)
    }

    /// Nothing is kept, and perhaps nothing comes for a long time: others may have its empty pipes, but for
    /// as many as a small share has.
    fn rest(&mut self) {
        if self.allowed.are_bound() && self.empty.len() > EMPTY_AT_REST {
            let given_back = self.empty.drain(EMPTY_AT_REST..).map(|pipe| pipe.bytes());
            self.capacity -= given_back.sum::<usize>();
        }
    }

    /// Whether pages that come next have to be copied: there is no pipe for them.
    pub fn only_copies(&self) -> bool {
        let full = self.pipes.back().is_none_or(|kept| kept.full) && self.empty.is_empty();
        full && (self.has_all_pipes() || self.most_pages() == self.capacity)
    }

    /// Keeps up to `want` bytes that are in `pipe`, which stay there.
    pub fn tee(&mut self, pipe: BorrowedFd<'_>, want: usize) -> io::Result<Teed> {
        loop {
            if self.pipes.back().is_none_or(|kept| kept.full) {
                // Out of descriptors, or of pipes: there is another way.
                let Some(pipe) = self.another_pipe() else {
                    return Ok(Teed::NoRoom);
                };
                self.pipes.push_back(Kept {
                    pipe,
                    bytes: 0,
                    full: false,
                });
            }
            let number = self.first_pipe + self.pipes.len() as u64 - 1;
            let Some(last) = self.pipes.back_mut() else {
                unreachable!("one was put there")
            };
            match tee(pipe, &last.pipe.writer, want, SpliceFlags::NONBLOCK) {
                Ok(0) => return Ok(Teed::Empty),
                Ok(bytes) => {
                    last.bytes += bytes;
                    last.full = bytes < want;
                    self.end += bytes as u64;
                    self.parts.push_back(Part::Pages {
                        pipe: number,
                        bytes,
                    });
                    return Ok(Teed::Kept(bytes));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if rustix::io::ioctl_fionread(pipe)? == 0 => {
                    return Ok(Teed::Empty);
                }
                Err(Errno::AGAIN) if last.bytes > 0 => last.full = true,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// A new socket begins with this byte of the stream.
    pub fn resume(&mut self, at: u64) -> io::Result<()> {
        if at < self.begin {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the cache has lost bytes that it had acknowledged",
            ));
        }
        self.acknowledged(at)
    }

    /// The cache has everything before this byte of the stream.
    pub fn acknowledged(&mut self, at: u64) -> io::Result<()> {
        if at > self.end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the cache acknowledges more than was sent",
            ));
        }
        while self.begin < at {
            let Some(first) = self.parts.front_mut() else {
                unreachable!("parts reach to the end of the stream")
            };
            let gone = usize::try_from(at - self.begin).map_or(first.len(), |n| n.min(first.len()));
            self.begin += gone as u64;
            let whole = gone == first.len();
            match first {
                Part::Bytes(bytes) => {
                    bytes.advance(gone);
                    self.copied -= gone;
                }
                Part::Pages { pipe, bytes } => {
                    *bytes -= gone;
                    let pipe = *pipe;
                    self.forget_pages(pipe, gone)?;
                }
            }
            if whole {
                if let Some(Part::Bytes(bytes)) = self.parts.pop_front() {
                    self.recycle(bytes);
                }
            }
        }
        if self.parts.is_empty() {
            self.rest();
        }
        Ok(())
    }

    /// Keeps a buffer that nobody else refers to for [`Self::spare`].
    fn recycle(&mut self, bytes: Bytes) {
        if self.spare.len() >= SPARE {
            return;
        }
        if let Ok(mut buffer) = bytes.try_into_mut() {
            buffer.clear();
            // What was made for a message alone is not worth keeping.
            if buffer.try_reclaim(BUFFER_BYTES) && buffer.capacity() < 2 * BUFFER_BYTES {
                self.spare.push(buffer);
            }
        }
    }

    /// Takes `gone` bytes out of the oldest pipe with pages: no page is referred to longer than it
    /// must be.
    fn forget_pages(&mut self, pipe: u64, gone: usize) -> io::Result<()> {
        if self.null.is_none() {
            self.null = Some(File::options().write(true).open("/dev/null")?);
        }
        let at = self.position(pipe);
        let (Some(null), Some(kept)) = (&self.null, self.pipes.get_mut(at)) else {
            unreachable!("pages are in a pipe")
        };
        discard(kept.pipe.reader.as_fd(), null, gone)?;
        kept.bytes -= gone;
        self.drop_empty();
        Ok(())
    }

    fn position(&self, pipe: u64) -> usize {
        usize::try_from(pipe - self.first_pipe).unwrap_or(usize::MAX)
    }

    fn drop_empty(&mut self) {
        while let Some(first) = self.pipes.front() {
            if first.bytes > 0 || !(first.full || self.pipes.len() > 1) {
                return;
            }
            let kept = self.pipes.pop_front();
            self.first_pipe += 1;
            // A few are enough to go on with, and too much where others have none.
            let keeps = self.empty.len() < EMPTY && self.allowed.may_keep(self.capacity);
            match kept.map(|kept| kept.pipe) {
                Some(pipe) if keeps => self.empty.push(pipe),
                Some(pipe) => self.capacity -= pipe.bytes(),
                None => {}
            }
        }
    }

    /// Reads the pages of a pipe, when there is no second pipe for their references.
    fn read_pages(&mut self, pipe: u64) -> io::Result<()> {
        let at = self.position(pipe);
        let Some(kept) = self.pipes.get_mut(at) else {
            unreachable!("a part refers to a pipe that is kept")
        };
        let mut file = File::from(kept.pipe.reader.try_clone()?);
        let mut bytes = vec![0; kept.bytes];
        file.read_exact(&mut bytes)?;
        (kept.bytes, kept.full) = (0, true);
        let mut bytes = Bytes::from(bytes);
        for part in &mut self.parts {
            match part {
                Part::Pages { pipe: of, bytes: n } if *of == pipe => {
                    self.copied += *n;
                    *part = Part::Bytes(bytes.split_to(*n));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The next part of what is kept, to be sent again; the pages of the one before must have
    /// been taken out of their pipe.
    pub fn next_copy<'c>(&mut self, cursor: &'c mut Cursor) -> io::Result<Option<Copy<'c>>> {
        let at = cursor.next;
        if let Some(&Part::Pages { pipe, .. }) = self.parts.get(at) {
            if cursor
                .pages
                .as_ref()
                .is_none_or(|(number, _)| *number != pipe)
            {
                let kept = self.pipes.get(self.position(pipe));
                match kept.map(Kept::copy) {
                    Some(Ok(copy)) => cursor.pages = Some((pipe, copy)),
                    // Out of descriptors, or of what a user may have in pipes.
                    _ => self.read_pages(pipe)?,
                }
            }
        }
        cursor.next += 1;
        match (self.parts.get(at), &cursor.pages) {
            (Some(Part::Bytes(bytes)), _) => Ok(Some(Copy::Bytes(bytes.clone()))),
            (Some(Part::Pages { bytes, .. }), Some((_, copy))) => {
                Ok(Some(Copy::Pages(copy.reader.as_fd(), *bytes)))
            }
            (Some(Part::Pages { .. }), None) => unreachable!("it was put there"),
            (None, _) => Ok(None),
        }
    }
}

/// Reads `n` bytes out of the pipe that nobody needs.
pub fn discard(pipe: BorrowedFd<'_>, null: &File, mut n: usize) -> io::Result<()> {
    while n > 0 {
        match splice(pipe, None, null, None, n, SpliceFlags::NONBLOCK) {
            Ok(0) | Err(Errno::AGAIN) => return Ok(()), // they are not there
            Ok(gone) => n -= gone,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// How far what is kept was sent again.
#[derive(Default)]
pub struct Cursor {
    next: usize,
    /// A second pipe with what is left of the one with this number.
    pages: Option<(u64, Pipe)>,
}

/// A part that is to be sent again.
pub enum Copy<'a> {
    Bytes(Bytes),
    /// So many bytes from this pipe.
    Pages(BorrowedFd<'a>, usize),
}

impl Kept {
    /// The same pages once more.
    fn copy(&self) -> io::Result<Pipe> {
        let copy = Pipe::new()?;
        let flags = SpliceFlags::NONBLOCK;
        match tee(&self.pipe.reader, &copy.writer, self.bytes, flags)? {
            n if n == self.bytes => Ok(copy),
            // The same capacity, but for an administrator who has just lowered it.
            _ => Err(io::Error::other(
                "no pipe is large enough to send pages again",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn read_all(retransmit: &mut RetransmitBuffer) -> Vec<u8> {
        let mut out = Vec::new();
        let mut cursor = Cursor::default();
        while let Some(copy) = retransmit.next_copy(&mut cursor).unwrap() {
            match copy {
                Copy::Bytes(bytes) => out.extend_from_slice(&bytes),
                Copy::Pages(pipe, n) => {
                    let mut file = File::from(pipe.try_clone_to_owned().unwrap());
                    let mut bytes = vec![0; n];
                    file.read_exact(&mut bytes).unwrap();
                    out.extend_from_slice(&bytes);
                }
            }
        }
        out
    }

    #[derive(Debug, Clone)]
    enum Step {
        Copied(usize),
        Teed(usize),
        Acknowledged(usize),
        /// There was no second pipe.
        Read,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1..300usize).prop_map(Step::Copied),
            (1..200_000usize).prop_map(Step::Teed),
            (0..400_000usize).prop_map(Step::Acknowledged),
            Just(Step::Read),
        ];
        proptest::collection::vec(step, 1..40)
    }

    static FEW: [Pipes; 3] = [Pipes::new(0), Pipes::new(1 << 20), Pipes::new(usize::MAX)];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        /// What is kept is what was sent and not acknowledged, whatever happens in which order.
        #[test]
        fn keeps_what_is_not_acknowledged(steps in steps(), few in 0..FEW.len()) {
            let mut retransmit = RetransmitBuffer::with_pipes(4 << 20, &FEW[few]);
            let mut sent: Vec<u8> = Vec::new();
            let mut at = 0;
            let fresh = |sent: &Vec<u8>, n: usize| -> Vec<u8> {
                (sent.len()..sent.len() + n).map(|i| u8::try_from(i % 251).unwrap()).collect()
            };
            for step in steps {
                match step {
                    Step::Copied(n) => {
                        let bytes = fresh(&sent, n);
                        sent.extend_from_slice(&bytes);
                        retransmit.keep(bytes.into());
                    }
                    Step::Teed(n) => {
                        let source = Pipe::new().unwrap();
                        let bytes = fresh(&sent, n);
                        File::from(source.writer.try_clone().unwrap()).write_all(&bytes).unwrap();
                        let null = File::options().write(true).open("/dev/null").unwrap();
                        let mut left = n;
                        while left > 0 {
                            match retransmit.tee(source.reader.as_fd(), left).unwrap() {
                                Teed::Kept(k) => {
                                    let done = n - left;
                                    sent.extend_from_slice(&bytes[done..done + k]);
                                    discard(source.reader.as_fd(), &null, k).unwrap();
                                    left -= k;
                                }
                                Teed::NoRoom => break,
                                Teed::Empty => panic!("{left} are left"),
                            }
                        }
                    }
                    Step::Read => {
                        let pages = retransmit.parts.iter().find_map(|part| match part {
                            Part::Pages { pipe, .. } => Some(*pipe),
                            Part::Bytes(_) => None,
                        });
                        if let Some(pipe) = pages {
                            retransmit.read_pages(pipe).unwrap();
                        }
                    }
                    Step::Acknowledged(n) => {
                        at = (at + n).min(sent.len());
                        retransmit.acknowledged(at as u64).unwrap();
                    }
                }
                prop_assert_eq!(retransmit.held(), sent.len() - at);
                prop_assert!(read_all(&mut retransmit) == sent[at..]);
                prop_assert!(read_all(&mut retransmit) == sent[at..], "a second time");
            }
            prop_assert!(retransmit.acknowledged(sent.len() as u64 + 1).is_err());
            prop_assert_eq!(retransmit.resume((at as u64).saturating_sub(1)).is_err(), at > 0);
        }
    }

    #[test]
    fn buffers_are_used_again() {
        let mut retransmit = RetransmitBuffer::new(1 << 20);
        let mut gathered = BytesMut::with_capacity(BUFFER_BYTES);
        gathered.extend_from_slice(&[7; 1000]);
        let at = gathered.as_ptr();
        retransmit.keep(gathered.split().freeze());
        drop(gathered);
        assert!(retransmit.spare().is_none(), "it may be needed again");
        retransmit.acknowledged(999).unwrap();
        assert!(retransmit.spare().is_none());
        retransmit.acknowledged(1000).unwrap();
        let mut again = retransmit.spare().unwrap();
        again.extend_from_slice(&[8; BUFFER_BYTES]);
        assert_eq!(again.as_ptr(), at, "without a move");
        // What is still referred to stays what it is.
        retransmit.keep(Bytes::from(vec![1; BUFFER_BYTES]));
        let Some(Part::Bytes(held)) = retransmit.parts.back().cloned() else {
            panic!("it was kept")
        };
        retransmit.acknowledged(1000 + BUFFER_BYTES as u64).unwrap();
        assert!(retransmit.spare().is_none());
        assert!(held.iter().all(|byte| *byte == 1));
    }

    #[test]
    fn pipes_are_shared_and_given_back() {
        static ONE: Pipes = Pipes::new(128 << 10);
        let source = Pipe::new().unwrap();
        let mut writer = File::from(source.writer.try_clone().unwrap());
        writer.write_all(&[1; 5000]).unwrap();
        let buffers = [(); 2].map(|()| RetransmitBuffer::with_pipes(16 << 20, &ONE));
        let [mut first, mut second] = buffers;
        let tee = |retransmit: &mut RetransmitBuffer| {
            retransmit.tee(source.reader.as_fd(), 5000).unwrap()
        };
        assert_eq!(tee(&mut first), Teed::Kept(5000));
        assert_eq!(tee(&mut second), Teed::NoRoom);
        assert!(second.only_copies() && !first.only_copies());
        // Its window is its pipe's; who waits for that has enough to be acknowledged.
        first.keep(vec![0; LEAST_BYTES - 5001].into());
        assert!(first.has_room(0, 2 * PIPE_BYTES));
        first.keep(vec![0; 1].into());
        assert!(!first.has_room(0, 128 << 10) && first.has_room(0, (128 << 10) - 5000));
        // Without one all is copied.
        second.keep(vec![0; LEAST_BYTES].into());
        assert!(second.has_room(0, PIPE_BYTES));
        drop(first);
        assert!(!second.only_copies());
        assert_eq!(tee(&mut second), Teed::Kept(5000));
    }

    #[test]
    fn pages_are_let_go_of() {
        let source = Pipe::new().unwrap();
        File::from(source.writer.try_clone().unwrap())
            .write_all(&[1; 5000])
            .unwrap();
        let mut retransmit = RetransmitBuffer::new(1 << 20);
        assert_eq!(
            retransmit.tee(source.reader.as_fd(), 5000).unwrap(),
            Teed::Kept(5000)
        );
        assert_eq!(
            retransmit.tee(source.reader.as_fd(), 5000).unwrap(),
            Teed::Kept(5000)
        );
        retransmit.acknowledged(5000).unwrap();
        let left = rustix::io::ioctl_fionread(&retransmit.pipes[0].pipe.reader).unwrap();
        assert_eq!(left, 5000);
        retransmit.acknowledged(10_000).unwrap();
        assert!(
            retransmit.has_room(0, 1 << 20) && !retransmit.has_room(0, (1 << 20) + 1)
                || retransmit.held() == 0
        );
    }
}
