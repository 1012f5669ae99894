//! Restores of processes that are many small things, from the pair and from a tmpfs of the same host.
//!
//! With `--stream` CRIU does the same with any server: it maps each mapping ahead, reads its pages with a `read`
//! of its own, and moves it at the end, where from files it maps once and reads all pages with one `preadv`. docs/performance.md
//! has what that costs.

use anyhow::{ensure, Context as _, Result};
use e2e_tests::real::{Dump, Host, Program, Restore, IMAGES};

use super::null::Null;
use super::{clock, make_files_dir, remove_files_dir, since, Lab, FILES};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};

/// What the names of all of them begin with.
pub const NAME: &str = "many";

const TMPFS: &str = "tmpfs.";
const NULL: &str = "null.";
/// Below the target's own.
const FIRST_PID: u32 = 6_000;
const WAYS: [&str; 3] = [TMPFS, NULL, ""];

pub struct Many {
    kind: &'static str,
    count: u32,
    lab: Option<Lab>,
    round: usize,
}

impl Many {
    pub fn all() -> [Self; 3] {
        [("mappings", 15_000), ("threads", 1_000), ("tasks", 300)].map(|(kind, count)| Self {
            kind,
            count,
            lab: None,
            round: 0,
        })
    }
}

impl Scenario for Many {
    fn name(&self) -> String {
        format!("{NAME}-{}", self.kind)
    }

    fn rows(&self) -> Vec<RowSpec> {
        let (kind, count) = (self.kind, self.count);
        let row = |way, title| {
            RowSpec::new(
                Group::Real,
                format!("many.{way}{kind}"),
                format!("restore of {count} {kind}{title}"),
                Unit::Milliseconds,
            )
        };
        let tmpfs = format!("many.tmpfs.{kind}");
        let null = format!("many.null.{kind}");
        vec![
            row("", "")
                .beside(tmpfs.clone(), "criu restore from tmpfs")
                .target(Reach::RatioAtMost(1.15), false),
            row(NULL, ", a server that only answers").beside(tmpfs, "criu restore from tmpfs"),
            row("", ", beside that server").beside(null, "a server that only answers"),
        ]
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        if context.criu_root.is_ok() {
            self.lab = Some(Lab::start()?);
        }
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let Some(lab) = &self.lab else {
            let why = context.criu_root.as_ref().err().cloned();
            for row in self.rows() {
                out.note(row.key, why.clone().unwrap_or_default());
            }
            return Ok(());
        };
        // Who comes first changes.
        let mut ways = WAYS;
        ways.rotate_left(self.round % WAYS.len());
        self.round += 1;
        for way in ways {
            let took = match way {
                TMPFS => from_files(&lab.pair.source, self.kind, self.count),
                NULL => from_null(&lab.pair.source, self.kind, self.count),
                _ => through(lab, self.kind, self.count),
            };
            if took.is_err() {
                lab.pair.lab.print_logs();
            }
            let took = took.with_context(|| format!("{way}{}", self.kind))?;
            out.push(format!("many.{way}{}", self.kind), took);
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.lab.take().map_or(Ok(()), Lab::stop)
    }
}

/// A program whose numbers are free on the target, however many there were before.
fn program(host: &Host, kind: &str, count: u32) -> Result<Program> {
    host.sh(&format!("echo {FIRST_PID} >/proc/sys/kernel/ns_last_pid"))?;
    Program::many(host, kind, count)
}

fn from_files(host: &Host, kind: &str, count: u32) -> Result<f64> {
    let program = program(host, kind, count)?;
    let hash = program.ask(host, "hash")?;
    make_files_dir(host)?;
    Dump::spawn_to_files(host, FILES, program.pid)?
        .wait()?
        .ok()?;
    let start = clock::now();
    Restore::spawn_from_files(host, FILES)?.wait()?.ok()?;
    let end = clock::now();
    remove_files_dir(host)?;
    arrived(&program, host, &hash, (kind, count))?;
    Ok(since(end, start)?.as_secs_f64() * 1e3)
}

/// What CRIU itself does with `--stream`.
fn from_null(host: &Host, kind: &str, count: u32) -> Result<f64> {
    let program = program(host, kind, count)?;
    let hash = program.ask(host, "hash")?;
    make_files_dir(host)?;
    Dump::spawn_to_files(host, FILES, program.pid)?
        .wait()?
        .ok()?;
    let null = Null::start(&host.path(FILES))?;
    let start = clock::now();
    Restore::spawn_with(host, FILES, &[])?.wait()?.ok()?;
    let end = clock::now();
    null.end()?;
    remove_files_dir(host)?;
    arrived(&program, host, &hash, (kind, count))?;
    Ok(since(end, start)?.as_secs_f64() * 1e3)
}

fn through(lab: &Lab, kind: &str, count: u32) -> Result<f64> {
    let (source, target) = (&lab.pair.source, &lab.pair.target);
    let program = program(source, kind, count)?;
    let hash = program.ask(source, "hash")?;
    Dump::spawn(source, IMAGES, program.pid)?.wait()?.ok()?;
    let start = clock::now();
    Restore::spawn(target, IMAGES)?.wait()?.ok()?;
    let end = clock::now();
    arrived(&program, target, &hash, (kind, count))?;
    Ok(since(end, start)?.as_secs_f64() * 1e3)
}

/// Checks that all of it runs with the memory that it had, and ends it.
fn arrived(program: &Program, host: &Host, hash: &str, (kind, count): (&str, u32)) -> Result<()> {
    program.runs_on()?;
    ensure!(
        program.ask(host, "hash")? == hash,
        "its memory is another one"
    );
    if kind != "mappings" {
        let alive = program.ask(host, "alive")?;
        ensure!(alive == count.to_string(), "{alive} of {count} {kind} run");
    }
    program.kill(host)
}
