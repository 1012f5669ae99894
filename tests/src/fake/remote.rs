//! A fake `criu --remote`: both data dialects, both spellings of the special names (`criu-remote.md`, section 10).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::stand_in::StandIn;
use super::wire::{self, Channel, O_APPEND, O_RDONLY, O_WRONLY};

pub const PROXY_SOCKET: &str = "img-proxy.sock";
pub const CACHE_SOCKET: &str = "img-cache.sock";

/// How image data travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dialect {
    /// On the unix socket itself (until May 2020).
    Socket,
    /// On a pipe that CRIU hands over (from May 2020).
    Pipe,
}

/// How the special names are spelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Spelling {
    /// `null`, `DUMP_FINISH`, `RESTORE_FINISH` (until February 2019).
    Words,
    /// Empty strings.
    Empty,
}

impl Spelling {
    pub fn null_id(self) -> &'static str {
        match self {
            Spelling::Words => "null",
            Spelling::Empty => "",
        }
    }

    fn finish(self, mode: u32) -> &'static str {
        match (self, mode) {
            (Spelling::Empty, _) => "",
            (Spelling::Words, O_RDONLY) => "RESTORE_FINISH",
            (Spelling::Words, _) => "DUMP_FINISH",
        }
    }
}

/// The dialects that CRIU ever spoke; the fourth combination never existed.
pub const DIALECTS: [(Dialect, Spelling); 3] = [
    (Dialect::Socket, Spelling::Words),
    (Dialect::Socket, Spelling::Empty),
    (Dialect::Pipe, Spelling::Empty),
];

/// One CRIU: it finds one socket in its images dir and work dir.
#[derive(Clone, Debug)]
pub struct Remote {
    socket: PathBuf,
    work_socket: PathBuf,
    pub dialect: Dialect,
    pub spelling: Spelling,
    /// Of each wait.
    limit: Option<Duration>,
    /// `None`: the CRIU that pushes is the test itself, as its scripts' parent has to be.
    criu: Option<Arc<Mutex<Option<StandIn>>>>,
}

impl Remote {
    /// A dumping CRIU with `-D dir -W dir`.
    pub fn dump(dir: &Path, dialect: Dialect, spelling: Spelling) -> Self {
        Remote::at(&dir.join(PROXY_SOCKET), dialect, spelling)
    }

    /// A restoring CRIU.
    pub fn restore(dir: &Path, dialect: Dialect, spelling: Spelling) -> Self {
        Remote::at(&dir.join(CACHE_SOCKET), dialect, spelling)
    }

    fn at(socket: &Path, dialect: Dialect, spelling: Spelling) -> Self {
        let socket = socket.to_path_buf();
        Remote {
            work_socket: socket.clone(),
            socket,
            dialect,
            spelling,
            limit: Some(wire::LIMIT),
            criu: Some(Arc::default()),
        }
    }

    /// A CRIU with action script.
    pub fn gated(mut self) -> Self {
        self.criu = None;
        self
    }

    /// The dump has failed, and so does CRIU.
    ///
    /// # Panics
    /// If another thread has panicked in here.
    pub fn fails(&self) {
        let criu = self
            .criu
            .as_ref()
            .map(|criu| criu.lock().expect("no panic"));
        if let Some(criu) = criu.as_ref().and_then(|criu| criu.as_ref()) {
            criu.ends_with(1);
        }
    }

    /// As `-W` would: list pushes and FINISH go here.
    pub fn with_work_dir(mut self, dir: &Path) -> Self {
        let name = self
            .socket
            .file_name()
            .expect("a socket has a name")
            .to_owned();
        self.work_socket = dir.join(name);
        self
    }

    /// How long one call may take before it counts as a hang.
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Waits as long as CRIU does.
    pub fn without_limit(mut self) -> Self {
        self.limit = None;
        self
    }

    fn open(&self, socket: &Path, name: &str, id: &str, mode: u32) -> io::Result<UnixStream> {
        self.ask_on(wire::connect(socket, self.limit)?, name, id, mode)
    }

    fn ask_on(
        &self,
        socket: UnixStream,
        name: &str,
        id: &str,
        mode: u32,
    ) -> io::Result<UnixStream> {
        wire::write_frame(
            &socket,
            &wire::local_image_entry(name.as_bytes(), id.as_bytes(), mode),
        )?;
        Ok(socket)
    }

    /// Appends `id` to the snapshot list.
    pub fn push(&self, id: &str) -> io::Result<()> {
        let (path, name, mode) = (&self.work_socket, "parent", O_APPEND);
        let null = self.spelling.null_id();
        let socket = match &self.criu {
            None => self.open(path, name, null, mode)?,
            Some(criu) => {
                let (socket, pushes) = StandIn::connect(path)?;
                wire::limit_waits(&socket, self.limit)?;
                // The one before has ended.
                *criu.lock().expect("no panic") = Some(pushes);
                self.ask_on(socket, name, null, mode)?
            }
        };
        wire::write_frame(&socket, &wire::one_string(id.as_bytes()))
    }

    /// The snapshot list, oldest first.
    pub fn list(&self) -> io::Result<Vec<String>> {
        Ok(self
            .list_or_errno()?
            .map_err(|errno| wire::protocol(format!("the list: errno {errno}")))?
            .0)
    }

    /// The list with its bytes as they came, or the errno that the daemon answered.
    #[allow(clippy::type_complexity, reason = "used in two places")]
    pub fn list_or_errno(&self) -> io::Result<Result<(Vec<String>, Vec<u8>), u8>> {
        let socket = self.open(&self.socket, "parent", self.spelling.null_id(), O_RDONLY)?;
        let errno = read_reply(&socket)?;
        if errno != 0 {
            return Ok(Err(errno));
        }
        let (mut ids, mut bytes) = (Vec::new(), Vec::new());
        while let Some(message) = wire::read_frame(&socket)? {
            bytes.extend_from_slice(&wire::framed(&message));
            ids.push(wire::parse_one_string(&message)?);
        }
        Ok(Ok((ids, bytes)))
    }

    /// Opens an image for writing; there is no reply.
    pub fn create(&self, id: &str, name: &str) -> io::Result<Channel> {
        self.create_with_mode(id, name, O_WRONLY)
    }

    pub fn create_with_mode(&self, id: &str, name: &str, mode: u32) -> io::Result<Channel> {
        self.channel(self.create_fd(id, name, mode)?)
    }

    /// The same as the plain, blocking pipe or socket that CRIU has.
    pub fn create_fd(&self, id: &str, name: &str, mode: u32) -> io::Result<OwnedFd> {
        let socket = self.open(&self.socket, name, id, mode)?;
        match self.dialect {
            Dialect::Socket => Ok(socket.into()),
            Dialect::Pipe => {
                let (read_end, write_end) = wire::pipe()?;
                wire::send_fds(&socket, &[read_end.as_fd()])?;
                drop(read_end);
                // CRIU closes the socket before the first byte of data.
                drop(socket);
                Ok(write_end)
            }
        }
    }

    /// Opens an image for reading: the daemon's errno, or where its bytes come from.
    pub fn open_read(&self, id: &str, name: &str) -> io::Result<Result<Channel, u8>> {
        self.ask(id, name)?.answer()
    }

    /// The first half of a read: the question is out, the answer may take its time.
    pub fn ask(&self, id: &str, name: &str) -> io::Result<Question> {
        let socket = self.open(&self.socket, name, id, O_RDONLY)?;
        Ok(Question {
            socket,
            client: self.clone(),
        })
    }

    fn channel(&self, fd: OwnedFd) -> io::Result<Channel> {
        let mut channel = Channel::new(fd)?;
        if let Some(limit) = self.limit {
            channel.set_limit(limit);
        }
        Ok(channel)
    }

    /// FINISH of a dump.
    pub fn dump_finish(&self) -> io::Result<()> {
        let mut finish = self.open(
            &self.work_socket,
            self.spelling.finish(O_WRONLY),
            self.spelling.null_id(),
            O_WRONLY,
        )?;
        // And exits. That this test speaks for it can be seen as long as it is there.
        if let Some(criu) = &self.criu {
            let heard = io::Read::read(&mut finish, &mut [0]);
            drop(criu.lock().expect("no panic").take());
            heard?;
        }
        Ok(())
    }

    /// FINISH of a restore: CRIU reads a reply and takes the end of file for one.
    pub fn restore_finish(&self) -> io::Result<()> {
        let name = self.spelling.finish(O_RDONLY);
        let socket = self.open(&self.work_socket, name, self.spelling.null_id(), O_RDONLY)?;
        match wire::read_frame(&socket)? {
            None => Ok(()),
            Some(message) => match wire::parse_one_number(&message)? {
                0 => Ok(()),
                errno => Err(wire::protocol(format!("FINISH: errno {errno}"))),
            },
        }
    }
}

/// A read whose reply has not been awaited yet.
pub struct Question {
    socket: UnixStream,
    client: Remote,
}

impl Question {
    /// Whether the daemon has said anything within `limit`.
    pub fn answered_within(&self, limit: Duration) -> io::Result<bool> {
        wire::wait_for(self.socket.as_fd(), rustix::event::PollFlags::IN, limit)
    }

    pub fn answer(self) -> io::Result<Result<Channel, u8>> {
        let client = self.client.clone();
        match self.answer_fd()? {
            Ok(fd) => client.channel(fd).map(Ok),
            Err(errno) => Ok(Err(errno)),
        }
    }

    /// The same as the plain, blocking pipe or socket that CRIU has.
    pub fn answer_fd(self) -> io::Result<Result<OwnedFd, u8>> {
        let errno = read_reply(&self.socket)?;
        if errno != 0 {
            return Ok(Err(errno));
        }
        match self.client.dialect {
            Dialect::Socket => Ok(Ok(self.socket.into())),
            Dialect::Pipe => {
                let (read_end, write_end) = wire::pipe()?;
                wire::send_fds(&self.socket, &[write_end.as_fd()])?;
                drop(write_end);
                drop(self.socket);
                Ok(Ok(read_end))
            }
        }
    }
}

/// CRIU itself would take an end of file here for "error 0" (section 2.4): a daemon must never do that to it, so for
/// the fake it is an error of its own.
fn read_reply(socket: &UnixStream) -> io::Result<u8> {
    match wire::read_frame(socket)? {
        Some(message) => wire::parse_one_number(&message),
        None => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "closed without a reply",
        )),
    }
}
