//! Rounds of a page server: a series of pre-dumps and a dump, and the set that comes of it.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::gib_per_second;
use super::page_servers::{check, Criu, Ours, PageServer, Raw};
use crate::criu::CriuRoot;
use crate::runner::{Context, Scenario};
use crate::sink::Sink;
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::PagesAt;
use e2e_tests::fake::fast::space::{Dirty, Space};
use e2e_tests::memory::{GIB, PAGE};

/// Key, title, and what a round finds dirty. The last one is the dump.
const ROUNDS: [(&str, &str, Dirty); 5] = [
    ("new", "all new", Dirty::All),
    ("replaced", "all replaced", Dirty::All),
    ("ten", "10 % replaced, single pages", Dirty::Scattered(10)),
    ("runs", "1 % replaced, in runs", Dirty::Runs(1)),
    ("one", "1 % replaced, single pages", Dirty::Scattered(1)),
];

/// Pages and CPU, `x criu page-server` (the speed issue).
const FASTER: Reach = Reach::RatioAtLeast(1.2);
const CHEAPER: Reach = Reach::RatioAtMost(0.5);
/// The iterative issue: not slower.
const AS_FAST: Reach = Reach::RatioAtLeast(1.0);

#[derive(Clone, Copy, PartialEq)]
pub enum Who {
    Ours(PagesAt),
    Criu {
        dedup: bool,
    },
    /// nobody: the limit
    Raw,
}

pub struct Rounds {
    who: Who,
    space: Space,
    server: Option<Box<dyn PageServer>>,
}

impl Who {
    fn name(self) -> &'static str {
        match self {
            Who::Ours(PagesAt::Proxy) => "page-server",
            Who::Ours(PagesAt::Cache) => "page-server-direct",
            Who::Criu { dedup: false } => PEER,
            Who::Criu { dedup: true } => "page-server-criu-dedup",
            Who::Raw => "page-server-raw",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Who::Ours(PagesAt::Proxy) => "image-proxy + image-cache",
            Who::Ours(PagesAt::Cache) => "image-cache directly",
            Who::Criu { dedup: false } => "criu page-server",
            Who::Criu { dedup: true } => "criu page-server --auto-dedup",
            Who::Raw => "two recv() per entry into warm memory",
        }
    }
}

/// Who the others stand beside.
const PEER: &str = "page-server-criu";

impl Rounds {
    pub fn new(who: Who, bytes: u64) -> Result<Self> {
        Ok(Self {
            who,
            space: Space::new(usize::try_from(bytes)? / PAGE),
            server: None,
        })
    }

    fn key(&self, what: &str) -> String {
        format!("{}.{what}", self.who.name())
    }

    fn rows_of_round(&self, round: &str, title: &str, rows: &mut Vec<RowSpec>) {
        let title = format!("{title}: {}", self.who.title());
        let peer = format!("{PEER}.{round}");
        let rate = || {
            let key = self.key(round);
            RowSpec::new(Group::PageRounds, key, &*title, Unit::PagesPerSecond)
        };
        let cpu = |what: &str, title: &str| {
            let key = self.key(&format!("{round}.{what}"));
            RowSpec::new(Group::PageCpu, key, title, Unit::CpuSecondsPerGib)
        };
        let peer_cpu = format!("{peer}.cpu");
        match self.who {
            Who::Ours(_) => {
                let beside = || rate().beside(&*peer, "criu page-server");
                rows.push(beside().target(FASTER, false));
                rows.push(beside().target(AS_FAST, false));
                let sum = cpu("cpu", &title).beside(peer_cpu, "criu page-server");
                rows.push(sum.target(CHEAPER, false));
            }
            Who::Criu { dedup: false } | Who::Raw => {
                rows.push(rate());
                rows.push(cpu("cpu", &title));
            }
            Who::Criu { dedup: true } => {
                rows.push(rate().beside(&*peer, "without --auto-dedup"));
                rows.push(cpu("cpu", &title).beside(peer_cpu, "without --auto-dedup"));
            }
        }
        if self.who == Who::Ours(PagesAt::Proxy) {
            rows.push(cpu("proxy.cpu", "  of that, image-proxy"));
            rows.push(cpu("cache.cpu", "  of that, image-cache"));
        }
    }

    fn rows_of_restore(&self) -> Vec<RowSpec> {
        let row = |what: &str, title: String, unit| {
            RowSpec::new(Group::PageRestore, self.key(what), title, unit)
        };
        let read = |title: &str| row("read", title.to_owned(), Unit::GibPerSecond);
        match self.who {
            Who::Ours(_) => {
                let title = "reading the flat set, --stream";
                vec![
                    read(title)
                        .beside(format!("{PEER}.read"), "criu's rounds on tmpfs")
                        .target(AS_FAST, false),
                    read(title).beside("raw.tmpfs-read", "one file on tmpfs"),
                    read(title).beside("raw.pipe-vmsplice", "vmsplice pipe"),
                    row(
                        "read.cpu",
                        format!("{title}: image-cache"),
                        Unit::CpuSecondsPerGib,
                    ),
                    row(
                        "commit",
                        "post-dump script: the flat set is made".to_owned(),
                        Unit::Milliseconds,
                    ),
                ]
            }
            Who::Criu { dedup: false } => {
                vec![read("reading criu page-server's rounds from tmpfs")]
            }
            Who::Criu { dedup: true } | Who::Raw => Vec::new(),
        }
    }
}

impl Scenario for Rounds {
    fn name(&self) -> String {
        self.who.name().to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let mut rows = Vec::new();
        for (key, title, _) in ROUNDS {
            self.rows_of_round(key, title, &mut rows);
        }
        rows.extend(self.rows_of_restore());
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let dir = context.dir.join(self.who.name());
        self.server = match self.who {
            Who::Ours(at) => Some(Box::new(Ours::start(&dir, at)?)),
            Who::Criu { dedup } => match &context.criu_root {
                Ok(root) => {
                    let root = CriuRoot::start(root, &dir)?;
                    Some(Box::new(Criu { root, dedup }))
                }
                Err(_) => None,
            },
            Who::Raw => Some(Box::new(Raw(Sink::new(self.space.pages)?))),
        };
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let Some(server) = self.server.as_mut() else {
            let why = context.criu_root.as_ref().err().cloned();
            for row in self.rows() {
                out.note(row.key, why.clone().unwrap_or_default());
            }
            return Ok(());
        };
        let name = self.who.name();
        for (n, (round, title, dirty)) in ROUNDS.into_iter().enumerate() {
            let dirty = self.space.dirty(dirty, n as u64);
            let entries = self.space.entries(&dirty);
            context.stamp_dirty(&dirty);
            let last = n + 1 == ROUNDS.len();
            let took = server
                .round(n, last, &entries, context.src.bytes())
                .with_context(|| format!("round {n}, {title}"))?;
            let pages = dirty.iter().filter(|dirty| **dirty).count();
            let per_gib = |cpu: Duration| cpu.as_secs_f64() * GIB as f64 / (pages * PAGE) as f64;
            let key = format!("{name}.{round}");
            out.push(&*key, pages as f64 / took.wall.as_secs_f64());
            out.push(
                format!("{key}.cpu"),
                per_gib(took.cpu.iter().map(|(_, cpu)| *cpu).sum()),
            );
            for (program, cpu) in took.cpu {
                out.push(format!("{key}.{program}.cpu"), per_gib(cpu));
            }
        }
        let bytes = self.space.pages * PAGE;
        let into = &mut context.dst.bytes_mut()[..bytes];
        let back = server.read_back(ROUNDS.len(), &self.space, into)?;
        check(name, into, &context.src.bytes()[..bytes])?;
        let bytes = bytes as u64;
        out.push(format!("{name}.read"), gib_per_second(bytes, back.read));
        if let Some(commit) = back.commit {
            out.push(format!("{name}.commit"), commit.as_secs_f64() * 1e3);
        }
        if let Some(cpu) = back.cpu {
            let per_gib = cpu.as_secs_f64() * GIB as f64 / bytes as f64;
            out.push(format!("{name}.read.cpu"), per_gib);
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.server.take().map_or(Ok(()), |server| server.stop())
    }
}
