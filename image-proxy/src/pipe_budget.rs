//! Large pipes, and how much of them each may have that wants some: windows to keep pages in, and
//! images for fewer wake-ups.
//!
//! The kernel bounds the pages that a user without CAP_SYS_RESOURCE has in pipes, and gives beyond
//! that pipes of two pages, also to CRIU for its images. So windows have half of it, images a quarter,
//! and each shares its part: of many dumps at once all have a little, rather than some all and the
//! others copies.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use image_common::criu_io::fdpass::enlarge_pipe;
use rustix::pipe::{fcntl_getpipe_size, pipe_with, PipeFlags};
use rustix::thread::CapabilitySet;

/// Capacity of a large pipe; the most that an unprivileged process may ask for.
pub const PIPE_BYTES: usize = 1 << 20;

/// A pipe with less room is not worth its system calls. The kernel makes pipes of two pages for a user
/// who has too many.
pub const LEAST_PIPE_BYTES: usize = 128 << 10;

pub struct Pipe {
    pub reader: OwnedFd,
    pub writer: OwnedFd,
    share: Option<Share>,
}

/// What all of one kind may have in pipes together, in bytes.
pub struct Pipes {
    most: usize,
    /// The same as the kernel has it, which knows of others' pipes: less, once it has refused one.
    granted: AtomicUsize,
    taken: AtomicUsize,
    /// Who shares them.
    partners: AtomicUsize,
}

/// A pipe's part of it.
struct Share {
    pipes: &'static Pipes,
    bytes: usize,
}

/// The pipe of an image is large, as long as this is there.
pub struct Enlarged(#[allow(dead_code, reason = "it is given back when it is dropped")] Share);

/// See [`Pipes::partner`].
pub struct Partner(&'static Pipes);

impl Pipe {
    /// Of nobody's share: for as long as pages are sent again.
    pub fn new() -> io::Result<Self> {
        Self::of(PIPE_BYTES)
    }

    fn of(bytes: usize) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        enlarge_pipe(&writer, bytes);
        Ok(Self {
            reader,
            writer,
            share: None,
        })
    }

    /// How much of its window's share it is.
    pub fn bytes(&self) -> usize {
        self.share.as_ref().map_or(0, |share| share.bytes)
    }
}

impl Pipes {
    pub const fn new(most: usize) -> Self {
        Self {
            most,
            granted: AtomicUsize::new(most),
            taken: AtomicUsize::new(0),
            partners: AtomicUsize::new(0),
        }
    }

    /// For the windows of this process.
    pub fn of_windows() -> &'static Self {
        static PIPES: OnceLock<Pipes> = OnceLock::new();
        PIPES.get_or_init(|| Self::new(user_limit().map_or(usize::MAX, |limit| limit / 2)))
    }

    /// For the images that this process takes. Who shares them are the runs: each has one large image at a
    /// time, but for a few.
    pub fn of_images() -> &'static Self {
        static PIPES: OnceLock<Pipes> = OnceLock::new();
        PIPES.get_or_init(|| Self::new(user_limit().map_or(usize::MAX, |limit| limit / 4)))
    }

    /// Makes the pipe of an image larger, as much as its share of them allows.
    pub fn enlarge(&'static self, pipe: impl AsFd) -> Option<Enlarged> {
        let share = self.take(power_below(self.fair()).clamp(LEAST_PIPE_BYTES, PIPE_BYTES))?;
        enlarge_pipe(pipe, share.bytes);
        Some(Enlarged(share))
    }

    /// Somebody has a part in them, for as long as this is there.
    pub fn partner(&'static self) -> Partner {
        // Whoever else had so many that the kernel refused one may have gone.
        self.granted.store(self.most, Ordering::Relaxed);
        self.partners.fetch_add(1, Ordering::Relaxed);
        Partner(self)
    }

    /// What each partner may have.
    fn fair(&self) -> usize {
        self.granted() / self.partners.load(Ordering::Relaxed).max(1)
    }

    /// How large a window's next pipe is: so that it has two at least, and one can be filled while the
    /// other is waited for.
    fn size(&self) -> usize {
        power_below(self.fair() / 2).clamp(LEAST_PIPE_BYTES, PIPE_BYTES)
    }

    /// Whether what one has another cannot have.
    pub fn are_bound(&self) -> bool {
        self.most < usize::MAX
    }

    fn granted(&self) -> usize {
        self.granted.load(Ordering::Relaxed)
    }

    fn left(&self) -> usize {
        let taken = self.taken.load(Ordering::Relaxed);
        self.granted().saturating_sub(taken)
    }

    /// How much a window that has `own` in pipes can have, as it is now.
    pub fn most_of(&self, own: usize) -> usize {
        let (size, left) = (self.size(), self.left());
        // The first pipe may be more than a fair share.
        let fair = self.fair().max(size);
        let more = fair.saturating_sub(own).min(left) / size * size;
        own.saturating_add(more)
    }

    fn share(&'static self, own: usize) -> Option<Share> {
        let bytes = self.size();
        match self.most_of(own) < own + bytes {
            true => None,
            false => self.take(bytes),
        }
    }

    fn take(&'static self, bytes: usize) -> Option<Share> {
        let more = |taken: usize| {
            taken
                .checked_add(bytes)
                .filter(|&sum| sum <= self.granted())
        };
        let taken = self
            .taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.ok()?;
        Some(Share { pipes: self, bytes })
    }

    /// Another pipe for a window that has `own` in pipes. `None`: it has its share, or there are no
    /// more.
    pub fn another(&'static self, own: usize) -> Option<Pipe> {
        let share = self.share(own)?;
        // Out of descriptors, or the kernel has another opinion of how many there are.
        let pipe = Pipe::of(share.bytes).ok();
        let large = |pipe: &Pipe| {
            let bytes = fcntl_getpipe_size(&pipe.writer);
            bytes.is_ok_and(|bytes| bytes >= LEAST_PIPE_BYTES)
        };
        let Some(pipe) = pipe.filter(large) else {
            drop(share);
            // Not to be asked for with every frame.
            let taken = self.taken.load(Ordering::Relaxed);
            self.granted.fetch_min(taken, Ordering::Relaxed);
            return None;
        };
        Some(Pipe {
            share: Some(share),
            ..pipe
        })
    }

    /// Whether a window that has `own` in pipes may keep an empty one of them for later.
    pub fn may_keep(&self, own: usize) -> bool {
        own <= self.fair()
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        self.0.partners.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.pipes.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn power_below(n: usize) -> usize {
    n.checked_ilog2().map_or(0, |bits| 1 << bits)
}

/// How much our user may have in pipes. `None`: as much as it likes, or that is not known.
fn user_limit() -> Option<usize> {
    let free = CapabilitySet::SYS_RESOURCE | CapabilitySet::SYS_ADMIN;
    let ours = rustix::thread::capabilities(None);
    if ours.is_ok_and(|ours| ours.effective.intersects(free)) {
        return None;
    }
    let pages = std::fs::read_to_string("/proc/sys/fs/pipe-user-pages-soft").ok()?;
    let pages = pages.trim().parse::<usize>().ok()?;
    (pages > 0).then(|| pages.saturating_mul(rustix::param::page_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_window_has_its_share() {
        static PIPES: Pipes = Pipes::new(4 << 20);
        // Alone, all of it.
        let mut first = Vec::new();
        let own = |pipes: &[Pipe]| pipes.iter().map(Pipe::bytes).sum::<usize>();
        let _one = PIPES.partner();
        while let Some(pipe) = PIPES.another(own(&first)) {
            assert_eq!(pipe.bytes(), 1 << 20);
            first.push(pipe);
        }
        assert_eq!(own(&first), 4 << 20);
        // Of two each has half, once it is given back.
        let _other = PIPES.partner();
        assert!(PIPES.another(0).is_none() && PIPES.most_of(0) == 0);
        assert!(!PIPES.may_keep(own(&first)) && PIPES.may_keep(2 << 20));
        first.truncate(2);
        let second = [(); 2].map(|()| PIPES.another(0).unwrap());
        assert_eq!(own(&second), 2 << 20);
        assert!(PIPES.another(own(&first)).is_none());
        // Of eight each has two pipes of a quarter.
        let six = [(); 6].map(|()| PIPES.partner());
        drop(first);
        assert_eq!(PIPES.another(0).unwrap().bytes(), 256 << 10);
        assert_eq!(PIPES.most_of(0), 512 << 10);
        assert!(PIPES.another(512 << 10).is_none());
        drop(second);
        assert_eq!(PIPES.taken.load(Ordering::Relaxed), 0);
        drop(six);
        assert_eq!(PIPES.most_of(0), 2 << 20);
    }

    #[test]
    fn no_limit_and_none_at_all() {
        static ALL: Pipes = Pipes::new(usize::MAX);
        static NONE: Pipes = Pipes::new(0);
        assert_eq!(ALL.another(64 << 20).unwrap().bytes(), PIPE_BYTES);
        assert!(ALL.most_of(0) > 1 << 40 && ALL.may_keep(1 << 30));
        assert!(NONE.another(0).is_none() && NONE.most_of(0) == 0);
    }
}
