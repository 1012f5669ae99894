//! 10,000 images of one page each, dumped and restored one after the other as CRIU does.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{measure, peak_rows, record_peaks};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::Pair;
use e2e_tests::fake::fast::set::ManySmall;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::memory::PAGE;

pub const IMAGES: usize = 10_000;

pub struct Small {
    name: &'static str,
    dialect: Dialect,
    pair: Option<Pair>,
}

impl Small {
    pub fn new(name: &'static str, dialect: Dialect) -> Self {
        Self {
            name,
            dialect,
            pair: None,
        }
    }

    fn key(&self, what: &str) -> String {
        format!("{}.{what}", self.name)
    }

    fn title(&self) -> &'static str {
        match self.dialect {
            Dialect::Stream => "--stream",
            _ => "--remote, pipes",
        }
    }
}

impl Scenario for Small {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let title = self.title();
        let mut rows = Vec::new();
        for (what, side, limit) in [
            ("dump", "dump", "raw.handover-dump"),
            ("restore", "restore", "raw.handover-restore"),
        ] {
            let title = format!("{side}, {title}");
            let row = RowSpec::new(Group::Small, self.key(what), title, Unit::PerSecond);
            let row = row.beside(limit, "handed over");
            rows.push(row.target(Reach::ValueAtLeast(5000.0), false));
        }
        for (what, who) in [
            ("dump.proxy.cpu", "image-proxy, dump"),
            ("dump.cache.cpu", "image-cache, dump"),
            ("restore.cache.cpu", "image-cache, restore"),
        ] {
            let title = format!("{who} 4 KiB, {title}");
            rows.push(RowSpec::new(
                Group::Cpu,
                self.key(what),
                title,
                Unit::CpuMicrosPerImage,
            ));
        }
        rows.extend(peak_rows(
            self.name,
            &format!("sets of 10,000 x 4 KiB, {title}"),
        ));
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.pair = Some(context.start_pair(self.name, self.dialect)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.pair.as_ref().context("not started")?;
        let id = format!("/bench/{}", context.next_stamp());
        let set = ManySmall {
            count: IMAGES,
            memory: context.src.bytes(),
        };

        let mut criu = Dump::begin(self.dialect, &pair.source, &id)?;
        pair.script("pre-dump")?;
        let dump = measure(pair, || {
            set.dump(&mut criu)?;
            pair.script("post-dump").map(drop)
        })
        .context("dump")?;
        criu.finish().context("the end of the dump")?;

        let mut criu = Restore::begin(self.dialect, &pair.target, &id)?;
        let restore = measure(pair, || set.restore(&mut criu)).context("restore")?;
        criu.finish().context("the end of the restore")?;
        pair.wait_released((IMAGES * PAGE) as u64)?;

        let micros = |cpu: Duration| cpu.as_secs_f64() * 1e6 / IMAGES as f64;
        out.push(self.key("dump"), IMAGES as f64 / dump.wall.as_secs_f64());
        out.push(self.key("dump.proxy.cpu"), micros(dump.proxy_cpu));
        out.push(self.key("dump.cache.cpu"), micros(dump.cache_cpu));
        out.push(
            self.key("restore"),
            IMAGES as f64 / restore.wall.as_secs_f64(),
        );
        out.push(self.key("restore.cache.cpu"), micros(restore.cache_cpu));
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        let pair = self.pair.take().context("not started")?;
        record_peaks(self.name, &pair, (IMAGES * PAGE) as u64, out)?;
        pair.stop()
    }
}
