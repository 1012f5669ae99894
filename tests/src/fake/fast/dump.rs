//! The dumping CRIU.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context, Result};

use super::wire::{self, O_APPEND, O_RDONLY, O_WRONLY};
use super::{new_pipe, vmsplice_all, Dialect};
use crate::memory::Body;

pub struct Dump {
    dialect: Dialect,
    /// images directory of image-proxy
    dir: PathBuf,
    /// `--remote`: the id that this dump was pushed with
    id: String,
    /// `--stream`: the one connection of the run
    stream: Option<UnixStream>,
    list_was_read: bool,
}

impl Dump {
    /// What CRIU does before it freezes anything: connect (`--stream`), push its id (`--remote`).
    pub fn begin(dialect: Dialect, dir: &Path, id: &str) -> Result<Self> {
        let mut stream = None;
        if dialect == Dialect::Stream {
            stream = Some(connect(&dir.join("streamer-capture.sock"))?);
        } else {
            let push = connect(&dir.join("img-proxy.sock"))?;
            wire::send(&push, &wire::remote_request("parent", "", O_APPEND))?;
            wire::send(&push, &wire::snapshot_id(id))?;
        }
        Ok(Self {
            dialect,
            dir: dir.to_owned(),
            id: id.to_owned(),
            stream,
            list_was_read: false,
        })
    }

    /// Opens an image and returns what its bytes are written to.
    pub fn create(&mut self, name: &str) -> Result<OwnedFd> {
        if let Some(stream) = &self.stream {
            wire::send(stream, &wire::stream_request(name))?;
            return hand_over_reader(stream);
        }
        // CRIU reads the list when it opens its first image.
        if !self.list_was_read {
            self.read_list()?;
            self.list_was_read = true;
        }
        let image = connect(&self.dir.join("img-proxy.sock"))?;
        wire::send(&image, &wire::remote_request(name, &self.id, O_WRONLY))?;
        match self.dialect {
            Dialect::RemoteSocket => Ok(image.into()),
            _ => hand_over_reader(&image),
        }
    }

    /// A whole small image, with write() as CRIU's buffered images.
    pub fn small(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let image = self
            .create(name)
            .with_context(|| format!("opening {name}"))?;
        File::from(image)
            .write_all(bytes)
            .with_context(|| format!("writing {name}"))
    }

    /// The pages from `offset` to `end`: moved into a pipe by reference, or written to a socket.
    pub fn pages(&self, image: impl AsFd, body: Body<'_>, mut offset: u64, end: u64) -> Result<()> {
        while offset < end {
            let memory = body.at(offset);
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let memory = &memory[..memory.len().min(left)];
            match self.dialect {
                Dialect::RemoteSocket => write_all(&image, memory)?,
                _ => vmsplice_all(&image, memory)?,
            }
            offset += memory.len() as u64;
        }
        Ok(())
    }

    /// What CRIU does after it killed the tasks: FINISH (`--remote`), close (`--stream`).
    pub fn finish(self) -> Result<()> {
        if self.dialect != Dialect::Stream {
            let finish = connect(&self.dir.join("img-proxy.sock"))?;
            wire::send(&finish, &wire::remote_request("", "", O_WRONLY))?;
        }
        Ok(())
    }

    fn read_list(&self) -> Result<()> {
        let list = connect(&self.dir.join("img-proxy.sock"))?;
        wire::send(&list, &wire::remote_request("parent", "", O_RDONLY))?;
        check_list(&list, &self.id).context("reading the snapshot list from image-proxy")
    }
}

/// Reads the list to its end; a list without the own id would be fatal for CRIU.
pub(super) fn check_list(list: &UnixStream, own: &str) -> Result<()> {
    let reply = wire::read_message(list)?.context("closed without an answer")?;
    let error = wire::answer(&reply)?;
    ensure!(error == 0, "answered with errno {error}");
    let mut ids = Vec::new();
    while let Some(entry) = wire::read_message(list)? {
        ids.push(wire::parse_snapshot_id(&entry)?.to_owned());
    }
    ensure!(
        ids.iter().any(|id| id == own),
        "the list {ids:?} lacks {own}"
    );
    Ok(())
}

pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).with_context(|| format!("connecting to {}", path.display()))
}

fn hand_over_reader(socket: &UnixStream) -> Result<OwnedFd> {
    let (reader, writer) = new_pipe()?;
    wire::send_fd(socket, reader.as_fd())?;
    Ok(writer)
}

fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(n) => bytes = &bytes[n..],
            Err(rustix::io::Errno::INTR) => (),
            Err(e) => return Err(e).context("writing to an image's socket"),
        }
    }
    Ok(())
}
