//! Which run an action script speaks for.

use std::sync::{Arc, PoisonError};

use image_common::image::SnapshotId;
use image_common::procfs::process::related;

use crate::dumps::proxy::{Active, Announced, Proxy, RunError, StreamConnection};
use crate::failure::Failure;
use crate::session::run::Run;
use crate::session::Session;

impl Proxy {
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
        // Exact pids first, before parents are looked up: else each of many dumps at once would look
        // at all others.
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
    pub fn announced_unconnected_before(
        &self,
        criu: i32,
        snapshot: &SnapshotId,
    ) -> Option<Arc<Session>> {
        let registry = self.registry();
        let own = |a: &&Announced| a.pid == criu && a.snapshot == *snapshot;
        let announced = registry.announced.iter().find(own)?;
        let session = announced.session.clone();
        session.is_usable().then_some(session)
    }

    /// Why the dump that the CRIU `pid` announced is over already, if it is.
    pub fn failure_of_announced(&self, pid: i32) -> Option<Failure> {
        let registry = self.registry();
        let mut recent = registry.recent.iter().rev();
        let gated = |a: &&Active| a.run.state().is_gated();
        let own = |a: &Active| a.run.pid.is_some_and(|p| related(p, pid));
        let own = recent.find(|a| gated(a) && own(a))?;
        own.run.state().failure().cloned()
    }
}
