//! Runs whose pages come through the page server, and whose other images are files.

use std::sync::{Arc, PoisonError};

use image_common::image::SnapshotId;
use image_common::link::codec::Dialect;
use image_common::process::{related, Process};

use super::{Active, Announced, Proxy, RunError, SETTLE};
use crate::run::State;
use crate::session::{Criu, Session};

impl Proxy {
    /// The run of a connection to the page server: CRIU connects after its pre-dump script, so
    /// that is the announced one; a `--stream` dump has connected before; else it is a run
    /// without script.
    pub async fn page_server_run(self: &Arc<Self>) -> Result<Active, RunError> {
        self.frontier.absorbed().await;
        self.accepts_runs()?;
        let announced = !self.registry().announced.is_empty();
        if !announced {
            let runs = self.registry().runs.clone();
            let streamed = |a: &&Active| {
                let state = a.run.state();
                state.dialect == Dialect::Stream && a.run.is_active() && !state.is_whole()
            };
            if let Some(active) = runs.iter().rev().find(streamed) {
                return Ok(active.clone());
            }
            self.settle_page_runs().await;
        }
        Ok(self.begin_page_server(None))
    }

    /// Rounds of one series follow each other: ends those whose CRIU must have gone on.
    async fn settle_page_runs(&self) {
        let runs = self.registry().runs.clone();
        for earlier in runs {
            if earlier.run.state().dialect == Dialect::PageServer {
                earlier.run.followed();
                let ended = earlier.run.wait_for(|s| s.ended.is_some());
                let _ = tokio::time::timeout(SETTLE, ended).await;
            }
        }
        tokio::task::yield_now().await;
    }

    /// Begins the run of the announcement of `pid`, or of any; without one an ungated run.
    fn begin_page_server(self: &Arc<Self>, pid: Option<i32>) -> Active {
        let (announced, session) = {
            let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |a: &Announced| pid.is_none_or(|pid| related(pid, a.pid));
            match registry.announced.iter().position(fits) {
                Some(at) => {
                    let a = registry.announced.remove(at);
                    (Some((a.pid, a.snapshot)), a.session)
                }
                None => (None, self.next_session(&mut registry)),
            }
        };
        let gated = announced.is_some();
        let (pid, snapshot) = match announced {
            Some((pid, snapshot)) => (Some(pid), snapshot),
            None => (None, unnamed()),
        };
        let criu = Criu::of(pid);
        let watched = criu.process.clone();
        let active = Active {
            run: session.begin_page_server(snapshot, gated, criu),
            session,
        };
        self.begun(&active);
        if let Some(process) = watched {
            let run = active.run.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = process.exited() => run.source_ended(),
                    _ = run.wait_for(State::is_over) => {}
                }
            });
        }
        active
    }

    /// The announced run of a CRIU that has sent nothing at all: its images are files.
    pub fn run_of_files(self: &Arc<Self>, pid: i32) -> Option<Active> {
        let announced = self
            .registry()
            .announced
            .iter()
            .any(|a| related(a.pid, pid));
        announced.then(|| self.begin_page_server(Some(pid)))
    }

    /// A dump is announced of which nothing has come yet: the next run of this CRIU is gated
    /// from its begin. Gives the session that it will have.
    pub async fn announce_ahead(
        self: &Arc<Self>,
        pid: i32,
        snapshot: SnapshotId,
    ) -> Result<Arc<Session>, RunError> {
        self.accepts_runs()?;
        self.settle_page_runs().await;
        let mut registry = self.registry();
        let announced = std::mem::take(&mut registry.announced);
        let (again, others): (Vec<_>, Vec<_>) = announced.into_iter().partition(|a| a.pid == pid);
        registry.announced = others;
        for old in again {
            self.close(&mut registry, old.session, "announced again");
        }
        let session = self.next_session(&mut registry);
        registry.announced.push(Announced {
            pid,
            snapshot,
            session: session.clone(),
        });
        drop(registry);
        if let Some(process) = Process::open(pid) {
            let (proxy, session) = (self.clone(), session.clone());
            tokio::spawn(async move {
                process.exited().await;
                proxy.frontier.settled().await;
                proxy.forget_announced(&session);
            });
        }
        Ok(session)
    }

    /// Nothing came of an announcement.
    pub fn forget_announced(self: &Arc<Self>, session: &Arc<Session>) {
        let mut registry = self.registry();
        let before = registry.announced.len();
        registry
            .announced
            .retain(|a| !Arc::ptr_eq(&a.session, session));
        if registry.announced.len() < before {
            self.close(&mut registry, session.clone(), "the dump did not come");
        }
    }
}

/// Id of a set whose directory nobody named.
pub fn unnamed() -> SnapshotId {
    SnapshotId::new("page-server").unwrap_or_else(|_| unreachable!("a constant that is an id"))
}
