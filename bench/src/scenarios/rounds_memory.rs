//! What a series of ten rounds leaves in memory: of image-cache, and in `criu page-server`'s tmpfs.

use anyhow::{Context as _, Result};

use super::page_servers::{check, Criu, Ours, PageServer};
use crate::criu::CriuRoot;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::PagesAt;
use e2e_tests::fake::fast::space::{Dirty, Space};
use e2e_tests::machine::meminfo;
use e2e_tests::memory::{MIB, PAGE};

const ROUNDS: usize = 10;

/// Of the final set (the iterative issue); one round in flight comes on top.
const BOUND: f64 = 1.1;

pub struct RoundsMemory {
    name: &'static str,
    title: &'static str,
    /// what every round but the first replaces
    dirty: Dirty,
    space: Space,
}

impl RoundsMemory {
    pub fn all_replaced(bytes: u64) -> Result<Self> {
        Self::new("all", "all replaced", Dirty::All, bytes)
    }

    pub fn some_replaced(bytes: u64) -> Result<Self> {
        Self::new("ten", "10 % replaced", Dirty::Scattered(10), bytes)
    }

    fn new(name: &'static str, title: &'static str, dirty: Dirty, bytes: u64) -> Result<Self> {
        let space = Space::new(usize::try_from(bytes)? / PAGE);
        Ok(Self {
            name,
            title,
            dirty,
            space,
        })
    }

    fn key(&self, what: &str) -> String {
        format!("page-server-memory.{}.{what}", self.name)
    }

    fn bytes(&self) -> usize {
        self.space.pages * PAGE
    }

    /// All rounds; gives the bytes of the largest one that replaces.
    fn rounds(&self, context: &mut Context, server: &mut dyn PageServer) -> Result<usize> {
        let mut largest = 0;
        for n in 0..ROUNDS {
            let what = if n == 0 { Dirty::All } else { self.dirty };
            let dirty = self.space.dirty(what, n as u64);
            context.stamp_dirty(&dirty);
            let entries = self.space.entries(&dirty);
            server
                .round(n, n + 1 == ROUNDS, &entries, context.src.bytes())
                .with_context(|| format!("round {n}"))?;
            if n > 0 {
                largest = largest.max(dirty.iter().filter(|dirty| **dirty).count() * PAGE);
            }
        }
        Ok(largest)
    }

    fn read_back(&self, context: &mut Context, server: &mut dyn PageServer) -> Result<()> {
        let into = &mut context.dst.bytes_mut()[..self.bytes()];
        server.read_back(ROUNDS, &self.space, into)?;
        check(self.title, into, &context.src.bytes()[..self.bytes()])
    }

    fn ours(&self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let dir = context.dir.join(format!("ps-memory-{}", self.name));
        let mut ours = Box::new(Ours::start(&dir, PagesAt::Proxy)?);
        let at_start = ours.pair.cache_rss_at_start;
        let in_flight = self.rounds(context, &mut *ours)?;
        let resident = ours.pair.cache.vm("VmRSS")?.saturating_sub(at_start);
        self.read_back(context, &mut *ours)?;
        let peak = ours.pair.cache.vm("VmHWM")?.saturating_sub(at_start);
        out.push(self.key("rss"), resident as f64);
        out.push(self.key("hwm"), peak as f64);
        out.push(
            self.key("bound"),
            BOUND * self.bytes() as f64 + in_flight as f64,
        );
        out.push(self.key("set"), self.bytes() as f64);
        out.push(self.key("proxy.hwm"), ours.pair.proxy.vm("VmHWM")? as f64);
        ours.stop()
    }

    fn criu(&self, context: &mut Context, dedup: bool, key: &str, out: &mut Samples) -> Result<()> {
        let dir = context.dir.join(format!("ps-memory-{}-{dedup}", self.name));
        let needed = (ROUNDS as u64 + 1) * self.bytes() as u64 + 512 * MIB;
        if meminfo("MemAvailable") < needed {
            out.note(self.key(key), "not enough memory");
            return Ok(());
        }
        let root = match &context.criu_root {
            Ok(root) => CriuRoot::start(root, &dir)?,
            Err(why) => {
                out.note(self.key(key), why);
                return Ok(());
            }
        };
        let mut criu = Criu { root, dedup };
        self.rounds(context, &mut criu)?;
        out.push(self.key(key), criu.root.image_bytes()? as f64);
        self.read_back(context, &mut criu)
    }
}

impl Scenario for RoundsMemory {
    fn name(&self) -> String {
        format!("page-server-memory-{}", self.name)
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row = |what: &str, who: &str| {
            let title = format!("{}: {who}", self.title);
            RowSpec::new(Group::PageMemory, self.key(what), title, Unit::Bytes)
        };
        let of_set = |row: RowSpec| row.beside(self.key("set"), "final set");
        vec![
            of_set(row("rss", "image-cache after the last CLOSE"))
                .target(Reach::RatioAtMost(BOUND), true),
            row("hwm", "image-cache, peak")
                .beside(self.key("bound"), "1.1 x set + a round")
                .target(Reach::RatioAtMost(1.0), true),
            row("proxy.hwm", "image-proxy, peak").target(super::PROXY_PEAK, true),
            of_set(row("criu", "criu page-server, tmpfs")),
            of_set(row("criu-dedup", "criu page-server --auto-dedup, tmpfs")),
        ]
    }

    fn once(&self) -> bool {
        true
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        self.ours(context, out)?;
        self.criu(context, false, "criu", out)?;
        self.criu(context, true, "criu-dedup", out)
    }
}
