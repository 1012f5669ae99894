//! Which runs and sessions there are, and which of them a connection or a script is about.

mod drain;
pub mod in_doubt;
pub mod memory_check;
pub mod page_server;
pub mod round_client;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use image_common::control::status::Status;
use image_common::criu::options::Unserved;
use image_common::criu::remote::IdSpelling;
use image_common::daemon::shutdown::Shutdown;
use image_common::image::{ImageName, SessionName, SnapshotId};
use image_common::procfs::host_memory::HostMemory;
use image_common::procfs::process::{related, Process};
use image_common::tasks;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::cli::Parents;
use crate::dumps::in_doubt::Doubt;
use crate::dumps::round_client::Origin;
use crate::frontend::Frontier;
use crate::link::connect::Target;
use crate::pipe_budget::Pipes;
use crate::session::parent_images::Kept;
use crate::session::run::{Ended, Run};
use crate::session::{broke, drive, Criu, Session};

/// A message of every CRIU whose dump fails if it is told of parents: in each version of the
/// pid-reuse check (`mem.c`) since it came in spring 2018, and in nothing before it.
const PID_REUSE_CHECK: &[u8] = b"Pid reuse%s detected for pid";

/// How long a new run waits for what an earlier one of the series still has under way.
const SETTLE: Duration = Duration::from_secs(10);

/// Series that wait for their next run. Each holds a connection, and memory in the cache.
const OPEN_SERIES: usize = 64;

/// Ended `--remote` runs that are remembered, for connections that come late.
const RECENT_RUNS: usize = 16;

pub struct Settings {
    pub target: Target,
    pub session: Option<SessionName>,
    pub parents: Parents,
    pub commit_timeout: Duration,
    /// Before the tasks are frozen.
    pub reserve_timeout: Duration,
}

pub struct Proxy {
    pub settings: Settings,
    pub frontier: Arc<Frontier>,
    pub shutdown: Shutdown,
    registry: Mutex<Registry>,
    changes: watch::Sender<()>,
    memory: HostMemory,
}

impl StreamConnection {
    /// Its run, if it has begun, cannot go on.
    pub fn fail(&self, reason: &str) {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(active) = &*run {
            active.run.fail(reason);
        }
    }
}

/// A run and the session that it belongs to.
#[derive(Clone)]
pub struct Active {
    pub run: Arc<Run>,
    pub session: Arc<Session>,
}

/// A `--stream` connection: CRIU connects before its pre-dump script and writes after it, so
/// the run begins with whichever comes first, the announcement or an image. A connection with
/// neither is nobody's dump.
pub struct StreamConnection {
    pub snapshot: SnapshotId,
    pub pid: Option<i32>,
    /// From its connect on, so that its end is seen.
    criu: Criu,
    run: Mutex<Option<Active>>,
}

#[derive(Default)]
struct Registry {
    /// Sessions whose last run was a pre-dump, the newest last: a later run goes on with one.
    series: Vec<Arc<Session>>,
    runs: Vec<Active>,
    recent: Vec<Active>,
    streams: Vec<Arc<StreamConnection>>,
    /// Sessions of dumps that were announced before anything of them came.
    announced: Vec<Announced>,
    /// Dumps in doubt, the newest last. Their links stay as long as they hold: by them an
    /// operator can still give the set on the target up.
    doubts: Vec<Doubt>,
    /// Sessions that are being closed; a new one of the same name waits for them.
    closing: Vec<(SessionName, CancellationToken)>,
}

/// A dump of which the script has spoken and nothing has come yet.
struct Announced {
    pid: i32,
    /// `None`: it cannot be seen from here.
    criu: Option<Arc<Process>>,
    /// Its connections can be told from other ones.
    found: bool,
    /// CRIU's images directory, as far as the script knew it.
    snapshot: SnapshotId,
    session: Arc<Session>,
    /// Ends the watch for the end of its CRIU, which need not be near.
    _watch: DropGuard,
}

/// No run can begin or be found.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("image-proxy is stopping")]
    Stopping,
    #[error("no dump of this CRIU (pid {0}) has connected: is its -D one of image-proxy's images directories, and has it --stream or --remote?")]
    NotConnected(i32),
    #[error("several dumps wait for their pages, and whose this connection is cannot be seen")]
    Whose,
    #[error("the CRIU of this script (pid {0}) has died")]
    Died(i32),
    #[error("CRIU (pid {0}) connected to the page server a second time in one dump")]
    Again(i32),
    #[error(transparent)]
    Unserved(#[from] Unserved),
}

impl Registry {
    /// Which announcement is that of CRIU `pid`.
    fn announced_by(&self, pid: i32) -> Option<usize> {
        let exact = self.announced.iter().position(|a| a.pid == pid);
        exact.or_else(|| self.announced.iter().position(|a| related(pid, a.pid)))
    }
}

impl Proxy {
    pub fn new(settings: Settings, frontier: Arc<Frontier>, shutdown: Shutdown) -> Arc<Self> {
        Arc::new(Self {
            settings,
            frontier,
            shutdown,
            registry: Mutex::default(),
            changes: watch::Sender::new(()),
            memory: HostMemory::default(),
        })
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_replace(());
    }

    // --- begin and end --------------------------------------------------------------------

    /// The session for a new run of CRIU `pid` that is no round of the page server, and whether
    /// it was announced: the announced one, the series that goes on, or a new one.
    fn session_for_run(self: &Arc<Self>, pid: Option<i32>) -> (Arc<Session>, bool) {
        let mut registry = self.registry();
        let own = match pid {
            Some(pid) => registry.announced_by(pid),
            None => None,
        };
        if let Some(at) = own {
            return (registry.announced.remove(at).session, true);
        }
        let at = registry.series.iter().rposition(|s| s.origin().is_none());
        let before = at.map(|at| registry.series.remove(at));
        (self.session_after(&mut registry, before), false)
    }

    /// The session of a series, if it can go on, or a new one.
    fn session_after(
        self: &Arc<Self>,
        registry: &mut Registry,
        series: Option<Arc<Session>>,
    ) -> Arc<Session> {
        if let Some(session) = series {
            if session.is_usable() {
                return session;
            }
            self.close(registry, session, "its link is lost");
        }
        // Such ones hold their name for nothing.
        let (live, dead) = std::mem::take(&mut registry.series)
            .into_iter()
            .partition(|s| s.is_usable());
        registry.series = live;
        for session in dead {
            self.close(registry, session, "its link is lost");
        }
        let name = match &self.settings.session {
            None => SessionName::unique(),
            Some(name) => {
                let used = |n: &SessionName| {
                    let running = registry.runs.iter().map(|a| &a.session);
                    let announced = registry.announced.iter().map(|a| &a.session);
                    let doubts = registry.doubts.iter().map(|d| &d.active.session);
                    let linked = doubts.filter(|s| s.is_usable());
                    let idle = linked.chain(&registry.series);
                    let mut all = running.chain(announced).chain(idle);
                    all.any(|s| s.name == *n)
                };
                free_name(name, used)
            }
        };
        let earlier: Vec<_> = registry
            .closing
            .iter()
            .filter(|(closing, _)| *closing == name)
            .map(|(_, closed)| closed.clone())
            .collect();
        let before = async move {
            for closed in earlier {
                closed.cancelled().await;
            }
        };
        Session::start(name, self.settings.target.clone(), before)
    }

    /// The session waits for the next run of its series.
    fn put_back(self: &Arc<Self>, registry: &mut Registry, session: Arc<Session>) {
        let origin = session.origin();
        // Runs of these are told from each other by nothing but their order; two are left only
        // if runs were beside each other.
        let older = registry.series.iter().position(|s| match &origin {
            None | Some(Origin::Unseen(_)) => s.origin() == origin,
            Some(Origin::Images(_) | Origin::Unclear) => false,
        });
        if let Some(at) = older {
            let older = registry.series.remove(at);
            self.close(registry, older, "another series goes on");
        }
        if origin == Some(Origin::Unclear) {
            return self.close(registry, session, "nothing can be known as its next round");
        }
        registry.series.push(session);
        if registry.series.len() > OPEN_SERIES {
            let oldest = registry.series.remove(0);
            tracing::error!(session = %oldest.name, "the series is given up: {OPEN_SERIES} newer ones are open");
            self.close(registry, oldest, "too many series are open");
        }
    }

    fn close(
        self: &Arc<Self>,
        registry: &mut Registry,
        session: Arc<Session>,
        reason: &'static str,
    ) {
        let closed = CancellationToken::new();
        registry
            .closing
            .push((session.name.clone(), closed.clone()));
        let proxy = self.clone();
        // Also after a panic: the next session of this name waits for it.
        let over = move |closed: CancellationToken| {
            closed.cancel();
            proxy
                .registry()
                .closing
                .retain(|(_, token)| !token.is_cancelled());
            proxy.changed();
        };
        let (close, failed) = ((over.clone(), closed.clone()), (over, closed));
        let closing = async move {
            session.close(reason).await;
            close.0(close.1);
        };
        tasks::spawn("closing a session", closing, move |_| failed.0(failed.1));
    }

    fn begun(self: &Arc<Self>, active: &Active) {
        self.registry().runs.push(active.clone());
        self.changed();
        let (proxy, active) = (self.clone(), active.clone());
        let partner = Pipes::of_images().partner();
        tokio::spawn(async move {
            let _partner = partner;
            let Active { run, session } = &active;
            let driven = tasks::caught("a dump", drive(session, run, &proxy.frontier)).await;
            let ended = driven.unwrap_or_else(|e| broke(session, run, &e.to_string()));
            proxy.ended(&active, &ended);
        });
    }

    fn ended(self: &Arc<Self>, active: &Active, ended: &Ended) {
        let mut registry = self.registry();
        registry.runs.retain(|a| !Arc::ptr_eq(&a.run, &active.run));
        registry.recent.push(active.clone());
        if registry.recent.len() > RECENT_RUNS {
            registry.recent.remove(0);
        }
        match ended {
            Ended::PreDump => self.put_back(&mut registry, active.session.clone()),
            Ended::Dump => self.close(&mut registry, active.session.clone(), ""),
            Ended::InDoubt(_) => self.keep_doubt(&mut registry, active),
            Ended::Failed(_) => {
                self.close(&mut registry, active.session.clone(), "the dump failed")
            }
        }
        drop(registry);
        self.changed();
        let state = active.run.state();
        if matches!(ended, Ended::Failed(_)) && !state.gated {
            self.frontier.veto(&active.run, &state);
        }
        active.run.drainable();
    }

    // --- --stream -------------------------------------------------------------------------

    pub fn stream_connected(&self, snapshot: SnapshotId, criu: Criu) -> Arc<StreamConnection> {
        let connection = Arc::new(StreamConnection {
            snapshot,
            pid: criu.pid,
            criu,
            run: Mutex::default(),
        });
        self.registry().streams.push(connection.clone());
        self.changed();
        connection
    }

    pub fn stream_closed(&self, connection: &Arc<StreamConnection>) {
        self.registry()
            .streams
            .retain(|c| !Arc::ptr_eq(c, connection));
        let run = connection
            .run
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(active) = run {
            active.run.source_ended();
        }
    }

    /// The dump of this connection must not be. CRIU notices at its first image at the latest.
    pub fn refuse_stream(&self, connection: &StreamConnection, reason: &str) {
        let run = connection
            .run
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Its script has spoken already.
        if let Some(active) = &*run {
            active.run.fail(reason);
        }
    }

    /// The run of a `--stream` connection, begun now if need be.
    pub async fn stream_run(
        self: &Arc<Self>,
        connection: &StreamConnection,
    ) -> Result<Active, RunError> {
        let begun = || {
            let run = connection
                .run
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            run.clone()
        };
        if let Some(active) = begun() {
            return Ok(active);
        }
        self.accepts_runs()?;
        let criu = connection.criu.clone();
        let earlier = self.registry().runs.clone();
        // All at once: one after the other, the last of many dumps beside each other would wait for
        // the sum of what it waits for each.
        let mut settling = JoinSet::new();
        for Active { run, .. } in earlier {
            if !run.state().dialect.says_finish() {
                let pid = connection.pid;
                settling.spawn(async move { settle_stream(&run, pid).await });
            }
        }
        settling.join_all().await;
        // Somebody else may have begun it meanwhile.
        let mut run = connection
            .run
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(active) = &*run {
            return Ok(active.clone());
        }
        let (session, gated) = self.session_for_run(connection.pid);
        let active = Active {
            run: session.begin_stream(connection.snapshot.clone(), gated, criu),
            session,
        };
        *run = Some(active.clone());
        self.begun(&active);
        Ok(active)
    }

    /// Waits until the run of a connection is over; gives why, if it failed.
    pub async fn failure_of(&self, connection: &StreamConnection) -> Option<String> {
        let run_of = || {
            let run = connection
                .run
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            run.as_ref().map(|a| a.run.clone())
        };
        let mut changes = self.changes.subscribe();
        let run = loop {
            changes.mark_unchanged();
            match run_of() {
                Some(run) => break run,
                None => drop(changes.changed().await),
            }
        };
        let over = |s: &crate::session::run::State| s.ended.is_some() || s.failure().is_some();
        run.wait_for(over).await.failure().map(str::to_owned)
    }

    // --- --remote -------------------------------------------------------------------------

    /// A dump or pre-dump pushes its snapshot id: a new run.
    pub async fn push(
        self: &Arc<Self>,
        snapshot: SnapshotId,
        spelling: IdSpelling,
        criu: Criu,
    ) -> Result<Active, RunError> {
        self.accepts_runs()?;
        if let Some(earlier) = self.remote_run(|_| true).filter(|a| a.run.is_active()) {
            settle(&earlier.run, criu.pid).await;
        }
        let with_parents = match self.settings.parents {
            Parents::Always => true,
            Parents::Never => false,
            // Ids are empty since 2019, the check is there since 2018. In between, only the
            // executable tells. If it cannot be read, a full dump is always right.
            Parents::Auto => {
                let check = criu
                    .process
                    .as_ref()
                    .and_then(|c| c.executable_contains(PID_REUSE_CHECK));
                spelling == IdSpelling::Null && check == Some(false)
            }
        };
        self.accepts_runs()?;
        let (session, gated) = self.session_for_run(criu.pid);
        let watched = criu.process.clone();
        // It can be seen from here, and was not there any more when it was looked up: it has exited.
        let exited = criu.pid.is_some() && watched.is_none();
        let active = Active {
            run: session.begin_remote(snapshot, with_parents, gated, criu),
            session,
        };
        self.begun(&active);
        if watched.is_some() || exited {
            let (proxy, run, failed) = (self.clone(), active.run.clone(), active.run.clone());
            let exits = async move {
                if let Some(process) = watched {
                    process.exited().await;
                }
            };
            let watch = async move {
                tokio::select! {
                    () = exits => {}
                    _ = run.wait_for(crate::session::run::State::is_over) => return,
                }
                // It may have connected, and said FINISH, just before it exited.
                proxy.frontier.absorbed().await;
                run.source_ended();
            };
            tasks::spawn("watching a CRIU", watch, move |why| failed.fail(why));
        }
        Ok(active)
    }

    /// The newest `--remote` run that fits; one that still runs before one that has ended.
    pub fn remote_run(&self, fits: impl Fn(&Run) -> bool) -> Option<Active> {
        let registry = self.registry();
        let all = registry.recent.iter().chain(&registry.runs).rev();
        let is_remote = |a: &&Active| a.run.state().dialect.is_remote();
        all.filter(is_remote).find(|a| fits(&a.run)).cloned()
    }

    /// The `--remote` run of a process, or of one that it descends from.
    pub fn remote_run_by(&self, pid: i32, fits: impl Fn(&Run) -> bool) -> Option<Active> {
        let own = self.remote_run(|run| run.is_criu(pid) && fits(run));
        own.or_else(|| self.remote_run(|run| run.pid.is_some_and(|p| related(p, pid)) && fits(run)))
    }

    /// The `--remote` run of a process; failing that, the newest.
    pub fn remote_run_of(&self, pid: Option<i32>) -> Option<Active> {
        let own = pid.and_then(|pid| self.remote_run_by(pid, |_| true));
        own.or_else(|| self.remote_run(|_| true))
    }

    /// The run that says FINISH. Never somebody else's, unless pids cannot be seen.
    pub fn remote_run_to_finish(&self, pid: Option<i32>) -> Option<Active> {
        match pid {
            Some(pid) => self.remote_run_by(pid, |_| true),
            None => self.remote_run(|_| true),
        }
    }

    /// The run that writes a snapshot: two CRIUs may have the same `-D`, so the process counts
    /// first.
    pub fn remote_run_of_snapshot(
        &self,
        pid: Option<i32>,
        snapshot: &SnapshotId,
    ) -> Option<Active> {
        let own = pid.and_then(|pid| self.remote_run_by(pid, |run| run.snapshot == *snapshot));
        own.or_else(|| self.remote_run(|run| run.snapshot == *snapshot))
    }

    pub fn read_back(
        &self,
        pid: Option<i32>,
        snapshot: &SnapshotId,
        name: &ImageName,
    ) -> Option<Kept> {
        self.remote_run_of(pid)?.session.read_back(snapshot, name)
    }

    // --- the action script ----------------------------------------------------------------

    /// The run that the script of CRIU `pid` speaks for, begun if it has only connected.
    pub async fn run_of_script(
        self: &Arc<Self>,
        pid: i32,
        fits: impl Fn(&Run) -> bool,
    ) -> Result<Active, RunError> {
        let (runs, idle) = {
            let registry = self.registry();
            let fits = |a: &&Active| a.run.is_active() && fits(&a.run);
            let runs: Vec<_> = registry.runs.iter().filter(fits).cloned().collect();
            let has_run = |c: &StreamConnection| {
                c.run
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .is_some()
            };
            let idle = registry.streams.iter().filter(|c| !has_run(c)).cloned();
            (runs, idle.collect::<Vec<_>>())
        };
        // Whose number it is, before anybody's family is looked up: of many dumps at once each would
        // look at all others.
        for exactly in [true, false] {
            let own = |p: Option<i32>| p.is_some_and(|p| p == pid || (!exactly && related(p, pid)));
            if let Some(active) = runs.iter().rev().find(|a| own(a.run.pid)) {
                return Ok(active.clone());
            }
            if let Some(connection) = idle.iter().rev().find(|c| own(c.pid)) {
                return self.stream_run(connection).await;
            }
        }
        // A dump whose process cannot be seen from here is not taken for this one, also if it is the only one.
        Err(RunError::NotConnected(pid))
    }

    /// Whether this CRIU was told before that it may kill what it dumps, and nothing has failed since.
    pub fn told_before(&self, criu: i32, root: Option<i32>) -> bool {
        let registry = self.registry();
        registry.runs.iter().any(|a| a.run.was_told(criu, root))
    }

    /// The run that this CRIU has announced before, if nothing of it has come since.
    pub fn announced_before(&self, criu: i32) -> Option<Active> {
        let registry = self.registry();
        let own = |a: &&Active| a.run.is_criu(criu) && a.run.is_announced_alone();
        registry.runs.iter().rev().find(own).cloned()
    }

    /// The session of an announcement that this CRIU has made before, if nothing of it has come since.
    pub fn announced_ahead_before(&self, criu: i32, snapshot: &SnapshotId) -> Option<Arc<Session>> {
        let registry = self.registry();
        let own = |a: &&Announced| a.pid == criu && a.snapshot == *snapshot;
        let announced = registry.announced.iter().find(own)?;
        let session = announced.session.clone();
        session.is_usable().then_some(session)
    }

    /// Why the dump that the CRIU `pid` announced is over already, if it is.
    pub fn failure_of_announced(&self, pid: i32) -> Option<String> {
        let registry = self.registry();
        let mut recent = registry.recent.iter().rev();
        let gated = |a: &&Active| a.run.state().gated;
        let own = |a: &Active| a.run.pid.is_some_and(|p| related(p, pid));
        let own = recent.find(|a| gated(a) && own(a))?;
        own.run.state().failure().map(str::to_owned)
    }

    /// Whether one more dump has room beside those under way.
    pub fn check_memory(&self) -> Result<(), String> {
        let registry = self.registry();
        let sessions = registry.runs.len() + registry.announced.len();
        drop(registry);
        let connections = self.settings.target.connections;
        crate::dumps::memory_check::check(&self.memory, sessions, connections)
    }

    pub fn status(&self) -> Status {
        let registry = self.registry();
        let announced = registry.announced.iter().map(|a| &a.session);
        let idle = registry.series.iter().chain(announced);
        let mut sessions: Vec<_> = idle
            .map(|session| session.status("waits for the next run", None))
            .collect();
        for Active { run, session } in &registry.runs {
            sessions.push(session.status("running", Some(run.status())));
        }
        for Doubt { active, .. } in &registry.doubts {
            sessions.push(active.session.status("in doubt", None));
        }
        let Target { host, port, .. } = &self.settings.target;
        Status {
            program: "image-proxy".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cache: Some(format!("{host}:{port}")),
            memory: None,
            sessions,
        }
    }

    // --- stopping -------------------------------------------------------------------------

    fn accepts_runs(&self) -> Result<(), RunError> {
        match self.shutdown.requested.is_cancelled() {
            true => Err(RunError::Stopping),
            false => Ok(()),
        }
    }
}

/// Waits until an earlier run is over, now that another one begins. Two CRIUs that both live
/// may dump beside each other; otherwise the earlier one cannot have anything left but what
/// is on its way to us.
async fn settle(earlier: &Run, next: Option<i32>) {
    if earlier.criu_may_live() && earlier.pid.is_some() && earlier.pid != next {
        return whole_ends(earlier).await;
    }
    earlier.followed();
    let under_way = earlier.wait_for(|s| s.ended.is_some() || (s.open == 0 && !s.is_whole()));
    let _ = tokio::time::timeout(SETTLE, under_way).await;
    // It may be one of those whose pre-dumps have no inventory.
    earlier.source_ended();
    let decided = earlier.wait_for(|s| s.ended.is_some() || s.failure().is_some());
    let _ = tokio::time::timeout(SETTLE, decided).await;
    if earlier.is_active() {
        earlier.fail("another dump began before this one was whole");
    }
    // Its session is put back for the next run, or closed, right after it ended.
    let ended = earlier.wait_for(|s| s.ended.is_some());
    let _ = tokio::time::timeout(SETTLE, ended).await;
    tokio::task::yield_now().await;
}

/// A CRIU that lives beside the next one. If it has written everything, it may be a pre-dump
/// whose acknowledgement is on its way: the next run joins its series.
async fn whole_ends(earlier: &Run) {
    /// How long its last bytes may be on their way through us.
    const LAST_BYTES: Duration = Duration::from_millis(250);
    let whole = earlier.wait_for(|s| s.is_whole() || s.ended.is_some());
    if tokio::time::timeout(LAST_BYTES, whole).await.is_ok() {
        let known = earlier.wait_for(|s| s.ended.is_some() || s.is_dump());
        let _ = tokio::time::timeout(SETTLE, known).await;
        tokio::task::yield_now().await;
    }
}

/// The same for `--stream`, where CRIU's last bytes, and the end of its connection, may still
/// be on their way through us when its successor has connected.
async fn settle_stream(earlier: &Run, next: Option<i32>) {
    /// How late the end of a connection can be seen of a process that goes on.
    const END_SEEN: Duration = Duration::from_millis(100);
    let over = |s: &crate::session::run::State| s.ended.is_some();
    if earlier.criu_may_live() {
        if earlier.pid.is_some() && earlier.pid != next {
            return whole_ends(earlier).await;
        }
        let ends = earlier.wait_for(|s| s.ended.is_some() || s.source_ended);
        if tokio::time::timeout(END_SEEN, ends).await.is_err() {
            return;
        }
    }
    let _ = tokio::time::timeout(SETTLE, earlier.wait_for(over)).await;
    tokio::task::yield_now().await;
}

/// `name`, or with the first free number behind it: two runs beside each other cannot both be
/// the session of that name.
fn free_name(name: &SessionName, used: impl Fn(&SessionName) -> bool) -> SessionName {
    let numbered = (2..1000).filter_map(|n| {
        let room = SessionName::MAX_BYTES - 4;
        let stem = &name.as_str()[..name.as_str().len().min(room)];
        SessionName::new(&format!("{stem}-{n}")).ok()
    });
    let mut candidates = std::iter::once(name.clone()).chain(numbered);
    candidates
        .find(|n| !used(n))
        .unwrap_or_else(SessionName::unique)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_sessions_beside_each_other() {
        let name = |t: &str| SessionName::new(t).unwrap();
        assert_eq!(free_name(&name("web"), |_| false), name("web"));
        assert_eq!(
            free_name(&name("web"), |n| n.as_str() == "web"),
            name("web-2")
        );
        let long = name(&"w".repeat(64));
        let second = free_name(&long, |n| *n == long);
        assert!(second.as_str().ends_with("w-2"));
    }
}
