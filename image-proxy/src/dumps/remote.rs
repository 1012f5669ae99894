//! The runs of `--remote` CRIUs, which make a connection per operation.

use std::sync::Arc;

use image_common::criu::remote::IdSpelling;
use image_common::image::{ImageName, SnapshotId};
use image_common::procfs::process::related;
use image_common::tasks;

use crate::cli::Parents;
use crate::dumps::proxy::{Active, Proxy, RunError};
use crate::dumps::settle::settle;
use crate::failure::Failure;
use crate::session::criu::Criu;
use crate::session::parent_images::ParentImage;
use crate::session::run::Run;
use crate::session::state::RunState;

/// A message of every CRIU whose dump fails if it is told of parents: in each version of the
/// pid-reuse check (`mem.c`) since it came in spring 2018, and in nothing before it.
const PID_REUSE_CHECK: &[u8] = b"Pid reuse%s detected for pid";

impl Proxy {
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
                    _ = run.wait_for(RunState::is_over) => return,
                }
                // It may have connected, and said FINISH, just before it exited.
                proxy.arrival_order.absorbed().await;
                run.source_ended();
            };
            tasks::spawn("watching a CRIU", watch, move |why| {
                failed.fail(Failure::bug(why));
            });
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

    /// The run that says FINISH. Never that of another CRIU, unless pids cannot be seen.
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
    ) -> Option<ParentImage> {
        self.remote_run_of(pid)?.session.read_back(snapshot, name)
    }
}
