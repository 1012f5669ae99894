//! Peak memory by size of the image: a fresh pair for one set of each size.

use anyhow::{Context as _, Result};

use super::{peak_rows, record_peaks};
use crate::fake::set::OneTask;
use crate::fake::{Dialect, Dump, Restore};
use crate::machine::meminfo;
use crate::memory::{Body, GIB, MIB};
use crate::runner::{Context, Scenario};
use crate::table::{RowSpec, Samples};

pub struct Memory {
    bytes: u64,
    name: String,
}

impl Memory {
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            name: format!("memory-{}", bytes / MIB),
        }
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
        peak_rows(&self.name, &format!("one image of {size}"))
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
        context.next_stamp();
        let pair = context.start_pair(&self.name, Dialect::Stream)?;
        let task = OneTask {
            body: Body::new(context.src.bytes(), self.bytes),
        };

        let mut criu = Dump::begin(Dialect::Stream, &pair.src, "")?;
        pair.script("pre-dump")?;
        task.dump(&mut criu).context("dump")?;
        pair.script("post-dump")?;
        criu.finish()?;
        let mut criu = Restore::begin(Dialect::Stream, &pair.dst, "")?;
        let into = context.dst.bytes_mut();
        task.restore(&mut criu, into).context("restore")?;
        criu.finish()?;
        task.check_last(into)?;
        record_peaks(&self.name, &pair, self.bytes, out)?;
        pair.wait_released(self.bytes)?;
        pair.stop()
    }
}
