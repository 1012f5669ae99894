//! Hosts made of namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use rustix::process::Pid;

use super::job::{Job, Output};
use super::{wait_for, SOON};
use crate::bins;

/// Pids that one host uses up before it reaches the next host's.
const PIDS_PER_HOST: usize = 5_000;

/// `-W` names a directory of its own per CRIU run, and log files are numbered.
static NEXT_NUMBER: AtomicU32 = AtomicU32::new(1);

/// A number that was not handed out before.
pub fn unique() -> u32 {
    NEXT_NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// What was prepared once for all labs of this run.
struct Prepared {
    root: PathBuf,
    programs: PathBuf,
    daemons: PathBuf,
}

static PREPARED: OnceLock<std::result::Result<Prepared, String>> = OnceLock::new();

/// Takes what there is, where nothing can be made: in a virtual machine. To be called before the first lab.
pub fn use_prepared(root: PathBuf, programs: PathBuf, daemons: PathBuf) {
    // A second call comes too late to matter.
    let _ = PREPARED.set(Ok(Prepared {
        root,
        programs,
        daemons,
    }));
}

fn prepare() -> Result<Prepared> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "real CRIU needs root (and CAP_SYS_ADMIN for namespaces)"
    );
    let daemon = bins::bin("image-proxy");
    let daemons = daemon.parent().context("a binary lies in a directory")?;
    // CRIU_SUITE=sid: with the CRIU of that Debian release.
    let suite = std::env::var("CRIU_SUITE").ok();
    // Beside `debug` and `release`: the root is large and does not depend on the profile.
    let target = daemons
        .parent()
        .context("a profile has a target directory")?;
    Ok(Prepared {
        root: script("criu-root", target, suite.as_deref())?,
        programs: script("programs", target, None)?,
        daemons: daemons.to_path_buf(),
    })
}

/// Runs a script of `scripts/lib`, which prints the path of what it made.
fn script(name: &str, target: &Path, more: Option<&str>) -> Result<PathBuf> {
    let output = Command::new(bins::workspace().join("scripts/lib").join(name))
        .arg(target)
        .args(more)
        .stdin(Stdio::null())
        // Progress is worth seeing: on a fresh machine this takes a minute or two.
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting scripts/lib/{name}"))?;
    ensure!(output.status.success(), "scripts/lib/{name} failed");
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim_end()))
}

/// A process that holds namespaces, for as long as it has input.
#[derive(Debug)]
struct Holder {
    child: Child,
    input: Option<ChildStdin>,
}

impl Holder {
    /// Starts the command and waits until it says `ready`.
    fn start(mut command: Command, what: &str) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("starting {what}"))?;
        let input = child.stdin.take();
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let holder = Self { child, input };
        let mut said = String::new();
        read_line(stdout, &mut said)?;
        ensure!(
            said == "ready\n",
            "{what} did not come up (does this machine allow namespaces and mounts?)"
        );
        Ok(holder)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

/// Reads one line; the writer either writes it or ends.
fn read_line(stdout: std::process::ChildStdout, line: &mut String) -> Result<()> {
    use std::io::BufRead;
    std::io::BufReader::new(stdout).read_line(line)?;
    Ok(())
}

impl Drop for Holder {
    fn drop(&mut self) {
        drop(self.input.take());
        let ended = wait_for("end of a host", SOON, || Ok(self.child.try_wait()?));
        if ended.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Hosts that share a tmpfs.
pub struct Lab {
    prepared: &'static Prepared,
    /// Holds the mount namespace that the hosts' are copies of, and in it the shared tmpfs.
    anchor: Holder,
    /// All hosts live as long as the lab, so that their logs can be printed when a test has failed.
    hosts: Mutex<Vec<Arc<Host>>>,
}

impl Lab {
    /// A lab without hosts.
    ///
    /// # Errors
    /// If this machine cannot have one; not being root is one reason.
    pub fn new() -> Result<Self> {
        let prepared = PREPARED
            .get_or_init(|| prepare().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow::anyhow!("{error}"))?;
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c"])
            .arg("mount -t tmpfs -o mode=755 shared \"$0/mnt\" && echo ready && exec cat")
            .arg(&prepared.root);
        Ok(Self {
            prepared,
            anchor: Holder::start(command, "the lab")?,
            hosts: Mutex::new(Vec::new()),
        })
    }

    /// A new host, without a link to others.
    ///
    /// # Errors
    /// If its namespaces or mounts cannot be made.
    pub fn host(&self, name: &str) -> Result<Arc<Host>> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let first_pid = (hosts.len() + 1) * PIDS_PER_HOST;
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.anchor.pid().to_string(), "--mount"])
            .args(["unshare", "--pid", "--net", "--ipc", "--uts", "--mount"])
            .args(["--propagation", "private", "--fork", "--", "sh", "-c"])
            .args([include_str!("setup.sh"), "setup"])
            .arg(&self.prepared.root)
            .arg(&self.prepared.daemons)
            .arg(&self.prepared.programs)
            .args([name, &first_pid.to_string()]);
        let holder = Holder::start(command, name)?;
        let host = Arc::new(Host {
            name: name.to_owned(),
            init: only_child(holder.pid())?,
            _holder: holder,
        });
        hosts.push(Arc::clone(&host));
        Ok(host)
    }

    /// Prints the tail of every log of every host to standard error.
    pub fn print_logs(&self) {
        let hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        for host in hosts.iter() {
            for directory in ["/run/log", "/run/criu"] {
                print_logs_below(&host.name, &host.path(directory));
            }
        }
        if let Some(host) = hosts.first() {
            print_logs_below("shared", &host.path("/mnt"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
    }
}

fn print_logs_below(host: &str, directory: &Path) {
    const LINES: usize = 40;
    let Ok(entries) = fs::read_dir(directory) else {
        return; // the host is gone
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        if path.is_dir() {
            print_logs_below(host, &path);
        } else if path.extension().is_some_and(|extension| extension == "log") {
            let text = fs::read(&path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<_> = text.lines().collect();
            let skipped = lines.len().saturating_sub(LINES);
            eprintln!(
                "--- {host}: {} ({skipped} lines before) ---",
                path.display()
            );
            for line in &lines[skipped..] {
                eprintln!("{line}");
            }
        }
    }
}

/// The machine-wide pid of the one child of a process that has just been made to have one.
pub(super) fn only_child(parent: u32) -> Result<u32> {
    wait_for("a child process", SOON, || {
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        Ok(children
            .split_ascii_whitespace()
            .next()
            .map(str::parse)
            .transpose()?)
    })
}

/// The machine-wide pid of a child of this process, if it has one.
pub(super) fn child_now(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

/// One host: a set of namespaces with a root of its own.
#[derive(Debug)]
pub struct Host {
    /// `source`, `target` or so.
    pub name: String,
    init: u32,
    _holder: Holder,
}

impl Host {
    /// The machine-wide pid of the host's process 1.
    pub fn init(&self) -> u32 {
        self.init
    }

    /// A path inside the host, as the test process can reach it.
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.init))
    }

    /// The content of a file inside the host.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, inside: &str) -> Result<String> {
        let bytes = fs::read(self.path(inside))
            .with_context(|| format!("reading {inside} on {}", self.name))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A command inside the host, as child of the test process and without time limit.
    pub fn command(&self, argv: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string()])
            .args([
                "--mount", "--pid", "--net", "--ipc", "--uts", "--root", "--wd", "--",
            ])
            .args(argv)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C");
        command
    }

    /// Starts a command with a time limit inside the host.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&self, argv: &[&str], limit: Duration) -> Result<Job> {
        // `timeout` ends the command itself; killing nsenter would only end nsenter.
        let seconds = limit.as_secs().to_string();
        let mut with_limit = vec!["timeout", "--signal=KILL", &seconds];
        with_limit.extend_from_slice(argv);
        Job::spawn(self.command(&with_limit), limit + SOON)
    }

    /// Runs a command inside the host to its end.
    ///
    /// # Errors
    /// If it cannot be started or does not end; a failing command is no error here.
    pub fn run(&self, argv: &[&str], limit: Duration) -> Result<Output> {
        self.spawn(argv, limit)?.wait()
    }

    /// Runs a short command inside the host that has to succeed.
    ///
    /// # Errors
    /// If it fails.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-euc", script], SOON)?.ok()
    }

    /// Starts a program the way CRIU can dump it, as orphan without terminal; its pid in the host.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn launch(&self, argv: &[&str]) -> Result<i32> {
        let mut launch = vec!["/srv/launch"];
        launch.extend_from_slice(argv);
        let pid = self.run(&launch, SOON)?.ok()?;
        pid.trim()
            .parse()
            .with_context(|| format!("launch printed {pid:?}"))
    }

    /// Whether a pid of this host is a process that has not exited.
    ///
    /// # Errors
    /// If the host itself is gone.
    pub fn is_alive(&self, pid: i32) -> Result<bool> {
        Ok(self
            .process_state(pid)?
            .is_some_and(|state| !matches!(state, 'Z' | 'X')))
    }

    /// The state letter of a process of this host (`R`, `S`, `T`, ...), if it exists.
    ///
    /// # Errors
    /// If the host itself is gone.
    pub fn process_state(&self, pid: i32) -> Result<Option<char>> {
        ensure!(self.path("/proc/1/stat").exists(), "{} is gone", self.name);
        let Ok(stat) = fs::read_to_string(self.path(&format!("/proc/{pid}/stat"))) else {
            return Ok(None);
        };
        // pid (name) S ...; the name may hold anything.
        Ok(stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next()))
    }

    /// Sends a signal to a process of this host.
    ///
    /// # Errors
    /// If there is no such process.
    pub fn kill(&self, pid: i32, signal: &str) -> Result<()> {
        self.sh(&format!("kill -{signal} {pid}")).map(drop)
    }

    /// Whether anybody is connected to a listening unix socket of this host, bound by this path.
    ///
    /// # Errors
    /// If the host is gone.
    pub fn is_connected(&self, socket: &str) -> Result<bool> {
        const CONNECTED: &str = "03";
        let table = fs::read_to_string(format!("/proc/{}/net/unix", self.init))?;
        // Num RefCount Protocol Flags Type St Inode Path; the accepted end carries the path.
        Ok(table.lines().any(|line| {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            fields.get(5) == Some(&CONNECTED) && fields.get(7) == Some(&socket)
        }))
    }

    /// Bytes that the host has received over its link.
    ///
    /// # Errors
    /// If it has no link.
    pub fn received_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/net/dev", self.init);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        for line in text.lines() {
            if let Some(counters) = line.trim_start().strip_prefix("eth0:") {
                let first = counters.split_ascii_whitespace().next();
                return Ok(first.context("no counters of eth0")?.parse()?);
            }
        }
        bail!("{} has no eth0", self.name)
    }

    /// Image files in any place of the host where one could be written. The answer should be
    /// empty: images are to pass through sockets only.
    ///
    /// # Errors
    /// If the places cannot be searched.
    pub fn image_files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for place in ["/run", "/tmp", "/mnt", "/dev/shm"] {
            collect_image_files(&self.path(place), &mut found)
                .with_context(|| format!("searching {place} on {}", self.name))?;
        }
        Ok(found)
    }
}

fn collect_image_files(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect_image_files(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "img") {
            found.push(path);
        }
    }
    Ok(())
}

/// A raw pid as rustix wants it.
pub(super) fn to_pid(pid: u32) -> Result<Pid> {
    i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("{pid} is no pid"))
}
