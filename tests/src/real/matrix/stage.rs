//! What a point begins with, and the way that an operator goes: the daemons, the process, its migration.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rustix::process::{pidfd_open, pidfd_send_signal, Pid, PidfdFlags, Signal};

use super::super::content::Written;
use super::super::criu::{self, Outcome as CriuOutcome, Running};
use super::super::daemon::PORT;
use super::super::pair::TLS;
use super::super::{wait_until, Cache, Pair, Program, Proxy, Restore, IMAGES, SOON};
use super::plan::{Comes, CommitOn, Plan, Way, KEEPER, ROUNDS};
use super::point::Notes;
use super::{Fault, Phase};
use crate::link::{Direction, Faults, Link};
use crate::memory_group::MemoryGroup;

pub(super) const MIB: u64 = 1 << 20;
/// Every so manieth page of the process is written while it runs.
pub(super) const STRIDE: usize = 20;
/// Of the set that is in the cache beside it.
const OTHER_MIB: u32 = 8;
pub(super) const SESSION: &str = "moving";
pub(super) const OTHER: &str = "other";
pub(super) const PROXY_CONTROL: &str = "/run/images/image-proxy-control.sock";
/// What a set in doubt, or a link that is away, takes to be seen as such, beside `--link-timeout`.
pub(super) const SETTLED: Duration = Duration::from_secs(25);

/// In image-cache's log.
pub(super) const TRIAL: &str = "in trial: every image is here";
pub(super) const HOLDING: &str = "restored and held: waits for the commit";
pub(super) const TOLD: &str = "the restore goes on: the process is dead on the source";
/// How the states begin of a set in doubt: in image-cache, or as the script tells that holds without it.
pub(super) const DOUBT: &str = "in doubt";

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What came of an attempt to restore.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Attempt {
    Restored,
    Failed,
    /// For a dump that is still to come.
    Waits,
    /// It stands, asleep, and nothing but an operator, or a link that comes back, decides.
    Holds,
}

/// Two hosts, their daemons, and a process that is to move.
pub(super) struct Stage<'a> {
    pub pair: &'a Pair,
    pub plan: &'a Plan,
    pub link: Link,
    pub port: String,
    pub program: Program,
    pub written: Mutex<Written>,
    pub other: Option<Program>,
    pub cache: Mutex<Option<Cache>>,
    /// Of image-cache; it goes behind that.
    pub group: Option<MemoryGroup>,
    pub proxy: Mutex<Option<Proxy>>,
    pub cache_options: Vec<String>,
    pub proxy_options: Vec<String>,
    /// CRIU on the source and on the target.
    pub dump: Mutex<Option<OwnedFd>>,
    pub restore: Mutex<Option<OwnedFd>>,
    /// CRIUs started on the source, and bytes on the link before the last one.
    pub runs: AtomicU32,
    pub before: Mutex<u64>,
    /// A restore that holds: [`Attempt::Holds`].
    pub held: Mutex<Option<Running<'a>>>,
    /// What makes a restore fail, or leaves the process stopped, is mended.
    pub right: AtomicBool,
    /// The operator has waited for the link.
    pub came_back: AtomicBool,
    /// There was nothing to strike any more.
    pub missed: AtomicBool,
    pub over: AtomicBool,
    /// Images directories of rounds are numbered.
    pub dirs: AtomicU32,
    pub failed_in: Mutex<Option<Phase>>,
    pub notes: &'a Notes,
}

impl<'a> Stage<'a> {
    pub fn set(pair: &'a Pair, plan: &'a Plan, notes: &'a Notes) -> Result<Self> {
        let mut faults = Faults::default();
        (faults.up.latency, faults.down.latency) = plan.latency;
        faults.seed = plan.number;
        let network = File::open(format!("/proc/{}/ns/net", pair.source.init()))?;
        let upstream = format!("{}:{PORT}", pair.cache_address()).parse()?;
        let link = Link::start_in(Some(network.into()), upstream, faults);
        let port = link.port().to_string();
        let program = Program::writer(&pair.source, plan.mib, STRIDE)?;
        let mut stage = Self {
            pair,
            plan,
            link,
            port,
            written: Mutex::new(Written::new(plan.mib, STRIDE)),
            program,
            other: None,
            cache: Mutex::default(),
            group: None,
            proxy: Mutex::default(),
            cache_options: Vec::new(),
            proxy_options: Vec::new(),
            dump: Mutex::default(),
            restore: Mutex::default(),
            runs: AtomicU32::new(0),
            before: Mutex::default(),
            held: Mutex::default(),
            right: AtomicBool::new(false),
            came_back: AtomicBool::new(false),
            missed: AtomicBool::new(false),
            over: AtomicBool::new(false),
            dirs: AtomicU32::new(0),
            failed_in: Mutex::default(),
            notes,
        };
        stage.choose_options()?;
        if plan.fault == Fault::LogFull {
            for host in [&pair.source, &pair.target] {
                host.sh("mount -t tmpfs -o size=8m,mode=755 log /run/log")?;
            }
        }
        stage.start_cache()?;
        stage.bring_other()?;
        if plan.fault == Fault::MemoryGroup {
            stage.bound_by_group()?;
        }
        stage.start_proxy()?;
        stage.hinder_restores()?;
        stage.write_pause("/run/pause-before", plan.pauses.0, 0)?;
        let last = i32::from(plan.fault.vetoes());
        stage.write_pause("/run/pause-after", plan.pauses.1, last)?;
        Ok(stage)
    }

    fn choose_options(&mut self) -> Result<()> {
        let plan = self.plan;
        let both = ["--link-timeout", plan.link_timeout(), "--grace-period", "1"];
        let mut cache: Vec<_> = both.to_vec();
        let mut proxy = [
            &both[..],
            &["--session", SESSION, "--connect-timeout", "30"],
        ]
        .concat();
        let limit = self.memory_limit().to_string();
        match plan.way {
            Way::Plain => {}
            Way::Tls => {
                self.pair.certify("127.0.0.1")?;
                cache.extend(TLS);
                proxy.extend(TLS);
            }
            Way::Summed => proxy.push("--checksum"),
        }
        match plan.commit_on {
            CommitOn::Auto => {}
            CommitOn::Held => proxy.extend(["--commit-on", "held"]),
            // A restore that was there may be gone with its image-cache.
            CommitOn::Restored => {
                proxy.extend(["--commit-on", "restored", "--commit-timeout", "15"])
            }
        }
        if KEEPER {
            let when = if plan.keeper { "on" } else { "off" };
            cache.extend(["--keep-through-restart", when]);
        }
        if plan.fault == Fault::Memory {
            cache.extend(["--memory-limit", &limit]);
        }
        if plan.rounds {
            proxy.extend(["--page-server", "27"]);
        }
        let owned = |options: Vec<&str>| options.into_iter().map(str::to_owned).collect();
        self.cache_options = owned(cache);
        self.proxy_options = owned(proxy);
        Ok(())
    }

    /// With another set in the cache there is room for that.
    pub fn memory_limit(&self) -> u64 {
        let size = self.plan.mib as u64 * MIB;
        let room = size * self.plan.limit / 1000;
        match self.has_other() {
            true => u64::from(OTHER_MIB) * MIB * 9 / 8 + room,
            false => room.max(MIB),
        }
    }

    pub fn has_other(&self) -> bool {
        self.plan.fault == Fault::Memory && self.plan.other && !self.plan.rounds
    }

    pub fn note(&self, text: impl AsRef<str>) {
        self.notes.add(text.as_ref());
    }

    pub fn start_cache(&self) -> Result<()> {
        let options: Vec<_> = self.cache_options.iter().map(String::as_str).collect();
        *lock(&self.cache) = Some(self.pair.cache(&options)?);
        Ok(())
    }

    pub fn start_proxy(&self) -> Result<()> {
        let options: Vec<_> = self.proxy_options.iter().map(String::as_str).collect();
        let to = ("127.0.0.1", self.port.as_str());
        *lock(&self.proxy) = Some(Proxy::start_to(&self.pair.source, to, IMAGES, &options)?);
        Ok(())
    }

    /// The limit of the group is below what is dumped.
    fn bound_by_group(&mut self) -> Result<()> {
        // As a container has it: a limit that cannot be seen is not kept.
        let mount = "mount -t cgroup -o memory cgroup /sys/fs/cgroup 2>/dev/null || \
                     mount -t cgroup2 cgroup2 /sys/fs/cgroup";
        self.pair.target.sh(mount)?;
        let group = MemoryGroup::new(1 << 10).context("no memory control groups here")?;
        let pid = lock(&self.cache).as_ref().context("no image-cache")?.pid();
        group.admit(pid)?;
        let used = group.usage() >> 20;
        // For the daemon itself, and what it keeps free.
        let own = 24;
        group.set_limit(used + own + self.plan.mib as u64 * self.plan.limit / 1000);
        self.group = Some(group);
        Ok(())
    }

    /// A set of another session that takes its part of the memory.
    fn bring_other(&mut self) -> Result<()> {
        if !self.has_other() {
            return Ok(());
        }
        let source = &self.pair.source;
        source.sh("mkdir /run/other")?;
        let mut options = vec!["--session", OTHER];
        if self.plan.way == Way::Tls {
            options.extend(TLS);
            // It does not come through the relay, to which the certificate belongs.
            options.push("--tls-no-cn-verify");
        }
        let _proxy = Proxy::start_in(source, self.pair.cache_address(), "/run/other", &options)?;
        let program = Program::memory(source, OTHER_MIB, 1)?;
        criu::Dump::ok(source, "/run/other", program.pid)?;
        self.other = Some(program);
        // Its image-proxy ends here, which must have said that the process is dead.
        wait_until("the other set being there", SOON, || {
            Ok(self.cache_logged("ready to be restored"))
        })
    }

    /// A script that waits when CRIU asks for the verdict, and then gives its own.
    pub fn write_pause(&self, path: &str, pause: Duration, verdict: i32) -> Result<()> {
        let seconds = pause.as_secs_f64();
        let text = format!(
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ] || exit 0\nsleep {seconds}\nexit {verdict}\n"
        );
        let outside = self.pair.source.path(path);
        fs::write(&outside, text)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        Ok(fs::set_permissions(outside, mode)?)
    }

    // --- the migration ------------------------------------------------------------------------

    /// The way an operator goes, up to the end of the restore, or a dump that failed.
    pub fn migrate(&self) -> Result<()> {
        let early = match self.plan.comes {
            Comes::Early => Some(self.start_restore()?),
            Comes::InTrial | Comes::After => None,
        };
        let ended = AtomicBool::new(false);
        let (dumped, late) = std::thread::scope(|scope| {
            let comes = self.plan.comes == Comes::InTrial;
            let late = comes.then(|| scope.spawn(|| self.start_restore_in_trial(&ended)));
            let dumped = self.dump();
            ended.store(true, Ordering::SeqCst);
            let late = late.map(|late| late.join().expect("no panic"));
            (dumped, late.transpose())
        });
        let (dumped, waiting) = (dumped?, early.or(late?.flatten()));
        if !dumped {
            *lock(&self.failed_in) = Some(self.phase()?);
        }
        if self.plan.fault == Fault::EndsItself {
            ensure!(!dumped, "a script has failed, and the dump has not");
            // As an operator or a supervisor does, in the moment in which it runs again.
            self.program.kill(&self.pair.source)?;
        }
        let gone = !self.pair.source.is_alive(self.program.pid)?;
        let restore = match waiting {
            Some(restore) => restore,
            // A CRIU that was killed after it has killed: the operator sees the process dead.
            None if gone && self.plan.fault != Fault::EndsItself => {
                std::thread::sleep(self.plan.rest);
                self.start_restore()?
            }
            None => return Ok(()),
        };
        let attempt = self.end_restore(restore)?;
        self.note(format!("the first restore: {attempt:?}"));
        Ok(())
    }

    /// When the dump waits for it. `None`: that does not come.
    fn start_restore_in_trial(&self, ended: &AtomicBool) -> Result<Option<Running<'a>>> {
        while !self.cache_logged(TRIAL) {
            if ended.load(Ordering::SeqCst) {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(self.plan.rest);
        // An image-cache that was killed meanwhile refuses it.
        Ok(self.start_restore().ok())
    }

    /// A restore on the target is to fail.
    fn hinder_restores(&self) -> Result<()> {
        let pid = self.program.pid;
        match self.plan.fault {
            Fault::TakenPid => {
                let script = format!(
                    "echo {} >/proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null 2>&1 & echo $!",
                    pid - 1
                );
                let taken = self.pair.target.sh(&script)?;
                ensure!(taken.trim() == pid.to_string(), "pid {pid}: {taken}");
            }
            // Over what both hosts share, and where its log is.
            Fault::MissingFile => {
                self.pair.target.sh("mount -t tmpfs none /mnt")?;
            }
            _ => {}
        }
        Ok(())
    }

    /// What the operator mends who has read why it failed.
    pub fn put_right(&self) -> Result<()> {
        let pid = self.program.pid;
        if self.right.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        match self.plan.fault {
            Fault::TakenPid => self.program.kill(&self.pair.target)?,
            Fault::MissingFile => {
                self.pair.target.sh("umount /mnt")?;
            }
            Fault::LeaveStopped if self.pair.source.is_alive(pid)? => {
                self.pair.source.kill(pid, "CONT")?;
            }
            _ => {}
        }
        Ok(())
    }

    /// All runs of CRIU on the source. `false` if one of them failed.
    pub fn dump(&self) -> Result<bool> {
        let first = self.dirs.load(Ordering::SeqCst);
        let rounds = if self.plan.rounds { ROUNDS } else { 1 };
        for round in 1..=rounds {
            let last = round == rounds;
            let running = match self.plan.rounds {
                true => self.start_round(last, first)?,
                false => self.start_dump(IMAGES, "dump", &["--stream"])?,
            };
            *lock(&self.before) = self.link.carried(Direction::Up);
            *lock(&self.dump) = Some(running.handle()?);
            self.runs.fetch_add(1, Ordering::SeqCst);
            let outcome = running.wait()?;
            let status = outcome.output.status;
            let verb = if last { "dump" } else { "pre-dump" };
            self.note(format!("criu {verb}: {status}"));
            self.ended_by_itself(&outcome)?;
            if !status.success() {
                return Ok(false);
            }
            if !last {
                self.program.runs_on()?;
            }
        }
        Ok(true)
    }

    /// Not for want of an answer: nothing here takes as long as the limit.
    fn ended_by_itself(&self, outcome: &CriuOutcome) -> Result<()> {
        let killed = outcome.output.status.code().is_none_or(|code| code == 137);
        let kills = matches!(self.plan.fault, Fault::KillDump | Fault::KillRestore);
        ensure!(kills || !killed, "`{}` hangs", outcome.output.what);
        Ok(())
    }

    fn start_round(&self, last: bool, first: u32) -> Result<Running<'a>> {
        let n = self.dirs.fetch_add(1, Ordering::SeqCst);
        let dir = format!("/run/d{n}");
        fs::create_dir(self.pair.source.path(&dir))?;
        let parent = format!("../d{}", n.saturating_sub(1));
        let mut more = vec![
            "--track-mem",
            "--page-server",
            "--address",
            "127.0.0.1",
            "--port",
            "27",
        ];
        if n > first {
            more.extend(["--prev-images-dir", &parent]);
        }
        self.start_dump(&dir, if last { "dump" } else { "pre-dump" }, &more)
    }

    fn start_dump(&self, dir: &str, verb: &str, more: &[&str]) -> Result<Running<'a>> {
        let pid = self.program.pid.to_string();
        // Those that are given last run first.
        let mut options = vec!["-t", &pid];
        for script in ["/run/pause-after", "/opt/image-proxy", "/run/pause-before"] {
            options.extend(["--action-script", script]);
        }
        options.extend(more);
        let leaves = self.plan.fault == Fault::LeaveStopped && !self.right.load(Ordering::SeqCst);
        if leaves && verb == "dump" {
            options.push("--leave-stopped");
        }
        let control = format!("IMAGE_PROXY_CONTROL={PROXY_CONTROL}");
        criu::spawn_by(&self.pair.source, &["env", &control], verb, dir, &options)
    }

    fn start_restore(&self) -> Result<Running<'a>> {
        let running = Restore::spawn(&self.pair.target, IMAGES)?;
        *lock(&self.restore) = Some(running.handle()?);
        Ok(running)
    }

    /// Waits until a restore has ended, or waits for a dump that is not under way; that one is killed. Or until it is
    /// clear that the restore holds, and that only an operator can decide.
    pub fn end_restore(&self, mut running: Running<'a>) -> Result<Attempt> {
        let mut idle = 0;
        let mut held_since = None;
        let mut series_ends_at = self.series_ends_at();
        wait_until("end of a restore", SETTLED * 2, || {
            if !running.is_running()? {
                return Ok(true);
            }
            self.end_series_after(&mut series_ends_at)?;
            // No set is on its way to it, and it asks for one.
            let sessions = self.sessions();
            // What holds here without its images is no set of an image-cache that was started since.
            let foreign = self.plan.fault == Fault::RestartCache && self.is_held();
            let is_no_set = |state: &str| state == "aborted" || (foreign && state == DOUBT);
            let nothing = (sessions.iter().flatten()).all(|(_, state)| is_no_set(state));
            let nothing = nothing && sessions.is_some();
            let doubt = (sessions.iter().flatten()).any(|(_, state)| state.starts_with(DOUBT));
            let undecided = doubt || sessions.is_none();
            match undecided && holds_by(&running) {
                true => drop(held_since.get_or_insert_with(Instant::now)),
                false => held_since = None,
            }
            match nothing && running.reads_a_socket() {
                true => idle += 1,
                false => idle = 0,
            }
            std::thread::sleep(Duration::from_millis(10));
            let holds = held_since.is_some_and(|since| since.elapsed() > self.patience());
            Ok(idle > 20 || holds)
        })?;
        if running.is_running()? {
            if held_since.is_some() && holds_by(&running) {
                *lock(&self.held) = Some(running);
                return Ok(Attempt::Holds);
            }
            let criu = running.handle()?;
            pidfd_send_signal(&criu, Signal::KILL)?;
            running.wait()?;
            return Ok(Attempt::Waits);
        }
        let outcome = running.wait()?;
        self.ended_by_itself(&outcome)?;
        Ok(match outcome.output.status.success() {
            true => Attempt::Restored,
            false => Attempt::Failed,
        })
    }

    /// How long a doubt is left to the daemons, which may end it.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(if self.plan.may_doubt() { 1 } else { 15 })
    }

    /// A restore stands, asleep.
    pub fn is_held(&self) -> bool {
        lock(&self.held).as_ref().is_some_and(holds_by)
    }

    /// The restore that holds goes on, or fails: something has decided.
    pub fn end_held(&self) -> Result<Attempt> {
        let running = lock(&self.held).take().context("no restore holds")?;
        let outcome = running.wait()?;
        self.ended_by_itself(&outcome)?;
        let attempt = match outcome.output.status.success() {
            true => Attempt::Restored,
            false => Attempt::Failed,
        };
        self.note(format!("the restore that held: {attempt:?}"));
        Ok(attempt)
    }
}

/// The script of this restore stands at `post-restore`.
fn holds_by(restore: &Running) -> bool {
    let criu = restore.pid_now();
    criu.is_some_and(|criu| script_of(criu, "post-restore", "image-cache").is_some())
}

/// The action script that this CRIU has started and that still runs.
pub(super) fn script_of(criu: u32, action: &str, program: &str) -> Option<OwnedFd> {
    let children = fs::read_to_string(format!("/proc/{criu}/task/{criu}/children")).ok()?;
    let action = format!("CRTOOLS_SCRIPT_ACTION={action}");
    children.split_ascii_whitespace().find_map(|child| {
        let pid = Pid::from_raw(child.parse().ok()?)?;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let exe = fs::read_link(format!("/proc/{child}/exe")).ok()?;
        let environment = fs::read(format!("/proc/{child}/environ")).ok()?;
        let mut variables = environment.split(|&byte| byte == 0);
        let is_it = exe.ends_with(program) && variables.any(|v| v == action.as_bytes());
        is_it.then_some(handle)
    })
}

/// The number that the process of a pidfd has here.
pub(super) fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    let number = std::os::fd::AsRawFd::as_raw_fd(pidfd);
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    line.trim().parse().ok()
}
