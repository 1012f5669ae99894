//! A connection whose other end is a daemon in this process, and which never blocks.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::world;

/// What is kept of what the daemon says.
const KEPT_BYTES: usize = 4 << 20;

/// A daemon that takes nothing for so long never will.
const PATIENCE: Duration = Duration::from_secs(120);

pub struct Client {
    pub socket: UnixStream,
    /// What the daemon has said.
    pub heard: Vec<u8>,
    /// The daemon has closed.
    pub over: bool,
}

impl Client {
    pub fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            heard: Vec::new(),
            over: false,
        }
    }

    /// Takes what the daemon has said by now.
    pub fn hear(&mut self) {
        let mut buffer = [0; 16 << 10];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => self.over = true,
                Ok(n) => {
                    let room = KEPT_BYTES.saturating_sub(self.heard.len());
                    self.heard.extend_from_slice(&buffer[..n.min(room)]);
                    continue;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => self.over = true,
            }
            return;
        }
    }

    /// Says all of it, listening meanwhile. What a daemon does not want is lost.
    pub async fn say(&mut self, mut bytes: &[u8]) {
        let mut waited = Duration::ZERO;
        while !bytes.is_empty() && waited < PATIENCE {
            match self.socket.write(bytes) {
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.hear();
                    world::turn().await;
                    if !self.room() {
                        world::pass(Duration::from_secs(1)).await;
                        waited += Duration::from_secs(1);
                    }
                }
                Err(_) => return,
            }
        }
    }

    fn room(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(
            &self.socket,
            rustix::event::PollFlags::OUT,
        )];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default()))
            .is_ok_and(|n| n > 0)
    }

    /// Waits until so many bytes are here; `false` if they do not come.
    pub async fn wait_for(&mut self, bytes: usize) -> bool {
        for _ in 0..20 {
            world::turn().await;
            self.hear();
            if self.heard.len() >= bytes {
                return true;
            }
            if self.over {
                return false;
            }
            world::pass(Duration::from_millis(700)).await;
        }
        false
    }
}
