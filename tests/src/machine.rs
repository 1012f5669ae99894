//! The machine and the source that numbers are from, for a report and its JSON, and where a run has its files.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{ensure, Context, Result};
use serde::Serialize;

use crate::process::parse_vm;

#[derive(Serialize)]
pub struct Machine {
    pub cpu_model: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    /// setting of transparent huge pages, which decides what a vmsplice moves
    pub transparent_hugepage: String,
    /// load of the last minute before the run: numbers of a busy machine are only indicative
    pub load_before: f64,
}

#[derive(Serialize)]
pub struct Source {
    pub commit: Option<String>,
    /// true if the work tree differs from the commit
    pub dirty: bool,
    pub date: String,
}

impl Machine {
    pub fn look() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let thp = read("/sys/kernel/mm/transparent_hugepage/enabled");
        let chosen = thp
            .split_once('[')
            .and_then(|(_, rest)| rest.split_once(']'));
        Self {
            cpu_model: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: meminfo("MemTotal"),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            transparent_hugepage: chosen.map_or("unknown", |(name, _)| name).to_owned(),
            load_before: read("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap_or(0.0),
        }
    }
}

impl Source {
    /// `tree` is any directory of the work tree.
    pub fn look(tree: &Path) -> Self {
        let git = |args: &[&str]| output(Command::new("git").arg("-C").arg(tree).args(args));
        Self {
            commit: git(&["rev-parse", "--verify", "-q", "HEAD"]),
            dirty: git(&["status", "--porcelain"]).is_some_and(|text| !text.is_empty()),
            date: output(Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%SZ"]))
                .unwrap_or_default(),
        }
    }
}

/// A line of /proc/meminfo in bytes, 0 if it is not there.
pub fn meminfo(field: &str) -> u64 {
    parse_vm(&read("/proc/meminfo"), field).unwrap_or(0)
}

/// So many bytes of memory, or an error that says how many there are.
pub fn need_memory(needed: u64) -> Result<()> {
    let available = meminfo("MemAvailable");
    ensure!(
        available >= needed,
        "needs {} MiB of memory, {} are available",
        needed >> 20,
        available >> 20
    );
    Ok(())
}

/// A short path (sockets lie below it) that is no tmpfs: image bytes that a daemon wrote to its
/// directory would cost disk there as they would for a user.
pub fn temp_dir() -> Result<tempfile::TempDir> {
    const TMPFS: rustix::fs::FsWord = 0x0102_1994;
    let is_tmpfs = |dir: &Path| rustix::fs::statfs(dir).is_ok_and(|fs| fs.f_type == TMPFS);
    let candidates = [std::env::temp_dir(), "/tmp".into(), "/var/tmp".into()];
    let good = candidates
        .iter()
        .find(|dir| dir.is_dir() && dir.as_os_str().len() < 40 && !is_tmpfs(dir));
    let dir =
        good.context("no directory for temporary files: /tmp and /var/tmp are tmpfs; set TMPDIR")?;
    tempfile::Builder::new()
        .prefix("ibench")
        .tempdir_in(dir)
        .with_context(|| format!("in {}", dir.display()))
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.stderr(std::process::Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
