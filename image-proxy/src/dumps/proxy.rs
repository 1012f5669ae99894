//! Which runs and sessions there are: begins them, and puts away what has ended.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::control::status::Status;
use image_common::criu::options::Unserved;
use image_common::daemon::shutdown::Shutdown;
use image_common::image::{SessionName, SnapshotId};
use image_common::procfs::host_memory::HostMemory;
use image_common::procfs::process::{related, Process};
use image_common::tasks;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::dumps::late::Late;
use crate::dumps::memory_check;
use crate::dumps::settings::Settings;
use crate::failure::Failure;
use crate::link::connect::Target;
use crate::link::decision::Decision;
use crate::pipe_budget::PipeBudget;
use crate::session::arrival_order::ArrivalOrder;
use crate::session::criu::Criu;
use crate::session::drive::{broke, drive};
use crate::session::lineage::Lineage;
use crate::session::phase::Ended;
use crate::session::run::{Run, Told};
use crate::session::Session;

/// Series that wait for their next run. Each holds a connection, and memory in the cache.
const OPEN_SERIES: usize = 64;

/// Dumps in doubt whose links are held. The oldest is closed when there are more: then its set
/// can be dropped on the target alone.
const OPEN_DOUBTS: usize = 64;

/// Ended `--remote` runs that are remembered, for connections that come late.
const RECENT_RUNS: usize = 16;

pub struct Proxy {
    pub settings: Settings,
    pub arrival_order: Arc<ArrivalOrder>,
    pub shutdown: Shutdown,
    pub(super) registry: Mutex<Registry>,
    pub(super) changes: watch::Sender<()>,
    pub(super) memory: HostMemory,
}

/// A run and the session that it belongs to.
#[derive(Clone)]
pub struct Active {
    pub run: Arc<Run>,
    pub session: Arc<Session>,
}

/// A `--stream` connection: CRIU connects before its pre-dump script and writes after it, so
/// the run begins with whichever comes first, the announcement or an image. A connection with
/// neither belongs to no dump.
pub struct StreamConnection {
    pub snapshot: SnapshotId,
    pub pid: Option<i32>,
    /// From its connect on, so that its end is seen.
    pub(super) criu: Criu,
    pub(super) run: Mutex<Option<Active>>,
}

#[derive(Default)]
pub(super) struct Registry {
    /// Sessions whose last run was a pre-dump, the newest last: a later run goes on with one.
    pub(super) series: Vec<Arc<Session>>,
    pub(super) runs: Vec<Active>,
    pub(super) recent: Vec<Active>,
    pub(super) streams: Vec<Arc<StreamConnection>>,
    /// Sessions of dumps that were announced before anything of them came.
    pub(super) announced: Vec<Announced>,
    /// Dumps in doubt, the newest last. Their links stay as long as they hold: by them an
    /// operator can still give the set on the target up.
    pub(super) doubts: Vec<Doubt>,
    /// Commits whose script is being told, or was.
    pub(super) concluding: usize,
    /// image-proxy stops, and there was a decision that the target has not heard.
    pub(super) unheard: bool,
    /// Sessions that are being closed; a new one of the same name waits for them.
    pub(super) closing: Vec<(SessionName, CancellationToken)>,
}

/// A dump of which the script has spoken and nothing has come yet.
pub(super) struct Announced {
    pub(super) pid: i32,
    /// `None`: it cannot be seen from here.
    pub(super) criu: Option<Arc<Process>>,
    /// Its connections can be told from other ones.
    pub(super) found: bool,
    /// CRIU's images directory, as far as the script knew it.
    pub(super) snapshot: SnapshotId,
    pub(super) session: Arc<Session>,
    /// Ends the watch for the end of its CRIU, which need not be near.
    pub(super) _watch: DropGuard,
}

/// A dump whose CRIU was told to kill, or may have killed, and whose process was not seen to die; or one of which the
/// target does not know what is known here.
#[derive(Clone)]
pub struct Doubt {
    pub active: Active,
    pub told: Told,
    /// What the target is to hear.
    pub late: Option<Late>,
}

impl Doubt {
    /// For the operator.
    pub fn state(&self) -> String {
        match &self.late {
            None => "in doubt".to_owned(),
            Some(late) => format!("in doubt: {}, the target does not know yet", late.process()),
        }
    }
}

/// No run can begin or be found.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error("image-proxy is stopping")]
    Stopping,
    #[error("no dump of this CRIU (pid {0}) has connected to image-proxy: give CRIU --stream or --remote, and one of image-proxy's images directories as -D")]
    NotConnected(i32),
    #[error("cannot match this page-server connection to a dump: {0} dumps are waiting and the client's pid is not visible. Dump one after another, or run image-proxy where it sees CRIU's processes")]
    Ambiguous(usize),
    #[error("CRIU (pid {0}), which ran this script, has died")]
    Died(i32),
    #[error("CRIU (pid {0}) connected to the page server a second time in one dump")]
    Again(i32),
    #[error(transparent)]
    Unserved(#[from] Unserved),
}

impl Registry {
    /// Which announcement is that of CRIU `pid`.
    pub(super) fn announced_by(&self, pid: i32) -> Option<usize> {
        let exact = self.announced.iter().position(|a| a.pid == pid);
        exact.or_else(|| self.announced.iter().position(|a| related(pid, a.pid)))
    }
}

impl Proxy {
    pub fn new(
        settings: Settings,
        arrival_order: Arc<ArrivalOrder>,
        shutdown: Shutdown,
    ) -> Arc<Self> {
        Arc::new(Self {
            settings,
            arrival_order,
            shutdown,
            registry: Mutex::default(),
            changes: watch::Sender::new(()),
            memory: HostMemory::default(),
        })
    }

    pub(super) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self) {
        self.changes.send_replace(());
    }

    // --- begin and end --------------------------------------------------------------------

    /// The session for a new run of CRIU `pid` that is no round of the page server, and whether
    /// it was announced: the announced one, the series that goes on, or a new one.
    pub(super) fn session_for_run(self: &Arc<Self>, pid: Option<i32>) -> (Arc<Session>, bool) {
        let mut registry = self.registry();
        let own = match pid {
            Some(pid) => registry.announced_by(pid),
            None => None,
        };
        if let Some(at) = own {
            return (registry.announced.remove(at).session, true);
        }
        let at = registry.series.iter().rposition(|s| s.lineage().is_none());
        let before = at.map(|at| registry.series.remove(at));
        (self.session_after(&mut registry, before), false)
    }

    /// The session of a series, if it can go on, or a new one.
    pub(super) fn session_after(
        self: &Arc<Self>,
        registry: &mut Registry,
        series: Option<Arc<Session>>,
    ) -> Arc<Session> {
        if let Some(session) = series {
            if session.is_usable() {
                return session;
            }
            self.close(registry, session, Some("its link is lost"));
        }
        // Such ones hold their name for nothing.
        let (live, dead) = std::mem::take(&mut registry.series)
            .into_iter()
            .partition(|s| s.is_usable());
        registry.series = live;
        for session in dead {
            self.close(registry, session, Some("its link is lost"));
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
        let lineage = session.lineage();
        // Runs of these are told from each other by nothing but their order; two are left only
        // if runs were beside each other.
        let older = registry.series.iter().position(|s| match &lineage {
            None | Some(Lineage::Unseen(_)) => s.lineage() == lineage,
            Some(Lineage::Images(_) | Lineage::Unclear) => false,
        });
        if let Some(at) = older {
            let older = registry.series.remove(at);
            self.close(registry, older, Some("another series goes on"));
        }
        if lineage == Some(Lineage::Unclear) {
            return self.close(
                registry,
                session,
                Some("its next round cannot be told from others"),
            );
        }
        registry.series.push(session);
        if registry.series.len() > OPEN_SERIES {
            let oldest = registry.series.remove(0);
            tracing::error!(session = %oldest.name, "the series of pre-dumps is given up: {OPEN_SERIES} newer ones are open; its next round will be a full one");
            self.close(registry, oldest, Some("too many series are open"));
        }
    }

    pub(super) fn close(
        self: &Arc<Self>,
        registry: &mut Registry,
        session: Arc<Session>,
        reason: Option<&'static str>,
    ) {
        self.close_decided(registry, session, reason, None);
    }

    /// `unheard`: what the target may not have heard if it does not answer the farewell.
    pub(super) fn close_decided(
        self: &Arc<Self>,
        registry: &mut Registry,
        session: Arc<Session>,
        reason: Option<&'static str>,
        unheard: Option<(Active, Decision)>,
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
        let proxy = self.clone();
        let closing = async move {
            let heard = session.close(reason).await;
            match unheard {
                Some((active, _)) if heard => proxy.forget(&active.run),
                Some((active, decision)) => proxy.bring(&active, decision),
                None => {}
            }
            close.0(close.1);
        };
        tasks::spawn("closing a session", closing, move |_| failed.0(failed.1));
    }

    pub(super) fn begun(self: &Arc<Self>, active: &Active) {
        self.registry().runs.push(active.clone());
        self.changed();
        let (proxy, active) = (self.clone(), active.clone());
        let participant = PipeBudget::of_images().join();
        tokio::spawn(async move {
            let _participant = participant;
            let Active { run, session } = &active;
            let driven = tasks::caught("a dump", drive(session, run, &proxy.arrival_order)).await;
            let ended = driven.unwrap_or_else(|e| broke(session, run, Failure::bug(e.to_string())));
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
        let (state, session) = (active.run.state(), active.session.clone());
        // As far as the target may have it.
        let decided = |decision| state.may_be_held.then(|| (active.clone(), decision));
        match ended {
            Ended::PreDump => self.put_back(&mut registry, session),
            Ended::Dump => {
                self.close_decided(&mut registry, session, None, decided(Decision::Commit))
            }
            Ended::InDoubt(_) => self.keep_doubt(&mut registry, active),
            Ended::Failed(reason) => {
                let aborted = decided(Decision::Abort(reason.text()));
                self.close_decided(&mut registry, session, Some("the dump failed"), aborted);
            }
        }
        drop(registry);
        self.changed();
        if matches!(ended, Ended::Failed(_)) && !state.is_gated() {
            self.arrival_order.veto(&active.run, &state);
        }
        active.run.drainable();
    }

    fn keep_doubt(self: &Arc<Self>, registry: &mut Registry, active: &Active) {
        if !active.session.is_usable() {
            self.close(registry, active.session.clone(), None);
        }
        let doubt = Doubt {
            active: active.clone(),
            told: active.run.take_told(),
            late: None,
        };
        self.add_doubt(registry, doubt);
    }

    pub(super) fn add_doubt(self: &Arc<Self>, registry: &mut Registry, doubt: Doubt) {
        registry.doubts.push(doubt);
        if registry.doubts.len() > OPEN_DOUBTS {
            let Doubt { active, late, .. } = registry.doubts.remove(0);
            if let Some(late) = late {
                late.over.cancel();
                let command = late.command(&active.session.handle());
                tracing::error!(
                    session = %active.session.name,
                    "the target has not heard that {}, and {OPEN_DOUBTS} newer dumps are in doubt: image-proxy does not \
                     say so any more. Run `{command}` there",
                    late.process()
                );
            }
            let reason = Some("too many dumps are in doubt");
            self.close(registry, active.session, reason);
        }
    }

    /// Whether one more dump has room beside those under way.
    pub fn check_memory(&self) -> Result<(), Failure> {
        let registry = self.registry();
        let sessions = registry.runs.len() + registry.announced.len();
        drop(registry);
        let connections = self.settings.target.connections;
        memory_check::check(&self.memory, sessions, connections)
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
        for doubt in &registry.doubts {
            sessions.push(doubt.active.session.status(&doubt.state(), None));
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

    pub(super) fn accepts_runs(&self) -> Result<(), RunError> {
        match self.shutdown.requested.is_cancelled() {
            true => Err(RunError::Stopping),
            false => Ok(()),
        }
    }
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
