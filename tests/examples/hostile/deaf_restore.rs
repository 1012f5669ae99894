//! A restore that asks for an image, and reads nothing of it.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;

use crate::daemons::until;
use crate::fake::stream::Serve;
use crate::fake::wire::{wait_for, Channel};

pub struct Deaf {
    _serve: Serve,
    pipe: Channel,
}

impl Deaf {
    /// Asks for `image` as `criu restore --stream` does, at the sockets in `dir`.
    pub fn begin(dir: &Path, image: &str) -> io::Result<Self> {
        let serve = Serve::connect(dir)?;
        let pipe = serve.open(image)?;
        let pipe = pipe.ok_or_else(|| io::Error::other(format!("there is no {image}")))?;
        Ok(Self {
            _serve: serve,
            pipe,
        })
    }

    /// How much waits for it in the pipe.
    pub fn unread(&self) -> u64 {
        rustix::io::ioctl_fionread(&self.pipe).unwrap_or(0)
    }

    /// Waits until the daemon has put into the pipe what the pipe takes, but for pages that are
    /// begun: from now on it waits for a reader.
    pub fn is_full(&self) {
        until("the pipe is full", || {
            let size = rustix::pipe::fcntl_getpipe_size(&self.pipe);
            size.is_ok_and(|size| self.unread() + (64 << 10) >= size as u64)
        });
    }

    /// Whether the daemon has let go of the pipe by then.
    pub fn is_over_within(&self, limit: Duration) -> io::Result<bool> {
        wait_for(self.pipe.as_fd(), PollFlags::HUP, limit)
    }
}
