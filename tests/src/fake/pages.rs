//! A fake `criu pre-dump --page-server` or `criu dump --page-server`, in a process of its own: what the page server can
//! know of a CRIU is its process and the directory that it has open.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::child::{stand_still, FakeCriu, Started};
use super::fast::pages::PageClient;
use super::fast::space::Entry;
use super::script;
use crate::memory::{Warm, PAGE};

pub const PAGE_BYTES: usize = PAGE;

/// Where its one pagemap begins, and whose it is: the same in each process, as in containers.
pub const ADDRESS: u64 = 0x40_0000;
pub const TASK: u64 = 252;

/// PE_PRESENT: how pages are marked that are not private memory.
const PRESENT: u32 = 4;

const LIMIT: Duration = Duration::from_secs(40);

/// One round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PageRound {
    pub port: u16,
    /// CRIU's `-D`. `None`: a client that has no directory open.
    pub images_dir: Option<PathBuf>,
    /// `--prev-images-dir`
    pub parent: Option<String>,
    /// The whole memory: what each page is filled with.
    pub memory: Vec<u64>,
    /// Which of its pages are sent if there is a parent.
    pub changed: Vec<usize>,
    pub dump: Option<Dump>,
    /// Stands still in the middle of the round.
    pub stop: bool,
    /// Goes away in the middle of the round.
    pub cut: bool,
}

/// What makes a dump of a round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dump {
    pub script: PathBuf,
    pub work_dir: PathBuf,
    /// The other images.
    pub files: PathBuf,
}

/// The bytes of such a memory.
pub fn bytes_of(memory: &[u64]) -> Vec<u8> {
    let pages = memory.iter().flat_map(|word| [*word; PAGE_BYTES / 8]);
    pages.flat_map(u64::to_le_bytes).collect()
}

impl PageRound {
    /// Starts it; `program` is the path of `fake-criu`. What it says at its end is whether it had a parent.
    pub fn spawn(&self, program: &str) -> FakeCriu {
        FakeCriu::start(program, "Pages", self)
    }

    /// The same as a CRIU that was started so.
    pub fn spawn_as(&self, program: &str, started: &Started) -> FakeCriu {
        FakeCriu::start_as(program, "Pages", self, started)
    }

    pub(super) fn run(&self) -> anyhow::Result<bool> {
        // In CRIU's order, and open until the end.
        let _dir = self.images_dir.as_ref().map(File::open).transpose()?;
        if let (Some(dir), Some(parent)) = (&self.images_dir, &self.parent) {
            symlink(parent, dir.join("parent"))?;
        }
        self.script("pre-dump")?;
        let had_parent = self.send()?;
        if let (Some(dump), Some(dir)) = (&self.dump, &self.images_dir) {
            copy_files(&dump.files, dir)?;
        }
        self.script("post-dump")?;
        Ok(had_parent)
    }

    fn send(&self) -> anyhow::Result<bool> {
        let bytes = bytes_of(&self.memory);
        let mut memory = Warm::new(bytes.len(), 0)?;
        memory.bytes_mut().copy_from_slice(&bytes);
        let mut server = PageClient::connect(self.port, TASK, PRESENT)?;
        let has_parent = server.open()?;
        let entry = |n: usize| Entry {
            vaddr: ADDRESS + (n * PAGE_BYTES) as u64,
            pages: 1,
            memory: (!has_parent || self.changed.contains(&n)).then_some(n),
        };
        let entries: Vec<Entry> = (0..self.memory.len()).map(entry).collect();
        let (first, rest) = entries.split_at(entries.len() / 2);
        server.send(first, memory.bytes())?;
        if self.stop || self.cut {
            server.push()?;
        }
        if self.stop {
            stand_still("the round");
        }
        if self.cut {
            return Ok(has_parent);
        }
        server.send(rest, memory.bytes())?;
        server.close()?;
        Ok(has_parent)
    }

    fn script(&self, action: &str) -> io::Result<()> {
        let (Some(dump), Some(dir)) = (&self.dump, &self.images_dir) else {
            return Ok(());
        };
        let result = script::run(&dump.script, action, dir, &dump.work_dir, LIMIT)?;
        match result.ok() {
            true => Ok(()),
            false => Err(io::Error::other(format!("{action}: {result:?}"))),
        }
    }
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
