//! Real CRIU moves a process of 1 GiB between two hosts of namespaces, which are those of the tests
//! with real CRIU (`e2e_tests::real`): through the daemons, beside the same CRIU with files on a
//! tmpfs of one host, and beside such files that are copied to the other host.
//!
//! "Runs" is the process's own word: the first tick that it writes after it stood still. CRIU
//! has the same options everywhere but for `--stream` and the action script.

mod clock;
mod copy;
mod hold;
mod many;
mod null;

use std::time::Duration;

use anyhow::{ensure, Context as _, Result};
use e2e_tests::real::program::longest_gap;
use e2e_tests::real::{Cache, Dump, Host, Pair, Program, Proxy, Restore, IMAGES};

use super::IMAGE;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::machine::meminfo;
use e2e_tests::memory::{Warm, GIB, MIB};

pub use hold::{Hold, NAME as HOLD};
pub use many::{Many, NAME as MANY};

pub const NAME: &str = "real";

const THREADS: u32 = 2;
/// Where CRIU's files are, on a tmpfs of their host.
const FILES: &str = "/run/files";
/// Made warm before each dump: the images of the process, its second copy, and some.
const REFRESHED: usize = 2560 << 20;
/// The process, its images twice (or its images and its restored self), and some.
const NEEDED: u64 = 3 * IMAGE + GIB;
/// What the cache says when a set is committed.
const COMMITTED: &str = "ready to be restored";

/// What is measured in each round, all of it with a new process.
#[derive(Clone, Copy)]
enum Way {
    /// Dump and restore on one host, through files on its tmpfs.
    Tmpfs,
    /// Through the daemons, restored when the dump has ended.
    Pair,
    /// The same with a restore that was started before the dump.
    Early,
    /// Files on the source's tmpfs, copied to the target's.
    Copied,
}

const WAYS: [Way; 4] = [Way::Tmpfs, Way::Pair, Way::Early, Way::Copied];

#[derive(Default)]
pub struct Real {
    /// The daemons stay for all rounds, as they would on a machine.
    lab: Option<Lab>,
    round: usize,
}

struct Lab {
    // Before the hosts that they run on.
    cache: Cache,
    proxy: Proxy,
    pair: Pair,
}

impl Scenario for Real {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row = |key: &str, title: &str| {
            RowSpec::new(
                Group::Real,
                format!("real.{key}"),
                title,
                Unit::Milliseconds,
            )
        };
        let at_most = Reach::RatioAtMost;
        vec![
            row("frozen", "frozen, by CRIU's count")
                .beside("real.tmpfs.frozen", "criu dump to tmpfs")
                .target(at_most(1.15), false),
            row("early.frozen", "frozen, with a restore that waits")
                .beside("real.tmpfs.frozen", "criu dump to tmpfs")
                .target(at_most(1.15), false),
            row("moved", "dump start to process running, one by one")
                .beside("real.tmpfs.moved", "tmpfs dump + restore")
                .target(at_most(1.15), false),
            row(
                "early.moved",
                "dump start to process running, restore started early",
            )
            .beside("real.tmpfs.moved", "tmpfs dump + restore")
            .target(at_most(1.15), false),
            row(
                "early.after",
                "commit to process running, restore started early",
            )
            .beside("real.tmpfs.restore", "criu restore from tmpfs")
            .target(at_most(1.1), false),
            row("restore", "restore after the dump, until it runs")
                .beside("real.tmpfs.restore", "criu restore from tmpfs"),
            row("ready", "dump start until it can be restored"),
            row(
                "copied.ready",
                "the same, criu dump to tmpfs + copy over TCP",
            )
            .beside("real.ready", "through the pair"),
            row(
                "copied.moved",
                "dump start to process running, tmpfs + copy",
            )
            .beside("real.early.moved", "through the pair"),
        ]
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        // The reason why there is none stands in the table.
        if context.criu_root.is_ok() && meminfo("MemAvailable") >= NEEDED {
            self.lab = Some(Lab::start()?);
        }
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let Some(lab) = &self.lab else {
            let why = match &context.criu_root {
                Err(why) => why.clone(),
                Ok(_) => format!("needs {} MiB of memory", NEEDED / MIB),
            };
            for row in self.rows() {
                out.note(row.key, why.clone());
            }
            return Ok(());
        };
        // Who comes first changes: nobody always finds what another one left.
        let mut ways = WAYS;
        ways.rotate_left(self.round % WAYS.len());
        self.round += 1;
        for way in ways {
            let result = match way {
                Way::Tmpfs => lab.tmpfs(out).context("tmpfs"),
                Way::Pair => lab.one_by_one(out).context("dump, then restore"),
                Way::Early => lab.early(out).context("restore started early"),
                Way::Copied => lab.copied(out).context("tmpfs and copy"),
            };
            if result.is_err() {
                lab.pair.lab.print_logs();
            }
            result?;
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        if let Some(lab) = self.lab.take() {
            lab.stop()?;
        }
        Ok(())
    }
}

impl Lab {
    fn start() -> Result<Self> {
        let pair = Pair::new()?;
        let (cache, proxy) = pair.daemons()?;
        Ok(Self { cache, proxy, pair })
    }

    fn stop(self) -> Result<()> {
        for daemon in [self.proxy.into_daemon(), self.cache.into_daemon()] {
            let status = daemon.terminate()?;
            ensure!(status.success(), "a daemon ended with {status}");
        }
        Ok(())
    }

    fn tmpfs(&self, out: &mut Samples) -> Result<()> {
        let host = &self.pair.source;
        let subject = Subject::start(host)?;
        make_files_dir(host)?;
        let dump_start = subject.about_to_be_dumped()?;
        let dump = Dump::spawn_to_files(host, FILES, subject.pid())?;
        let frozen = dump.wait()?.ok()?.frozen;
        let restore_start = clock::now();
        Restore::spawn_from_files(host, FILES)?.wait()?.ok()?;
        let runs = subject.arrived(host)?;
        remove_files_dir(host)?;
        push(out, "tmpfs.frozen", frozen.context("no frozen time")?);
        push(out, "tmpfs.restore", since(runs, restore_start)?);
        push(out, "tmpfs.moved", since(runs, dump_start)?);
        Ok(())
    }

    fn one_by_one(&self, out: &mut Samples) -> Result<()> {
        let (source, target) = (&self.pair.source, &self.pair.target);
        let subject = Subject::start(source)?;
        let dump_start = subject.about_to_be_dumped()?;
        let dump = Dump::spawn(source, IMAGES, subject.pid())?;
        let frozen = dump.wait()?.ok()?.frozen;
        let restore_start = clock::now();
        Restore::spawn(target, IMAGES)?.wait()?.ok()?;
        let committed = self.committed()?;
        let runs = subject.arrived(target)?;
        self.gone(&subject)?;
        push(out, "frozen", frozen.context("no frozen time")?);
        push(out, "ready", since(committed, dump_start)?);
        push(out, "restore", since(runs, restore_start)?);
        push(out, "moved", since(runs, dump_start)?);
        Ok(())
    }

    fn early(&self, out: &mut Samples) -> Result<()> {
        let (source, target) = (&self.pair.source, &self.pair.target);
        let subject = Subject::start(source)?;
        let restore = Restore::spawn(target, IMAGES)?;
        restore.wait_until_it_waits()?;
        let dump_start = subject.about_to_be_dumped()?;
        let dump = Dump::spawn(source, IMAGES, subject.pid())?;
        let frozen = dump.wait()?.ok()?.frozen;
        restore.wait()?.ok()?;
        let committed = self.committed()?;
        let runs = subject.arrived(target)?;
        self.gone(&subject)?;
        // Or it is an older commit.
        ensure!(dump_start < committed, "no commit in the cache's log");
        push(out, "early.frozen", frozen.context("no frozen time")?);
        push(out, "early.after", since(runs, committed)?);
        push(out, "early.moved", since(runs, dump_start)?);
        Ok(())
    }

    fn copied(&self, out: &mut Samples) -> Result<()> {
        let (source, target) = (&self.pair.source, &self.pair.target);
        let subject = Subject::start(source)?;
        make_files_dir(source)?;
        make_files_dir(target)?;
        let dump_start = subject.about_to_be_dumped()?;
        let dump = Dump::spawn_to_files(source, FILES, subject.pid())?;
        dump.wait()?.ok()?;
        copy::directory(&self.pair, FILES)?;
        let ready = clock::now();
        Restore::spawn_from_files(target, FILES)?.wait()?.ok()?;
        let runs = subject.arrived(target)?;
        remove_files_dir(source)?;
        remove_files_dir(target)?;
        push(out, "copied.ready", since(ready, dump_start)?);
        push(out, "copied.moved", since(runs, dump_start)?);
        Ok(())
    }

    /// When the newest set was committed.
    fn committed(&self) -> Result<Duration> {
        let log = self.cache.log()?;
        let line = log.lines().rev().find(|line| line.contains(COMMITTED));
        clock::when_logged(line.context("the cache's log has no commit")?)
    }

    /// Nothing is left: no second copy, no image file, and no memory in the cache.
    fn gone(&self, subject: &Subject) -> Result<()> {
        let alive = self.pair.source.is_alive(subject.pid())?;
        ensure!(!alive, "it runs on the source as well");
        for host in [&self.pair.source, &self.pair.target] {
            let files = host.image_files()?;
            ensure!(files.is_empty(), "images became files: {files:?}");
        }
        self.cache.wait_for_memory_below(IMAGE / 4)
    }
}

/// The process that is moved.
struct Subject {
    program: Program,
    /// of its memory
    hash: String,
}

impl Subject {
    fn start(host: &Host) -> Result<Self> {
        let program = Program::memory(host, u32::try_from(IMAGE / MIB)?, THREADS)?;
        let hash = program.ask(host, "hash")?;
        let rollup = host.read(&format!("/proc/{}/smaps_rollup", program.pid))?;
        let dirty =
            e2e_tests::process::parse_vm(&rollup, "Private_Dirty").context("smaps_rollup")?;
        ensure!(dirty >= IMAGE, "only {dirty} bytes of it are dirty");
        Ok(Self { program, hash })
    }

    fn pid(&self) -> i32 {
        self.program.pid
    }

    /// The dump is to begin at once.
    fn about_to_be_dumped(&self) -> Result<Duration> {
        Warm::refresh(REFRESHED)?;
        Ok(clock::now())
    }

    /// Checks that it runs with the memory that it had, ends it, and gives when it first ran
    /// after it had stood still.
    fn arrived(&self, host: &Host) -> Result<Duration> {
        self.program.runs_on()?;
        let hash = self.program.ask(host, "hash")?;
        ensure!(hash == self.hash, "its memory is another one");
        let ticks = self.program.ticks()?;
        let gap = longest_gap(&ticks).context("it has not ticked twice")?;
        let first = ticks[usize::try_from(gap.after)?];
        // CRIU gives it a clock that goes on from the end of the dump, not from now.
        let offsets = host.read(&format!("/proc/{}/timens_offsets", self.program.pid))?;
        self.program.kill(host)?;
        clock::outside(first.at, &offsets)
    }
}

/// `runs` is of a process that was stopped after `start`: anything else is a pause of its own.
fn since(runs: Duration, start: Duration) -> Result<Duration> {
    runs.checked_sub(start)
        .context("the process stood still before it was dumped")
}

fn push(out: &mut Samples, key: &str, took: Duration) {
    out.push(format!("real.{key}"), took.as_secs_f64() * 1e3);
}

fn make_files_dir(host: &Host) -> Result<()> {
    host.sh(&format!("mkdir {FILES}")).map(drop)
}

fn remove_files_dir(host: &Host) -> Result<()> {
    host.sh(&format!("rm -r {FILES}")).map(drop)
}
