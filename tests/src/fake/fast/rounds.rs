//! A series of pre-dumps and a dump through a page server: CRIU's directories, its side of a round, and what the flat
//! set must be.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};

use super::pages::{PageClient, PE_SENT, PID};
use super::space::{Entry, Space};
use super::{pagemap, set, Restore};

/// The client's side of a round.
pub fn send(port: u16, n: usize, entries: &[Entry], memory: &[u8]) -> Result<Duration> {
    let begin = Instant::now();
    let mut client = PageClient::connect(port, PID, PE_SENT)?;
    let parent = client.open()?;
    ensure!(
        parent == (n > 0),
        "round {n} is told that it has a parent: {parent}"
    );
    client.send(entries, memory)?;
    client.close()?;
    Ok(begin.elapsed())
}

/// CRIU's directories in a series of rounds.
pub struct Series {
    /// images directory of the dump, with all images but the pages
    pub images: PathBuf,
    /// those of the pre-dumps
    rounds: PathBuf,
}

impl Series {
    /// Below `dir`, for rounds of this process.
    pub fn new(dir: &Path) -> Result<Self> {
        let images = dir.join("images");
        fs::create_dir(&images)?;
        set::write_files(&images)?;
        let rounds = dir.join("rounds");
        // image-proxy looks for the process behind a connection, and at those of this name first.
        rustix::thread::set_name(c"criu")?;
        Ok(Self { images, rounds })
    }

    /// The images directory of round `n`, with the link to the one before, as CRIU makes it: a
    /// round is known by the directory that its CRIU has open.
    pub fn images_of(&self, n: usize, last: bool) -> Result<PathBuf> {
        if n == 0 && self.rounds.exists() {
            fs::remove_dir_all(&self.rounds)?;
        }
        fs::create_dir_all(&self.rounds)?;
        let dir = match last {
            true => self.images.clone(),
            false => self.rounds.join(n.to_string()),
        };
        if !last {
            fs::create_dir(&dir)?;
        }
        let parent = dir.join("parent");
        if parent.is_symlink() {
            fs::remove_file(&parent)?;
        }
        if n > 0 {
            symlink(self.rounds.join((n - 1).to_string()), parent)?;
        }
        Ok(dir)
    }
}

/// Reads all of a flat set but its pages, which must be right; gives the number of these.
pub fn check_flat(criu: &mut Restore, space: &Space) -> Result<u64> {
    set::check_files(criu)?;
    let map = criu.small(&format!("pagemap-{PID}.img"))?;
    let (pages_id, entries) = pagemap::parse(&map).context("the flat pagemap")?;
    let flat = space.regions.iter().map(|region| pagemap::Mapped {
        vaddr: region.vaddr,
        pages: region.pages as u64,
        flags: pagemap::PE_PRESENT,
    });
    ensure!(entries.into_iter().eq(flat), "the flat pagemap is wrong");
    Ok(pages_id)
}
