//! `scripts/demo`: moves a live process between two local hosts and says what happened.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use e2e_tests::real::program::{longest_gap, monotonic_offset};
use e2e_tests::real::{Cache, Dump, Host, Pair, Program, Proxy, Restore, IMAGES};

const DEFAULT_MIB: u32 = 256;
const THREADS: u32 = 4;
const MIB: f64 = 1024.0 * 1024.0;

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let all = arguments.len();
    arguments.retain(|argument| argument != "--failing-restore");
    let fails = arguments.len() < all;
    let mib = match arguments.first().map(|argument| argument.parse()) {
        None => DEFAULT_MIB,
        Some(Ok(mib @ 1..=16_384)) if arguments.len() == 1 => mib,
        Some(_) => {
            eprintln!("usage: demo [--failing-restore] [MIB]   how much memory the process has, 1 to 16384 MiB");
            return ExitCode::from(64);
        }
    };
    let pair = match Pair::new() {
        Ok(pair) => pair,
        Err(error) => {
            eprintln!("demo: cannot make two hosts: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    let shown = match fails {
        true => failing_restore(&pair, mib),
        false => demo(&pair, mib),
    };
    match shown {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            pair.lab.print_logs();
            eprintln!("\ndemo: failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Two hosts with a daemon on each.
fn hosts(pair: &Pair) -> Result<(Cache, Proxy)> {
    let criu = pair.source.sh("criu --version | head -n 1")?;
    let criu = criu.trim().trim_start_matches("Version: ");
    heading("Two hosts on this machine");
    fact(
        "hosts",
        "source and target: namespaces, joined by a veth pair",
    );
    fact("CRIU", format!("{criu}, unmodified, with --stream"));
    let daemons = pair.daemons()?;
    fact(
        "daemons",
        "image-cache on the target, image-proxy on the source",
    );
    Ok(daemons)
}

/// A process that counts, and the hash of its memory.
fn process(pair: &Pair, mib: u32) -> Result<(Program, String)> {
    heading("A process on the source");
    let program = Program::memory(&pair.source, mib, THREADS)?;
    let hash = program.ask(&pair.source, "hash")?;
    fact("process", format!("pid {}, {THREADS} threads", program.pid));
    fact("memory", format!("{mib} MiB, hash {hash}"));
    Ok((program, hash))
}

/// A restore that can never succeed: the process goes on where it was.
fn failing_restore(pair: &Pair, mib: u32) -> Result<()> {
    let (_cache, _proxy) = hosts(pair)?;
    let (program, hash) = process(pair, mib)?;
    let pid = program.pid;

    heading("A target on which the restore must fail");
    let last = pid - 1;
    let taken = pair.target.sh(&format!(
        "echo {last} > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null 2>&1 & echo $!"
    ))?;
    ensure!(
        taken.trim() == pid.to_string(),
        "the number is not free: {taken}"
    );
    fact("target", format!("another process has the number {pid}"));

    heading("On its way");
    let restore = Restore::spawn(&pair.target, IMAGES)?;
    restore.wait_until_it_waits()?;
    fact("restore", "waits on the target");
    let dump = step("criu dump on the source, which fails", || {
        Dump::fails(&pair.source, IMAGES, pid)
    })?;
    restore.wait()?.expect_failure()?;
    let why = dump
        .log
        .lines()
        .find_map(|line| line.split_once("image-proxy: post-dump: "));
    let (_, why) = why.context("CRIU's log on the source does not say why")?;
    fact("why", why);

    heading("Proof");
    pair.target.sh(&format!("kill -9 {pid}"))?;
    program.runs_on()?;
    ensure!(pair.source.is_alive(pid)?, "the process is gone");
    fact(
        "source",
        format!(
            "process {pid} counts on, at {} by now",
            program.ticks()?.len()
        ),
    );
    let after = program.ask(&pair.source, "hash")?;
    ensure!(
        after == hash,
        "the memory changed: hash {hash} became {after}"
    );
    fact("memory", format!("hash {after}, the same"));
    let gap = longest_gap(&program.ticks()?).context("the process has not ticked twice")?;
    fact(
        "stood",
        format!("{} at most, while it was dumped and tried", time(gap.pause)),
    );
    println!();
    Ok(())
}

fn demo(pair: &Pair, mib: u32) -> Result<()> {
    let (cache, proxy) = hosts(pair)?;

    let (program, hash) = process(pair, mib)?;
    let running = program.ticks()?;
    let rhythm = longest_gap(&running).context("the process has not ticked twice")?;
    fact(
        "counter",
        format!("at {}, counting every 5 ms", running.len()),
    );

    heading("On its way");
    let link_before = pair.target.received_bytes()?;
    // The restore comes first: then it stands on the target before the source kills.
    let restore = Restore::spawn(&pair.target, IMAGES)?;
    restore.wait_until_it_waits()?;
    let started = Instant::now();
    let dump = step("criu dump on the source", || {
        Dump::ok(&pair.source, IMAGES, program.pid)
    })?;
    let dumped = started.elapsed();
    step("criu restore on the target", || {
        restore.wait()?.ok()?;
        ensure!(pair.target.is_alive(program.pid)?, "no restored process");
        Ok(())
    })?;
    let took = started.elapsed();
    step("the process counting on", || program.runs_on())?;
    ensure!(
        cache.log()?.contains("restored and held"),
        "the source killed before the restore stood"
    );
    fact(
        "held",
        "it stood restored on the target before it was killed on the source",
    );

    let link_bytes = pair.target.received_bytes()? - link_before;
    let (images, bytes) = what_moved(&cache)?;
    let frozen = dump.frozen.context("CRIU printed no frozen time")?;
    let ticks = program.ticks()?;
    let mut gap = longest_gap(&ticks).context("the process has not ticked twice")?;
    // Its clock stood still from the end of the dump to its restore.
    let offsets = pair
        .target
        .sh(&format!("cat /proc/{}/timens_offsets", program.pid))?;
    let behind = -monotonic_offset(&offsets).context("no offset of its clock")?;
    gap.pause += Duration::from_nanos(u64::try_from(behind).unwrap_or_default());

    heading("What moved");
    fact("images", format!("{images}, together {}", size(bytes)));
    fact(
        "link",
        format!("{} received by the target", size(link_bytes)),
    );
    fact(
        "proxy",
        format!("{} at its peak", size(proxy.peak_memory()?)),
    );
    heading("How fast");
    fact("dump", format!("{} in all", time(dumped)));
    fact(
        "frozen",
        format!(
            "{} by CRIU's count, {}/s",
            time(frozen),
            rate(bytes, frozen)
        ),
    );
    fact("moved", format!("{} from dump to restored", time(took)));
    fact(
        "downtime",
        format!(
            "{} between two ticks of the process (it never paused longer than {} before)",
            time(gap.pause),
            time(rhythm.pause)
        ),
    );

    heading("Proof");
    ensure!(
        gap.after >= running.len() as u64,
        "the process stood still before its dump, not during it"
    );
    let hash_after = program.ask(&pair.target, "hash")?;
    ensure!(
        hash_after == hash,
        "the memory changed: hash {hash} became {hash_after}"
    );
    fact(
        "counter",
        format!(
            "{} was its last on the source, {} its first on the target, {} by now, none missing",
            gap.after,
            gap.after + 1,
            ticks.len()
        ),
    );
    fact("memory", format!("hash {hash_after}, the same"));
    let beats = program.beats(&pair.target)?;
    ensure!(beats.len() == THREADS as usize, "threads were lost");
    fact("threads", format!("all {} of them go on", beats.len()));
    ensure!(!pair.source.is_alive(program.pid)?, "it runs twice");
    fact("source", "the process is gone there");
    for host in [&pair.source, &pair.target] {
        nothing_on_disk(host)?;
    }
    fact(
        "disk",
        "untouched: both hosts can only write to tmpfs, and even there is no image",
    );
    println!();
    Ok(())
}

fn heading(text: &str) {
    println!("\n{text}");
}

fn fact(name: &str, value: impl Display) {
    println!("  {name:<9} {value}");
}

/// Says what is going on while it takes its time.
fn step<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {what} ... ");
    // Only looks; a closed standard output shows at the next line.
    let _ = std::io::stdout().flush();
    let started = Instant::now();
    let outcome = action();
    match &outcome {
        Ok(_) => println!("{}", time(started.elapsed())),
        Err(_) => println!("failed"),
    }
    outcome
}

/// Images and bytes of the set, as the cache counted them when it was committed.
fn what_moved(cache: &Cache) -> Result<(u64, u64)> {
    let log = cache.log()?;
    let field = |line: &str, name: &str| -> Option<u64> {
        let value = line.split_once(&format!(" {name}="))?.1;
        value.split_ascii_whitespace().next()?.parse().ok()
    };
    log.lines()
        .rev()
        .find_map(|line| Some((field(line, "images")?, field(line, "bytes")?)))
        .context("the cache's log does not say what it received")
}

/// No place on the host can be written that is not memory, and no image lies there either.
fn nothing_on_disk(host: &Host) -> Result<()> {
    const IN_MEMORY: &[&str] = &["tmpfs", "proc", "devpts", "sysfs", "devtmpfs"];
    for line in host.read("/proc/1/mountinfo")?.lines() {
        let (mount, fs) = line.split_once(" - ").context("odd mountinfo")?;
        let mount: Vec<_> = mount.split(' ').collect();
        let options = mount.get(5).context("odd mountinfo")?;
        let fs = fs.split(' ').next().context("odd mountinfo")?;
        let writable = options.split(',').any(|option| option == "rw");
        ensure!(
            !writable || IN_MEMORY.contains(&fs) || mount[4].starts_with("/dev/"),
            "{} could write to {} ({fs})",
            host.name,
            mount[4]
        );
    }
    let images = host.image_files()?;
    ensure!(images.is_empty(), "images on {}: {images:?}", host.name);
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn size(bytes: u64) -> String {
    let bytes = bytes as f64;
    if bytes >= MIB {
        format!("{:.1} MiB", bytes / MIB)
    } else {
        format!("{:.1} KiB", bytes / 1024.0)
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.0} MiB", bytes as f64 / MIB / time.as_secs_f64())
}

fn time(time: Duration) -> String {
    if time >= Duration::from_secs(1) {
        format!("{:.2} s", time.as_secs_f64())
    } else {
        format!("{:.0} ms", time.as_secs_f64() * 1000.0)
    }
}
