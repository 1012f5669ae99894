//! Runs the scenarios: one warm-up round, then the rounds that count. Each round takes one sample
//! of every raw limit and of every scenario, so both see the same state of the machine.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::table::{RowSpec, Samples};
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::fast::Dialect;
use e2e_tests::guard::{print_logs, Guard};
use e2e_tests::memory::Warm;

/// More than any sample takes on a slow machine; a hang ends there.
const SAMPLE: Duration = Duration::from_secs(90);

/// What every sample needs.
pub struct Context {
    /// Directory of this run, removed at its end.
    pub dir: PathBuf,
    /// What is dumped.
    pub src: Warm,
    /// Where it is restored.
    pub dst: Warm,
    /// Where real CRIU is, or why it is not.
    pub criu_root: Result<PathBuf, String>,
    /// Number of the sample, which is in every page of `src`.
    stamp: u64,
}

impl Context {
    pub fn new(dir: &Path, image_bytes: usize) -> Result<Self> {
        let (src, dst) = (Warm::source(image_bytes)?, Warm::new(image_bytes, 0xff)?);
        Ok(Self {
            dir: dir.to_owned(),
            src,
            dst,
            criu_root: Err("not looked for".to_owned()),
            stamp: 0,
        })
    }

    pub fn start_pair(&self, name: &str, dialect: Dialect) -> Result<Pair> {
        self.start_pair_at(name, Options::as_installed().dialect(dialect))
    }

    /// New bytes in those of the first pages that are `dirty`. Nothing may refer to the old
    /// ones any more.
    pub fn stamp_dirty(&mut self, dirty: &[bool]) {
        self.stamp += 1;
        self.src.stamp_dirty(self.stamp, dirty);
    }

    pub fn start_pair_at(&self, name: &str, options: Options) -> Result<Pair> {
        options.start_in(&self.dir.join(name))
    }

    /// New bytes in every page; returns their number. Nothing may refer to the old ones any more.
    pub fn next_stamp(&mut self) -> u64 {
        self.stamp += 1;
        self.src.stamp(self.stamp);
        self.stamp
    }
}

/// Something that is measured once per round.
pub trait Scenario {
    fn name(&self) -> String;

    fn rows(&self) -> Vec<RowSpec>;

    /// Starts its own fresh daemons, if it needs any.
    fn start(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()>;

    /// After the last round: peaks of memory; daemons must stop cleanly.
    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        Ok(())
    }

    /// Measured in the warm-up round only, where nothing needs to be warm (memory).
    fn once(&self) -> bool {
        false
    }
}

/// Free memory that is made warm before each sample: the largest image, and some.
const REFRESHED: usize = 1280 << 20;

pub struct Plan {
    pub rounds: usize,
    /// No new round begins after this much time; the rounds that were done count.
    pub budget: Duration,
}

/// Returns what failed: a scenario that fails is reported and left out of the next rounds.
pub fn run(
    plan: &Plan,
    scenarios: &mut [Box<dyn Scenario>],
    context: &mut Context,
    guard: &Guard,
    samples: &mut Samples,
) -> Vec<String> {
    let begin = Instant::now();
    let mut failures = Vec::new();
    let mut failed = vec![false; scenarios.len()];
    let mut step =
        |n: usize, name: &str, failed: &mut Vec<bool>, work: &mut dyn FnMut() -> Result<()>| {
            if failed[n] {
                return;
            }
            if let Err(error) = guard.within(name, SAMPLE, work) {
                eprintln!("bench: {name} failed: {error:#}");
                failures.push(format!("{name}: {error:#}"));
                failed[n] = true;
            }
        };

    for (n, scenario) in scenarios.iter_mut().enumerate() {
        step(n, &scenario.name(), &mut failed, &mut || {
            scenario.start(context)
        });
    }
    let mut longest = Duration::ZERO;
    let rounds = if scenarios.iter().all(|scenario| scenario.once()) {
        0
    } else {
        plan.rounds
    };
    for round in 0..=rounds {
        // A round is only begun if it fits, as far as the ones before tell.
        if round > 1 && begin.elapsed() + longest > plan.budget {
            eprintln!(
                "bench: {} of {rounds} rounds fit into {:?}",
                round - 1,
                plan.budget
            );
            break;
        }
        let round_begin = Instant::now();
        for (n, scenario) in scenarios.iter_mut().enumerate() {
            if scenario.once() && round > 0 {
                continue;
            }
            samples.warm_up = round == 0 && !scenario.once();
            if let Ok(cost) = Warm::refresh(REFRESHED) {
                samples.push("raw.touch", cost);
            }
            step(n, &scenario.name(), &mut failed, &mut || {
                scenario.sample(context, samples)
            });
        }
        longest = if round == 0 {
            Duration::ZERO
        } else {
            longest.max(round_begin.elapsed())
        };
        let what = if round == 0 {
            "warm-up".to_owned()
        } else {
            format!("round {round} of {rounds}")
        };
        eprintln!(
            "bench: {what} took {:.1} s",
            round_begin.elapsed().as_secs_f64()
        );
    }
    samples.warm_up = false;
    for (n, scenario) in scenarios.iter_mut().enumerate() {
        step(n, &scenario.name(), &mut failed, &mut || {
            scenario.finish(samples)
        });
    }
    if !failures.is_empty() {
        print_logs(&context.dir);
    }
    failures
}
