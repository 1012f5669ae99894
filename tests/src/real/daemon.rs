//! The two daemons inside hosts.

use std::fs::{self, File};
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::process::{Child, ExitStatus, Stdio};

use anyhow::{bail, Context, Result};
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

use super::lab::{only_child, to_pid, unique, Host};
use super::{wait_for, IMAGES, SOON};
use crate::process::{parse_vm, wait_until_ready};

/// The cache's port; every lab has networks of its own.
pub const PORT: &str = "7000";

/// A daemon that runs until it is told to end, or dropped.
#[derive(Debug)]
pub struct Daemon {
    /// `nsenter`, the daemon's grandparent: it ends with the daemon and hands on its status.
    child: Child,
    pid: Pid,
    /// For signals, because the pid may be another's once the daemon has ended.
    handle: OwnedFd,
    /// The daemon's log, as the test process can read it.
    log: std::path::PathBuf,
}

impl Daemon {
    /// Starts a daemon and waits until all of its sockets accept.
    ///
    /// # Errors
    /// If it does not come up; the message holds its log.
    pub fn start(host: &Host, argv: &[&str]) -> Result<Self> {
        let name = argv[0].rsplit('/').next().unwrap_or(argv[0]);
        let log = host.path(&format!("/run/log/{name}-{}.log", unique()));
        // The status descriptor is our pipe; what may be printed joins the log. The shell stays,
        // because nsenter stops itself when its own child is stopped, and would never end then.
        const SCRIPT: &str = r#""$@" --status-fd 3 3>&1 1>&2; exit $?"#;
        let mut with_status = vec!["sh", "-c", SCRIPT, "sh"];
        with_status.extend_from_slice(argv);
        let mut child = host
            .command(&with_status)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).with_context(|| format!("making {}", log.display()))?)
            .spawn()
            .with_context(|| format!("starting {name} on {}", host.name))?;
        let stdout = child.stdout.take().context("stdout is a pipe")?;
        let ready = wait_until_ready(name, stdout.into());
        if ready.is_err() {
            let _ = child.kill();
            let _ = child.wait();
            let text = fs::read_to_string(&log).unwrap_or_default();
            ready.with_context(|| format!("{name} on {}: {text}", host.name))?;
        }
        let pid = to_pid(only_child(only_child(child.id())?)?)?;
        // It has just said that it is ready, so the pid is still its own.
        let handle = pidfd_open(pid, PidfdFlags::empty()).context("opening a pidfd")?;
        Ok(Self {
            child,
            pid,
            handle,
            log,
        })
    }

    /// What the daemon has logged so far.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    /// Memory that the daemon itself holds: not the pages of its executable and libraries.
    ///
    /// # Errors
    /// If the daemon is gone.
    pub fn memory(&self) -> Result<u64> {
        self.status(&["RssAnon", "RssShmem"])
    }

    /// The most memory that was ever resident, executable and libraries included.
    ///
    /// # Errors
    /// If the daemon is gone.
    pub fn peak_memory(&self) -> Result<u64> {
        self.status(&["VmHWM"])
    }

    fn status(&self, fields: &[&str]) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid.as_raw_nonzero());
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let value =
            |field: &&str| parse_vm(&text, field).with_context(|| format!("no {field} in {path}"));
        fields.iter().map(value).sum()
    }

    /// Its number here.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends the daemon a signal.
    ///
    /// # Errors
    /// If it is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        pidfd_send_signal(&self.handle, signal).context("signalling a daemon")
    }

    /// Kills the daemon as nothing can prevent.
    ///
    /// # Errors
    /// If it was gone before.
    pub fn kill(mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the daemon had ended by itself: {status}");
        }
        self.signal(Signal::KILL)?;
        self.wait().map(drop)
    }

    /// Asks the daemon to end, and waits for it.
    ///
    /// # Errors
    /// If it does not end.
    pub fn terminate(mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait()
    }

    fn wait(&mut self) -> Result<ExitStatus> {
        wait_for("end of a daemon", SOON, || Ok(self.child.try_wait()?))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.signal(Signal::KILL);
            let _ = self.wait();
        }
    }
}

/// An image-cache.
#[derive(Debug)]
pub struct Cache(Daemon);

impl Cache {
    /// Starts a cache with its sockets in [`IMAGES`].
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(host: &Host, options: &[&str]) -> Result<Self> {
        Self::start_in(host, IMAGES, options)
    }

    /// Starts a cache with its sockets in a directory of the caller's choice.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_in(host: &Host, images_dir: &str, options: &[&str]) -> Result<Self> {
        let mut argv = vec!["/opt/image-cache", "--port", PORT, "-D", images_dir, "-v4"];
        // The network between the two hosts is this test's alone.
        if !options.contains(&"--tls") {
            argv.push("--insecure-listen");
        }
        argv.extend_from_slice(options);
        Ok(Self(Daemon::start(host, &argv)?))
    }

    /// Waits until the cache holds no more memory than `bytes`.
    ///
    /// # Errors
    /// If it holds more for too long.
    pub fn wait_for_memory_below(&self, bytes: u64) -> Result<()> {
        let mut now = 0;
        wait_for("memory of image-cache going back", SOON, || {
            now = self.memory()?;
            Ok((now < bytes).then_some(()))
        })
        .with_context(|| format!("it holds {now} bytes"))
    }

    /// Ends the handle, keeping the daemon's.
    pub fn into_daemon(self) -> Daemon {
        self.0
    }
}

impl Deref for Cache {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.0
    }
}

/// An image-proxy.
#[derive(Debug)]
pub struct Proxy(Daemon);

impl Proxy {
    /// Starts a proxy with its sockets in [`IMAGES`].
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(host: &Host, cache: &str, options: &[&str]) -> Result<Self> {
        Self::start_in(host, cache, IMAGES, options)
    }

    /// Starts a proxy with its sockets in a directory of the caller's choice.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_in(host: &Host, cache: &str, images_dir: &str, options: &[&str]) -> Result<Self> {
        Self::start_to(host, (cache, PORT), images_dir, options)
    }

    /// The same with another port than the cache's: a relay's.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start_to(
        host: &Host,
        (address, port): (&str, &str),
        images_dir: &str,
        options: &[&str],
    ) -> Result<Self> {
        let mut argv = vec!["/opt/image-proxy", "--address", address, "--port", port];
        argv.extend_from_slice(&["-D", images_dir, "-v4"]);
        argv.extend_from_slice(options);
        Ok(Self(Daemon::start(host, &argv)?))
    }

    /// Ends the handle, keeping the daemon's.
    pub fn into_daemon(self) -> Daemon {
        self.0
    }
}

impl Deref for Proxy {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.0
    }
}
