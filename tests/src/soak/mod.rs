//! `scripts/soak`: thousands of short sessions through one image-proxy and one image-cache. Afterwards both must be
//! what they were: memory, descriptors, threads, sessions, files.

mod sessions;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::fake::content::Random;
use anyhow::{anyhow, ensure, Context as _, Result};
use serde::Serialize;

use crate::daemons::{Daemon, Options, PagesAt};
use crate::fake::fast::rounds::Series;
use crate::guard::{print_logs, Guard};
use crate::machine::{need_memory, Machine, Source as Commit};
use crate::memory::{Warm, GIB, MIB};
use sessions::{space, Driver, End, Plan, Scripts, Source};
use watch::{at_rest, Gauge, Watched};

#[derive(clap::Args)]
pub struct Args {
    /// Sessions, one after the other
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    sessions: u64,
    /// Bytes of all pages together, at least
    #[arg(long, value_name = "N", default_value_t = 200)]
    gib: u64,
    /// 600 sessions and 3 GiB: for CI
    #[arg(long, conflicts_with_all = ["sessions", "gib"])]
    quick: bool,
    /// What is drawn by lot depends on it
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Write what was measured to FILE
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Of so many sessions one is large: together they have the bytes.
const LARGE_EVERY: u64 = 50;
/// The first part of all sessions, which the daemons may grow in, in percent; but at least so many, if that is not more
/// than half of them.
const WARM_UP: u64 = 10;
const LEAST_WARM_UP: u64 = 400;
/// Looks at the daemons between that and the end.
const LOOKS: u64 = 8;

/// Resident memory at the end, above that after the warm-up, and above that in the middle.
const GROWTH: u64 = 2 * MIB;
const SLOPE: u64 = MIB;

/// Lines of a log that should not be there, as far as they are shown.
const SHOWN: usize = 10;

/// A session takes milliseconds, a large one a second or two.
const SESSION: Duration = Duration::from_secs(60);

#[derive(Serialize)]
struct Report<'a> {
    sessions: u64,
    bytes: u64,
    seed: u64,
    seconds: f64,
    machine: &'a Machine,
    source: &'a Commit,
    ways: BTreeMap<String, u64>,
    ends: BTreeMap<String, u64>,
    wide: u64,
    short: Together,
    large: Together,
    /// CPU time of each daemon, in seconds.
    cpu: Vec<(&'static str, f64)>,
    looks: Vec<Look>,
    logged: BTreeMap<&'static str, u64>,
    failures: Vec<String>,
}

/// Sessions of one size, by the time from the beginning of each until both daemons have forgotten it: with the CRIU that
/// is played, and the comparison of each byte.
#[derive(Default, Serialize)]
struct Together {
    sessions: u64,
    bytes: u64,
    seconds: f64,
}

/// The daemons after so many sessions.
#[derive(Serialize)]
struct Look {
    sessions: u64,
    daemons: Vec<(&'static str, Gauge)>,
}

const NAMES: [&str; 3] = ["image-proxy", "image-proxy, 3 connections", "image-cache"];

/// Runs it in `dir`; `false` if something is not as it must be.
pub fn run(args: &Args, dir: &Path) -> Result<bool> {
    let (sessions, gib) = match args.quick {
        true => (600, 3),
        false => (args.sessions, args.gib),
    };
    ensure!(
        sessions >= 2 * LARGE_EVERY,
        "at least {} sessions",
        2 * LARGE_EVERY
    );
    // Rounded up: all of them.
    let large = (gib * GIB)
        .div_ceil(sessions / LARGE_EVERY)
        .next_multiple_of(MIB);
    need_memory(3 * large + GIB)?;
    let (machine, commit) = (
        Machine::look(),
        Commit::look(Path::new(env!("CARGO_MANIFEST_DIR"))),
    );
    let guard = Guard::start(dir.to_owned())?;
    let begin = Instant::now();
    let home = sessions::subdir(dir, "soak")?;
    let pair = Options::as_installed()
        .proxy(&["--session", "soak"])
        .page_server(PagesAt::Proxy)
        .start_in(&home)?;
    // Over several connections, which is an option of the whole daemon: a second source host.
    let wide_home = sessions::subdir(dir, "wide")?;
    let wide_dir = sessions::subdir(&wide_home, "s")?;
    let port = pair.port.to_string();
    let words = ["--address", "127.0.0.1", "--port", &port];
    let more = ["--session", "wide", "--connections", "3"];
    let words = [words, more].concat();
    let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    let log = wide_home.join("image-proxy.log");
    let wide = Daemon::launch(&[], "image-proxy", &wide_dir, &words, log);
    let mut wide = wide.map_err(|(status, log)| anyhow!("image-proxy: {status:?}\n{log}"))?;

    let bytes = usize::try_from(large)?;
    let mut driver = Driver {
        source: Source {
            proxy: Watched::new(&pair.proxy, &pair.source)?,
            session: "soak",
            pages_port: pair.pages_port,
        },
        wide: Source {
            proxy: Watched::new(&wide, &wide_dir)?,
            session: "wide",
            pages_port: 0,
        },
        cache: Watched::new(&pair.cache, &pair.target)?,
        cache_port: pair.port,
        series: Series::new(&home)?,
        space: space(),
        src: Warm::source(bytes)?,
        dst: Warm::new(bytes, 0xff)?,
        scripts: Scripts::new(),
    };
    let mut report = Report {
        sessions,
        bytes: 0,
        seed: args.seed,
        seconds: 0.0,
        machine: &machine,
        source: &commit,
        ways: BTreeMap::new(),
        ends: BTreeMap::new(),
        wide: 0,
        short: Together::default(),
        large: Together::default(),
        cpu: Vec::new(),
        looks: Vec::new(),
        logged: BTreeMap::new(),
        failures: Vec::new(),
    };
    let mut random = Random::new(args.seed);
    let least = LEAST_WARM_UP.min(sessions / 2);
    let warm_up = (sessions * WARM_UP / 100).max(least);
    let every = (sessions - warm_up).div_ceil(LOOKS);
    for number in 0..sessions {
        let is_large = number % LARGE_EVERY == LARGE_EVERY - 1;
        let plan = Plan::new(number, is_large.then_some(large), &mut random);
        let what = format!("session {number}, {plan:?}");
        let began = Instant::now();
        if let Err(error) = guard.within(&what, SESSION, || driver.run(plan)) {
            print_logs(dir);
            report.failures.push(format!("{what}: {error:#}"));
            break;
        }
        report.bytes += plan.bytes;
        let together = match is_large {
            true => &mut report.large,
            false => &mut report.short,
        };
        together.sessions += 1;
        together.bytes += plan.bytes;
        together.seconds += began.elapsed().as_secs_f64();
        *report.ways.entry(format!("{:?}", plan.way)).or_default() += 1;
        *report.ends.entry(format!("{:?}", plan.end)).or_default() += 1;
        report.wide += u64::from(plan.wide);
        let done = number + 1;
        if done >= warm_up && ((done - warm_up) % every == 0 || done == sessions) {
            let exact = report.looks.is_empty() || done == sessions;
            if exact {
                if let Err(error) = guard.within("alike sessions", SESSION, || driver.alike(done)) {
                    report.failures.push(format!("alike sessions: {error:#}"));
                    break;
                }
            }
            let daemons = look(&driver, report.looks.first(), exact)?;
            report.looks.push(Look {
                sessions: done,
                daemons,
            });
            eprintln!(
                "soak: {done} of {sessions} sessions, {:.1} GiB, {:.0} s",
                report.bytes as f64 / GIB as f64,
                begin.elapsed().as_secs_f64()
            );
        }
    }
    judge(&driver, &mut report)?;
    for (name, watched) in watched(&driver) {
        report
            .cpu
            .push((name, watched.process.cpu()?.as_secs_f64()));
    }
    report.seconds = begin.elapsed().as_secs_f64();
    drop(driver);
    if report.failures.is_empty() {
        wide.signal(rustix::process::Signal::TERM);
        let status = wide.wait_within(SESSION)?;
        ensure!(
            status.success(),
            "image-proxy ended with {status} after SIGTERM"
        );
        pair.stop()?;
    }
    print(&report);
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(report.failures.is_empty())
}

fn watched<'a, 'b>(driver: &'b Driver<'a>) -> [(&'static str, &'b Watched<'a>); 3] {
    let all = [&driver.source.proxy, &driver.wide.proxy, &driver.cache];
    std::array::from_fn(|n| (NAMES[n], all[n]))
}

/// The first look is what the last one, which waits to be like it, is compared with.
fn look(
    driver: &Driver<'_>,
    first: Option<&Look>,
    exact: bool,
) -> Result<Vec<(&'static str, Gauge)>> {
    if first.is_none() {
        at_rest(&watched(driver).map(|(_, watched)| watched))?;
    }
    let all = watched(driver).into_iter().enumerate();
    all.map(|(n, (name, watched))| {
        let gauge = match first.filter(|_| exact) {
            Some(look) => watched.back_to(look.daemons[n].1),
            None => watched.gauge(),
        };
        Ok((name, gauge?))
    })
    .collect()
}

fn judge(driver: &Driver<'_>, report: &mut Report<'_>) -> Result<()> {
    let mut failures = Vec::new();
    if let [first, .., last] = &report.looks[..] {
        let middle = &report.looks[report.looks.len() / 2];
        for (n, (name, end)) in last.daemons.iter().enumerate() {
            let (begin, middle) = (first.daemons[n].1, middle.daemons[n].1);
            let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / MIB as f64);
            if end.rss > begin.rss + GROWTH {
                failures.push(format!(
                    "{name}: {} resident, {} after the warm-up",
                    mib(end.rss),
                    mib(begin.rss)
                ));
            }
            if end.rss > middle.rss + SLOPE {
                failures.push(format!(
                    "{name}: {} resident, {} in the middle",
                    mib(end.rss),
                    mib(middle.rss)
                ));
            }
            if end.fds != begin.fds {
                let kinds = watched(driver)[n].1.fds()?;
                failures.push(format!(
                    "{name}: {} descriptors, {} after the warm-up: {kinds:?}",
                    end.fds, begin.fds
                ));
            }
            if end.threads != begin.threads {
                failures.push(format!(
                    "{name}: {} threads, {} after the warm-up",
                    end.threads, begin.threads
                ));
            }
        }
    } else if report.failures.is_empty() {
        failures.push("too few sessions to compare anything".to_owned());
    }
    for (name, watched) in watched(driver) {
        let left = watched.leftovers()?;
        if !left.is_empty() {
            failures.push(format!("{name}: left behind: {left:?}"));
        }
        let (known, unknown) = watched.log(&End::EXPECTED)?;
        for (text, count) in known {
            *report.logged.entry(text).or_default() += count;
        }
        let more = unknown.len().saturating_sub(SHOWN);
        failures.extend(
            unknown
                .iter()
                .take(SHOWN)
                .map(|line| format!("{name} logged: {line}")),
        );
        if more > 0 {
            failures.push(format!("{name} logged {more} more such lines"));
        }
    }
    report.failures.extend(failures);
    Ok(())
}

fn print(report: &Report<'_>) {
    let (machine, source) = (report.machine, report.source);
    let commit = source.commit.as_deref().unwrap_or("no commit");
    println!(
        "\n{}, {} cores, Linux {}; {}{}",
        machine.cpu_model,
        machine.cores,
        machine.kernel,
        &commit[..commit.len().min(12)],
        if source.dirty { " with changes" } else { "" }
    );
    println!(
        "{} sessions, {:.1} GiB of pages, seed {}, {:.0} s",
        report.sessions,
        report.bytes as f64 / GIB as f64,
        report.seed,
        report.seconds
    );
    let line = |counts: &BTreeMap<String, u64>| {
        let counts = counts.iter().map(|(name, count)| format!("{name} {count}"));
        counts.collect::<Vec<_>>().join(", ")
    };
    println!(
        "  {}; over 3 connections {}",
        line(&report.ways),
        report.wide
    );
    println!("  {}", line(&report.ends));
    for (what, together) in [("short", &report.short), ("large", &report.large)] {
        let Together {
            sessions,
            bytes,
            seconds,
        } = together;
        println!(
            "  {what}: {sessions} sessions and {:.1} GiB in {seconds:.0} s, {:.1} sessions/s, {:.2} GiB/s, with CRIU's part and the comparison",
            *bytes as f64 / GIB as f64,
            *sessions as f64 / seconds,
            *bytes as f64 / GIB as f64 / seconds
        );
    }
    let cpu = report.cpu.iter();
    let cpu: Vec<_> = cpu.map(|(name, s)| format!("{name} {s:.1} s")).collect();
    println!("  CPU: {}", cpu.join(", "));
    print!("{:>34}", "after sessions");
    for look in &report.looks {
        print!("{:>8}", look.sessions);
    }
    println!();
    for (n, name) in NAMES.iter().enumerate() {
        let row = |what: &str, value: &dyn Fn(Gauge) -> String| {
            print!("{name:>26} {what:<7}");
            for look in &report.looks {
                print!("{:>8}", value(look.daemons[n].1));
            }
            println!();
        };
        row("MiB", &|gauge| {
            format!("{:.1}", gauge.rss as f64 / MIB as f64)
        });
        row("fds", &|gauge| gauge.fds.to_string());
        row("threads", &|gauge| gauge.threads.to_string());
    }
    for (text, count) in &report.logged {
        println!("  logged {count} x \"{text}\"");
    }
    for failure in &report.failures {
        println!("FAILED: {failure}");
    }
    if report.failures.is_empty() {
        println!("Every byte was compared; no sessions, sockets or files are left; both are as they were.");
    }
}
