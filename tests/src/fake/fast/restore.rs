//! The restoring CRIU.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{bail, ensure, Context, Result};

use super::dump::check_list;
use super::Dialect;
use crate::fake::remote::Remote;
use crate::fake::stream::Serve;

pub enum Restore {
    /// The one connection of the run.
    Stream(Serve),
    Remote {
        criu: Remote,
        id: String,
    },
}

impl Restore {
    /// Connects (`--stream`) or reads the snapshot list (`--remote`). `dir`: the images directory of image-cache.
    pub fn begin(dialect: Dialect, dir: &Path, id: &str) -> Result<Self> {
        let Some((dialect, spelling)) = dialect.of_remote() else {
            let criu = Serve::connect_within(dir, None).context("connecting")?;
            return Ok(Restore::Stream(criu));
        };
        let criu = Remote::restore(dir, dialect, spelling).without_limit();
        check_list(&criu, id)?;
        let id = id.to_owned();
        Ok(Restore::Remote { criu, id })
    }

    /// Opens an image that must exist, and returns what its bytes are read from.
    pub fn open(&mut self, name: &str) -> Result<OwnedFd> {
        self.try_open(name)
            .and_then(|image| image.context("the cache says that it does not exist"))
            .with_context(|| format!("opening {name}"))
    }

    fn try_open(&mut self, name: &str) -> Result<Option<OwnedFd>> {
        match self {
            Restore::Stream(criu) => Ok(criu.open_fd(name)?),
            Restore::Remote { criu, id } => match criu.ask(id, name)?.answer_fd()? {
                Ok(image) => Ok(Some(image)),
                Err(2) => Ok(None),
                Err(errno) => bail!("answered with errno {errno}"),
            },
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
        match self {
            Restore::Stream(_) => Ok(()),
            Restore::Remote { criu, .. } => Ok(criu.restore_finish()?),
        }
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
