//! A pair of fresh daemons on loopback, and what the kernel says of them.
//!
//! They die with the bench whatever ends it (parent death signal), and are stopped by their
//! pidfd, so nothing else can be hit.

use std::fs::{self, File};
use std::io::Read;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

use crate::fake::{new_pipe, Dialect};
use crate::hosts::{self, Host, Hosts};

const START: Duration = Duration::from_secs(10);
const STOP: Duration = Duration::from_secs(10);
/// A commit waits for data in flight, which here is at most a second's worth.
const SCRIPT: Duration = Duration::from_secs(60);
const RELEASE: Duration = Duration::from_secs(15);

/// A child with a handle that cannot mean another process.
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts `command`; it is killed when this thread ends, so call it on the main thread.
    pub fn spawn(name: &str, mut command: Command) -> Result<Self> {
        // SAFETY: between fork and exec only a system call is made: no allocation, no lock.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(
                    Signal::KILL,
                ))?)
            });
        }
        let child = command
            .stdin(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .with_context(|| format!("opening a pidfd of {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            pidfd,
        })
    }

    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        ensure!(
            readable(&self.pidfd, limit)?,
            "{} did not end within {limit:?}",
            self.name
        );
        Ok(self.child.wait()?)
    }

    pub fn signal(&self, signal: Signal) {
        // It may have ended meanwhile; whoever waits for it sees that.
        let _ = pidfd_send_signal(&self.pidfd, signal);
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// User and system time of all its threads, also of those that ended.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .with_context(|| format!("{} is gone", self.name))?;
        parse_cpu(&stat, rustix::param::clock_ticks_per_second()).context("/proc/PID/stat")
    }

    /// A `Vm...` line of its status, in bytes.
    pub fn vm(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .with_context(|| format!("{} is gone", self.name))?;
        parse_vm(&status, field).with_context(|| format!("{} has no {field}", self.name))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

fn parse_cpu(stat: &str, ticks_per_second: u64) -> Option<Duration> {
    // The name in parentheses may contain anything; utime and stime are fields 14 and 15.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let ticks = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(ticks * 1000 / ticks_per_second))
}

fn parse_vm(status: &str, field: &str) -> Option<u64> {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(
        value
            .trim()
            .strip_suffix(" kB")?
            .trim()
            .parse::<u64>()
            .ok()?
            * 1024,
    )
}

fn readable(fd: &OwnedFd, limit: Duration) -> Result<bool> {
    let limit = Timespec::try_from(limit)?;
    loop {
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)) {
            Err(rustix::io::Errno::INTR) => (),
            n => return Ok(n? > 0),
        }
    }
}

/// Where the binaries are.
pub struct Binaries {
    pub proxy: PathBuf,
    pub cache: PathBuf,
}

impl Binaries {
    /// Beside this program, as cargo builds them.
    pub fn find() -> Result<Self> {
        let me = std::env::current_exe().context("finding this program")?;
        let dir = me.parent().context("this program has no directory")?;
        let beside = |name: &str| {
            let path = dir.join(name);
            ensure!(
                path.is_file(),
                "{} is missing: run scripts/bench, which builds it",
                path.display()
            );
            Ok(path)
        };
        Ok(Self {
            proxy: beside("image-proxy")?,
            cache: beside("image-cache")?,
        })
    }
}

/// Where a pair runs, and how.
#[derive(Default)]
pub struct Place<'a> {
    /// Not on loopback.
    hosts: Option<&'a Hosts>,
    proxy_options: Vec<String>,
}

impl<'a> Place<'a> {
    pub fn with_connections(count: u16) -> Self {
        Self {
            hosts: None,
            proxy_options: vec!["--connections".to_owned(), count.to_string()],
        }
    }

    pub fn on(self, hosts: &'a Hosts) -> Self {
        Self {
            hosts: Some(hosts),
            ..self
        }
    }
}

/// image-proxy and image-cache, connected over loopback.
pub struct Pair {
    pub proxy: Process,
    pub cache: Process,
    /// images directory of the dumping side
    pub src: PathBuf,
    /// images directory of the restoring side
    pub dst: PathBuf,
    script: PathBuf,
    cache_rss_at_start: u64,
}

impl Pair {
    /// Starts both below `dir`, which is created, and waits until their sockets accept.
    pub fn start(binaries: &Binaries, dir: &Path, dialect: Dialect) -> Result<Self> {
        Self::start_at(binaries, dir, dialect, &Place::default())
    }

    /// The same, somewhere else than on loopback, or with other options.
    pub fn start_at(
        binaries: &Binaries,
        dir: &Path,
        dialect: Dialect,
        place: &Place<'_>,
    ) -> Result<Self> {
        let (src, dst) = (dir.join("s"), dir.join("d"));
        fs::create_dir_all(&src)?;
        fs::create_dir_all(&dst)?;
        let longest = src.join("image-proxy-control.sock");
        ensure!(
            longest.as_os_str().len() < 100,
            "{} is too long for a socket",
            longest.display()
        );

        // The port may be taken between here and there; then the daemon says so and we fail.
        let port = TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port()
            .to_string();
        let on = |host: Option<&Host>, program: &Path| match host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        let address = place.hosts.map_or(Ipv4Addr::LOCALHOST, |_| hosts::TARGET);
        let address = address.to_string();
        let mut cache = on(place.hosts.map(|h| &h.target), &binaries.cache);
        cache
            .args(["--address", &address, "--port", &port, "--images-dir"])
            .arg(&dst);
        match dialect {
            Dialect::Stream => (),
            Dialect::RemotePipe => _ = cache.args(["--remote-dialect", "pipe"]),
            Dialect::RemoteSocket => _ = cache.args(["--remote-dialect", "socket"]),
        }
        let cache = start_daemon("image-cache", cache, &dst, dir)?;
        let mut proxy = on(place.hosts.map(|h| &h.source), &binaries.proxy);
        proxy
            .args(["--address", &address, "--port", &port, "--images-dir"])
            .arg(&src)
            .args(&place.proxy_options);
        let proxy = start_daemon("image-proxy", proxy, &src, dir)?;
        let cache_rss_at_start = cache.vm("VmRSS")?;
        Ok(Self {
            proxy,
            cache,
            src,
            dst,
            script: binaries.proxy.clone(),
            cache_rss_at_start,
        })
    }

    /// Runs the action script as CRIU does, with this process as CRIU, and returns how long it
    /// took from the start of the process to its successful exit.
    pub fn script(&self, action: &str) -> Result<Duration> {
        let mut command = Command::new(&self.script);
        command
            .current_dir(&self.src)
            .env("CRTOOLS_SCRIPT_ACTION", action)
            .env("CRTOOLS_IMAGE_DIR", &self.src)
            .env_remove("IMAGE_PROXY_CONTROL");
        let start = Instant::now();
        let mut script = Process::spawn(&format!("the {action} script"), command)?;
        let status = script.wait(SCRIPT)?;
        ensure!(status.success(), "the {action} script says no: {status}");
        Ok(start.elapsed())
    }

    /// Waits until the cache has given back the memory of a released set of `bytes`.
    pub fn wait_released(&self, bytes: u64) -> Result<()> {
        let limit = self.cache_rss_at_start + bytes / 8 + (16 << 20);
        let deadline = Instant::now() + RELEASE;
        loop {
            let rss = self.cache.vm("VmRSS")?;
            if rss <= limit {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} MiB are still resident in image-cache {RELEASE:?} after the set was restored",
                rss >> 20
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops both. They must end cleanly, and no image may lie in their directories.
    pub fn stop(mut self) -> Result<()> {
        for (daemon, dir) in [(&mut self.proxy, &self.src), (&mut self.cache, &self.dst)] {
            daemon.signal(Signal::TERM);
            let status = daemon.wait(STOP)?;
            ensure!(
                status.success(),
                "{} ended with {status} after SIGTERM",
                daemon.name
            );
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                ensure!(
                    !kind.is_file(),
                    "{} lies on the disk",
                    entry.path().display()
                );
                ensure!(
                    !kind.is_socket(),
                    "{} was left behind",
                    entry.path().display()
                );
            }
        }
        Ok(())
    }
}

fn start_daemon(name: &str, mut command: Command, cwd: &Path, logs: &Path) -> Result<Process> {
    let (ready, status_fd) = new_pipe()?;
    let log = logs.join(format!("{name}.log"));
    let log_file = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let raw = status_fd.as_raw_fd();
    command
        .arg("--status-fd")
        .arg(raw.to_string())
        .current_dir(cwd);
    command.stdout(log_file.try_clone()?).stderr(log_file);
    // SAFETY: one system call on a descriptor that outlives the spawn below. The child alone
    // inherits it: it is close-on-exec here.
    unsafe {
        command.pre_exec(move || {
            let fd = BorrowedFd::borrow_raw(raw);
            Ok(rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?)
        });
    }
    let daemon = Process::spawn(name, command)?;
    drop(status_fd);
    ensure!(
        readable(&ready, START)?,
        "{name} was not ready within {START:?}"
    );
    let mut byte = [0xff];
    match File::from(ready).read(&mut byte)? {
        1 if byte == [0] => Ok(daemon),
        1 => bail!("{name} wrote {byte:?} to its status descriptor"),
        _ => bail!("{name} ended before it was ready: {}", tail(&log)),
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_understood() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 25 9 9 20 0 1 0 1 1 1";
        assert_eq!(parse_cpu(stat, 100), Some(Duration::from_millis(1750)));
        assert_eq!(parse_cpu("7 (a", 100), None);
        let status = "Name:\tx\nVmHWM:\t    1234 kB\nVmRSS:\t     12 kB\n";
        assert_eq!(parse_vm(status, "VmHWM"), Some(1234 * 1024));
        assert_eq!(parse_vm(status, "VmSwap"), None);
    }

    #[test]
    fn a_process_is_bounded_and_killed() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut process = Process::spawn("sleep", command).unwrap();
        assert!(process.wait(Duration::from_millis(20)).is_err());
        process.signal(Signal::TERM);
        assert!(!process.wait(Duration::from_secs(10)).unwrap().success());
    }

    #[test]
    fn a_daemon_that_dies_at_start_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such port >&2; exit 1", "sh"]);
        let error = start_daemon("sh", command, dir.path(), dir.path())
            .err()
            .unwrap();
        assert!(error.to_string().contains("no such port"), "{error}");
    }
}
