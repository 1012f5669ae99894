//! Children: started, bounded, and what the kernel says of them.
//!
//! They die with the bench whatever ends it (parent death signal), and are stopped by their
//! pidfd, so nothing else can be hit.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{bail, ensure, Context, Result};
use rustix::event::PollFlags;
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

use crate::fake::wire::{pipe, wait_for};

const START: Duration = Duration::from_secs(30);

/// A child with a handle that cannot mean another process.
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts `command`; it is killed when this thread ends, so call it on the main thread.
    pub fn spawn(name: &str, command: Command) -> Result<Self> {
        Self::spawn_with(name, command, Stdio::null())
    }

    /// The same with something to read.
    pub fn spawn_with(name: &str, mut command: Command, stdin: Stdio) -> Result<Self> {
        // SAFETY: between fork and exec only a system call is made: no allocation, no lock.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(
                    Signal::KILL,
                ))?)
            });
        }
        let child = command
            .stdin(stdin)
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

    /// Waits for its end.
    ///
    /// # Errors
    /// If it does not end within the limit.
    pub fn wait_within(&mut self, limit: Duration) -> Result<ExitStatus> {
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

    /// User and system time of all its threads, also of those that ended.
    pub fn cpu(&self) -> Result<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()))
            .with_context(|| format!("{} is gone", self.name))?;
        parse_cpu(&stat, rustix::param::clock_ticks_per_second()).context("/proc/PID/stat")
    }

    /// The same much finer, for work of a few milliseconds. Without the threads that have ended,
    /// and only exact while the process sleeps.
    pub fn fine_cpu(&self) -> Result<Duration> {
        run_time(self.child.id()).map_or_else(|| self.cpu(), Ok)
    }

    /// All of it to the nanosecond, also of threads that ended and while it runs: the clock that
    /// the kernel keeps for the process.
    pub fn clock(&self) -> Result<Duration> {
        let pid = libc::pid_t::try_from(self.child.id())?;
        let mut clock = 0;
        // SAFETY: the call writes to `clock` alone, which is valid for it.
        let error = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
        ensure!(error == 0, "{} has no CPU clock: errno {error}", self.name);
        let mut now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the call writes to `now` alone, which is valid for it.
        let result = unsafe { libc::clock_gettime(clock, &mut now) };
        ensure!(result == 0, "{} is gone", self.name);
        Ok(Duration::new(
            now.tv_sec.try_into()?,
            now.tv_nsec.try_into()?,
        ))
    }

    /// Waits for its end, and gives all of its CPU time, of one thread, as [`Self::fine_cpu`].
    pub fn wait_with_cpu(&mut self, limit: Duration) -> Result<(ExitStatus, Duration)> {
        ensure!(
            readable(&self.pidfd, limit)?,
            "{} did not end within {limit:?}",
            self.name
        );
        let cpu = self.fine_cpu()?;
        Ok((self.wait_within(limit)?, cpu))
    }

    /// Our ends of its standard input and output, where these are pipes.
    pub fn take_pipes(&mut self) -> (Option<ChildStdin>, Option<ChildStdout>) {
        (self.child.stdin.take(), self.child.stdout.take())
    }

    pub fn running(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_none()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// A `Vm...` line of its status, in bytes.
    pub fn vm(&self, field: &str) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .with_context(|| format!("{} is gone", self.name))?;
        parse_vm(&status, field).with_context(|| format!("{} has no {field}", self.name))
    }
}

/// Of all threads that live; to the nanosecond, as far as they sleep. A process that has ended and was
/// not waited for still has its first thread.
fn run_time(pid: u32) -> Option<Duration> {
    let mut sum = Duration::ZERO;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        let text = fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        sum += Duration::from_nanos(text.split(' ').next()?.parse().ok()?);
    }
    Some(sum)
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

/// The value of a line `Name: 123 kB` of a file in /proc, in bytes.
pub fn parse_vm(text: &str, field: &str) -> Option<u64> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

fn readable(fd: &OwnedFd, limit: Duration) -> Result<bool> {
    Ok(wait_for(fd.as_fd(), PollFlags::IN, limit)?)
}

/// Starts a program that tells by `--status-fd` when it is ready, and waits for that. Its output goes to `log`. If it
/// is not ready, the second value says why.
///
/// # Errors
/// If it cannot be started.
pub fn launch(
    name: &str,
    mut command: Command,
    cwd: &Path,
    log: &Path,
) -> Result<(Process, Result<()>)> {
    let (ready, status_fd) = pipe()?;
    let log_file = File::create(log).with_context(|| format!("creating {}", log.display()))?;
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
    let process = Process::spawn(name, command)?;
    drop(status_fd);
    let ready = wait_until_ready(name, ready);
    Ok((process, ready))
}

/// Waits for the one zero byte of a daemon that is ready.
///
/// # Errors
/// If it does not come.
pub fn wait_until_ready(name: &str, ready: OwnedFd) -> Result<()> {
    let limit = START;
    ensure!(
        readable(&ready, limit)?,
        "{name} was not ready within {limit:?}"
    );
    let mut byte = [0xff];
    match File::from(ready).read(&mut byte)? {
        1 if byte == [0] => Ok(()),
        1 => bail!("{name} wrote {byte:?} to its status descriptor"),
        _ => bail!("{name} ended before it was ready"),
    }
}

/// The same for one that must be ready.
///
/// # Errors
/// If it is not; the message has the end of its log.
pub fn start_daemon(name: &str, command: Command, cwd: &Path, log: &Path) -> Result<Process> {
    let (process, ready) = launch(name, command, cwd, log)?;
    ready.with_context(|| tail(log))?;
    Ok(process)
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
    fn the_clock_of_a_process_counts_what_it_works() {
        let mut command = Command::new("sh");
        command.args(["-c", "while :; do :; done"]);
        let busy = Process::spawn("sh", command).unwrap();
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while busy.clock().unwrap() < Duration::from_millis(20) {
            assert!(std::time::Instant::now() < deadline, "it does not count");
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut command = Command::new("sleep");
        command.arg("60");
        let idle = Process::spawn("sleep", command).unwrap();
        assert!(idle.clock().unwrap() < busy.clock().unwrap());
    }

    #[test]
    fn a_process_is_bounded_and_killed() {
        let mut command = Command::new("sleep");
        command.arg("60");
        let mut process = Process::spawn("sleep", command).unwrap();
        assert!(process.wait_within(Duration::from_millis(20)).is_err());
        process.signal(Signal::TERM);
        assert!(!process
            .wait_within(Duration::from_secs(10))
            .unwrap()
            .success());
    }

    #[test]
    fn a_daemon_that_dies_at_start_is_reported_with_its_words() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo no such port >&2; exit 1", "sh"]);
        let error = start_daemon("sh", command, dir.path(), &dir.path().join("sh.log"))
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("no such port"), "{error:#}");
    }
}
