//! `scripts/fault-matrix`: faults at random moments of real migrations, and a table of what came of them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::{bail, Context, Result};
use e2e_tests::real::lab::use_prepared;
use e2e_tests::real::matrix::{self, Fault, Notes, Phase, Plan, Table};
use e2e_tests::real::pair::use_authority;
use e2e_tests::real::Pair;

/// For `scripts/fault-matrix`, which runs this here and in virtual machines: `--save` leaves the counts in a file, and
/// `--sum` makes one table of several, of so many points.
const USAGE: &str = "usage: fault-matrix --seed S [--points N] [--from K] [--skip N] [--only K] [--fault NAME] [--phase NAME] [--jobs N] [--rounds] [--in ROOT PROGRAMS DAEMONS CERTIFICATES] [--save FILE]\n       fault-matrix --sum POINTS FILE...";

/// Where nothing is found among so many points in a row, there is nothing.
const SEARCHED: u64 = 10_000;

struct Options {
    seed: u64,
    from: u64,
    /// Of those that are wanted, the first so many are not.
    skip: usize,
    points: u64,
    rounds: bool,
    /// Only points of it.
    fault: Option<Fault>,
    /// Only points that aim at it.
    phase: Option<Phase>,
    /// So many at a time.
    jobs: usize,
    save: Option<PathBuf>,
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1).peekable();
    if args.next_if(|first| first == "--sum").is_some() {
        return sum(args).unwrap_or_else(|error| {
            eprintln!("fault-matrix: {error:#}");
            ExitCode::FAILURE
        });
    }
    let options = match options(args) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("fault-matrix: {error:#}\n{USAGE}");
            return ExitCode::from(64);
        }
    };
    let plans = match options.plans() {
        Ok(plans) => plans,
        Err(error) => {
            eprintln!("fault-matrix: {error:#}");
            return ExitCode::from(64);
        }
    };
    let table = run(&options, &plans);
    println!("\n{table}");
    let saved = options
        .save
        .map(|path| std::fs::write(path, table.counts()));
    if let Some(Err(error)) = saved {
        eprintln!("fault-matrix: saving the counts: {error}");
        return ExitCode::FAILURE;
    }
    match table.failures() {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// One table of those that were saved; points that are in none have failed.
fn sum(mut args: impl Iterator<Item = String>) -> Result<ExitCode> {
    let points: u32 = args.next().context(USAGE)?.parse().context("--sum")?;
    let mut table = Table::default();
    for path in args {
        let counts = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        table.add_counts(&counts).with_context(|| path)?;
    }
    table.expect(points);
    println!("\n{table}");
    Ok(match table.failures() {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    })
}

fn options(mut args: impl Iterator<Item = String>) -> Result<Options> {
    let mut seed = None;
    let mut options = Options {
        seed: 0,
        from: 0,
        skip: 0,
        points: 40,
        rounds: false,
        fault: None,
        phase: None,
        jobs: 1,
        save: None,
    };
    while let Some(option) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{option} needs a value"))
        };
        match option.as_str() {
            "--seed" => seed = Some(value()?.parse().context("--seed")?),
            "--points" => options.points = value()?.parse().context("--points")?,
            "--from" => options.from = value()?.parse().context("--from")?,
            "--skip" => options.skip = value()?.parse().context("--skip")?,
            "--only" => (options.from, options.points) = (value()?.parse().context("--only")?, 1),
            "--fault" => options.fault = Some(value()?.parse().context("--fault")?),
            "--phase" => options.phase = Some(value()?.parse().context("--phase")?),
            "--jobs" => options.jobs = value()?.parse().context("--jobs")?,
            "--save" => options.save = Some(PathBuf::from(value()?)),
            "--rounds" => options.rounds = true,
            "--in" => {
                use_prepared(value()?.into(), value()?.into(), value()?.into());
                use_authority(value()?.into());
            }
            _ => bail!("unknown option {option}"),
        }
    }
    options.seed = seed.context("--seed is missing")?;
    Ok(options)
}

impl Options {
    /// What is to be run: the first points that are wanted.
    fn plans(&self) -> Result<Vec<Plan>> {
        let wanted = |plan: &Plan| {
            self.fault.is_none_or(|fault| plan.fault == fault)
                && self.phase.is_none_or(|phase| plan.aims_at(phase))
        };
        let mut plans = Vec::new();
        let (mut number, mut in_vain) = (self.from, 0);
        while (plans.len() as u64) < self.points + self.skip as u64 {
            let plan = Plan::draw(self.seed, number, self.rounds);
            number += 1;
            if wanted(&plan) {
                plans.push(plan);
                in_vain = 0;
            } else {
                in_vain += 1;
            }
            if in_vain > SEARCHED {
                bail!("no point has this fault and aims at this phase");
            }
        }
        Ok(plans.split_off(self.skip))
    }
}

fn run(options: &Options, plans: &[Plan]) -> Table {
    let what = if options.rounds {
        "pre-dump, pre-dump, dump"
    } else {
        "dump --stream"
    };
    println!("seed {}: {} points of {what}", options.seed, plans.len());
    let (table, next) = (Mutex::new(Table::default()), Mutex::new(plans.iter()));
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| loop {
                let plan = next.lock().unwrap_or_else(PoisonError::into_inner).next();
                let Some(plan) = plan else { return };
                run_one(options, plan, &table);
            });
        }
    });
    table.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn run_one(options: &Options, plan: &Plan, table: &Mutex<Table>) {
    let began = Instant::now();
    let head = format!("point {:4}  {:22}", plan.number, plan.fault);
    let pair = Pair::new();
    let notes = Notes::default();
    let record = match &pair {
        Ok(pair) => matrix::run(pair, plan, &notes),
        Err(error) => Err(anyhow::anyhow!("cannot make two hosts: {error:#}")),
    };
    let seconds = began.elapsed().as_secs_f64();
    // What one point says stays together.
    let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
    if record.is_err() || std::env::var_os("REAL_CRIU_LOGS").is_some() {
        if let Ok(pair) = &pair {
            pair.lab.print_logs();
        }
        println!("{plan:#?}\n{notes}");
    }
    match record {
        Ok(record) => {
            println!(
                "{head}  {:5}  {:10}  {}  {seconds:.1} s",
                plan.order(),
                record.phase,
                record.outcome
            );
            table.add(plan.order(), plan.fault, record.phase, record.outcome);
        }
        Err(error) => {
            println!("{head}  NOT AS DOCUMENTED: {error:#}  {seconds:.1} s");
            println!(
                "again: --seed {} --only {}{}",
                options.seed,
                plan.number,
                if options.rounds { " --rounds" } else { "" }
            );
            table.add_failure();
        }
    }
}
