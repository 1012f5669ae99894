//! CRIU's own command line inside a host.

use anyhow::{bail, ensure, Context, Result};
use rustix::process::{pidfd_open, PidfdFlags};
use std::os::fd::OwnedFd;
use std::time::Duration;

use super::job::{Job, Output};
use super::lab::{child_now, only_child, to_pid, unique, Host};
use super::{wait_until, CRIU_LIMIT, SOON};

/// CRIU puts the socket's path into a `sun_path` and cuts it silently.
const MAX_IMAGES_DIR: usize = 85;

/// Images through sockets instead of files.
const STREAM: &str = "--stream";

/// CRIU ends when the tree runs, as with a container engine.
const DETACHED: &str = "--restore-detached";

/// What ended: CRIU's exit and its log.
#[derive(Debug)]
pub struct Outcome {
    /// CRIU's exit status and what it (and its action script) printed.
    pub output: Output,
    /// CRIU's log.
    pub log: String,
}

impl Outcome {
    /// Fails unless CRIU succeeded.
    ///
    /// # Errors
    /// If CRIU failed.
    pub fn ok(self) -> Result<Success> {
        let frozen = self.statistic("Frozen time");
        let errors: Vec<_> = self.log.lines().filter(|l| l.contains("Error")).collect();
        self.output.ok().with_context(|| errors.join("\n"))?;
        Ok(Success {
            frozen: frozen.map(Duration::from_micros),
        })
    }

    /// Fails unless CRIU itself ended with an error (not by a signal, not by a time limit).
    ///
    /// # Errors
    /// If CRIU succeeded or was killed.
    pub fn expect_failure(self) -> Result<Self> {
        match self.output.status.code() {
            None => bail!("`{}` was killed", self.output.what),
            Some(0) => bail!("`{}` claims success", self.output.what),
            // 128 + SIGKILL: `timeout` killed it, or something else did.
            Some(137) => bail!("`{}` was killed or hangs", self.output.what),
            Some(_) => Ok(self),
        }
    }

    /// Whether CRIU got as far as stopping a task.
    pub fn froze_tasks(&self) -> bool {
        self.log.contains("Seized task")
    }

    /// A number of CRIU's `--display-stats`.
    fn statistic(&self, name: &str) -> Option<u64> {
        self.output
            .stdout
            .lines()
            .find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'))
            .and_then(|value| value.split_ascii_whitespace().next()?.parse().ok())
    }
}

/// A CRIU run that succeeded.
#[derive(Debug)]
pub struct Success {
    /// How long a dump had the tasks frozen.
    pub frozen: Option<Duration>,
}

/// A CRIU that runs.
#[derive(Debug)]
pub struct Running<'a> {
    host: &'a Host,
    job: Job,
    log: String,
}

impl Running<'_> {
    /// Whether CRIU still runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        self.job.is_running()
    }

    /// What CRIU has logged so far, with what its scripts have said.
    pub fn log_so_far(&self) -> String {
        self.host.read(&self.log).unwrap_or_default()
    }

    /// CRIU itself, held so that a signal reaches nobody else.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn handle(&self) -> Result<OwnedFd> {
        pidfd_open(to_pid(self.pid()?)?, PidfdFlags::empty()).context("opening a pidfd of criu")
    }

    /// The machine-wide pid of CRIU itself.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn pid(&self) -> Result<u32> {
        // Ours is nsenter, whose child is `timeout`, whose child is CRIU.
        only_child(only_child(self.job.pid())?)
    }

    /// The same, if it runs at this moment.
    pub fn pid_now(&self) -> Option<u32> {
        child_now(child_now(self.job.pid())?)
    }

    /// Whether CRIU is blocked in reading a unix socket.
    pub fn reads_a_socket(&self) -> bool {
        let place = |pid| std::fs::read_to_string(format!("/proc/{pid}/wchan")).ok();
        let place = self.pid_now().and_then(place);
        place.is_some_and(|place| place.starts_with("unix_stream"))
    }

    /// Waits until CRIU is blocked in reading a unix socket: nothing
    /// else in a restore does that for longer than an instant than asking for an image.
    ///
    /// # Errors
    /// If that does not happen.
    pub fn wait_until_it_waits(&self) -> Result<()> {
        wait_until("criu waiting for an image", SOON, || {
            Ok(self.reads_a_socket())
        })
    }

    /// Waits for CRIU's end.
    ///
    /// # Errors
    /// If it does not end.
    pub fn wait(self) -> Result<Outcome> {
        let output = self.job.wait()?;
        // A dump that finds no socket ends before it has a log.
        let log = self.host.read(&self.log).unwrap_or_default();
        Ok(Outcome { output, log })
    }
}

/// Starts any CRIU command; its work directory and log are of its own.
///
/// # Errors
/// If it cannot be started.
pub fn spawn<'a>(
    host: &'a Host,
    verb: &str,
    images_dir: &str,
    more: &[&str],
) -> Result<Running<'a>> {
    spawn_by(host, &[], verb, images_dir, more)
}

/// The same through `by`, which has to end in an `exec` of what follows.
///
/// # Errors
/// If it cannot be started.
pub fn spawn_by<'a>(
    host: &'a Host,
    by: &[&str],
    verb: &str,
    images_dir: &str,
    more: &[&str],
) -> Result<Running<'a>> {
    ensure!(
        images_dir.len() <= MAX_IMAGES_DIR,
        "-D is too long for CRIU"
    );
    let work_dir = format!("/run/criu/{verb}-{}", unique());
    std::fs::create_dir(host.path(&work_dir)).with_context(|| format!("making {work_dir}"))?;
    let log = format!("{verb}.log");
    let mut argv = by.to_vec();
    argv.extend_from_slice(&["criu", verb, "-D", images_dir, "-W", &work_dir]);
    argv.extend_from_slice(&["-o", &log, "-v4", "--display-stats"]);
    // The hosts share the machine's control groups, there is nothing to move.
    argv.push("--manage-cgroups=ignore");
    argv.extend_from_slice(more);
    Ok(Running {
        host,
        job: host.spawn(&argv, CRIU_LIMIT)?,
        log: format!("{work_dir}/{log}"),
    })
}

/// `criu dump`.
#[derive(Debug)]
pub struct Dump;

impl Dump {
    /// Starts to dump a process tree, with image-proxy as action script.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn<'a>(host: &'a Host, images_dir: &str, pid: i32) -> Result<Running<'a>> {
        let pid = pid.to_string();
        let more = [STREAM, "--action-script", "/opt/image-proxy", "-t", &pid];
        spawn(host, "dump", images_dir, &more)
    }

    /// The same with another script behind ours.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn_before<'a>(
        host: &'a Host,
        images_dir: &str,
        pid: i32,
        script: &str,
    ) -> Result<Running<'a>> {
        let pid = pid.to_string();
        // CRIU runs the one first that was given last.
        let scripts = [
            "--action-script",
            script,
            "--action-script",
            "/opt/image-proxy",
        ];
        let more = [&[STREAM][..], &scripts, &["-t", &pid]].concat();
        spawn(host, "dump", images_dir, &more)
    }

    /// Starts to dump a process tree into files, as CRIU does without us: for comparison.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn_to_files<'a>(host: &'a Host, images_dir: &str, pid: i32) -> Result<Running<'a>> {
        spawn(host, "dump", images_dir, &["-t", &pid.to_string()])
    }

    /// Dumps a process tree that has to be gone afterwards.
    ///
    /// # Errors
    /// If the dump fails, or leaves the process or an image file behind.
    pub fn ok(host: &Host, images_dir: &str, pid: i32) -> Result<Success> {
        let success = Self::spawn(host, images_dir, pid)?.wait()?.ok()?;
        ensure!(!host.is_alive(pid)?, "the dumped process still runs");
        assert_no_image_files(host)?;
        Ok(success)
    }

    /// Dumps a process tree, which has to fail.
    ///
    /// # Errors
    /// If the dump succeeds, or leaves an image file behind.
    pub fn fails(host: &Host, images_dir: &str, pid: i32) -> Result<Outcome> {
        let outcome = Self::spawn(host, images_dir, pid)?.wait()?;
        assert_no_image_files(host)?;
        outcome.expect_failure()
    }
}

/// `criu restore`.
#[derive(Debug)]
pub struct Restore;

impl Restore {
    /// Starts to restore a process tree, with image-cache as action script.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn<'a>(host: &'a Host, images_dir: &str) -> Result<Running<'a>> {
        Self::spawn_with(host, images_dir, &["--action-script", "/opt/image-cache"])
    }

    /// The same with options of the test's own instead of the action script.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn_with<'a>(
        host: &'a Host,
        images_dir: &str,
        options: &[&str],
    ) -> Result<Running<'a>> {
        let more = [&[STREAM, DETACHED], options].concat();
        spawn(host, "restore", images_dir, &more)
    }

    /// Starts to restore a process tree from files.
    ///
    /// # Errors
    /// If CRIU cannot be started.
    pub fn spawn_from_files<'a>(host: &'a Host, images_dir: &str) -> Result<Running<'a>> {
        spawn(host, "restore", images_dir, &[DETACHED])
    }

    /// Restores a process tree that has to run afterwards.
    ///
    /// # Errors
    /// If the restore fails, or leaves an image file behind.
    pub fn ok(host: &Host, images_dir: &str, pid: i32) -> Result<Success> {
        let success = Self::spawn(host, images_dir)?.wait()?.ok()?;
        ensure!(host.is_alive(pid)?, "no restored process {pid}");
        assert_no_image_files(host)?;
        Ok(success)
    }
}

/// Images are to pass through sockets only.
fn assert_no_image_files(host: &Host) -> Result<()> {
    let files = host.image_files()?;
    ensure!(files.is_empty(), "images became files: {files:?}");
    Ok(())
}
