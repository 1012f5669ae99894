//! The action script as CRIU runs it: directly, without arguments, in the work dir, as a child of CRIU.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
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
pub struct Task(Child);

impl Task {
    /// # Errors
    /// If it cannot be started.
    pub fn start() -> io::Result<Self> {
        let mut command = Command::new("sleep");
        command
            .arg("600")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Ok(Self(command.stderr(Stdio::null()).spawn()?))
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
        let task = Self(command.spawn()?);
        until("it has its memory", || {
            status_kib(task.pid(), "RssAnon") >= mib << 10
        });
        Ok(task)
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Task {
    /// Kills it, as CRIU does behind a dump.
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
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
    let begin = Instant::now();
    let dir = File::open(images_dir)?;
    let link = format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd());
    let mut child = Command::new(program)
        .env("CRTOOLS_SCRIPT_ACTION", action)
        .env("CRTOOLS_IMAGE_DIR", link)
        .env("CRTOOLS_INIT_PID", task.pid().to_string())
        .env_remove("IMAGE_PROXY_CONTROL")
        .current_dir(work_dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut pipe = child.stderr.take().expect("stderr is piped");
    let reader = std::thread::spawn(move || {
        let mut text = Vec::new();
        io::Read::read_to_end(&mut pipe, &mut text).map(|_| text)
    });
    let Some(status) = wait_child(&mut child, limit)? else {
        child.kill()?;
        child.wait()?;
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("the {action} script hangs"),
        ));
    };
    let text = reader.join().expect("the reader does not panic")?;
    let stderr = String::from_utf8_lossy(&text).into_owned();
    Ok(ScriptResult {
        code: status.code(),
        stderr,
        took: begin.elapsed(),
    })
}
