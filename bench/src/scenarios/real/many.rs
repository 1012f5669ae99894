//! Restores of processes that are many small things, from the pair and from a tmpfs of the same host.
//!
//! What CRIU does with `--stream` it does whoever serves it: it maps each mapping ahead, reads its pages with a `read`
//! of its own, and moves it at the end, where from files it maps once and reads all pages with one `preadv`. docs/performance.md
//! has what that costs.

use anyhow::{ensure, Context as _, Result};
use e2e_tests::real::{Dump, Host, Program, Restore, IMAGES};

use super::{clock, make_files_dir, remove_files_dir, since, Lab, FILES};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};

pub const NAME: &str = "many";

const KINDS: [(&str, u32); 3] = [("mappings", 15_000), ("threads", 1_000), ("tasks", 300)];

#[derive(Default)]
pub struct Many {
    lab: Option<Lab>,
    round: usize,
}

impl Scenario for Many {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row = |(kind, count): (&str, u32)| {
            let title = format!("restore of {count} {kind}");
            RowSpec::new(
                Group::Real,
                format!("many.{kind}"),
                title,
                Unit::Milliseconds,
            )
            .beside(format!("many.tmpfs.{kind}"), "criu restore from tmpfs")
            .target(Reach::RatioAtMost(1.15), false)
        };
        KINDS.into_iter().map(row).collect()
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
        self.round += 1;
        for (kind, count) in KINDS {
            // Who comes first changes.
            for files in [self.round % 2 == 0, self.round % 2 != 0] {
                let took = match files {
                    true => from_files(&lab.pair.source, kind, count),
                    false => through(lab, kind, count),
                };
                let way = if files { "tmpfs." } else { "" };
                if took.is_err() {
                    lab.pair.lab.print_logs();
                }
                let took = took.with_context(|| format!("{way}{kind}"))?;
                out.push(format!("many.{way}{kind}"), took);
            }
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.lab.take().map_or(Ok(()), Lab::stop)
    }
}

fn from_files(host: &Host, kind: &str, count: u32) -> Result<f64> {
    let program = Program::many(host, kind, count)?;
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

fn through(lab: &Lab, kind: &str, count: u32) -> Result<f64> {
    let (source, target) = (&lab.pair.source, &lab.pair.target);
    let program = Program::many(source, kind, count)?;
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
