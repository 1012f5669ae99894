//! Peak memory by size of the image, and by number of sets: a fresh pair for each.

use anyhow::{Context as _, Result};

use super::{peak_rows, record_peaks};
use crate::runner::{Context, Scenario};
use crate::table::{RowSpec, Samples};
use e2e_tests::daemons::Pair;
use e2e_tests::fake::fast::set::OneTask;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::machine::meminfo;
use e2e_tests::memory::{Body, GIB, MIB};

pub struct Memory {
    /// of the one large image in a set
    bytes: u64,
    /// one after the other, each restored before the next
    sets: usize,
    name: String,
}

impl Memory {
    pub fn one(bytes: u64) -> Self {
        let name = format!("memory-{}", bytes / MIB);
        Self {
            bytes,
            sets: 1,
            name,
        }
    }

    /// Shows what a daemon keeps of sets that are over.
    pub fn series(sets: usize, bytes: u64) -> Self {
        let name = format!("memory-{sets}x{}", bytes / MIB);
        Self { bytes, sets, name }
    }
}

impl Scenario for Memory {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let size = if self.bytes < GIB {
            format!("{} MiB", self.bytes / MIB)
        } else {
            format!("{} GiB", self.bytes / GIB)
        };
        let what = match self.sets {
            1 => format!("one image of {size}"),
            sets => format!("{sets} sets of {size} in turn"),
        };
        peak_rows(&self.name, &what)
    }

    fn once(&self) -> bool {
        true
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let needed = self.bytes + self.bytes / 8 + GIB / 2;
        let available = meminfo("MemAvailable");
        if available < needed {
            let why = format!(
                "left out: needs {} MiB, {} are available",
                needed / MIB,
                available / MIB
            );
            out.note(format!("{}.proxy.hwm", self.name), &why);
            out.note(format!("{}.cache.hwm", self.name), &why);
            return Ok(());
        }
        let pair = context.start_pair(&self.name, Dialect::Stream)?;
        for _ in 0..self.sets {
            context.next_stamp();
            let body = Body::new(context.src.bytes(), self.bytes);
            move_one(&pair, &OneTask { body }, context.dst.bytes_mut())?;
            pair.wait_released(self.bytes)?;
        }
        record_peaks(&self.name, &pair, self.bytes, out)?;
        pair.stop()
    }
}

fn move_one(pair: &Pair, task: &OneTask<'_>, into: &mut [u8]) -> Result<()> {
    let mut criu = Dump::begin(Dialect::Stream, &pair.source, "")?;
    pair.announce(task.body.len)?;
    task.dump(&mut criu).context("dump")?;
    pair.script("post-dump")?;
    criu.finish()?;
    let mut criu = Restore::begin(Dialect::Stream, &pair.target, "")?;
    task.restore(&mut criu, into).context("restore")?;
    criu.finish()?;
    task.check_last(into)
}
