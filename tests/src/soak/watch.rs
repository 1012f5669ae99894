//! What a daemon holds: memory, descriptors, threads, sessions, files; and what it logged.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};
use serde::Serialize;
use serde_json::{json, Value};

use crate::daemons::Daemon;
use crate::process::Process;

/// Threads for blocking work end 10 s after their last (tokio); all else is quicker.
const AT_REST: Duration = Duration::from_secs(11);
const SETTLES: Duration = Duration::from_secs(20);
const SESSION_ENDS: Duration = Duration::from_secs(15);

/// At one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Gauge {
    pub rss: u64,
    pub fds: usize,
    pub threads: usize,
}

/// A daemon that is watched.
pub struct Watched<'a> {
    pub process: &'a Process,
    /// Where its sockets are.
    pub dir: &'a Path,
    control: PathBuf,
    log: PathBuf,
    /// What was in `dir` at the start.
    files: Vec<PathBuf>,
}

impl<'a> Watched<'a> {
    pub fn new(daemon: &'a Daemon, dir: &'a Path) -> Result<Self> {
        Ok(Self {
            process: daemon,
            dir,
            control: dir.join(format!("{}-control.sock", daemon.name())),
            log: daemon.log_file().to_owned(),
            files: entries(dir)?,
        })
    }

    fn count(&self, what: &str) -> Result<usize> {
        let dir = format!("/proc/{}/{what}", self.process.id());
        Ok(entries(Path::new(&dir))?.len())
    }

    pub fn gauge(&self) -> Result<Gauge> {
        Ok(Gauge {
            rss: self.process.vm("VmRSS")?,
            fds: self.count("fd")?,
            threads: self.count("task")?,
        })
    }

    /// The gauge once it has no more descriptors and threads than `before`, or the last one.
    pub fn back_to(&self, before: Gauge) -> Result<Gauge> {
        let deadline = Instant::now() + SETTLES;
        loop {
            let now = self.gauge()?;
            let back = now.fds <= before.fds && now.threads <= before.threads;
            if back || Instant::now() > deadline {
                return Ok(now);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What its descriptors are, for people.
    pub fn fds(&self) -> Result<BTreeMap<String, usize>> {
        let mut kinds = BTreeMap::new();
        for path in entries(Path::new(&format!("/proc/{}/fd", self.process.id())))? {
            let link = fs::read_link(path).unwrap_or_default();
            let link = link.to_string_lossy();
            let kind = match link.starts_with("anon") {
                true => &link,
                false => link.split('[').next().unwrap_or_default(),
            };
            *kinds.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(kinds)
    }

    /// Sends a request to its control socket; gives the answer that is not "accepted".
    pub fn ask(&self, request: &Value) -> Result<Value> {
        let ask = || -> Result<Value> {
            let mut socket = UnixStream::connect(&self.control)?;
            socket.set_read_timeout(Some(SETTLES))?;
            socket.write_all(format!("{request}\n").as_bytes())?;
            for line in BufReader::new(socket).lines() {
                let answer: Value = serde_json::from_str(&line?)?;
                if answer["answer"] != "accepted" {
                    return Ok(answer);
                }
            }
            anyhow::bail!("closed without an answer")
        };
        ask().with_context(|| format!("{}: {request}", self.process.name()))
    }

    /// The same for what must be done.
    pub fn order(&self, request: &Value) -> Result<()> {
        let answer = self.ask(request)?;
        ensure!(answer["answer"] == "done", "{request}: {answer}");
        Ok(())
    }

    /// Waits until it has no session.
    pub fn wait_empty(&self) -> Result<()> {
        self.wait_status(|status| {
            let sessions = status["sessions"].as_array();
            let used = status["memory"]["used_bytes"].as_u64();
            sessions.is_some_and(Vec::is_empty) && used.unwrap_or(0) == 0
        })
    }

    /// Waits until nothing comes for its only session any more, and then drops it.
    pub fn drop_session(&self, session: &str) -> Result<()> {
        // A restore that was begun before may have it.
        let states = ["to be restored", "being restored"];
        self.wait_status(|status| {
            let state = &status["sessions"][0]["state"];
            states.iter().any(|wanted| state == wanted)
        })?;
        self.order(&json!({"request": "drop", "session": session}))
    }

    fn wait_status(&self, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        let deadline = Instant::now() + SESSION_ENDS;
        loop {
            let answer = self.ask(&json!({"request": "status"}))?;
            if wanted(&answer["status"]) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} has after {SESSION_ENDS:?}: {answer}",
                self.process.name()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Files that have come to its directory and stayed.
    pub fn leftovers(&self) -> Result<Vec<PathBuf>> {
        let mut now = entries(self.dir)?;
        now.retain(|path| !self.files.contains(path));
        // The directory of all sessions stays as long as the daemon; what is of a session has gone.
        let sessions = self.dir.join("sessions");
        if now.contains(&sessions) {
            let mark = |path: &PathBuf| path.file_name().is_some_and(|name| name == ".image-cache");
            now.retain(|path| *path != sessions);
            now.extend(entries(&sessions)?.into_iter().filter(|path| !mark(path)));
        }
        Ok(now)
    }

    /// Its warnings and errors by the text of `expected` that they have, and those that have none.
    pub fn log(
        &self,
        expected: &[&'static str],
    ) -> Result<(BTreeMap<&'static str, u64>, Vec<String>)> {
        let text = fs::read(&self.log).with_context(|| format!("{}", self.log.display()))?;
        let text = String::from_utf8_lossy(&text);
        let mut known = BTreeMap::new();
        let mut unknown = Vec::new();
        let bad = |line: &&str| {
            line.contains("WARN") || line.contains("ERROR") || line.contains("panicked")
        };
        for line in text.lines().filter(bad) {
            match expected.iter().find(|text| line.contains(**text)) {
                Some(text) => *known.entry(*text).or_default() += 1,
                None => unknown.push(line.to_owned()),
            }
        }
        Ok((known, unknown))
    }
}

/// Waits until the descriptors and threads of all stay as they are.
pub fn at_rest(all: &[&Watched<'_>]) -> Result<()> {
    let counts = || -> Result<Vec<_>> {
        let gauges = all.iter().map(|watched| watched.gauge());
        gauges.map(|g| g.map(|g| (g.fds, g.threads))).collect()
    };
    let (mut before, mut since) = (counts()?, Instant::now());
    let deadline = Instant::now() + 2 * SETTLES;
    while since.elapsed() < AT_REST {
        ensure!(
            Instant::now() < deadline,
            "the daemons find no rest: {before:?}"
        );
        std::thread::sleep(Duration::from_millis(20));
        let now = counts()?;
        if now != before {
            (before, since) = (now, Instant::now());
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("{}", dir.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}
