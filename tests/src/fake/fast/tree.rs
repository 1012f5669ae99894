//! A process with as much memory as the one that is dumped, for the pre-dump script to look at: of
//! what the fake CRIU writes there is no process.

use anyhow::{Context, Result};
use memmap2::{MmapMut, MmapOptions};

use crate::fake::fast::dumper::{bench, stand_still, Dumper};

/// The memory that it has many times over: it costs page tables and no more.
const BYTES: u64 = 16 << 20;

/// Is it.
pub fn run(bytes: u64) -> Result<()> {
    let file = rustix::fs::memfd_create("tree", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, BYTES)?;
    let mut maps: Vec<MmapMut> = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let len = usize::try_from(left.min(BYTES))?;
        // SAFETY: nobody else has the file, and nobody truncates it.
        let map = unsafe { MmapOptions::new().len(len).populate().map_mut(&file) };
        maps.push(map.context("mapping memory")?);
        left -= len as u64;
    }
    stand_still(&mut bench()?)?;
    Ok(())
}

pub struct Tree(Dumper);

impl Tree {
    pub fn of(bytes: u64) -> Result<Self> {
        let mut process = Dumper::spawn(|command| {
            command.args(["--tree", &bytes.to_string()]);
        })?;
        process.ready()?;
        Ok(Self(process))
    }

    pub fn pid(&self) -> u32 {
        self.0.pid()
    }
}
