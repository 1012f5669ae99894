//! What the order costs: the source kills when the restore stands on the target (`--commit-on auto`, a restore that waits),
//! beside the order in which it kills first and the restore begins then (`--commit-on held`). In both the restore is started
//! early and memory is reserved ahead.
//!
//! Downtime is the time between two ticks of the process, the last on the source and the first on the target. A restored
//! process has a clock of its own ([`super::clock`]), so both are put on the machine's.

use std::time::Duration;

use anyhow::{ensure, Context as _, Result};
use e2e_tests::memory::{Warm, MIB};
use e2e_tests::real::program::longest_gap;
use e2e_tests::real::{Cache, Dump, Pair, Program, Proxy, Restore, IMAGES};

use super::clock;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::machine::meminfo;

pub const NAME: &str = "hold";

const SIZES: [u64; 3] = [64, 256, 1024];
const THREADS: u32 = 2;
/// The process, its images, its restored self, and some.
const NEEDED: u64 = 4 << 30;

#[derive(Clone, Copy)]
enum Order {
    Held,
    Hold,
}

impl Order {
    fn commit_on(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Hold => "auto",
        }
    }

    fn key(self, mib: u64) -> String {
        match self {
            Self::Held => format!("hold.{mib}.present"),
            Self::Hold => format!("hold.{mib}"),
        }
    }
}

#[derive(Default)]
pub struct Hold {
    lab: Option<(Cache, Pair)>,
    round: usize,
}

impl Scenario for Hold {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row =
            |key: String, title: String| RowSpec::new(Group::Real, key, title, Unit::Milliseconds);
        let mut rows = Vec::new();
        for mib in SIZES {
            let key = Order::Hold.key(mib);
            rows.push(
                row(
                    key.clone(),
                    format!("downtime of {mib} MiB, killed when the restore stands"),
                )
                .beside(Order::Held.key(mib), "killed first")
                .target(Reach::RatioAtMost(1.05), false),
            );
            rows.push(
                row(
                    format!("{key}.told"),
                    format!("restore of {mib} MiB stands until CRIU is told"),
                )
                .target(Reach::ValueAtMost(3.0), false),
            );
        }
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        if context.criu_root.is_ok() && meminfo("MemAvailable") >= NEEDED {
            let pair = Pair::new()?;
            self.lab = Some((pair.cache(&[])?, pair));
        }
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let Some((cache, pair)) = &self.lab else {
            let why = match &context.criu_root {
                Err(why) => why.clone(),
                Ok(_) => format!("needs {} MiB of memory", NEEDED / MIB),
            };
            for row in self.rows() {
                out.note(row.key, why.clone());
            }
            return Ok(());
        };
        let mut orders = [Order::Held, Order::Hold];
        // Neither always finds what the other one left.
        orders.rotate_left(self.round % 2);
        self.round += 1;
        for mib in SIZES {
            for order in orders {
                let moved = one(pair, cache, order, mib, out);
                if moved.is_err() {
                    pair.lab.print_logs();
                }
                moved.with_context(|| order.key(mib))?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        if let Some((cache, _pair)) = self.lab.take() {
            let status = cache.into_daemon().terminate()?;
            ensure!(status.success(), "image-cache ended with {status}");
        }
        Ok(())
    }
}

fn one(pair: &Pair, cache: &Cache, order: Order, mib: u64, out: &mut Samples) -> Result<()> {
    let proxy: Proxy = pair.proxy(&["--commit-on", order.commit_on()])?;
    let program = Program::memory(&pair.source, u32::try_from(mib)?, THREADS)?;
    let hash = program.ask(&pair.source, "hash")?;
    // Both hosts are this machine: killed first, the restore gets the warm memory of the killed process.
    Warm::refresh(super::REFRESHED)?;
    let restore = Restore::spawn(&pair.target, IMAGES)?;
    restore.wait_until_it_waits()?;
    Dump::ok(&pair.source, IMAGES, program.pid)?;
    restore.wait()?.ok()?;
    program.runs_on()?;
    ensure!(
        program.ask(&pair.target, "hash")? == hash,
        "its memory is another one"
    );
    let ticks = program.ticks()?;
    let gap = longest_gap(&ticks).context("it has not ticked twice")?;
    let at = usize::try_from(gap.after)?;
    let (last, first) = (ticks[at - 1].at, ticks[at].at);
    let offsets = pair
        .target
        .read(&format!("/proc/{}/timens_offsets", program.pid))?;
    let last = Duration::from_nanos(last);
    let downtime = clock::outside(first, &offsets)?
        .checked_sub(last)
        .context("the process stood still before it was dumped")?;
    program.kill(&pair.target)?;
    out.push(order.key(mib), downtime.as_secs_f64() * 1e3);
    if matches!(order, Order::Hold) {
        let stands = logged(&cache.log()?, "restored and held")?;
        let told = logged(&proxy.log()?, " committed")?;
        let took = told
            .checked_sub(stands)
            .context("CRIU was told before the restore stood")?;
        out.push(format!("{}.told", order.key(mib)), took.as_secs_f64() * 1e3);
    }
    let status = proxy.into_daemon().terminate()?;
    ensure!(status.success(), "image-proxy ended with {status}");
    cache.wait_for_memory_below(mib * MIB / 4 + 32 * MIB)
}

/// When the newest line with this was written.
fn logged(log: &str, text: &str) -> Result<Duration> {
    let line = log.lines().rev().find(|line| line.contains(text));
    clock::when_logged(line.with_context(|| format!("no line with {text:?}"))?)
}
