//! Commands with a time limit and their output.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use super::wait_for;

/// What a command left behind.
#[derive(Debug)]
pub struct Output {
    /// The command, for messages.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// The output of a command that has to succeed.
    ///
    /// # Errors
    /// If the command failed; the message holds what it wrote.
    pub fn ok(self) -> Result<String> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}: {}{}",
                self.what,
                self.status,
                self.stdout,
                self.stderr
            );
        }
        Ok(self.stdout)
    }
}

/// A running command.
#[derive(Debug)]
pub struct Job {
    what: String,
    child: Child,
    limit: Duration,
    // Files instead of pipes: what a command leaves running may hold them open for as long as it
    // likes, and nobody has to drain them meanwhile.
    stdout: File,
    stderr: File,
}

impl Job {
    /// Starts `command`, without input, and with its output kept for [`Job::wait`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(mut command: Command, limit: Duration) -> Result<Self> {
        let what = command
            .get_args()
            .map(|argument| argument.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ");
        let stdout = tempfile::tempfile().context("making a file for output")?;
        let stderr = tempfile::tempfile().context("making a file for output")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(OwnedFd::from(stdout.try_clone()?))
            .stderr(OwnedFd::from(stderr.try_clone()?))
            .spawn()
            .with_context(|| format!("starting {:?} {what}", command.get_program()))?;
        Ok(Self {
            what,
            child,
            limit,
            stdout,
            stderr,
        })
    }

    /// The pid of the process that was started.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the command still runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the end of the command.
    ///
    /// # Errors
    /// If it does not end within its limit (counted from now); it is killed then.
    pub fn wait(mut self) -> Result<Output> {
        let limit = self.limit;
        let status = wait_for(&format!("end of `{}`", self.what), limit, || {
            Ok(self.child.try_wait()?)
        })?;
        Ok(Output {
            status,
            stdout: content(&mut self.stdout)?,
            stderr: content(&mut self.stderr)?,
            what: std::mem::take(&mut self.what),
        })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // Best effort: usually it has ended. What runs inside a host also ends with the host.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn content(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
