//! The retransmit buffer of a connection: everything that was sent and that the cache has not acknowledged, up to a limit.
//!
//! Image data are kept by reference: `tee` gives a second pipe the same pages
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

use crate::pipe_budget::{Participant, Pipe, PipeBudget, PIPE_BYTES};

/// The limit is never lower than this. A writer that waits for space depends on an acknowledgement; image-cache
/// sends one at least every so many bytes when nothing more has arrived.
// Far less than any `usize` has.
#[allow(clippy::cast_possible_truncation)]
const LEAST_BYTES: usize = ACK_WAITING_BYTES as usize;

/// At most this much is kept as copies, whatever the limit: copies are memory of this process, and pages are
/// references. image-cache acknowledges each MiB, and at the end of a frame.
const COPIED_BYTES: usize = 4 << 20;

/// How many empty pipes are kept for later: one acknowledgement can empty several.
const EMPTY: usize = 16;
const EMPTY_AT_REST: usize = 2;

/// What fits into one buffer beside the heads of frames.
pub const COPIED_FRAME_BYTES: u32 = 256 << 10;

/// Shorter frames cost more than copies do.
const LEAST_FRAME_BYTES: usize = 64 << 10;

/// Frames are gathered in buffers of this capacity.
pub const BUFFER_BYTES: usize = 264 << 10;

/// How many empty buffers are kept for later: as many as one acknowledgement frees.
const SPARE: usize = 4;

pub struct RetransmitBuffer {
    limit: usize,
    parts: VecDeque<Part>,
    /// Where in the stream the first part begins, and the last one ends.
    begin: u64,
    end: u64,
    /// Pipes with pages, the oldest first. The head of the first one may be acknowledged.
    pipes: VecDeque<PagePipe>,
    /// Number of the first of them.
    first_pipe: u64,
    empty: Vec<Pipe>,
    budget: &'static PipeBudget,
    /// Capacity of its pipes, the empty ones too.
    capacity: usize,
    /// So that the others leave it its fair share.
    _participant: Participant,
    null: Option<File>,
    /// How many of the bytes held are copies.
    copied: usize,
    /// Buffers whose bytes are acknowledged, to gather in again: fresh memory would cost more than the copy into it.
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

struct PagePipe {
    pipe: Pipe,
    bytes: usize,
    /// It has no space for more.
    full: bool,
}

/// What [`RetransmitBuffer::tee`] did.
#[derive(Debug, PartialEq, Eq)]
pub enum TeeOutcome {
    /// This many bytes of the source pipe are kept.
    Kept(usize),
    /// There is no pipe for them: they have to be copied.
    NoPipe,
    /// The source pipe is empty.
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
    /// Keeps at most `limit` bytes, pages of frozen tasks included.
    pub fn new(limit: usize) -> Self {
        Self::with_pipes(limit, PipeBudget::of_retransmit_buffers())
    }

    pub fn with_pipes(limit: usize, budget: &'static PipeBudget) -> Self {
        Self {
            limit,
            budget,
            capacity: 0,
            _participant: budget.join(),
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

    /// A buffer whose bytes are all acknowledged, if there is one.
    pub fn spare(&mut self) -> Option<BytesMut> {
        self.spare.pop()
    }

    /// Whether this many more bytes fit: copies, and pages.
    pub fn has_space(&self, copies: usize, pages: usize) -> bool {
        // A frame that is longer than the limit is sent when nothing else is kept.
        let fits = |held, bytes, most| held == 0 || held + bytes <= most;
        // Without any pipe pages are copies, too.
        let (copies, pages) = match self.most_pages() {
            0 => (copies + pages, 0),
            _ => (copies, pages),
        };
        fits(self.held(), copies + pages, self.limit)
            && fits(self.copied, copies, COPIED_BYTES)
            && (self.held() < LEAST_BYTES || pages <= self.space_for_pages())
    }

    /// Bytes of pages for which there are pipes, or may be.
    fn most_pages(&self) -> usize {
        self.budget.most_for(self.capacity)
    }

    /// How many of them fit now. A full pipe has space again only when all of it is acknowledged.
    fn space_for_pages(&self) -> usize {
        let last = self.pipes.back().filter(|kept| !kept.full);
        let last = last.map_or(0, |kept| kept.pipe.bytes().saturating_sub(kept.bytes));
        let empty: usize = self.empty.iter().map(Pipe::bytes).sum();
        let more = match self.has_all_pipes() {
            true => 0,
            false => self.most_pages().saturating_sub(self.capacity),
        };
        more.saturating_add(last + empty)
    }

    /// The best length of a frame: its pages fit while the one before is in flight.
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

    fn next_pipe(&mut self) -> Option<Pipe> {
        let pipe = match self.empty.pop() {
            Some(pipe) => pipe,
            None if self.has_all_pipes() => return None,
            None => {
                let pipe = self.budget.new_pipe(self.capacity)?;
                self.capacity += pipe.bytes();
                pipe
            }
        };
        Some(pipe)
    }

    /// The limit needs no more. Of the first one a part may be acknowledged, so there is one more than the limit.
    fn has_all_pipes(&self) -> bool {
        self.capacity >= self.limit.saturating_add(PIPE_BYTES)
    }

    /// Nothing is kept, and nothing may be sent for a long time: gives its empty pipes back to the budget, but for
    /// as many as a small share has.
    fn rest(&mut self) {
        if self.budget.is_limited() && self.empty.len() > EMPTY_AT_REST {
            let given_back = self.empty.drain(EMPTY_AT_REST..).map(|pipe| pipe.bytes());
            self.capacity -= given_back.sum::<usize>();
        }
    }

    /// Whether the next pages have to be copied: there is no pipe for them.
    pub fn only_copies(&self) -> bool {
        let full = self.pipes.back().is_none_or(|kept| kept.full) && self.empty.is_empty();
        full && (self.has_all_pipes() || self.most_pages() == self.capacity)
    }

    /// Keeps up to `want` bytes that are in `pipe`, which stay there.
    pub fn tee(&mut self, pipe: BorrowedFd<'_>, want: usize) -> io::Result<TeeOutcome> {
        loop {
            if self.pipes.back().is_none_or(|kept| kept.full) {
                // Out of descriptors, or of the budget: the caller copies.
                let Some(pipe) = self.next_pipe() else {
                    return Ok(TeeOutcome::NoPipe);
                };
                self.pipes.push_back(PagePipe {
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
                Ok(0) => return Ok(TeeOutcome::Empty),
                Ok(bytes) => {
                    last.bytes += bytes;
                    last.full = bytes < want;
                    self.end += bytes as u64;
                    self.parts.push_back(Part::Pages {
                        pipe: number,
                        bytes,
                    });
                    return Ok(TeeOutcome::Kept(bytes));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if rustix::io::ioctl_fionread(pipe)? == 0 => {
                    return Ok(TeeOutcome::Empty);
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
                "image-cache lost bytes that it had acknowledged: the link cannot be resumed",
            ));
        }
        self.acknowledged(at)
    }

    /// The cache has everything before this byte of the stream.
    pub fn acknowledged(&mut self, at: u64) -> io::Result<()> {
        if at > self.end {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "image-cache acknowledged more bytes than were sent",
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

    /// Keeps a buffer without other references for [`Self::spare`].
    fn recycle(&mut self, bytes: Bytes) {
        if self.spare.len() >= SPARE {
            return;
        }
        if let Ok(mut buffer) = bytes.try_into_mut() {
            buffer.clear();
            // A buffer that was made for one message is not worth keeping.
            if buffer.try_reclaim(BUFFER_BYTES) && buffer.capacity() < 2 * BUFFER_BYTES {
                self.spare.push(buffer);
            }
        }
    }

    /// Discards `gone` bytes of the oldest pipe with pages, so that no page is referred to longer than it
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
            // A few are enough, and too many where other buffers have none.
            let keeps = self.empty.len() < EMPTY && self.budget.may_keep(self.capacity);
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

    /// The next unacknowledged part, to be sent again. The pages of the one before must have
    /// been taken out of their pipe.
    pub fn next_unacknowledged<'c>(
        &mut self,
        cursor: &'c mut Cursor,
    ) -> io::Result<Option<Unacknowledged<'c>>> {
        let at = cursor.next;
        if let Some(&Part::Pages { pipe, .. }) = self.parts.get(at) {
            if cursor
                .pages
                .as_ref()
                .is_none_or(|(number, _)| *number != pipe)
            {
                let kept = self.pipes.get(self.position(pipe));
                match kept.map(PagePipe::copy) {
                    Some(Ok(copy)) => cursor.pages = Some((pipe, copy)),
                    // Out of descriptors, or the kernel gave a short pipe.
                    _ => self.read_pages(pipe)?,
                }
            }
        }
        cursor.next += 1;
        match (self.parts.get(at), &cursor.pages) {
            (Some(Part::Bytes(bytes)), _) => Ok(Some(Unacknowledged::Bytes(bytes.clone()))),
            (Some(Part::Pages { bytes, .. }), Some((_, copy))) => {
                Ok(Some(Unacknowledged::Pages(copy.reader.as_fd(), *bytes)))
            }
            (Some(Part::Pages { .. }), None) => unreachable!("it was put there"),
            (None, _) => Ok(None),
        }
    }
}

/// Discards `n` bytes of the pipe.
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

/// How far the unacknowledged bytes were sent again.
#[derive(Default)]
pub struct Cursor {
    next: usize,
    /// A second pipe with what is left of the one with this number.
    pages: Option<(u64, Pipe)>,
}

/// A part that is to be sent again.
pub enum Unacknowledged<'a> {
    Bytes(Bytes),
    /// This many bytes from this pipe.
    Pages(BorrowedFd<'a>, usize),
}

impl PagePipe {
    /// The same pages once more.
    fn copy(&self) -> io::Result<Pipe> {
        let copy = Pipe::new()?;
        let flags = SpliceFlags::NONBLOCK;
        match tee(&self.pipe.reader, &copy.writer, self.bytes, flags)? {
            n if n == self.bytes => Ok(copy),
            // Its capacity is the same, unless an administrator has just lowered the limit.
            _ => Err(io::Error::other(
                "a new pipe is too short for the pages to be sent again",
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
        while let Some(copy) = retransmit.next_unacknowledged(&mut cursor).unwrap() {
            match copy {
                Unacknowledged::Bytes(bytes) => out.extend_from_slice(&bytes),
                Unacknowledged::Pages(pipe, n) => {
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

    static FEW: [PipeBudget; 3] = [
        PipeBudget::new(0),
        PipeBudget::new(1 << 20),
        PipeBudget::new(usize::MAX),
    ];

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
                                TeeOutcome::Kept(k) => {
                                    let done = n - left;
                                    sent.extend_from_slice(&bytes[done..done + k]);
                                    discard(source.reader.as_fd(), &null, k).unwrap();
                                    left -= k;
                                }
                                TeeOutcome::NoPipe => break,
                                TeeOutcome::Empty => panic!("{left} are left"),
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
        static ONE: PipeBudget = PipeBudget::new(128 << 10);
        let source = Pipe::new().unwrap();
        let mut writer = File::from(source.writer.try_clone().unwrap());
        writer.write_all(&[1; 5000]).unwrap();
        let buffers = [(); 2].map(|()| RetransmitBuffer::with_pipes(16 << 20, &ONE));
        let [mut first, mut second] = buffers;
        let tee = |retransmit: &mut RetransmitBuffer| {
            retransmit.tee(source.reader.as_fd(), 5000).unwrap()
        };
        assert_eq!(tee(&mut first), TeeOutcome::Kept(5000));
        assert_eq!(tee(&mut second), TeeOutcome::NoPipe);
        assert!(second.only_copies() && !first.only_copies());
        // Its limit is its pipe; a writer that waits for that has sent enough for an acknowledgement.
        first.keep(vec![0; LEAST_BYTES - 5001].into());
        assert!(first.has_space(0, 2 * PIPE_BYTES));
        first.keep(vec![0; 1].into());
        assert!(!first.has_space(0, 128 << 10) && first.has_space(0, (128 << 10) - 5000));
        // Without one all is copied.
        second.keep(vec![0; LEAST_BYTES].into());
        assert!(second.has_space(0, PIPE_BYTES));
        drop(first);
        assert!(!second.only_copies());
        assert_eq!(tee(&mut second), TeeOutcome::Kept(5000));
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
            TeeOutcome::Kept(5000)
        );
        assert_eq!(
            retransmit.tee(source.reader.as_fd(), 5000).unwrap(),
            TeeOutcome::Kept(5000)
        );
        retransmit.acknowledged(5000).unwrap();
        let left = rustix::io::ioctl_fionread(&retransmit.pipes[0].pipe.reader).unwrap();
        assert_eq!(left, 5000);
        retransmit.acknowledged(10_000).unwrap();
        assert!(
            retransmit.has_space(0, 1 << 20) && !retransmit.has_space(0, (1 << 20) + 1)
                || retransmit.held() == 0
        );
    }
}
