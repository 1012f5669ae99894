//! The restoring CRIU.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{bail, ensure, Context, Result};

use super::dump::{check_list, connect};
use super::wire::{self, O_RDONLY};
use super::{new_pipe, Dialect};

pub struct Restore {
    dialect: Dialect,
    /// images directory of image-cache
    dir: PathBuf,
    id: String,
    stream: Option<UnixStream>,
}

impl Restore {
    /// Connects (`--stream`) or reads the snapshot list (`--remote`).
    pub fn begin(dialect: Dialect, dir: &Path, id: &str) -> Result<Self> {
        let mut stream = None;
        if dialect == Dialect::Stream {
            stream = Some(connect(&dir.join("streamer-serve.sock"))?);
        } else {
            let list = connect(&dir.join("img-cache.sock"))?;
            wire::send(&list, &wire::remote_request("parent", "", O_RDONLY))?;
            check_list(&list, id).context("reading the snapshot list from image-cache")?;
        }
        Ok(Self {
            dialect,
            dir: dir.to_owned(),
            id: id.to_owned(),
            stream,
        })
    }

    /// Opens an image that must exist, and returns what its bytes are read from.
    pub fn open(&mut self, name: &str) -> Result<OwnedFd> {
        self.try_open(name)
            .and_then(|image| image.context("the cache says that it does not exist"))
            .with_context(|| format!("opening {name}"))
    }

    fn try_open(&mut self, name: &str) -> Result<Option<OwnedFd>> {
        if let Some(stream) = &self.stream {
            wire::send(stream, &wire::stream_request(name))?;
            let reply = wire::read_message(stream)?.context("closed without an answer")?;
            return match wire::answer(&reply)? {
                0 => Ok(None),
                _ => hand_over_writer(stream).map(Some),
            };
        }
        let image = connect(&self.dir.join("img-cache.sock"))?;
        wire::send(&image, &wire::remote_request(name, &self.id, O_RDONLY))?;
        let reply = wire::read_message(&image)?.context("closed without an answer")?;
        match (wire::answer(&reply)?, self.dialect) {
            (0, Dialect::RemoteSocket) => Ok(Some(image.into())),
            (0, _) => hand_over_writer(&image).map(Some),
            (2, _) => Ok(None),
            (error, _) => bail!("answered with errno {error}"),
        }
    }

    /// Asks for an image that the dump did not write, as CRIU does for many.
    pub fn missing(&mut self, name: &str) -> Result<()> {
        let found = self
            .try_open(name)
            .with_context(|| format!("asking for {name}"))?;
        ensure!(
            found.is_none(),
            "{name} was never dumped, yet the cache has it"
        );
        Ok(())
    }

    /// A whole small image.
    pub fn small(&mut self, name: &str) -> Result<Vec<u8>> {
        let image = self.open(name)?;
        let mut bytes = Vec::new();
        File::from(image)
            .read_to_end(&mut bytes)
            .with_context(|| format!("reading {name}"))?;
        Ok(bytes)
    }

    /// After the tasks run: FINISH (`--remote`), close (`--stream`). Either releases the set.
    pub fn finish(self) -> Result<()> {
        if self.dialect != Dialect::Stream {
            let finish = connect(&self.dir.join("img-cache.sock"))?;
            wire::send(&finish, &wire::remote_request("", "", O_RDONLY))?;
            // EOF without an answer means success too.
            if let Some(reply) = wire::read_message(&finish)? {
                let error = wire::answer(&reply)?;
                ensure!(error == 0, "FINISH was answered with errno {error}");
            }
        }
        Ok(())
    }
}

/// Fills `into` from `image`; fewer bytes are an error.
pub fn read_exactly(image: &mut File, into: &mut [u8]) -> Result<()> {
    let mut at = 0;
    while at < into.len() {
        match image.read(&mut into[at..]) {
            Ok(0) => bail!("the image ends after {at} of {} bytes", into.len()),
            Ok(n) => at += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => (),
            Err(e) => return Err(e).context("reading an image"),
        }
    }
    Ok(())
}

/// The image must be at its end.
pub fn expect_end(image: &mut File) -> Result<()> {
    let n = image.read(&mut [0; 64]).context("reading an image's end")?;
    ensure!(n == 0, "the image is longer than what was dumped");
    Ok(())
}

fn hand_over_writer(socket: &UnixStream) -> Result<OwnedFd> {
    let (reader, writer) = new_pipe()?;
    wire::send_fd(socket, writer.as_fd())?;
    Ok(reader)
}
