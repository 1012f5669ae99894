//! The action script as CRIU runs it: directly, without arguments, in the work dir, as a child of CRIU.
//!
//! Behind post-dump it matters how CRIU ends, so there a shell is the CRIU of the script: it has the process seized, kills
//! it and exits with 0, as CRIU does; with an error if the script said no.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{mpsc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::daemons::{status_kib, until, wait_child};

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
}

/// A process to be dumped: all that it does is to be there.
pub struct Task {
    child: Child,
    /// The CRIU that has been told that it may kill it.
    criu: Mutex<Option<Child>>,
}

/// Runs the script, says its exit status, and does what CRIU does then when it is told to.
const CRIU: &str = r#""$@" >/dev/null; code=$?; exec 2>/dev/null; echo $code; [ $code = 0 ] || exit 1
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
            .stdout(Stdio::null());
        Ok(Self::of(command.stderr(Stdio::null()).spawn()?))
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

    /// SIGKILL for the process alone.
    ///
    /// # Panics
    /// If it is not there.
    pub fn kill(&self) {
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let sent =
            rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::KILL);
        sent.expect("our own child");
    }

    /// CRIU ends well, and lets the process go on.
    ///
    /// # Panics
    /// If no CRIU was told.
    pub fn left_running(&self) {
        let criu = self
            .criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
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
        let criu = self
            .criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let mut criu = criu.expect("a CRIU that was told");
        drop(criu.stdin.take());
        assert!(!criu.wait().expect("our own child").success());
    }

    /// SIGKILL for the CRIU that was told.
    ///
    /// # Panics
    /// If no CRIU was told.
    pub fn criu_is_killed(&self) {
        let criu = self
            .criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let mut criu = criu.expect("a CRIU that was told");
        criu.kill().expect("our own child");
        criu.wait().expect("our own child");
    }

    /// The process ends as others do: nothing but a signal that it does not catch.
    ///
    /// # Panics
    /// If it does not end.
    pub fn ends(&mut self) {
        let pid = i32::try_from(self.pid())
            .ok()
            .and_then(rustix::process::Pid::from_raw);
        let sent =
            rustix::process::kill_process(pid.expect("a pid"), rustix::process::Signal::TERM);
        sent.expect("our own child");
        self.child.wait().expect("our own child");
    }
}

impl Drop for Task {
    /// Kills it, as CRIU does behind a dump.
    fn drop(&mut self) {
        let criu = self
            .criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
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
/// If it cannot be started or does not end within `limit` (it is killed then).
pub fn run(
    program: &Path,
    action: &str,
    images_dir: &Path,
    work_dir: &Path,
    limit: Duration,
) -> io::Result<ScriptResult> {
    let task = Task::start()?;
    run_of(&task, program, action, images_dir, work_dir, limit)
}

/// The same with a process whose life is the caller's matter.
///
/// # Errors
/// As [`run`].
pub fn run_of(
    task: &Task,
    program: &Path,
    action: &str,
    images_dir: &Path,
    work_dir: &Path,
    limit: Duration,
) -> io::Result<ScriptResult> {
    run_in(&[], task, program, action, images_dir, work_dir, limit)
}

/// The same with the program as the last argument of `wrapper`, a shell around the script.
///
/// # Errors
/// As [`run`].
pub fn run_in(
    wrapper: &[&str],
    task: &Task,
    program: &Path,
    action: &str,
    images_dir: &Path,
    work_dir: &Path,
    limit: Duration,
) -> io::Result<ScriptResult> {
    let begin = Instant::now();
    let dir = File::open(images_dir)?;
    let link = format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd());
    let mut command = match action {
        "post-dump" => {
            let mut shell = Command::new("sh");
            shell.args(["-c", CRIU, "criu"]).args(wrapper).arg(program);
            let pid = libc::pid_t::try_from(task.pid()).expect("a pid");
            let seize = move || {
                // SAFETY: no memory of this process is involved.
                match unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) } {
                    0 => Ok(()),
                    _ => Err(io::Error::last_os_error()),
                }
            };
            // SAFETY: a system call and its error number, which may be between fork and exec. What a process traces
            // it traces behind its exec.
            unsafe { shell.pre_exec(seize) };
            shell
        }
        _ => Command::new(program),
    };
    let mut child = command
        .env("CRTOOLS_SCRIPT_ACTION", action)
        .env("CRTOOLS_IMAGE_DIR", link)
        .env("CRTOOLS_INIT_PID", task.pid().to_string())
        .env_remove("IMAGE_PROXY_CONTROL")
        .current_dir(work_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut pipe = child.stderr.take().expect("stderr is piped");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        io::Read::read_to_end(&mut pipe, &mut text).map(|_| text)
    });
    let hangs = || {
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the {action} script hangs"),
        )
    };
    let code = match action {
        "post-dump" => match said(&mut child, limit)? {
            Some(code) => Some(code),
            None => {
                child.kill()?;
                child.wait()?;
                return Err(hangs());
            }
        },
        _ => match wait_child(&mut child, limit)? {
            Some(status) => status.code(),
            None => {
                child.kill()?;
                child.wait()?;
                return Err(hangs());
            }
        },
    };
    let took = begin.elapsed();
    match (action, code) {
        ("post-dump", Some(0)) => {
            *task.criu.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
        }
        ("post-dump", _) => drop(child.wait()?),
        _ => {}
    }
    let text = reader.join().expect("the reader does not panic")?;
    let stderr = String::from_utf8_lossy(&text).into_owned();
    Ok(ScriptResult { code, stderr, took })
}

/// The exit status of the script, as the shell says it. One that a signal has ended has 128 and the signal.
fn said(shell: &mut Child, limit: Duration) -> io::Result<Option<i32>> {
    let stdout = shell.stdout.take().expect("stdout is piped");
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(stdout).read_line(&mut line);
        let _ = tell.send(read.map(|_| line));
    });
    match told.recv_timeout(limit) {
        Ok(line) => Ok(line?.trim().parse().ok()),
        Err(_) => Ok(None),
    }
}
