//! The two daemons as child processes: started in a fresh directory, awaited by `--status-fd`, their logs printed when
//! a test fails, always gone at its end.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};
use tempfile::TempDir;

use crate::bins::bin;
use crate::fake::wire::wait_for;
use crate::link::{Faults, Link};

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
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let value = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

/// A running daemon.
pub struct Daemon {
    name: &'static str,
    child: Child,
    log: PathBuf,
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
        // The daemon replaces the shell, so the child's pid is the daemon's. The shell is there because only it can give a
        // child descriptor 3 without `unsafe`, and without it leaking into children that other tests start.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3>&1 >&2", "sh"])
            .args(by)
            .arg(bin(name))
            .args(args)
            .args(["-v4", "--status-fd", "3"])
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("the directory is writable"))
            .env_remove("CRTOOLS_SCRIPT_ACTION")
            .env_remove("IMAGE_PROXY_CONTROL")
            .spawn()
            .expect("the daemon can be started");
        // Descriptor 3 is the piped stdout: the one byte arrives here, and the end of file if the daemon dies.
        let mut status_pipe = child.stdout.take().expect("stdout is piped");
        let mut daemon = Daemon { name, child, log };
        let mut byte = [1];
        let spoke = wait_for(
            std::os::fd::AsFd::as_fd(&status_pipe),
            rustix::event::PollFlags::IN,
            SOON,
        );
        let ready = spoke.expect("poll works")
            && status_pipe.read(&mut byte).expect("a pipe") == 1
            && byte == [0];
        if ready {
            return Ok(daemon);
        }
        let status = wait_child(&mut daemon.child, Duration::from_secs(2)).expect("our own child");
        Err((status, daemon.log()))
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
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

    pub fn running(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_none()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("our own child");
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_child(&mut self.child, Duration::from_secs(60)).expect("our own child");
        status.unwrap_or_else(|| panic!("{} does not end", self.name))
    }

    /// SIGTERM and its exit code.
    pub fn terminate(&mut self) -> Option<i32> {
        self.signal(Signal::TERM);
        self.wait().code()
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
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
        // Already gone is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- log of {}:\n{}----", self.name, tail(&self.log()));
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

/// How a [`Pair`] is started.
#[derive(Default)]
pub struct Options {
    pub cache: Vec<String>,
    pub proxy: Vec<String>,
    /// A relay between the two, with these faults.
    pub link: Option<Faults>,
}

impl Options {
    pub fn cache(mut self, args: &[&str]) -> Self {
        self.cache.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn proxy(mut self, args: &[&str]) -> Self {
        self.proxy.extend(args.iter().map(ToString::to_string));
        self
    }

    pub fn link(mut self, faults: Faults) -> Self {
        self.link = Some(faults);
        self
    }

    pub fn start(self) -> Pair {
        Pair::with(self)
    }
}

/// A cache and a proxy in fresh directories, perhaps with a faulty link between them.
pub struct Pair {
    pub proxy: Daemon,
    pub cache: Daemon,
    pub link: Option<Link>,
    /// The cache's own port.
    pub port: u16,
    /// Images and work dir of the dump side.
    pub source: PathBuf,
    /// Images and work dir of the restore side.
    pub target: PathBuf,
    // Last: removed after the daemons are gone.
    dir: TempDir,
}

impl Pair {
    pub fn new() -> Self {
        Pair::with(Options::default())
    }

    pub fn with(options: Options) -> Self {
        Pair::with_by(options, &[], &[])
    }

    /// What becomes the cache, and what the proxy ([`Daemon::start_by`]).
    pub fn with_by(options: Options, cache_by: &[String], proxy_by: &[String]) -> Self {
        let dir = scratch();
        let (source, target) = (dir.path().join("s"), dir.path().join("t"));
        fs::create_dir(&source).expect("a fresh directory");
        fs::create_dir(&target).expect("a fresh directory");
        let port = free_port();
        let cache = start_cache_by(cache_by, &target, port, &options.cache);
        let link = options.link.map(|faults| Link::start(port, faults));
        let dial = link.as_ref().map_or(port, Link::port);
        let proxy = start_proxy_by(proxy_by, &source, dial, &options.proxy);
        Pair {
            proxy,
            cache,
            link,
            port,
            source,
            target,
            dir,
        }
    }

    /// Where the sockets of a session are, on the restore side.
    pub fn session_dir(&self, name: &str) -> PathBuf {
        self.target.join("sessions").join(name)
    }

    /// The directory above both.
    pub fn dir(&self) -> &Path {
        self.dir.path()
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
    start_cache_by(&[], dir, port, extra)
}

fn start_cache_by(by: &[String], dir: &Path, port: u16, extra: &[String]) -> Daemon {
    let mut args = vec![
        "--port".to_owned(),
        port.to_string(),
        "--address".into(),
        "127.0.0.1".into(),
    ];
    args.extend_from_slice(extra);
    Daemon::start_by(by, "image-cache", dir, &args)
}

pub fn start_proxy(dir: &Path, port: u16, extra: &[String]) -> Daemon {
    start_proxy_by(&[], dir, port, extra)
}

fn start_proxy_by(by: &[String], dir: &Path, port: u16, extra: &[String]) -> Daemon {
    let mut args = vec![
        "--address".to_owned(),
        "127.0.0.1".into(),
        "--port".into(),
        port.to_string(),
    ];
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
    args.extend_from_slice(extra);
    Daemon::start_by(by, "image-proxy", dir, &args)
}
