//! The dumping CRIU.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{ensure, Context, Result};

use super::{vmsplice_all, Dialect};
use crate::fake::remote::Remote;
use crate::fake::stream::Capture;
use crate::fake::wire::O_WRONLY;
use crate::memory::Body;

pub struct Dump {
    dialect: Dialect,
    to: To,
}

enum To {
    /// The one connection of the run.
    Stream(Capture),
    Remote {
        criu: Remote,
        /// The id that this dump was pushed with.
        id: String,
        list_was_read: bool,
    },
}

impl Dump {
    /// What CRIU does before it freezes anything: connect (`--stream`), push its id (`--remote`). `dir`: the images
    /// directory of image-proxy.
    pub fn begin(dialect: Dialect, dir: &Path, id: &str) -> Result<Self> {
        let to = match dialect.of_remote() {
            None => To::Stream(Capture::connect_within(dir, None).context("connecting")?),
            Some((dialect, spelling)) => {
                let criu = Remote::dump(dir, dialect, spelling).gated();
                let criu = criu.without_limit();
                criu.push(id).context("announcing the snapshot")?;
                To::Remote {
                    criu,
                    id: id.to_owned(),
                    list_was_read: false,
                }
            }
        };
        Ok(Self { dialect, to })
    }

    /// Opens an image and returns what its bytes are written to.
    pub fn create(&mut self, name: &str) -> Result<OwnedFd> {
        match &mut self.to {
            To::Stream(criu) => Ok(criu.create_fd(name)?),
            To::Remote {
                criu,
                id,
                list_was_read,
            } => {
                // CRIU reads the list when it opens its first image.
                if !*list_was_read {
                    check_list(criu, id)?;
                    *list_was_read = true;
                }
                Ok(criu.create_fd(id, name, O_WRONLY)?)
            }
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
        match self.to {
            To::Stream(_) => Ok(()),
            To::Remote { criu, .. } => Ok(criu.dump_finish()?),
        }
    }
}

/// Reads the list to its end; a list without the own id would be fatal for CRIU.
pub(super) fn check_list(criu: &Remote, own: &str) -> Result<()> {
    let ids = criu.list().context("reading the snapshot list")?;
    ensure!(
        ids.iter().any(|id| id == own),
        "the list {ids:?} lacks {own}"
    );
    Ok(())
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
