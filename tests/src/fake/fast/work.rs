//! What `fake-criu` does as a process of its own for the bench and the soak run: image-proxy tells dumps from each other
//! by their process, and each is the parent of its action script.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use memmap2::{MmapMut, MmapOptions};
use rustix::time::{clock_gettime, ClockId};
use serde::{Deserialize, Serialize};

use super::set::OneTask;
use super::{read_exactly, Dialect, Dump, Restore};
use crate::bins::bin;
use crate::fake::child::{stand_still, FakeCriu};
use crate::fake::script::Script;
use crate::memory::{Body, Warm, MIB};

/// A script waits for data in flight, at the most.
const SCRIPT: Duration = Duration::from_secs(60);

/// What it does. Its end, before it is done, ends what it has begun.
#[derive(Serialize, Deserialize)]
pub enum Work {
    /// Dumps one task of `bytes`, every page marked with `seed`. It stands still when its memory is ready, and when it
    /// is announced; then it says when it did what ([`Done`]).
    Dump {
        dir: PathBuf,
        bytes: u64,
        seed: u64,
        script: PathBuf,
    },
    /// Stands still when it is announced, and in the middle of its pages.
    HalfDump {
        dir: PathBuf,
        id: String,
        bytes: u64,
        script: PathBuf,
    },
    /// Stands still in the middle of the pages.
    HalfRestore {
        dir: PathBuf,
        dialect: Dialect,
        id: String,
        bytes: u64,
    },
    /// No CRIU but a process with so much memory, for the pre-dump script to look at; it stands still when it has it.
    Tree { bytes: u64 },
}

impl Work {
    /// One that is to be dumped from `dir`, the sockets' directory.
    pub fn dump(dir: &Path, bytes: u64, seed: u64) -> Self {
        let (dir, script) = (dir.to_owned(), bin("image-proxy"));
        Work::Dump {
            dir,
            bytes,
            seed,
            script,
        }
    }

    /// One that is to be ended in the middle.
    pub fn half_dump(dir: &Path, id: &str, bytes: u64) -> Self {
        let (dir, script) = (dir.to_owned(), bin("image-proxy"));
        Work::HalfDump {
            dir,
            id: id.to_owned(),
            bytes,
            script,
        }
    }

    /// The same of a restore.
    pub fn half_restore(dir: &Path, dialect: Dialect, id: &str, bytes: u64) -> Self {
        Work::HalfRestore {
            dir: dir.to_owned(),
            dialect,
            id: id.to_owned(),
            bytes,
        }
    }

    /// Starts it, and does not wait until it stands still.
    pub fn spawn(self) -> FakeCriu {
        FakeCriu::start(&bin("fake-criu").display().to_string(), "Fast", &self)
    }

    pub(in crate::fake) fn run(&self) -> Result<()> {
        match self {
            Work::Dump {
                dir,
                bytes,
                seed,
                script,
            } => dump(dir, *bytes, *seed, script),
            Work::HalfDump {
                dir,
                id,
                bytes,
                script,
            } => half_dump(dir, id, *bytes, script),
            Work::HalfRestore {
                dir,
                dialect,
                id,
                bytes,
            } => half_restore(dir, *dialect, id, *bytes),
            Work::Tree { bytes } => tree(*bytes),
        }
    }
}

/// When a [`Work::Dump`] did what, by the clock that all processes share.
pub struct Done {
    /// Before it wrote its first image.
    pub began: Duration,
    /// Its last image was written.
    pub written: Duration,
    /// Its action script has exited: the dump is committed.
    pub committed: Duration,
}

impl Done {
    /// Waits for its end.
    ///
    /// # Errors
    /// If it has failed.
    pub fn of(dumper: FakeCriu) -> Result<Self> {
        let (status, said) = dumper.wait();
        ensure!(status.success(), "a dumping CRIU: {status}: {said}");
        let times: Vec<u64> = said
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let [began, written, committed] = times[..] else {
            anyhow::bail!("a dumping CRIU said {said:?}");
        };
        Ok(Done {
            began: Duration::from_nanos(began),
            written: Duration::from_nanos(written),
            committed: Duration::from_nanos(committed),
        })
    }
}

pub fn now() -> Duration {
    time_of(ClockId::Monotonic)
}

/// Of a clock that counts from something in the past: never negative, and less than 10^9 nanoseconds.
pub fn time_of(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(
        time.tv_sec.try_into().unwrap_or(0),
        time.tv_nsec.try_into().unwrap_or(0),
    )
}

/// Announces a dump of this process.
fn announce(script: &Path, dir: &Path) -> Result<()> {
    let script = Script::new(script, "pre-dump", dir, SCRIPT);
    let announced = script.run_beside(Some(std::process::id()))?;
    announced.succeeded("pre-dump").map(drop)
}

fn dump(dir: &Path, bytes: u64, seed: u64, script: &Path) -> Result<()> {
    let mut memory = Warm::source(usize::try_from(bytes)?)?;
    memory.stamp(seed);
    let task = OneTask {
        body: Body::new(memory.bytes(), bytes),
    };
    stand_still("with its memory");

    let mut criu = Dump::begin(Dialect::Stream, dir, "")?;
    announce(script, dir)?;
    stand_still("announced");
    let began = now();
    task.dump(&mut criu)?;
    let written = now();
    // It is not killed itself.
    let committed = Script::new(script, "post-dump", dir, SCRIPT).run()?;
    committed.succeeded("post-dump")?;
    let committed = now();
    criu.finish()?;
    let [began, written, committed] = [began, written, committed].map(|time| time.as_nanos());
    println!("{began} {written} {committed}");
    Ok(())
}

fn half_dump(dir: &Path, id: &str, bytes: u64, script: &Path) -> Result<()> {
    let memory = Warm::source(usize::try_from(bytes)?)?;
    let task = OneTask {
        body: Body::new(memory.bytes(), bytes),
    };
    let mut criu = Dump::begin(Dialect::Stream, dir, id)?;
    announce(script, dir)?;
    stand_still("announced");
    task.dump_with(&mut criu, || {
        stand_still("in the pages");
        Ok(())
    })
}

fn half_restore(dir: &Path, dialect: Dialect, id: &str, bytes: u64) -> Result<()> {
    let mut restore = Restore::begin(dialect, dir, id)?;
    restore.small("inventory.img")?;
    restore.small("pstree.img")?;
    let mut pages = File::from(restore.open("pages-1.img")?);
    let mut buffer = vec![0; usize::try_from(MIB)?];
    let mut left = bytes / 2;
    while left > 0 {
        let n = left.min(MIB);
        read_exactly(&mut pages, &mut buffer[..usize::try_from(n)?])
            .context("half of the pages")?;
        left -= n;
    }
    stand_still("in the pages");
    Ok(())
}

/// The memory that it has many times over: it costs page tables and no more.
fn tree(bytes: u64) -> Result<()> {
    const BYTES: u64 = 16 << 20;
    let file = rustix::fs::memfd_create("tree", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&file, BYTES)?;
    let mut maps: Vec<MmapMut> = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let len = usize::try_from(left.min(BYTES))?;
        // SAFETY: this process alone has the file, and does not truncate it.
        let map = unsafe { MmapOptions::new().len(len).populate().map_mut(&file) };
        maps.push(map.context("mapping memory")?);
        left -= len as u64;
    }
    stand_still("with its memory");
    Ok(())
}
