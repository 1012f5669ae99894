//! Measures image-proxy and image-cache beside what the machine itself can do.
//!
//! `scripts/bench` builds everything and starts this program. See `scenarios/` for what is
//! measured, `raw.rs` for the limits. The CRIU that drives the daemons, the daemons as a pair and warm
//! memory are those of the tests (`e2e_tests`).

mod criu;
mod discard;
mod raw;
mod runner;
mod scenarios;
mod sink;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use serde::Serialize;

use e2e_tests::bins::use_built_here;
use e2e_tests::guard::Guard;
use e2e_tests::machine::{need_memory, temp_dir, Machine, Source};
use runner::{Context, Plan};
use scenarios::{real, IMAGE};
use table::{Row, RowSpec, Samples};

/// Measures the dump side and the restore side through image-proxy and image-cache on loopback,
/// beside the raw limits of this machine in the same run.
///
/// Exits with 1 if bytes were wrong, anything failed, or a memory target was missed. Targets of
/// time are printed only.
#[derive(Parser)]
#[command(name = "scripts/bench")]
struct Args {
    /// Fewer rounds and no 8 GiB image: under two minutes
    #[arg(long)]
    quick: bool,
    /// Write everything that was measured to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only scenarios whose name begins with NAME (may be repeated): limits, stream, unprepared,
    /// remote-pipe, remote-socket, small-stream, small-remote, commit, release, memory-64, memory-1024, memory-8192,
    /// memory-40x64, page-server (all that begin so: -direct, -criu, -criu-dedup, -raw, -memory-all,
    /// -memory-ten), connections, limited, growth (all that begin so: -bytes, -images, -sessions), real (real
    /// CRIU; like limited, growth and many not in --quick unless named), many (real CRIU, many small things: -mappings, -threads, -tasks), socat, tmpfs; the raw limits that they
    /// stand beside are measured too
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Be the process that discards what comes to PORT, for the scenario with hostile peers
    #[arg(long, value_name = "PORT", hide = true)]
    discard: Option<u16>,
}

#[derive(Serialize)]
struct Report<'a> {
    /// Version of this layout.
    schema: u32,
    mode: &'static str,
    image_bytes: u64,
    seconds: f64,
    machine: &'a Machine,
    source: &'a Source,
    rows: &'a [Row],
    failures: &'a [String],
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    if let Some(port) = args.discard {
        return discard::run(port).map(|()| true);
    }
    // Those that were built with this one.
    use_built_here()?;
    let begin = Instant::now();
    let mut scenarios = scenarios::select(&args.only, args.quick)?;
    let source = Source::look(Path::new(env!("CARGO_MANIFEST_DIR")));
    let machine = Machine::look();
    // What is dumped, where it is restored, the cache's copy, and some room.
    need_memory(3 * IMAGE + IMAGE / 2)?;

    let temp = temp_dir()?;
    let guard = Guard::start(temp.path().to_owned())?;
    let mut context = Context::new(temp.path(), usize::try_from(IMAGE)?)?;
    if scenarios.iter().any(|s| {
        let name = s.name();
        let real =
            [real::NAME, real::HOLD].contains(&name.as_str()) || name.starts_with(real::MANY);
        name.starts_with("page-server") || real
    }) {
        context.criu_root = criu::find_root();
    }
    let plan = match args.quick {
        true => Plan {
            rounds: 3,
            budget: Duration::from_secs(75),
        },
        false => Plan {
            rounds: 7,
            budget: Duration::from_secs(1400),
        },
    };
    let mut samples = Samples::default();
    let specs: Vec<RowSpec> = scenarios
        .iter()
        .flat_map(|scenario| scenario.rows())
        .collect();
    let mut failures = runner::run(&plan, &mut scenarios, &mut context, &guard, &mut samples);
    let rows = table::rows(&specs, &samples);
    failures.extend(rows.iter().filter_map(Row::hard_miss));

    let report = Report {
        schema: 1,
        mode: if args.quick { "quick" } else { "full" },
        image_bytes: IMAGE,
        seconds: begin.elapsed().as_secs_f64(),
        machine: &machine,
        source: &source,
        rows: &rows,
        failures: &failures,
    };
    print(&report);
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(failures.is_empty())
}

fn print(report: &Report<'_>) {
    let (machine, source) = (report.machine, report.source);
    let commit = source
        .commit
        .as_deref()
        .map_or("no commit", |hash| &hash[..hash.len().min(12)]);
    println!(
        "\n{}, {} cores, {} GiB, Linux {}, huge pages: {}",
        machine.cpu_model,
        machine.cores,
        machine.memory_bytes >> 30,
        machine.kernel,
        machine.transparent_hugepage
    );
    let dirty = if source.dirty { " with changes" } else { "" };
    println!(
        "{commit}{dirty}, {}, {} run of {:.0} s\n",
        source.date, report.mode, report.seconds
    );
    print!("{}", table::print(report.rows));
    println!("\nMedians; the warm-up is in none. Every byte that arrived was compared.");
    if machine.load_before > 0.5 {
        println!(
            "The machine was busy before (load {:.1}): times are only indicative.",
            machine.load_before
        );
    }
    for failure in report.failures {
        println!("FAILED: {failure}");
    }
}
