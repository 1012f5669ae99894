//! One point: a migration, its fault, and the judgement.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use rustix::process::{pidfd_send_signal, Signal};

use super::super::content::Written;
use super::super::criu::{self, Outcome as CriuOutcome, Running};
use super::super::daemon::PORT;
use super::super::pair::TLS_FILES;
use super::super::{
    wait_for, wait_until, Cache, Host, Pair, Program, Proxy, Restore, IMAGES, SOON,
};
use super::{Fault, Mark, Outcome, Phase, Plan, ROUNDS};
use crate::link::{self, Direction, Faults, Link};

const MIB: u64 = 1 << 20;
/// Every so manieth page of the process is written while it runs.
const STRIDE: usize = 20;
/// Of the set that is in the cache beside it.
const OTHER_MIB: u32 = 8;
const SESSION: &str = "moving";
const OTHER: &str = "other";
const PROXY_CONTROL: &str = "/run/images/image-proxy-control.sock";
const CACHE_CONTROL: &str = "/run/images/image-cache-control.sock";
/// How often the saboteur looks.
const GLANCE: Duration = Duration::from_micros(300);
/// A process that stands still for so long, goes on no more.
const STILL: Duration = Duration::from_secs(4);
/// What a set in doubt, or a link that is away, takes to be seen as such, beside `--link-timeout`.
const SETTLED: Duration = Duration::from_secs(25);

/// What a point came to.
#[derive(Debug)]
pub struct Record {
    /// Where the migration was when the fault struck.
    pub phase: Phase,
    /// Where the process is.
    pub outcome: Outcome,
}

/// What happened at a point, with the time since its beginning.
#[derive(Debug)]
pub struct Notes {
    began: Instant,
    lines: Mutex<Vec<String>>,
}

impl Default for Notes {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            lines: Mutex::default(),
        }
    }
}

impl Notes {
    fn add(&self, text: &str) {
        let at = self.began.elapsed().as_secs_f64();
        lock(&self.lines).push(format!("{at:7.3} s  {text}"));
    }
}

impl std::fmt::Display for Notes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&lock(&self.lines).join("\n"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs one point between two fresh hosts.
///
/// # Errors
/// If what holds in the end is not what the documentation says.
pub fn run(pair: &Pair, plan: &Plan, notes: &Notes) -> Result<Record> {
    let stage = Stage::set(pair, plan, notes)?;
    let struck = std::thread::scope(|scope| {
        let saboteur = scope.spawn(|| stage.sabotage());
        let migrated = stage.migrate();
        stage.over.store(true, Ordering::SeqCst);
        let struck = saboteur.join();
        migrated?;
        struck.unwrap_or_else(|_| bail!("the saboteur panicked"))
    })?;
    let phase = match plan.fault {
        Fault::Memory => lock(&stage.failed_in).unwrap_or(Phase::Restored),
        _ => struck,
    };
    stage.note(format!("struck: {phase}"));
    let outcome = stage.judge(phase)?;
    Ok(Record { phase, outcome })
}

/// A copy of the process on one host.
#[derive(Debug, PartialEq, Eq)]
enum Copy {
    Gone,
    Unharmed,
    /// There, and not what it was.
    Harmed(String),
}

/// What came of an attempt to restore.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    Restored,
    Failed,
    /// For a dump that is still to come.
    Waits,
}

struct Stage<'a> {
    pair: &'a Pair,
    plan: &'a Plan,
    link: Link,
    port: String,
    program: Program,
    written: Mutex<Written>,
    other: Option<Program>,
    cache: Mutex<Option<Cache>>,
    proxy: Mutex<Option<Proxy>>,
    cache_options: Vec<String>,
    proxy_options: Vec<String>,
    /// CRIU on the source and on the target.
    dump: Mutex<Option<OwnedFd>>,
    restore: Mutex<Option<OwnedFd>>,
    /// CRIUs started on the source, and bytes on the link before the last one.
    runs: AtomicU32,
    before: Mutex<u64>,
    over: AtomicBool,
    /// Images directories of rounds are numbered.
    dirs: AtomicU32,
    failed_in: Mutex<Option<Phase>>,
    notes: &'a Notes,
}

impl<'a> Stage<'a> {
    fn set(pair: &'a Pair, plan: &'a Plan, notes: &'a Notes) -> Result<Self> {
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
            proxy: Mutex::default(),
            cache_options: Vec::new(),
            proxy_options: Vec::new(),
            dump: Mutex::default(),
            restore: Mutex::default(),
            runs: AtomicU32::new(0),
            before: Mutex::default(),
            over: AtomicBool::new(false),
            dirs: AtomicU32::new(0),
            failed_in: Mutex::default(),
            notes,
        };
        stage.choose_options()?;
        stage.start_cache()?;
        stage.bring_other()?;
        stage.start_proxy()?;
        stage.write_pause("/run/pause-before", plan.pauses.0)?;
        stage.write_pause("/run/pause-after", plan.pauses.1)?;
        Ok(stage)
    }

    fn choose_options(&mut self) -> Result<()> {
        let plan = self.plan;
        let both = ["--link-timeout", plan.link_timeout(), "--grace-period", "1"];
        let mut cache: Vec<_> = both.to_vec();
        let mut proxy = [&both[..], &["--session", SESSION, "--connect-timeout", "5"]].concat();
        let limit = self.memory_limit().to_string();
        match plan.fault {
            Fault::CorruptTls => {
                self.pair.certify("127.0.0.1")?;
                let tls = [&["--tls"], &TLS_FILES[..]].concat();
                cache.extend(&tls);
                proxy.extend(&tls);
            }
            Fault::CorruptSummed => proxy.push("--checksum"),
            Fault::Memory => cache.extend(["--memory-limit", &limit]),
            _ => {}
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
    fn memory_limit(&self) -> u64 {
        let size = self.plan.mib as u64 * MIB;
        let room = size * self.plan.limit / 1000;
        match self.has_other() {
            true => u64::from(OTHER_MIB) * MIB * 9 / 8 + room,
            false => room.max(MIB),
        }
    }

    fn has_other(&self) -> bool {
        self.plan.fault == Fault::Memory && self.plan.other && !self.plan.rounds
    }

    fn note(&self, text: impl AsRef<str>) {
        self.notes.add(text.as_ref());
    }

    fn start_cache(&self) -> Result<()> {
        let options: Vec<_> = self.cache_options.iter().map(String::as_str).collect();
        *lock(&self.cache) = Some(self.pair.cache(&options)?);
        Ok(())
    }

    fn start_proxy(&self) -> Result<()> {
        let options: Vec<_> = self.proxy_options.iter().map(String::as_str).collect();
        let to = ("127.0.0.1", self.port.as_str());
        *lock(&self.proxy) = Some(Proxy::start_to(&self.pair.source, to, IMAGES, &options)?);
        Ok(())
    }

    /// A set of another session that takes its part of the memory.
    fn bring_other(&mut self) -> Result<()> {
        if !self.has_other() {
            return Ok(());
        }
        let source = &self.pair.source;
        source.sh("mkdir /run/other")?;
        let options = ["--session", OTHER];
        let _proxy = Proxy::start_in(source, self.pair.cache_address(), "/run/other", &options)?;
        let program = Program::memory(source, OTHER_MIB, 1)?;
        super::super::Dump::ok(source, "/run/other", program.pid)?;
        self.other = Some(program);
        Ok(())
    }

    /// A script that waits when CRIU asks for the verdict, and says that it does.
    fn write_pause(&self, path: &str, pause: Duration) -> Result<()> {
        let seconds = pause.as_secs_f64();
        let text = format!(
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" = post-dump ] || exit 0\nexec sleep {seconds}\n"
        );
        let outside = self.pair.source.path(path);
        fs::write(&outside, text)?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        Ok(fs::set_permissions(outside, mode)?)
    }

    // --- the migration ------------------------------------------------------------------------

    /// The way an operator goes, up to the end of the restore, or a dump that failed.
    fn migrate(&self) -> Result<()> {
        let early = match self.plan.early {
            true => Some(self.start_restore()?),
            false => None,
        };
        let dumped = self.dump()?;
        if !dumped {
            *lock(&self.failed_in) = Some(self.phase()?);
        }
        let gone = !self.pair.source.is_alive(self.program.pid)?;
        let restore = match early {
            Some(restore) => restore,
            // A CRIU that was killed after it has killed: the operator sees the process dead.
            None if gone => {
                std::thread::sleep(self.plan.rest);
                self.start_restore()?
            }
            None => return Ok(()),
        };
        let attempt = self.end_restore(restore)?;
        self.note(format!("the first restore: {attempt:?}"));
        Ok(())
    }

    /// All runs of CRIU on the source. `false` if one of them failed.
    fn dump(&self) -> Result<bool> {
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
        let control = format!("IMAGE_PROXY_CONTROL={PROXY_CONTROL}");
        criu::spawn_by(&self.pair.source, &["env", &control], verb, dir, &options)
    }

    fn start_restore(&self) -> Result<Running<'a>> {
        let running = Restore::spawn(&self.pair.target, IMAGES)?;
        *lock(&self.restore) = Some(running.handle()?);
        Ok(running)
    }

    /// Waits until a restore has ended, or waits for a dump that is not under way; that one is killed.
    fn end_restore(&self, mut running: Running) -> Result<Attempt> {
        let mut idle = 0;
        wait_until("end of a restore", SETTLED * 2, || {
            if !running.is_running()? {
                return Ok(true);
            }
            // No set is on its way to it, and it asks for one.
            let sessions = self.sessions();
            let nothing = sessions.is_some_and(|s| s.iter().all(|(_, state)| state == "aborted"));
            match nothing && running.reads_a_socket()? {
                true => idle += 1,
                false => idle = 0,
            }
            std::thread::sleep(Duration::from_millis(10));
            Ok(idle > 20)
        })?;
        if running.is_running()? {
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

    // --- the fault ----------------------------------------------------------------------------

    /// Waits for the moment and strikes. If it does not come, the end is the moment.
    fn sabotage(&self) -> Result<Phase> {
        while !self.over.load(Ordering::SeqCst) {
            if self.is_reached()? {
                std::thread::sleep(self.plan.delay);
                break;
            }
            std::thread::sleep(GLANCE);
        }
        let phase = self.phase()?;
        self.strike()?;
        Ok(phase)
    }

    fn is_reached(&self) -> Result<bool> {
        Ok(match self.plan.mark {
            Mark::Run(n) => self.runs.load(Ordering::SeqCst) >= n,
            Mark::Carried(share) => {
                self.link.carried(Direction::Up) >= self.expected() * share / 1000
                    && self.runs.load(Ordering::SeqCst) > 0
            }
            Mark::Held => self.cache_logged("held for commit"),
            Mark::Committed => self.proxy_logged(" committed"),
            Mark::Dead => !self.pair.source.is_alive(self.program.pid)?,
            Mark::Restore => lock(&self.restore).is_some(),
            Mark::Served => self.cache_logged("restore --stream begins"),
            Mark::Over => false,
        })
    }

    /// What the whole migration puts on the link, about.
    fn expected(&self) -> u64 {
        let size = self.plan.mib as u64 * MIB;
        let later = size / STRIDE as u64 * u64::from(ROUNDS - 1);
        if self.plan.rounds {
            size + later
        } else {
            size
        }
    }

    fn phase(&self) -> Result<Phase> {
        let cache = logs(&self.pair.target, "image-cache");
        let held = cache.contains("held for commit");
        let dead = !self.pair.source.is_alive(self.program.pid)?;
        let own = cache.rsplit_once(&format!("session={SESSION}")).is_some();
        let begun = own && cache.contains("set begins");
        let rounds = if self.plan.rounds { ROUNDS } else { 1 };
        let run = self.runs.load(Ordering::SeqCst);
        if cache.contains("restored; released") && self.other.is_none() {
            return Ok(Phase::Restored);
        }
        if cache.contains("restore --stream begins") {
            return Ok(Phase::Restoring);
        }
        if held && dead {
            let count = cache.matches("ready to be restored").count();
            let others = usize::from(self.other.is_some());
            return Ok(if count > others {
                Phase::Ready
            } else {
                Phase::Dead
            });
        }
        if held && self.other.is_none() {
            return Ok(match self.proxy_logged(" committed") {
                true => Phase::Committed,
                false => Phase::Held,
            });
        }
        if run < rounds {
            return Ok(match run {
                0 => Phase::Before,
                _ => Phase::Rounds,
            });
        }
        let carried = self.link.carried(Direction::Up) - *lock(&self.before);
        let size = match self.plan.rounds {
            true => self.plan.mib as u64 * MIB / STRIDE as u64,
            false => self.expected(),
        };
        Ok(match carried * 10 / size {
            _ if carried < 64 << 10 && !self.proxy_logged("session=moving") => Phase::Before,
            _ if carried < 64 << 10 && !begun => Phase::Announced,
            0 => Phase::First,
            1..9 => Phase::Middle,
            _ => Phase::End,
        })
    }

    fn cache_logged(&self, what: &str) -> bool {
        logs(&self.pair.target, "image-cache").contains(what)
    }

    fn proxy_logged(&self, what: &str) -> bool {
        logs(&self.pair.source, "image-proxy").contains(what)
    }

    fn strike(&self) -> Result<()> {
        let plan = self.plan;
        match plan.fault {
            Fault::KillProxy => self.end_proxy(Signal::KILL)?,
            Fault::KillCache => self.end_cache(Signal::KILL)?,
            Fault::KillDump => self.kill_criu(&self.dump),
            Fault::KillRestore => self.kill_criu(&self.restore),
            Fault::RestartProxy => {
                self.end_proxy(self.signal())?;
                self.start_proxy()?;
            }
            Fault::RestartCache => {
                self.end_cache(self.signal())?;
                self.start_cache()?;
            }
            Fault::Cut => {
                self.link.bar(true);
                self.link.strike(match plan.reset {
                    true => link::Fault::Reset,
                    false => link::Fault::Close,
                });
                if plan.returns {
                    std::thread::sleep(plan.away);
                    self.link.bar(false);
                }
            }
            Fault::Stall => {
                self.link.freeze();
                std::thread::sleep(plan.away);
                if !plan.returns {
                    self.link.bar(true);
                    self.link.strike(link::Fault::Reset);
                }
                self.link.release();
            }
            Fault::CorruptTls | Fault::CorruptSummed => self.link.flip(plan.direction),
            Fault::Memory => {}
        }
        self.note("struck");
        Ok(())
    }

    fn signal(&self) -> Signal {
        match self.plan.term {
            true => Signal::TERM,
            false => Signal::KILL,
        }
    }

    fn end_proxy(&self, signal: Signal) -> Result<()> {
        let Some(proxy) = lock(&self.proxy).take() else {
            return Ok(());
        };
        end(proxy.into_daemon(), signal)
    }

    fn end_cache(&self, signal: Signal) -> Result<()> {
        let Some(cache) = lock(&self.cache).take() else {
            return Ok(());
        };
        end(cache.into_daemon(), signal)
    }

    /// It may have ended before.
    fn kill_criu(&self, which: &Mutex<Option<OwnedFd>>) {
        let killed = lock(which)
            .as_ref()
            .map(|criu| pidfd_send_signal(criu.as_fd(), Signal::KILL));
        self.note(format!("SIGKILL for CRIU: {killed:?}"));
    }

    // --- the judgement ------------------------------------------------------------------------

    fn judge(&self, struck: Phase) -> Result<Outcome> {
        // What is away stays away until it has been noticed; then somebody mends it.
        let mut doubt = false;
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            ensure!(tries < 5, "no end of it");
            let state = self.settled()?;
            let source = self.look(&self.pair.source)?;
            let target = self.look(&self.pair.target)?;
            self.note(format!(
                "source {source:?}, target {target:?}, set {state:?}"
            ));
            match (source, target, state.as_deref()) {
                (Copy::Unharmed, Copy::Gone, state) => {
                    self.is_not_served()?;
                    let doubted = state == Some("in doubt");
                    if doubted {
                        self.forget_copy()?;
                        self.is_not_served()?;
                    }
                    break match doubted {
                        true => Outcome::DoubtLived,
                        false => Outcome::Lived,
                    };
                }
                (Copy::Gone, Copy::Unharmed, state) => {
                    if let Some(state) = state {
                        ensure!(
                            self.plan.fault == Fault::KillRestore && state == "to be restored",
                            "it was restored, and its set is {state}"
                        );
                        self.on_target("drop")?;
                    }
                    break match doubt {
                        true => Outcome::DoubtMoved,
                        false => Outcome::Moved,
                    };
                }
                (Copy::Gone, Copy::Gone, Some("in doubt")) => {
                    doubt = true;
                    self.is_not_served()?;
                    self.abort_is_refused()?;
                    self.on_target("release")?;
                    self.restore_again()?;
                }
                (Copy::Gone, Copy::Gone, Some("to be restored")) => self.restore_again()?,
                (Copy::Gone, Copy::Gone, None) => break self.loss(struck)?,
                (Copy::Gone, Copy::Harmed(why), _) => {
                    ensure!(
                        matches!(self.plan.fault, Fault::KillRestore),
                        "what was restored is harmed: {why}"
                    );
                    self.note(format!("the killed restore left a torso: {why}"));
                    self.program.kill(&self.pair.target)?;
                }
                (Copy::Harmed(why), Copy::Gone, state) => {
                    ensure!(
                        self.plan.fault == Fault::KillDump,
                        "the process on the source is harmed: {why}"
                    );
                    ensure!(
                        matches!(state, None | Some("in doubt")),
                        "it is there on the source, and its set is {state:?}"
                    );
                    self.is_not_served()?;
                    self.program.kill(&self.pair.source)?;
                    if state.is_none() {
                        break Outcome::Damaged;
                    }
                }
                (source, target, state) => {
                    bail!("source {source:?}, target {target:?}, set {state:?}")
                }
            }
        };
        self.is_documented(outcome)?;
        self.mend()?;
        self.other_is_there()?;
        if self.plan.retry && matches!(outcome, Outcome::Lived | Outcome::DoubtLived) {
            self.retry().context("the retry")?;
        }
        self.lets_go()?;
        Ok(outcome)
    }

    /// Beside what holds for every fault.
    fn is_documented(&self, outcome: Outcome) -> Result<()> {
        let fault = self.plan.fault;
        let right = match fault {
            Fault::KillRestore => outcome == Outcome::Moved,
            Fault::CorruptTls => outcome == Outcome::Moved,
            Fault::Cut | Fault::Stall if self.plan.returns => outcome == Outcome::Moved,
            Fault::Memory => outcome == Outcome::Lived,
            Fault::KillDump => outcome != Outcome::Lost,
            Fault::KillCache | Fault::RestartCache => outcome != Outcome::Damaged,
            _ => !matches!(outcome, Outcome::Damaged | Outcome::Lost),
        };
        ensure!(right, "{fault} must not end so: {outcome}");
        Ok(())
    }

    /// The process is nowhere.
    fn loss(&self, struck: Phase) -> Result<Outcome> {
        let restored = self.cache_logged("restored; released");
        match self.plan.fault {
            Fault::KillDump if struck < Phase::Dead => Ok(Outcome::Damaged),
            fault if fault.ends_cache() && self.cache_logged("held for commit") && !restored => {
                // Told to stop it says so, if it knew that it had the only copy.
                Ok(Outcome::Lost)
            }
            fault => bail!("the process is lost, by: {fault}"),
        }
    }

    /// The states of the sessions in image-cache; `None` if it does not run.
    fn sessions(&self) -> Option<Vec<(String, String)>> {
        if lock(&self.cache).is_none() {
            return None;
        }
        let status = status(&self.pair.target, "image-cache", CACHE_CONTROL)?;
        let sessions = status["sessions"].as_array()?.iter();
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        sessions
            .map(|s| Some((text(&s["name"])?, text(&s["state"])?)))
            .collect()
    }

    /// What becomes of the set when nothing is under way any more.
    fn settled(&self) -> Result<Option<String>> {
        if lock(&self.cache).is_none() {
            return Ok(None);
        }
        let mut last = Vec::new();
        wait_for("image-cache coming to a decision", SETTLED, || {
            let sessions = self.sessions().context("no status of image-cache")?;
            let own: Vec<_> = sessions
                .into_iter()
                .filter(|(name, _)| name != OTHER)
                .collect();
            let decided = |state: &str| matches!(state, "in doubt" | "to be restored" | "aborted");
            last.clone_from(&own);
            if !own.iter().all(|(_, state)| decided(state)) {
                std::thread::sleep(Duration::from_millis(30));
                return Ok(None);
            }
            let mut kept = own.into_iter().filter(|(_, state)| state != "aborted");
            let one = kept.next().map(|(_, state)| state);
            ensure!(kept.next().is_none(), "two sets of one process");
            Ok(Some(one))
        })
        .with_context(|| format!("sessions: {last:?}"))
    }

    fn look(&self, host: &Host) -> Result<Copy> {
        let pid = self.program.pid;
        let alive = || host.is_alive(pid);
        if !alive()? {
            return Ok(Copy::Gone);
        }
        let before = self.program.ticks()?.len();
        let deadline = Instant::now() + STILL;
        while self.program.ticks()?.len() < before + 20 {
            if !alive()? {
                return Ok(Copy::Gone);
            }
            if Instant::now() > deadline {
                let state = host.process_state(pid)?;
                let place = fs::read_to_string(host.path(&format!("/proc/{pid}/wchan")));
                return Ok(Copy::Harmed(format!(
                    "it stands still, state {state:?}, in {place:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let report = self.program.report(host)?;
        let field = |name| {
            let words = report.split(' ');
            words
                .filter_map(|word| word.split_once('='))
                .find(|(n, _)| *n == name)
        };
        let (_, writes) = field("writes").context("no writes in the report")?;
        let (_, hash) = field("hash").context("no hash in the report")?;
        let expected = lock(&self.written).hash_after(writes.parse()?);
        Ok(match hash == expected {
            true => Copy::Unharmed,
            false => Copy::Harmed("its memory is not what it was".to_owned()),
        })
    }

    /// A restore does not succeed now.
    fn is_not_served(&self) -> Result<()> {
        if self.other.is_some() {
            // What `-D` itself serves is the other one; ours has no directory any more.
            let own = self.pair.target.path(&format!("{IMAGES}/{SESSION}"));
            ensure!(!own.exists(), "a set that was given up has its sockets");
            return Ok(());
        }
        let runs = lock(&self.cache).is_some();
        let attempt = match runs {
            true => self.end_restore(Restore::spawn(&self.pair.target, IMAGES)?)?,
            false => Attempt::Failed,
        };
        ensure!(
            attempt != Attempt::Restored,
            "a set was restored that must not be"
        );
        ensure!(
            !self.pair.target.is_alive(self.program.pid)?,
            "a restore that failed left something running"
        );
        Ok(())
    }

    fn restore_again(&self) -> Result<()> {
        let attempt = self.end_restore(Restore::spawn(&self.pair.target, IMAGES)?)?;
        ensure!(
            attempt == Attempt::Restored,
            "the restore once more: {attempt:?}"
        );
        Ok(())
    }

    // --- the operator -------------------------------------------------------------------------

    /// `image-cache release` or `drop`.
    fn on_target(&self, verb: &str) -> Result<()> {
        let name = self.kept_session()?;
        let argv = ["/opt/image-cache", verb, &name, "--control", CACHE_CONTROL];
        self.pair.target.run(&argv, SOON)?.ok()?;
        self.note(format!("image-cache {verb} {name}"));
        Ok(())
    }

    fn kept_session(&self) -> Result<String> {
        let sessions = self.sessions().context("no image-cache")?;
        let mut kept = sessions
            .into_iter()
            .filter(|(name, state)| name != OTHER && state != "aborted");
        Ok(kept.next().context("no session")?.0)
    }

    /// `image-proxy abort`: whether it was done, and what it said.
    fn abort(&self) -> Result<(bool, String)> {
        let name = self.kept_session()?;
        let argv = [
            "/opt/image-proxy",
            "abort",
            &name,
            "--control",
            PROXY_CONTROL,
        ];
        let output = self.pair.source.run(&argv, Duration::from_secs(60))?;
        self.note(format!(
            "image-proxy abort: {}, {}",
            output.status,
            output.stderr.trim()
        ));
        Ok((output.status.success(), output.stderr))
    }

    /// The process lives here: the target is to forget its copy.
    fn forget_copy(&self) -> Result<()> {
        ensure!(
            self.cache_logged("in doubt: "),
            "image-cache does not say that it is in doubt"
        );
        if self.plan.abort && lock(&self.proxy).is_some() {
            let (done, said) = self.abort()?;
            if done {
                return Ok(());
            }
            ensure!(
                said.contains("image-cache drop"),
                "it does not say what to do: {said}"
            );
        }
        self.on_target("drop")
    }

    /// Of a process that is dead here no command on the source forgets the copy.
    fn abort_is_refused(&self) -> Result<()> {
        ensure!(
            self.cache_logged("in doubt: "),
            "image-cache does not say that it is in doubt"
        );
        if self.plan.abort && lock(&self.proxy).is_some() {
            let (done, said) = self.abort()?;
            ensure!(!done, "image-proxy abort took the only copy: {said}");
        }
        Ok(())
    }

    /// The link and the daemons are there again.
    fn mend(&self) -> Result<()> {
        self.link.bar(false);
        self.link.release();
        if lock(&self.proxy).is_none() {
            self.start_proxy()?;
        }
        if lock(&self.cache).is_none() {
            self.start_cache()?;
        }
        Ok(())
    }

    /// What filled the memory was not touched.
    fn other_is_there(&self) -> Result<()> {
        let Some(other) = &self.other else {
            return Ok(());
        };
        let by_name = format!("{IMAGES}/{OTHER}");
        Restore::ok(&self.pair.target, &by_name, other.pid)?;
        other.runs_on()
    }

    fn retry(&self) -> Result<()> {
        if self.plan.fault == Fault::Memory
            && !(self.has_other() && self.plan.mib as u64 * MIB * 9 / 8 < self.memory_limit())
        {
            self.end_cache(Signal::TERM)?;
            let options = ["--link-timeout", "2"];
            *lock(&self.cache) = Some(self.pair.cache(&options)?);
        }
        ensure!(self.dump()?, "the dump failed");
        self.restore_again()?;
        let copies = (self.look(&self.pair.source)?, self.look(&self.pair.target)?);
        ensure!(
            copies == (Copy::Gone, Copy::Unharmed),
            "source and target: {copies:?}"
        );
        self.note("migrated after all");
        Ok(())
    }

    /// Nothing of it stays in image-cache.
    fn lets_go(&self) -> Result<()> {
        let mut last = None;
        wait_until("image-cache giving all memory back", SETTLED, || {
            std::thread::sleep(Duration::from_millis(10));
            last = status(&self.pair.target, "image-cache", CACHE_CONTROL);
            Ok(last
                .as_ref()
                .is_some_and(|s| s["memory"]["used_bytes"] == 0))
        })
        .with_context(|| format!("{last:#?}"))
    }
}

fn end(daemon: super::super::Daemon, signal: Signal) -> Result<()> {
    match signal {
        Signal::KILL => daemon.kill(),
        _ => daemon.terminate().map(drop),
    }
}

fn status(host: &Host, name: &str, control: &str) -> Option<serde_json::Value> {
    let program = format!("/opt/{name}");
    let argv = [&program, "status", "--json", "--control", control];
    let output = host.run(&argv, SOON).ok()?.ok().ok()?;
    serde_json::from_str(&output).ok()
}

/// The logs of all daemons of this name that the host has had, one after the other.
fn logs(host: &Host, name: &str) -> String {
    let Ok(entries) = fs::read_dir(host.path("/run/log")) else {
        return String::new();
    };
    let own = |path: &std::path::PathBuf| {
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        file.starts_with(name)
    };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).filter(own).collect();
    paths.sort();
    let texts = paths.iter().map(|path| fs::read(path).unwrap_or_default());
    let bytes: Vec<u8> = texts.flatten().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
