//! The two daemons as child processes: started in a fresh directory, awaited by `--status-fd`, their logs printed when
//! a test fails, always gone at its end.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::bins::bin;
use crate::hosts::{self, Hosts};
use crate::link::{Faults, Link};
use crate::process::{self, Process};

/// Nothing that a daemon does at once may take longer than this.
pub const SOON: Duration = Duration::from_secs(20);

/// Polls until `condition` holds.
///
/// # Panics
/// When it does not within [`SOON`].
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "waited {SOON:?} in vain until {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `None` if the child still runs after `limit`.
pub fn wait_child(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A port that nobody listens on. Below the ephemeral range, so that no outgoing connection takes it meanwhile.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = u16::try_from(std::process::id() % 200).expect("small") * 100;
    loop {
        let port = 10_000 + (base + NEXT.fetch_add(1, Ordering::Relaxed)) % 20_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// A fresh directory with a short path, because unix sockets lie in it.
pub fn scratch() -> TempDir {
    tempfile::Builder::new()
        .prefix("e2e")
        .tempdir_in("/tmp")
        .expect("/tmp is writable")
}

/// The command that a text names after `command`, up to its closing quote: what an operator would type.
///
/// # Panics
/// If there is none.
pub fn advised(text: &str, command: &str) -> Vec<String> {
    let quoted = format!("`{command} ");
    let rest = text.rfind(&quoted).map(|at| &text[at + 1..]);
    let rest = rest.unwrap_or_else(|| panic!("no {command} in\n{text}"));
    let end = rest.find('`').unwrap_or_else(|| panic!("no end in {rest}"));
    rest[..end].split(' ').skip(1).map(str::to_owned).collect()
}

/// A line `Name: 123 kB` of `/proc/PID/status`.
///
/// # Panics
/// If there is none.
pub fn status_kib(pid: u32, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let bytes = process::parse_vm(&text, name);
    bytes.unwrap_or_else(|| panic!("no {name} in\n{text}")) / 1024
}

/// A running daemon.
pub struct Daemon {
    process: Process,
    log: PathBuf,
}

impl Deref for Daemon {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl DerefMut for Daemon {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Daemon {
    /// Starts `name` in `dir` with these arguments and waits until it is ready.
    ///
    /// # Panics
    /// If it ends or says nothing instead; its log is part of the text.
    pub fn start(name: &'static str, dir: &Path, args: &[String]) -> Self {
        Daemon::try_start(name, dir, args)
            .unwrap_or_else(|(status, log)| panic!("{name}: {status:?}\n{log}"))
    }

    /// The same as another user, with no other capabilities than `keep` (setpriv's words); for root.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_as(
        uid: u32,
        keep: &[&str],
        name: &'static str,
        dir: &Path,
        args: &[String],
    ) -> Self {
        let mut user = vec![
            "setpriv".to_owned(),
            format!("--reuid={uid}"),
            format!("--regid={uid}"),
            "--clear-groups".into(),
        ];
        if !keep.is_empty() {
            let kept: Vec<String> = keep.iter().map(|name| format!("+{name}")).collect();
            let kept = kept.join(",");
            user.push(format!("--inh-caps={kept}"));
            user.push(format!("--ambient-caps={kept}"));
        }
        Daemon::try_start_by(&user, name, dir, args)
            .unwrap_or_else(|(status, log)| panic!("{name} as {uid}: {status:?}\n{log}"))
    }

    /// The same behind the words of another command, which becomes the daemon.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_by(by: &[String], name: &'static str, dir: &Path, args: &[String]) -> Self {
        Daemon::try_start_by(by, name, dir, args)
            .unwrap_or_else(|(status, log)| panic!("{name} by {by:?}: {status:?}\n{log}"))
    }

    /// The same in a pid namespace of its own: it sees no number of this process, nor of its children.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_in_own_pids(name: &'static str, dir: &Path, args: &[String]) -> Self {
        let by = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
        Daemon::try_start_by(&by.map(str::to_owned), name, dir, args)
            .unwrap_or_else(|(status, log)| panic!("{name}: {status:?}\n{log}"))
    }

    /// The same, for a start that may fail: the exit status (`None`: still running and silent) and the log.
    pub fn try_start(
        name: &'static str,
        dir: &Path,
        args: &[String],
    ) -> Result<Self, (Option<ExitStatus>, String)> {
        Daemon::try_start_by(&[], name, dir, args)
    }

    fn try_start_by(
        by: &[String],
        name: &'static str,
        dir: &Path,
        args: &[String],
    ) -> Result<Self, (Option<ExitStatus>, String)> {
        let log = dir.join(format!("{name}.{}.log", unique()));
        let mut args = args.to_vec();
        args.push("-v4".to_owned());
        Daemon::launch(by, name, dir, &args, log)
    }

    /// The same with nothing but these arguments and `--status-fd`, and with this log.
    ///
    /// # Errors
    /// As [`Self::try_start`].
    ///
    /// # Panics
    /// If it cannot be started at all.
    pub fn launch(
        by: &[String],
        name: &str,
        dir: &Path,
        args: &[String],
        log: PathBuf,
    ) -> Result<Self, (Option<ExitStatus>, String)> {
        let mut command = match by {
            [] => Command::new(bin(name)),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(bin(name));
                command
            }
        };
        command
            .args(args)
            .env_remove("CRTOOLS_SCRIPT_ACTION")
            .env_remove("IMAGE_PROXY_CONTROL");
        let started = process::launch(name, command, dir, &log);
        let (process, ready) = started.expect("the daemon can be started");
        let mut daemon = Daemon { process, log };
        if ready.is_ok() {
            return Ok(daemon);
        }
        let status = daemon.process.wait_within(Duration::from_secs(2)).ok();
        Err((status, daemon.log()))
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where its log is.
    pub fn log_file(&self) -> &Path {
        &self.log
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn logged_errors(&self) -> usize {
        self.log()
            .lines()
            .filter(|line| line.contains("ERROR") || line.contains("WARN"))
            .count()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait(&mut self) -> ExitStatus {
        let status = self.process.wait_within(Duration::from_secs(60));
        status.unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// SIGTERM and its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().code()
    }

    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    pub fn status_kib(&self, name: &str) -> u64 {
        status_kib(self.pid(), name)
    }

    /// What its descriptors are.
    pub fn fds(&self) -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid())).expect("it runs");
        // One may be closed between the listing and the look at it.
        let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.map(|link| link.display().to_string()).collect()
    }

    pub fn fd_count(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .expect("it runs")
            .count()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        // Already gone is fine.
        let _ = self.process.wait_within(SOON);
        if std::thread::panicking() {
            let name = self.process.name();
            eprintln!("---- log of {name}:\n{}----", tail(&self.log()));
        }
    }
}

/// The end of a log: a test over many connections would bury the panic otherwise.
fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    let skipped = lines.len().saturating_sub(80);
    let mut text = format!("({skipped} lines before)\n");
    for line in &lines[skipped..] {
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn unique() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Which daemon is CRIU's page server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PagesAt {
    Proxy,
    /// CRIU's pages go straight to the target.
    Cache,
}

/// How a [`Pair`] is started.
#[derive(Default)]
pub struct Options {
    pub cache: Vec<String>,
    pub proxy: Vec<String>,
    /// A relay between the two, with these faults.
    pub link: Option<Faults>,
    pub page_server: Option<PagesAt>,
    /// What becomes the cache, and what the proxy ([`Daemon::start_by`]).
    pub cache_by: Vec<String>,
    pub proxy_by: Vec<String>,
    /// Of the cache, if it is not on loopback.
    pub address: Option<Ipv4Addr>,
    /// They log what they log by default, and what breaks is survived as by default.
    pub as_installed: bool,
}

impl Options {
    /// Without anything that makes a test simpler: for what is measured.
    pub fn as_installed() -> Self {
        Options {
            as_installed: true,
            ..Options::default()
        }
    }

    pub fn cache(mut self, args: &[impl ToString]) -> Self {
        self.cache.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn proxy(mut self, args: &[impl ToString]) -> Self {
        self.proxy.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn link(mut self, faults: Faults) -> Self {
        self.link = Some(faults);
        self
    }

    pub fn page_server(mut self, at: PagesAt) -> Self {
        self.page_server = Some(at);
        self
    }

    /// On these hosts, which have a link of their own.
    pub fn on(mut self, hosts: &Hosts) -> Self {
        self.proxy_by = hosts.source.by();
        self.cache_by = hosts.target.by();
        self.address = Some(hosts::TARGET);
        // Only the other host can connect.
        self.cache(&["--insecure-listen"])
    }

    /// # Panics
    /// If a daemon is not ready.
    pub fn start(self) -> Pair {
        Pair::with(self)
    }

    /// Below `dir`, which is made; their logs are in it.
    ///
    /// # Errors
    /// If a daemon is not ready.
    pub fn start_in(self, dir: &Path) -> anyhow::Result<Pair> {
        fs::create_dir_all(dir)?;
        let longest = dir.join("s/image-proxy-control.sock");
        anyhow::ensure!(
            longest.as_os_str().len() < 100,
            "{} is too long for a socket",
            longest.display()
        );
        Pair::below(self, dir, None)
    }
}

/// A cache and a proxy in fresh directories, perhaps with a faulty link between them.
pub struct Pair {
    pub proxy: Daemon,
    pub cache: Daemon,
    pub link: Option<Link>,
    /// The cache's own port.
    pub port: u16,
    /// Of the page server; 0 without one.
    pub pages_port: u16,
    /// What the cache held resident then, in bytes.
    pub cache_rss_at_start: u64,
    /// Images and work dir of the dump side.
    pub source: PathBuf,
    /// Images and work dir of the restore side.
    pub target: PathBuf,
    // Last: removed after the daemons are gone.
    dir: Dir,
}

/// The directory of a pair.
enum Dir {
    /// Removed with it.
    Own(TempDir),
    Given(PathBuf),
}

impl Pair {
    pub fn new() -> Self {
        Pair::with(Options::default())
    }

    /// # Panics
    /// If a daemon is not ready.
    pub fn with(options: Options) -> Self {
        let dir = scratch();
        let below = dir.path().to_owned();
        Pair::below(options, &below, Some(dir)).unwrap_or_else(|error| panic!("{error:#}"))
    }

    /// What becomes the cache, and what the proxy ([`Daemon::start_by`]).
    pub fn with_by(options: Options, cache_by: &[String], proxy_by: &[String]) -> Self {
        Pair::with(Options {
            cache_by: cache_by.to_vec(),
            proxy_by: proxy_by.to_vec(),
            ..options
        })
    }

    fn below(options: Options, dir: &Path, own: Option<TempDir>) -> anyhow::Result<Self> {
        let (source, target) = (dir.join("s"), dir.join("t"));
        fs::create_dir_all(&source)?;
        fs::create_dir_all(&target)?;
        let port = free_port();
        let pages_port = options.page_server.map_or(0, |_| free_port());
        let pages = |at: PagesAt| match options.page_server == Some(at) {
            true => vec!["--page-server".to_owned(), pages_port.to_string()],
            false => Vec::new(),
        };
        let address = options.address.unwrap_or(Ipv4Addr::LOCALHOST).to_string();
        let launch = |by: &[String], name, dir: &Path, logs: &Path, args: Vec<String>| {
            let started = match options.as_installed {
                true => Daemon::launch(by, name, dir, &args, logs.join(format!("{name}.log"))),
                false => Daemon::try_start_by(by, name, dir, &args),
            };
            started.map_err(|(status, log)| anyhow::anyhow!("{name} by {by:?}: {status:?}\n{log}"))
        };
        let args = [
            cache_args(&address, port),
            kept_args(&options.cache),
            pages(PagesAt::Cache),
            options.cache,
        ];
        let cache = launch(
            &options.cache_by,
            "image-cache",
            &target,
            dir,
            args.concat(),
        )?;
        let link = options.link.map(|faults| Link::start(port, faults));
        let dial = link.as_ref().map_or(port, Link::port);
        let args = match options.as_installed {
            true => cache_args(&address, dial),
            false => proxy_args(&address, dial, &options.proxy),
        };
        let args = [args, pages(PagesAt::Proxy), options.proxy];
        let proxy = launch(
            &options.proxy_by,
            "image-proxy",
            &source,
            dir,
            args.concat(),
        )?;
        Ok(Pair {
            cache_rss_at_start: cache.vm("VmRSS")?,
            proxy,
            cache,
            link,
            port,
            pages_port,
            source,
            target,
            dir: own.map_or_else(|| Dir::Given(dir.to_owned()), Dir::Own),
        })
    }

    /// Where the sockets of a session are, on the restore side.
    pub fn session_dir(&self, name: &str) -> PathBuf {
        self.target.join("sessions").join(name)
    }

    /// The directory above both.
    pub fn dir(&self) -> &Path {
        match &self.dir {
            Dir::Own(dir) => dir.path(),
            Dir::Given(dir) => dir,
        }
    }

    pub fn link(&self) -> &Link {
        self.link.as_ref().expect("started with a link")
    }

    /// What an operator on the target asks of image-cache: whether it succeeded, and what it printed.
    pub fn ask_cache(&self, arguments: &[&str]) -> (bool, String) {
        ask("image-cache", &self.target, arguments)
    }

    /// Does on the target what a text says, e.g. `image-cache drop`: whether it succeeded, and what it said.
    pub fn follow(&self, text: &str, command: &str) -> (bool, String) {
        let control = self.target.join("image-cache-control.sock");
        let mut asked = Command::new(bin("image-cache"));
        asked
            .args(advised(text, command))
            .arg("--control")
            .arg(control);
        let output = asked.output().expect("it runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), said)
    }
    /// The same of image-proxy.
    ///
    /// # Panics
    /// As [`Self::ask_cache`].
    pub fn ask_proxy(&self, arguments: &[&str]) -> (bool, String) {
        ask("image-proxy", &self.source, arguments)
    }
}

fn ask(program: &str, dir: &Path, arguments: &[&str]) -> (bool, String) {
    let control = dir.join(format!("{program}-control.sock"));
    let mut command = Command::new(bin(program));
    command.args(arguments).arg("--control").arg(control);
    let output = command.output().expect("it runs");
    let said = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.success(), said)
}

impl Default for Pair {
    fn default() -> Self {
        Pair::new()
    }
}

pub fn start_cache(dir: &Path, port: u16, extra: &[String]) -> Daemon {
    let args = [
        cache_args("127.0.0.1", port),
        kept_args(extra),
        extra.to_vec(),
    ];
    Daemon::start("image-cache", dir, &args.concat())
}

pub fn start_proxy(dir: &Path, port: u16, extra: &[String]) -> Daemon {
    let args = [proxy_args("127.0.0.1", port, extra), extra.to_vec()].concat();
    Daemon::start("image-proxy", dir, &args)
}

/// Where image-cache listens, and where image-proxy finds it.
fn cache_args(address: &str, port: u16) -> Vec<String> {
    ["--address", address, "--port", &port.to_string()]
        .map(str::to_owned)
        .into()
}

/// E2E_KEEP_THROUGH_RESTART=off runs every test without it that does not choose itself.
fn kept_args(extra: &[String]) -> Vec<String> {
    const OPTION: &str = "--keep-through-restart";
    match std::env::var("E2E_KEEP_THROUGH_RESTART") {
        Ok(when) if !extra.iter().any(|arg| arg == OPTION) => vec![OPTION.to_owned(), when],
        _ => Vec::new(),
    }
}

/// The same for the image-proxy of a test, and what is simpler so in tests but for what `extra` says.
fn proxy_args(address: &str, port: u16, extra: &[String]) -> Vec<String> {
    let mut args = cache_args(address, port);
    // E2E_CONNECTIONS=4 runs every test over so many connections that does not choose itself.
    if let Ok(connections) = std::env::var("E2E_CONNECTIONS") {
        if !extra.iter().any(|arg| arg == "--connections") {
            args.extend(["--connections".to_owned(), connections]);
        }
    }
    // What breaks shall fail at once, but in the tests of what survives; those say so.
    if !extra.iter().any(|arg| arg == "--link-timeout") {
        let timeout = std::env::var("E2E_LINK_TIMEOUT").unwrap_or_else(|_| "0".to_owned());
        args.extend(["--link-timeout".to_owned(), timeout]);
    }
    args
}
