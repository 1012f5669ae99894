//! A fake `criu --stream`: capture and serve (`criu-stream.md`, section 10).

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::stand_in::StandIn;
use super::wire::{self, Channel};

pub const CAPTURE_SOCKET: &str = "streamer-capture.sock";
pub const SERVE_SOCKET: &str = "streamer-serve.sock";

/// A dumping CRIU: one connection for all its images.
pub struct Capture {
    socket: UnixStream,
    /// Ends behind the connection.
    criu: Option<StandIn>,
}

impl Capture {
    pub fn connect(dir: &Path) -> io::Result<Self> {
        Self::connect_within(dir, Some(wire::LIMIT))
    }

    /// The same with another limit for each wait, or without one.
    pub fn connect_within(dir: &Path, limit: Option<Duration>) -> io::Result<Self> {
        Ok(Capture {
            socket: wire::connect(&dir.join(CAPTURE_SOCKET), limit)?,
            criu: None,
        })
    }

    /// A CRIU without action script, which is a process of its own and ends with 0 when this is dropped.
    pub fn connect_alone(dir: &Path) -> io::Result<Self> {
        Self::connect_for(dir, 0)
    }

    /// The same, which dumps this process.
    pub fn connect_for(dir: &Path, task: i32) -> io::Result<Self> {
        let (socket, criu) = StandIn::connect_for(&dir.join(CAPTURE_SOCKET), task)?;
        wire::limit_waits(&socket, Some(wire::LIMIT))?;
        let criu = Some(criu);
        Ok(Capture { socket, criu })
    }

    /// The CRIU of [`Self::connect_alone`].
    ///
    /// # Panics
    /// If it is the test itself.
    pub fn criu(&self) -> &StandIn {
        self.criu.as_ref().expect("a process of its own")
    }

    /// Closes the connection, and gives the CRIU that goes on.
    ///
    /// # Panics
    /// If it is the test itself.
    pub fn close(self) -> StandIn {
        drop(self.socket);
        self.criu.expect("a process of its own")
    }

    /// Opens an image; there is no reply, ever.
    pub fn create(&self, name: &str) -> io::Result<Channel> {
        Channel::new(self.create_fd(name)?)
    }

    /// The same as the plain, blocking pipe that CRIU has.
    pub fn create_fd(&self, name: &str) -> io::Result<OwnedFd> {
        wire::write_frame(&self.socket, &wire::one_string(name.as_bytes()))?;
        let (read_end, write_end) = wire::pipe()?;
        wire::send_fds(&self.socket, &[read_end.as_fd()])?;
        drop(read_end);
        Ok(write_end)
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

/// A restoring CRIU: its processes share one connection, request by request under a lock.
pub struct Serve {
    socket: Mutex<UnixStream>,
}

impl Serve {
    pub fn connect(dir: &Path) -> io::Result<Self> {
        Self::connect_within(dir, Some(wire::LIMIT))
    }

    /// The same with another limit for each wait, or without one.
    pub fn connect_within(dir: &Path, limit: Option<Duration>) -> io::Result<Self> {
        Ok(Serve {
            socket: Mutex::new(wire::connect(&dir.join(SERVE_SOCKET), limit)?),
        })
    }

    /// `None`: the daemon said that there is no such image.
    pub fn open(&self, name: &str) -> io::Result<Option<Channel>> {
        self.open_fd(name)?.map(Channel::new).transpose()
    }

    /// The same as the plain, blocking pipe that CRIU has.
    pub fn open_fd(&self, name: &str) -> io::Result<Option<OwnedFd>> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_frame(&socket, &wire::one_string(name.as_bytes()))?;
        let Some(message) = wire::read_frame(&socket)? else {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the streamer closed instead of a reply",
            ));
        };
        if wire::parse_one_number(&message)? == 0 {
            return Ok(None);
        }
        let (read_end, write_end) = wire::pipe()?;
        wire::send_fds(&*socket, &[write_end.as_fd()])?;
        drop(write_end);
        Ok(Some(read_end))
    }

    /// The whole of an image that has to be there.
    ///
    /// # Panics
    /// If it is not, or breaks off.
    pub fn fetch(&self, name: &str) -> Vec<u8> {
        let mut bytes = Vec::new();
        let channel = self.open(name).expect("an answer");
        let mut channel = channel.unwrap_or_else(|| panic!("{name} does not exist"));
        channel.read_to_end(&mut bytes).expect("bytes");
        bytes
    }

    /// Asks without waiting; whether an answer (or the end) came within `limit`.
    pub fn asks_in_vain(&self, name: &str, limit: Duration) -> io::Result<bool> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        wire::write_frame(&socket, &wire::one_string(name.as_bytes()))?;
        Ok(!wire::wait_for(
            socket.as_fd(),
            rustix::event::PollFlags::IN,
            limit,
        )?)
    }
}
