//! The test programs of `tests/programs`, seen through their logs.

use std::fs::OpenOptions;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};

use super::lab::{unique, Host};
use super::{wait_for, wait_until, SOON};

/// How many more ticks show that a process runs on.
const SOME_TICKS: u64 = 20;

/// One tick of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick {
    /// Counts from 1, without gap, in the program's memory.
    pub number: u64,
    /// The monotonic clock, in nanoseconds.
    pub at: u64,
}

/// The longest time between two ticks, and where it was.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// The number of the tick before it.
    pub after: u64,
    /// How long the program stood still, by the monotonic clock.
    pub pause: Duration,
}

/// The longest gap between ticks; `None` if there are not two of them.
pub fn longest_gap(ticks: &[Tick]) -> Option<Gap> {
    ticks
        .windows(2)
        .map(|pair| Gap {
            after: pair[0].number,
            pause: Duration::from_nanos(pair[1].at.saturating_sub(pair[0].at)),
        })
        .max_by_key(|gap| gap.pause)
}

/// How far the monotonic clock of a process is ahead of the machine's, in nanoseconds, by its `/proc/PID/timens_offsets`:
/// CRIU restores a process into a time namespace, where its clock goes on from the dump.
/// The line has seconds, which may be negative, and nanoseconds, which are not.
#[must_use]
pub fn monotonic_offset(text: &str) -> Option<i128> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("monotonic"))?;
    let mut fields = line
        .split_ascii_whitespace()
        .map(|field| field.parse::<i64>().ok());
    let (seconds, nanos) = (fields.next()??, fields.next()??);
    Some(i128::from(seconds) * 1_000_000_000 + i128::from(nanos))
}

/// A program that was started on one host and may run on another by now.
#[derive(Debug)]
pub struct Program {
    /// Its pid, which is the same on every host.
    pub pid: i32,
    /// Its log on the tmpfs that all hosts share, seen from the host that is never gone first.
    log: PathBuf,
}

impl Program {
    /// The smallest one: a counter.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn counter(host: &Host) -> Result<Self> {
        Self::start(host, "counter", &[])
    }

    /// Threads that share the work of keeping (and hashing) this much memory.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn memory(host: &Host, mib: u32, threads: u32) -> Result<Self> {
        Self::start(host, "memory", &[&mib.to_string(), &threads.to_string()])
    }

    /// Memory of which every `stride`-th page is written again and again ([`super::content::Written`]).
    ///
    /// # Errors
    /// If it does not come up.
    pub fn writer(host: &Host, mib: usize, stride: usize) -> Result<Self> {
        let arguments = [mib.to_string(), stride.to_string()];
        Self::start(host, "writer", &[&arguments[0], &arguments[1]])
    }

    /// A process tree with something of everything between its members.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn tree(host: &Host) -> Result<Self> {
        Self::start(host, "tree", &[])
    }

    /// A process of many small things: `mappings` of a page each, `threads`, or `tasks`.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn many(host: &Host, kind: &str, count: u32) -> Result<Self> {
        Self::start(host, "many", &[kind, &count.to_string()])
    }

    fn start(host: &Host, name: &str, arguments: &[&str]) -> Result<Self> {
        let log = format!("/mnt/{name}-{}.log", unique());
        let path = format!("/srv/{name}");
        let mut argv = vec![path.as_str(), &log];
        argv.extend_from_slice(arguments);
        let program = Self {
            pid: host.launch(&argv)?,
            log: host.path(&log),
        };
        wait_until(&format!("{name} being ready"), SOON, || {
            Ok(program
                .lines()?
                .iter()
                .any(|line| line.starts_with("ready")))
        })?;
        program.runs_on()?;
        Ok(program)
    }

    fn lines(&self) -> Result<Vec<String>> {
        // The program makes the file itself.
        let text = match std::fs::read_to_string(&self.log) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).context("reading a program's log"),
        };
        // The last line may be half written at this moment.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines: Vec<_> = whole.lines().map(str::to_owned).collect();
        if let Some(problem) = lines.iter().find(|line| line.starts_with("fatal")) {
            bail!("the program failed: {problem}");
        }
        Ok(lines)
    }

    /// All ticks so far.
    ///
    /// # Errors
    /// If they do not count 1, 2, 3, ...: state was lost, or two copies are running.
    pub fn ticks(&self) -> Result<Vec<Tick>> {
        let mut ticks = Vec::new();
        for line in self.lines()? {
            let mut words = line.split(' ');
            if words.next() == Some("tick") {
                let mut number =
                    || -> Result<u64> { Ok(words.next().context("a short tick")?.parse()?) };
                let tick = Tick {
                    number: number()?,
                    at: number()?,
                };
                ticks.push(tick);
                ensure!(
                    tick.number == ticks.len() as u64,
                    "tick {} was written as {}th",
                    tick.number,
                    ticks.len()
                );
            }
        }
        Ok(ticks)
    }

    /// Waits until the program has counted on, from exactly where it was.
    ///
    /// # Errors
    /// If it does not, or counts otherwise.
    pub fn runs_on(&self) -> Result<()> {
        let before = self.ticks()?.len() as u64;
        wait_until("the program counting on", SOON, || {
            Ok(self.ticks()?.len() as u64 >= before + SOME_TICKS)
        })
    }

    /// Asks the program, on the host where it runs, for a report on itself.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn report(&self, host: &Host) -> Result<String> {
        let reports = || -> Result<Vec<String>> {
            let mut lines = self.lines()?;
            lines.retain(|line| line.starts_with("report "));
            Ok(lines)
        };
        let before = reports()?.len();
        host.kill(self.pid, "USR1")?;
        wait_for("the program's report", SOON, || {
            Ok(reports()?.into_iter().nth(before))
        })
    }

    /// A field (`name=value`) of a new report.
    ///
    /// # Errors
    /// If the program does not answer, or without that field.
    pub fn ask(&self, host: &Host, field: &str) -> Result<String> {
        let report = self.report(host)?;
        report
            .split(' ')
            .find_map(|word| word.strip_prefix(field)?.strip_prefix('='))
            .map(str::to_owned)
            .with_context(|| format!("no {field} in {report:?}"))
    }

    /// How often each thread went round its loop.
    ///
    /// # Errors
    /// If the program does not answer.
    pub fn beats(&self, host: &Host) -> Result<Vec<u64>> {
        self.ask(host, "beats")?
            .split(',')
            .map(|beat| Ok(beat.parse()?))
            .collect()
    }

    /// Forgets what was logged after a dump, so that the same dump can be restored once more: the
    /// file has to be what it was, as on any storage that is not part of the images.
    ///
    /// # Errors
    /// If the log cannot be cut.
    pub fn rewind_to(&self, mark: u64) -> Result<()> {
        let file = OpenOptions::new().write(true).open(&self.log)?;
        Ok(file.set_len(mark)?)
    }

    /// The present size of the log, for [`Program::rewind_to`].
    ///
    /// # Errors
    /// If there is no log.
    pub fn mark(&self) -> Result<u64> {
        Ok(std::fs::metadata(&self.log)?.len())
    }

    /// Ends the program and waits until it is gone.
    ///
    /// # Errors
    /// If it does not end.
    pub fn kill(&self, host: &Host) -> Result<()> {
        host.kill(self.pid, "KILL")?;
        // Its pid is free, too, only when somebody has waited for it.
        wait_until("end of a program", SOON, || {
            Ok(host.process_state(self.pid)?.is_none())
        })
    }
}
