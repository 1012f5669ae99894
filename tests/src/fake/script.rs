//! The action script as CRIU runs it: directly, without arguments, in the work dir, as a child of CRIU.
//!
//! Behind post-dump it matters how CRIU ends, so there a shell is the CRIU of the script: it has the process seized, kills
//! it and exits with 0, as CRIU does; with an error if the script said no.
//!
//! The bench takes the time that a script needs from here: it is that of the script alone, to its exit.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::process::{pidfd_open, Pid, PidfdFlags};

use super::wire::wait_for;
use crate::daemons::{status_kib, until};

/// What became of one run of the script.
#[derive(Debug)]
pub struct ScriptResult {
    pub code: Option<i32>,
    pub stderr: String,
    pub took: Duration,
}

impl ScriptResult {
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }

    /// How long it took, if it said yes.
    ///
    /// # Errors
    /// If it said no.
    pub fn succeeded(self, action: &str) -> anyhow::Result<Duration> {
        let Self { code, stderr, took } = &self;
        anyhow::ensure!(self.ok(), "the {action} script says no: {code:?} {stderr}");
        Ok(*took)
    }
}

/// A process to be dumped: all that it does is to be there.
pub struct Task {
    child: Child,
    /// The CRIU that has been told that it may kill it.
    criu: Mutex<Option<Child>>,
}

/// When it is told to, it runs the script, says its exit status, and does then what it is told next.
const CRIU: &str = r#"read go; "$@" >/dev/null; code=$?; exec 2>/dev/null; echo $code; [ $code = 0 ] || exit 1
read order || exit 1
[ "$order" != kill ] || kill -9 "$CRTOOLS_INIT_PID""#;

impl Task {
    /// # Errors
    /// If it cannot be started.
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new("sleep");
        command
            .arg("600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // SAFETY: a system call alone, which may be between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // The CRIU of the script is no ancestor of it, and Yama asks for one where a user is not root. A kernel
                // without Yama does not know the call, and does not ask.
                let _ = rustix::process::set_ptracer(rustix::process::PTracer::Any);
                Ok(())
            });
        }
        Ok(Self::of(command.spawn()?))
    }

    /// The same with so much memory of its own.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with_memory(mib: u64) -> io::Result<Self> {
        // It fills its buffer, and waits until somebody reads what it writes: nobody does.
        let mut command = Command::new("dd");
        command
            .args(["if=/dev/zero", &format!("bs={mib}M")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let task = Self::of(command.spawn()?);
        until("it has its memory", || {
            status_kib(task.pid(), "RssAnon") >= mib << 10
        });
        Ok(task)
    }

    /// A process and a child of it.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn with_child() -> io::Result<Self> {
        let mut command = Command::new("sh");
        // The child ends with this test at the latest: with the other end of its input.
        command
            .args(["-c", "exec 3<&0; { echo; exec cat <&3; } & wait"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let mut child = command.spawn()?;
        let said = child.stdout.as_mut().expect("stdout is piped");
        io::Read::read_exact(said, &mut [0])?;
        Ok(Self::of(child))
    }

    fn of(child: Child) -> Self {
        let criu = Mutex::default();
        Self { child, criu }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn told(&self) -> MutexGuard<'_, Option<Child>> {
        self.criu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let sent = rustix::process::kill_process(Pid::from_child(&self.child), signal);
        sent.expect("our own child");
    }

    /// SIGKILL for the process alone.
    ///
    /// # Panics
    /// If it is not there.
    pub fn kill(&self) {
        self.signal(rustix::process::Signal::KILL);
    }

    /// CRIU ends well, and lets the process go on.
    ///
    /// # Panics
    /// If no CRIU was told.
    pub fn left_running(&self) {
        let criu = self.told().take();
        let mut criu = criu.expect("a CRIU that was told");
        let orders = criu.stdin.as_mut().expect("stdin is piped");
        orders.write_all(b"leave\n").expect("it listens");
        assert!(criu.wait().expect("our own child").success());
    }

    /// CRIU ends with an error behind its script, and lets the process go on: another script has failed.
    ///
    /// # Panics
    /// If no CRIU was told.
    pub fn dump_fails(&self) {
        let criu = self.told().take();
        let mut criu = criu.expect("a CRIU that was told");
        drop(criu.stdin.take());
        assert!(!criu.wait().expect("our own child").success());
    }

    /// SIGKILL for the CRIU that was told.
    ///
    /// # Panics
    /// If no CRIU was told.
    pub fn criu_is_killed(&self) {
        let criu = self.told().take();
        let mut criu = criu.expect("a CRIU that was told");
        criu.kill().expect("our own child");
        criu.wait().expect("our own child");
    }

    /// The process ends as others do: nothing but a signal that it does not catch.
    ///
    /// # Panics
    /// If it does not end.
    pub fn ends(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        self.child.wait().expect("our own child");
    }
}

impl Drop for Task {
    /// Kills it, as CRIU does behind a dump.
    fn drop(&mut self) {
        let criu = self.told().take();
        if let Some(mut criu) = criu {
            let _ = criu
                .stdin
                .take()
                .map(|mut orders| orders.write_all(b"kill\n"));
            let _ = criu.wait();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `program` for `action`, with a process that CRIU kills afterwards.
///
/// # Errors
/// As [`Script::run`].
pub fn run(
    program: &Path,
    action: &str,
    images_dir: &Path,
    work_dir: &Path,
    limit: Duration,
) -> io::Result<ScriptResult> {
    run_of(
        &Task::start()?,
        program,
        action,
        images_dir,
        work_dir,
        limit,
    )
}

/// The same with a process whose life is the caller's matter.
///
/// # Errors
/// As [`Script::run`].
pub fn run_of(
    task: &Task,
    program: &Path,
    action: &str,
    images_dir: &Path,
    work_dir: &Path,
    limit: Duration,
) -> io::Result<ScriptResult> {
    let script = Script::new(program, action, images_dir, limit);
    Script { work_dir, ..script }.run_of(task)
}

/// One run of the script.
#[derive(Clone, Copy)]
pub struct Script<'a> {
    pub program: &'a Path,
    pub action: &'a str,
    pub images_dir: &'a Path,
    pub work_dir: &'a Path,
    /// Of the daemon, in the environment.
    pub control: Option<&'a Path>,
    /// A shell around the script, whose last argument it is.
    pub wrapper: &'a [&'a str],
    pub limit: Duration,
}

impl<'a> Script<'a> {
    /// Of image-proxy or image-cache, in CRIU's images directory.
    pub fn new(program: &'a Path, action: &'a str, images_dir: &'a Path, limit: Duration) -> Self {
        Script {
            program,
            action,
            images_dir,
            work_dir: images_dir,
            control: None,
            wrapper: &[],
            limit,
        }
    }

    /// Runs it with a process that CRIU kills afterwards.
    ///
    /// # Errors
    /// If it cannot be started or does not end within its limit (it is killed then).
    pub fn run(&self) -> io::Result<ScriptResult> {
        self.run_of(&Task::start()?)
    }

    /// The same with a process whose life is the caller's matter.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_of(&self, task: &Task) -> io::Result<ScriptResult> {
        self.run_with(Some(task.pid()), Some(task))
    }

    /// The same with the pid of a process that CRIU neither seizes nor kills, or without one: for all but post-dump.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_beside(&self, pid: Option<u32>) -> io::Result<ScriptResult> {
        self.run_with(pid, None)
    }

    fn run_with(&self, pid: Option<u32>, task: Option<&Task>) -> io::Result<ScriptResult> {
        let dir = File::open(self.images_dir)?;
        let link = format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd());
        // What the script says fits into memory, so no reader is needed meanwhile.
        let stderr = rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC)?;
        let mut stderr = File::from(stderr);
        let mut command = match task.filter(|_| self.action == "post-dump") {
            Some(task) => self.criu(task),
            None => Command::new(self.program),
        };
        command
            .env("CRTOOLS_SCRIPT_ACTION", self.action)
            .env("CRTOOLS_IMAGE_DIR", link)
            .env_remove("IMAGE_PROXY_CONTROL")
            .current_dir(self.work_dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr.try_clone()?);
        if let Some(pid) = pid {
            command.env("CRTOOLS_INIT_PID", pid.to_string());
        }
        if let Some(control) = self.control {
            command.env("IMAGE_PROXY_CONTROL", control);
            command.env("IMAGE_CACHE_CONTROL", control);
        }
        let begin = Instant::now();
        let mut child = command.spawn()?;
        let (code, took) = match task.filter(|_| self.action == "post-dump") {
            Some(task) => {
                let (code, took) = self.told_to_go(&mut child)?;
                match code {
                    Some(0) => *task.told() = Some(child),
                    _ => drop(child.wait()?),
                }
                (code, took)
            }
            None => {
                let end = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
                if !wait_for(end.as_fd(), PollFlags::IN, self.limit)? {
                    return Err(self.hangs(&mut child));
                }
                (child.wait()?.code(), begin.elapsed())
            }
        };
        let mut text = Vec::new();
        stderr.rewind()?;
        stderr.read_to_end(&mut text)?;
        let stderr = String::from_utf8_lossy(&text).into_owned();
        Ok(ScriptResult { code, stderr, took })
    }

    /// The shell that is CRIU at post-dump.
    fn criu(&self, task: &Task) -> Command {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", CRIU, "criu"])
            .args(self.wrapper)
            .arg(self.program);
        let pid = libc::pid_t::try_from(task.pid()).expect("a pid");
        let seize = move || {
            // SAFETY: no memory of this process is involved.
            match unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        };
        // SAFETY: a system call and its error number, which may be between fork and exec. What a process traces it
        // traces behind its exec.
        unsafe { shell.pre_exec(seize) };
        shell
    }

    /// Tells the shell to run the script; gives the script's exit status as the shell says it, and the time until then.
    /// A script that a signal has ended has 128 and the signal.
    fn told_to_go(&self, shell: &mut Child) -> io::Result<(Option<i32>, Duration)> {
        let mut orders = shell.stdin.as_ref().expect("stdin is piped");
        let mut stdout = shell.stdout.take().expect("stdout is piped");
        let begin = Instant::now();
        orders.write_all(b"go\n")?;
        let left = || self.limit.saturating_sub(begin.elapsed());
        let mut line = Vec::new();
        while !line.ends_with(b"\n") {
            if !wait_for(stdout.as_fd(), PollFlags::IN, left())? {
                return Err(self.hangs(shell));
            }
            let mut part = [0; 16];
            match stdout.read(&mut part)? {
                0 => break,
                count => line.extend(&part[..count]),
            }
        }
        let took = begin.elapsed();
        let said = String::from_utf8_lossy(&line);
        Ok((said.trim().parse().ok(), took))
    }

    /// Kills it.
    fn hangs(&self, child: &mut Child) -> io::Error {
        // It is our own; what it did not do within its limit is the error.
        let _ = child.kill();
        let _ = child.wait();
        let text = format!("the {} script hangs", self.action);
        io::Error::new(io::ErrorKind::TimedOut, text)
    }
}
