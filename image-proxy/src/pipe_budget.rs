//! The memory in large pipes, and how it is shared. Retransmit buffers keep pages in pipes; an image in a large pipe costs
//! fewer wake-ups.
//!
//! The kernel limits the pages that a user without CAP_SYS_RESOURCE has in pipes. Beyond the limit a new pipe has
//! two pages, also one that CRIU makes for an image. So retransmit buffers get half of the limit, and images a
//! quarter. Each part is shared fairly: with many dumps at once, all of them get a few pipes.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::OnceLock;

use image_common::criu_io::fdpass::enlarge_pipe;
use rustix::pipe::{fcntl_getpipe_size, pipe_with, PipeFlags};
use rustix::thread::CapabilitySet;

/// Capacity of a large pipe; the most that an unprivileged process may ask for.
pub const PIPE_BYTES: usize = 1 << 20;

/// A shorter pipe is not worth its system calls. The kernel makes pipes of two pages for a user with too
/// many pages in pipes.
pub const LEAST_PIPE_BYTES: usize = 128 << 10;

pub struct Pipe {
    pub reader: OwnedFd,
    pub writer: OwnedFd,
    lease: Option<Lease>,
}

/// How many bytes all pipes of one kind may have together.
pub struct PipeBudget {
    limit: usize,
    /// What the kernel grants: less than `limit` once it has refused a pipe, as it also counts the pipes of other processes.
    granted: AtomicUsize,
    leased: AtomicUsize,
    /// How many share it.
    participants: AtomicUsize,
}

/// The bytes of one pipe, until it is dropped.
struct Lease {
    budget: &'static PipeBudget,
    bytes: usize,
}

/// The lease of an enlarged pipe of an image.
pub struct EnlargedPipe(#[allow(dead_code, reason = "dropping it ends the lease")] Lease);

/// One that shares a budget: see [`PipeBudget::join`].
pub struct Participant(&'static PipeBudget);

impl Pipe {
    /// Outside any budget: for as long as pages are sent again.
    pub fn new() -> io::Result<Self> {
        Self::of(PIPE_BYTES)
    }

    fn of(bytes: usize) -> io::Result<Self> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        enlarge_pipe(&writer, bytes);
        Ok(Self {
            reader,
            writer,
            lease: None,
        })
    }

    /// How many bytes of the budget it leases.
    pub fn bytes(&self) -> usize {
        self.lease.as_ref().map_or(0, |lease| lease.bytes)
    }
}

impl PipeBudget {
    pub const fn new(limit: usize) -> Self {
        Self {
            limit,
            granted: AtomicUsize::new(limit),
            leased: AtomicUsize::new(0),
            participants: AtomicUsize::new(0),
        }
    }

    /// Of all retransmit buffers of this process.
    pub fn of_retransmit_buffers() -> &'static Self {
        static BUDGET: OnceLock<PipeBudget> = OnceLock::new();
        BUDGET.get_or_init(|| Self::new(user_limit().map_or(usize::MAX, |limit| limit / 2)))
    }

    /// Of all images that this process receives from CRIU. The dumps share it: each has one large image at a
    /// time, with few exceptions.
    pub fn of_images() -> &'static Self {
        static BUDGET: OnceLock<PipeBudget> = OnceLock::new();
        BUDGET.get_or_init(|| Self::new(user_limit().map_or(usize::MAX, |limit| limit / 4)))
    }

    /// Makes the pipe of an image larger, as far as its fair share allows.
    pub fn enlarge(&'static self, pipe: impl AsFd) -> Option<EnlargedPipe> {
        let lease =
            self.lease(power_below(self.fair_share()).clamp(LEAST_PIPE_BYTES, PIPE_BYTES))?;
        enlarge_pipe(pipe, lease.bytes);
        Some(EnlargedPipe(lease))
    }

    /// Adds one that shares the budget, until what this returns is dropped.
    pub fn join(&'static self) -> Participant {
        // The process whose pipes made the kernel refuse one may have ended.
        self.granted.store(self.limit, Ordering::Relaxed);
        self.participants.fetch_add(1, Ordering::Relaxed);
        Participant(self)
    }

    /// What each participant may have.
    fn fair_share(&self) -> usize {
        self.granted() / self.participants.load(Ordering::Relaxed).max(1)
    }

    /// How large a retransmit buffer's next pipe is: so that it has two at least, and one can be filled while the
    /// other waits for an acknowledgement.
    fn next_pipe_bytes(&self) -> usize {
        power_below(self.fair_share() / 2).clamp(LEAST_PIPE_BYTES, PIPE_BYTES)
    }

    /// Whether a pipe of one participant leaves less for the others.
    pub fn is_limited(&self) -> bool {
        self.limit < usize::MAX
    }

    fn granted(&self) -> usize {
        self.granted.load(Ordering::Relaxed)
    }

    fn available(&self) -> usize {
        let leased = self.leased.load(Ordering::Relaxed);
        self.granted().saturating_sub(leased)
    }

    /// How much a retransmit buffer with `own` bytes in pipes may have at present, `own` included.
    pub fn most_for(&self, own: usize) -> usize {
        let (size, available) = (self.next_pipe_bytes(), self.available());
        // The first pipe may be more than a fair share.
        let fair_share = self.fair_share().max(size);
        let more = fair_share.saturating_sub(own).min(available) / size * size;
        own.saturating_add(more)
    }

    fn lease_next(&'static self, own: usize) -> Option<Lease> {
        let bytes = self.next_pipe_bytes();
        match self.most_for(own) < own + bytes {
            true => None,
            false => self.lease(bytes),
        }
    }

    fn lease(&'static self, bytes: usize) -> Option<Lease> {
        let more = |leased: usize| {
            leased
                .checked_add(bytes)
                .filter(|&sum| sum <= self.granted())
        };
        let leased = self
            .leased
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        leased.ok()?;
        Some(Lease {
            budget: self,
            bytes,
        })
    }

    /// One more pipe for a retransmit buffer with `own` bytes in pipes. `None`: it has its fair share, or the budget is used
    /// up.
    pub fn new_pipe(&'static self, own: usize) -> Option<Pipe> {
        let lease = self.lease_next(own)?;
        // The process may be out of descriptors. The kernel may count more pipes than this process does.
        let pipe = Pipe::of(lease.bytes).ok();
        let large = |pipe: &Pipe| {
            let bytes = fcntl_getpipe_size(&pipe.writer);
            bytes.is_ok_and(|bytes| bytes >= LEAST_PIPE_BYTES)
        };
        let Some(pipe) = pipe.filter(large) else {
            drop(lease);
            // The next frame must not ask the kernel again.
            let leased = self.leased.load(Ordering::Relaxed);
            self.granted.fetch_min(leased, Ordering::Relaxed);
            return None;
        };
        Some(Pipe {
            lease: Some(lease),
            ..pipe
        })
    }

    /// Whether a retransmit buffer with `own` bytes in pipes may keep an empty one for later.
    pub fn may_keep(&self, own: usize) -> bool {
        own <= self.fair_share()
    }
}

impl Drop for Participant {
    fn drop(&mut self) {
        self.0.participants.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.budget.leased.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

fn power_below(n: usize) -> usize {
    n.checked_ilog2().map_or(0, |bits| 1 << bits)
}

/// How many bytes the user of this process may have in pipes. `None`: there is no limit, or it is not known.
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
    fn each_retransmit_buffer_gets_its_fair_share() {
        static BUDGET: PipeBudget = PipeBudget::new(4 << 20);
        // Alone, all of it.
        let mut first = Vec::new();
        let own = |pipes: &[Pipe]| pipes.iter().map(Pipe::bytes).sum::<usize>();
        let _one = BUDGET.join();
        while let Some(pipe) = BUDGET.new_pipe(own(&first)) {
            assert_eq!(pipe.bytes(), 1 << 20);
            first.push(pipe);
        }
        assert_eq!(own(&first), 4 << 20);
        // Of two each has half, once it is given back.
        let _other = BUDGET.join();
        assert!(BUDGET.new_pipe(0).is_none() && BUDGET.most_for(0) == 0);
        assert!(!BUDGET.may_keep(own(&first)) && BUDGET.may_keep(2 << 20));
        first.truncate(2);
        let second = [(); 2].map(|()| BUDGET.new_pipe(0).unwrap());
        assert_eq!(own(&second), 2 << 20);
        assert!(BUDGET.new_pipe(own(&first)).is_none());
        // Of eight each has two pipes of a quarter.
        let six = [(); 6].map(|()| BUDGET.join());
        drop(first);
        assert_eq!(BUDGET.new_pipe(0).unwrap().bytes(), 256 << 10);
        assert_eq!(BUDGET.most_for(0), 512 << 10);
        assert!(BUDGET.new_pipe(512 << 10).is_none());
        drop(second);
        assert_eq!(BUDGET.leased.load(Ordering::Relaxed), 0);
        drop(six);
        assert_eq!(BUDGET.most_for(0), 2 << 20);
    }

    #[test]
    fn no_limit_and_none_at_all() {
        static ALL: PipeBudget = PipeBudget::new(usize::MAX);
        static NONE: PipeBudget = PipeBudget::new(0);
        assert_eq!(ALL.new_pipe(64 << 20).unwrap().bytes(), PIPE_BYTES);
        assert!(ALL.most_for(0) > 1 << 40 && ALL.may_keep(1 << 30));
        assert!(NONE.new_pipe(0).is_none() && NONE.most_for(0) == 0);
    }
}
