//! `scripts/fault-matrix`: faults at random moments of real migrations, and a table of what came of them.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{bail, Context, Result};
use e2e_tests::real::lab::use_prepared;
use e2e_tests::real::matrix::{self, Notes, Plan, Table};
use e2e_tests::real::pair::use_authority;
use e2e_tests::real::Pair;

/// For `scripts/fault-matrix`, which runs this here and in virtual machines: `--save` leaves the counts in a file, and
/// `--sum` makes one table of several, of so many points.
const USAGE: &str = "usage: fault-matrix --seed S [--points N] [--from K] [--only K] [--fault NAME] [--rounds] [--in ROOT PROGRAMS DAEMONS CERTIFICATES] [--save FILE]\n       fault-matrix --sum POINTS FILE...";

struct Options {
    seed: u64,
    from: u64,
    points: u64,
    rounds: bool,
    /// Only this one.
    fault: Option<String>,
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
    let table = run(&options);
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
    let (mut seed, mut fault, mut save) = (None, None, None);
    let (mut from, mut points, mut rounds) = (0, 40, false);
    while let Some(option) = args.next() {
        let mut value = || {
            args.next()
                .with_context(|| format!("{option} needs a value"))
        };
        match option.as_str() {
            "--seed" => seed = Some(value()?.parse().context("--seed")?),
            "--points" => points = value()?.parse().context("--points")?,
            "--from" => from = value()?.parse().context("--from")?,
            "--only" => (from, points) = (value()?.parse().context("--only")?, 1),
            "--fault" => fault = Some(value()?),
            "--save" => save = Some(PathBuf::from(value()?)),
            "--rounds" => rounds = true,
            "--in" => {
                use_prepared(value()?.into(), value()?.into(), value()?.into());
                use_authority(value()?.into());
            }
            _ => bail!("unknown option {option}"),
        }
    }
    Ok(Options {
        seed: seed.context("--seed is missing")?,
        from,
        points,
        rounds,
        fault,
        save,
    })
}

fn run(options: &Options) -> Table {
    let seed = options.seed;
    let what = if options.rounds {
        "pre-dump, pre-dump, dump"
    } else {
        "dump --stream"
    };
    println!("seed {seed}: {} points of {what}", options.points);
    let mut table = Table::default();
    for number in options.from..options.from + options.points {
        let plan = Plan::draw(seed, number, options.rounds);
        if options
            .fault
            .as_ref()
            .is_some_and(|only| plan.fault.to_string() != *only)
        {
            continue;
        }
        let began = Instant::now();
        let head = format!("point {number:4}  {:22}", plan.fault);
        let pair = match Pair::new() {
            Ok(pair) => pair,
            Err(error) => {
                println!("{head}  cannot make two hosts: {error:#}");
                table.add_failure();
                continue;
            }
        };
        let notes = Notes::default();
        let record = matrix::run(&pair, &plan, &notes);
        let seconds = began.elapsed().as_secs_f64();
        match record {
            Ok(record) => {
                println!(
                    "{head}  {:10}  {}  {seconds:.1} s",
                    record.phase, record.outcome
                );
                if std::env::var_os("REAL_CRIU_LOGS").is_some() {
                    pair.lab.print_logs();
                    println!("{plan:#?}\n{notes}");
                }
                table.add(plan.fault, record.phase, record.outcome);
            }
            Err(error) => {
                pair.lab.print_logs();
                println!("{plan:#?}\n{notes}");
                println!("{head}  NOT AS DOCUMENTED: {error:#}  {seconds:.1} s");
                println!(
                    "again: --seed {seed} --only {number}{}",
                    if options.rounds { " --rounds" } else { "" }
                );
                table.add_failure();
            }
        }
    }
    table
}
