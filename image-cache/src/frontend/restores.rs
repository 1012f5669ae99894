//! Did a restore succeed? CRIU hardly says, and the answer decides whether the only copy of a
//! process is given back.
//!
//! Signs, each from CRIU's behaviour (`restore_root_task` in `cr-restore.c`):
//! - every image that a restore needs was asked for;
//! - the action script at `pre-resume`: CRIU runs it when all has succeeded;
//! - its main process closes the `--stream` connection and lives on, if only for a moment,
//!   while a failed one exits with the connection open;
//! - the restored tasks read their memory themselves, so they are known; after a failure CRIU
//!   kills them, after a success they run. `--remote` CRIUs until 2020 say FINISH in both cases.
//!   A `--stream` CRIU that was killed leaves half-restored tasks behind, which live, too: still with its code.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use image_common::image::ImageName;
use image_common::process::{related, Process};
use tokio_util::task::AbortOnDropHandle;

use crate::store::session::Session;
use crate::store::set::{RestoreId, Set};

/// Tasks that a failed restore killed are gone after this.
const KILLED_WITHIN: Duration = Duration::from_millis(500);

/// Readers that are remembered of one restore. One that lives is enough.
const MAX_READERS: usize = 64;

/// What one restore has done so far.
pub struct Restore {
    pub id: RestoreId,
    pub session: Arc<Session>,
    pub set: Arc<Set>,
    /// CRIU itself, if it can be seen.
    criu: Option<Process>,
    /// Its executable.
    executable: Option<PathBuf>,
    state: Mutex<State>,
    /// Waits for its CRIU's end, and ends with this.
    watch: OnceLock<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct State {
    asked: HashSet<ImageName>,
    readers: HashMap<i32, Process>,
    resumes: bool,
}

/// How a restore ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Restored,
    /// It did not read what a restore needs.
    Incomplete,
    /// Nobody of it is seen to run.
    Unknown,
}

impl Restore {
    pub fn new(session: Arc<Session>, set: Arc<Set>, criu: Option<Process>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: RestoreId(NEXT.fetch_add(1, Ordering::Relaxed)),
            session,
            set,
            executable: criu.as_ref().and_then(Process::executable),
            criu,
            state: Mutex::default(),
            watch: OnceLock::new(),
        })
    }

    /// Calls `ended` when its CRIU has ended, if it can be seen.
    pub fn watch(&self, ended: impl FnOnce() + Send + 'static) {
        let Some(criu) = self.criu_pid().and_then(Process::open) else {
            return;
        };
        let watch = tokio::spawn(async move {
            criu.exited().await;
            ended();
        });
        let _ = self.watch.set(AbortOnDropHandle::new(watch)); // once
    }

    pub fn is_watched(&self) -> bool {
        let watch = self.watch.get();
        watch.is_some_and(|watch| !watch.is_finished())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn criu_pid(&self) -> Option<i32> {
        self.criu.as_ref().map(Process::pid)
    }

    pub fn has_asked(&self, name: &ImageName) -> bool {
        self.state().asked.contains(name)
    }

    /// Its CRIU runs, so it may ask for more.
    pub fn goes_on(&self) -> bool {
        self.criu.as_ref().is_some_and(Process::has_memory)
    }

    /// Whether `pid` is its CRIU, or one of the tasks that this restores.
    pub fn is_of(&self, pid: Option<i32>) -> bool {
        pid.zip(self.criu_pid())
            .is_some_and(|(pid, criu)| related(pid, criu))
    }

    /// `reader` asked for an image.
    pub fn asks(&self, name: &ImageName, reader: Option<i32>) {
        let mut state = self.state();
        state.asked.insert(name.clone());
        let criu = self.criu_pid();
        let Some(pid) = reader.filter(|&pid| Some(pid) != criu) else {
            return;
        };
        if state.readers.len() < MAX_READERS && !state.readers.contains_key(&pid) {
            if let Some(process) = Process::open(pid) {
                state.readers.insert(pid, process);
            }
        }
    }

    /// It is over, and not known to have succeeded. `true` if that costs the set, which is
    /// said in the log.
    pub fn failed(&self) -> bool {
        let lost = self.set.is_lost_with(self.id);
        if lost {
            tracing::error!(
                session = %self.session.name, snapshot = %self.set.snapshot,
                "a restore that took the set's memory along (--release-on-read) is not known to have succeeded: the set is gone; \
                 unless what was restored runs, or its source still lives, the process is lost"
            );
        }
        lost
    }

    /// Its action script says that all has succeeded.
    pub fn said_so(&self) -> bool {
        self.state().resumes
    }

    /// The `--stream` connection is over. That CRIU lives behind it means something only if CRIU has closed it.
    pub async fn judge(&self, by_criu: bool) -> Verdict {
        // Now or never: CRIU may exit at once.
        let criu_lives = self.goes_on();
        if !self.set.restored_by(&self.state().asked) {
            return Verdict::Incomplete;
        }
        if self.said_so() || (by_criu && criu_lives) {
            return Verdict::Restored;
        }
        // It has ended, or was killed; then its tasks live, and wait for it for ever.
        self.judge_by_readers(|reader| self.is_resumed(reader))
            .await
    }

    /// Whether a task is out of CRIU's code: of the executable, and of the restorer that stands in for it at the end.
    fn is_resumed(&self, task: &Process) -> bool {
        let known = self.executable.as_ref().zip(task.executable());
        known.is_some_and(|(criu, own)| *criu != own) && task.has_nameless_code() == Some(false)
    }

    /// The same for FINISH of `--remote`: CRIU lives when it says that, also after a failure.
    /// If other processes have read, one of them must live; a client that is one process alone
    /// is believed.
    pub async fn judge_finish(&self) -> Verdict {
        if !self.set.restored_by(&self.state().asked) {
            return Verdict::Incomplete;
        }
        if self.state().resumes || self.state().readers.is_empty() {
            return Verdict::Restored;
        }
        self.judge_by_readers(Process::has_memory).await
    }

    /// What is left when CRIU itself tells nothing: do the tasks run, or were they killed?
    async fn judge_by_readers(&self, runs: impl Fn(&Process) -> bool) -> Verdict {
        tokio::time::sleep(KILLED_WITHIN).await;
        match self.state().readers.values().any(runs) {
            true => Verdict::Restored,
            false => Verdict::Unknown,
        }
    }
}

/// The restores under way, by the pid of their CRIU: a FINISH and an action script carry no
/// name. Weak, so that one which never says how it ended holds no memory.
#[derive(Default)]
pub struct Restores(Mutex<HashMap<i32, Weak<Restore>>>);

impl Restores {
    fn map(&self) -> MutexGuard<'_, HashMap<i32, Weak<Restore>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note(&self, pid: i32, restore: &Arc<Restore>) {
        let mut map = self.map();
        map.retain(|_, r| r.strong_count() > 0);
        map.insert(pid, Arc::downgrade(restore));
    }

    /// The action script of this CRIU says that all has succeeded.
    pub fn resumes(&self, pid: i32) -> bool {
        let restore = self.map().get(&pid).and_then(Weak::upgrade);
        restore.inspect(|r| r.state().resumes = true).is_some()
    }
}
