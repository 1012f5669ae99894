//! Runs whose pages come through the page server, and whose other images are files.

use std::net::SocketAddr;
use std::sync::Arc;

use image_common::criu::dialect::PageRounds;
use image_common::image::SnapshotId;
use image_common::procfs::process::{related, Process};
use image_common::procfs::tcp_peer::can_be_found;
use image_common::tasks;
use tokio_util::sync::CancellationToken;

use crate::dumps::proxy::{Active, Announced, Proxy, Registry, RunError};
use crate::dumps::round_client::Client;
use crate::dumps::settle::SETTLE;
use crate::failure::Failure;
use crate::session::criu::Criu;
use crate::session::lineage::Lineage;
use crate::session::state::RunState;
use crate::session::Session;

/// Which run a connection belongs to, if that is known before it begins.
enum Known {
    /// The dump that was announced, at this place.
    Announced(usize),
    /// A `--stream` dump, which connected before.
    Streamed(Active),
    /// A run without script.
    No,
}

impl Proxy {
    /// The run of a connection from `peer` to the page server at `local`: CRIU connects after
    /// its pre-dump script, so that is the announced one; a `--stream` dump has connected
    /// before; else it is a run without script.
    pub async fn page_server_run(
        self: &Arc<Self>,
        peer: Option<SocketAddr>,
        local: Option<SocketAddr>,
    ) -> Result<Active, RunError> {
        let likely = self.registry().announced.iter().map(|a| a.pid).collect();
        let client = Client::find(peer, local, likely).await;
        if let Some(unserved) = client.options.unserved_round() {
            return Err(unserved.into());
        }
        self.arrival_order.absorbed().await;
        self.accepts_runs()?;
        self.sweep_series().await;
        let known = dump_of(&self.registry(), &client)?;
        match known {
            Known::Streamed(active) => return Ok(active),
            Known::Announced(_) => {}
            Known::No => {
                self.settle_page_runs(&client.lineage, client.criu.pid)
                    .await;
            }
        }
        let mut registry = self.registry();
        // Again: while others were waited for, announcements may have come and gone.
        let (announced, session) = match dump_of(&registry, &client)? {
            Known::Streamed(active) => return Ok(active),
            Known::Announced(at) => {
                let a = registry.announced.remove(at);
                if !a.found {
                    a.session.round_from(client.lineage.clone());
                }
                let criu = Criu {
                    pid: Some(a.pid),
                    process: a.criu,
                };
                (Some((criu, a.snapshot)), a.session)
            }
            Known::No => (None, self.page_session(&mut registry, &client.lineage)),
        };
        drop(registry);
        Ok(self.begin_page_server(announced, session, client.criu))
    }

    /// Rounds of one series follow each other: ends those that the next one comes after.
    async fn settle_page_runs(&self, next: &Lineage, pid: Option<i32>) {
        let runs = self.registry().runs.clone();
        for Active { run, session } in runs {
            let before = session.lineage().is_some_and(|last| next.continues(&last));
            if !run.state().dialect.is_rounds_alone() || !before {
                continue;
            }
            // A dump that waits for its verdict is not over, so this is another one.
            let other = pid.is_none_or(|pid| !run.is_criu(pid));
            let waits =
                other && run.state().is_gated() && run.criu().is_some_and(|c| c.has_memory());
            if !waits {
                run.followed();
                let ended = run.wait_for(|s| s.has_ended());
                let _ = tokio::time::timeout(SETTLE, ended).await;
            }
        }
        tokio::task::yield_now().await;
    }

    /// The session of a round: that of the series which it continues, or a new one.
    fn page_session(self: &Arc<Self>, registry: &mut Registry, lineage: &Lineage) -> Arc<Session> {
        let series = registry.series.iter().enumerate();
        let before =
            series.filter(|(_, s)| s.lineage().is_some_and(|last| lineage.continues(&last)));
        let places: Vec<usize> = before.map(|(at, _)| at).collect();
        let at = match (&places[..], lineage) {
            ([only], _) => Some(*only),
            // From one address the order is all there is.
            ([.., newest], Lineage::Unseen(Some(_))) => Some(*newest),
            // Two that could be meant: to take none is always right.
            _ => None,
        };
        let before = at.map(|at| registry.series.remove(at));
        let overwritten =
            |s: &Arc<Session>| s.lineage().is_some_and(|last| lineage.overwrites(&last));
        let (old, kept) = std::mem::take(&mut registry.series)
            .into_iter()
            .partition(overwritten);
        registry.series = kept;
        self.close_all(registry, old, "its images directory is used anew");
        let session = self.session_after(registry, before);
        session.round_from(lineage.clone());
        session
    }

    /// Gives up the series whose images directory has gone: nothing can have it as parent.
    async fn sweep_series(self: &Arc<Self>) {
        let has_dir = |session: &Arc<Session>| match session.lineage() {
            Some(Lineage::Images(dir)) => Some((session.clone(), dir)),
            _ => None,
        };
        let series: Vec<_> = self.registry().series.iter().filter_map(has_dir).collect();
        let look = move || {
            series
                .into_iter()
                .filter(|(_, dir)| dir.has_gone())
                .collect()
        };
        let gone: Vec<_> = tokio::task::spawn_blocking(look).await.unwrap_or_default();
        let has_gone = |s: &Arc<Session>| gone.iter().any(|(g, _)| Arc::ptr_eq(g, s));
        let mut registry = self.registry();
        let (old, kept) = std::mem::take(&mut registry.series)
            .into_iter()
            .partition(has_gone);
        registry.series = kept;
        self.close_all(&mut registry, old, "its images directory has gone");
    }

    fn close_all(
        self: &Arc<Self>,
        registry: &mut Registry,
        series: Vec<Arc<Session>>,
        reason: &'static str,
    ) {
        for session in series {
            tracing::info!(session = %session.name, "series given up: {reason}");
            self.close(registry, session, Some(reason));
        }
    }

    /// Begins a run, gated if it was announced.
    fn begin_page_server(
        self: &Arc<Self>,
        announced: Option<(Criu, SnapshotId)>,
        session: Arc<Session>,
        client: Criu,
    ) -> Active {
        let gated = announced.is_some();
        let (criu, snapshot) = match announced {
            // The client may be a child of the CRIU that ran the script.
            Some(announced) => announced,
            None => (client, unnamed()),
        };
        let watched = criu.process.clone();
        let active = Active {
            run: session.begin_page_server(snapshot, gated, criu),
            session,
        };
        self.begun(&active);
        if let Some(process) = watched {
            let (run, failed) = (active.run.clone(), active.run.clone());
            let watch = async move {
                tokio::select! {
                    () = process.exited() => run.source_ended(),
                    _ = run.wait_for(RunState::is_over) => {}
                }
            };
            tasks::spawn("watching a CRIU", watch, move |why| {
                failed.fail(Failure::bug(why));
            });
        }
        active
    }

    /// The announced run of a CRIU that has sent nothing at all: its images are files.
    pub fn run_of_files(self: &Arc<Self>, pid: i32) -> Option<Active> {
        let announced = {
            let mut registry = self.registry();
            let at = registry.announced_by(pid)?;
            registry.announced.remove(at)
        };
        let criu = Criu {
            pid: Some(announced.pid),
            process: announced.criu,
        };
        let own = (criu, announced.snapshot);
        Some(self.begin_page_server(Some(own), announced.session, Criu::default()))
    }

    /// A dump is announced of which nothing has come yet: the next run of this CRIU is gated
    /// from its begin. Gives the session that it will have.
    pub async fn announce_unconnected(
        self: &Arc<Self>,
        (pid, criu): (i32, Option<Arc<Process>>),
        snapshot: SnapshotId,
        lineage: Lineage,
    ) -> Result<Arc<Session>, RunError> {
        self.accepts_runs()?;
        self.settle_page_runs(&lineage, Some(pid)).await;
        // It may have died since its script asked. Nothing will come of it, and nothing else would end the session.
        if criu.as_ref().is_some_and(|criu| criu.has_exited()) {
            return Err(RunError::Died(pid));
        }
        let criu = criu.or_else(|| Process::open(pid).map(Arc::new));
        let mut registry = self.registry();
        let announced = std::mem::take(&mut registry.announced);
        let (again, others): (Vec<_>, Vec<_>) = announced.into_iter().partition(|a| a.pid == pid);
        registry.announced = others;
        for old in again {
            self.close(&mut registry, old.session, Some("announced again"));
        }
        let session = self.page_session(&mut registry, &lineage);
        let over = CancellationToken::new();
        registry.announced.push(Announced {
            pid,
            criu: criu.clone(),
            found: !matches!(lineage, Lineage::Unseen(_)),
            snapshot,
            session: session.clone(),
            _watch: over.clone().drop_guard(),
        });
        drop(registry);
        if let Some(process) = criu {
            let (proxy, session) = (self.clone(), session.clone());
            let (forgets, forgotten) = (proxy.clone(), session.clone());
            let watch = async move {
                tokio::select! {
                    () = process.exited() => {}
                    () = over.cancelled() => return,
                }
                proxy.arrival_order.settled().await;
                proxy.forget_announced(&session);
            };
            tasks::spawn("watching an announced dump", watch, move |_| {
                forgets.forget_announced(&forgotten);
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
            self.close(
                &mut registry,
                session.clone(),
                Some("the dump did not come"),
            );
        }
    }
}

/// Id of a set whose directory is not known.
pub fn unnamed() -> SnapshotId {
    SnapshotId::new("page-server").unwrap_or_else(|_| unreachable!("a constant that is an id"))
}

/// Which of the dumps that are under way a connection belongs to.
fn dump_of(registry: &Registry, client: &Client) -> Result<Known, RunError> {
    let streamed = |a: &&Active| {
        let state = a.run.state();
        let beside = state.dialect.page_rounds() == PageRounds::BesideImages;
        beside && a.run.is_active() && !state.is_whole()
    };
    let mut streamed = registry.runs.iter().rev().filter(streamed);
    if let Some(pid) = client.criu.pid {
        let own = registry.announced_by(pid);
        if let Some(at) = own.filter(|&at| registry.announced[at].found) {
            return Ok(Known::Announced(at));
        }
        let own = |a: &&Active| a.run.pid.is_some_and(|p| related(p, pid));
        if let Some(active) = streamed.find(own) {
            return Ok(Known::Streamed(active.clone()));
        }
        // Pages of another process would be committed together with its own.
        let gated = |a: &&Active| {
            let state = a.run.state();
            state.dialect.is_rounds_alone() && state.is_gated() && a.run.is_active()
        };
        if let Some(other) = registry.runs.iter().filter(gated).find(own) {
            let again = RunError::Again(pid);
            other.run.fail(Failure::criu(again.to_string()));
            return Err(again);
        }
        return Ok(Known::No);
    }
    // A dump whose connection would be found is not the one that is looked for.
    let unfound = |a: &&Active| !a.run.pid.is_some_and(can_be_found);
    let streams: Vec<_> = streamed.filter(unfound).collect();
    let announced = registry.announced.iter().enumerate();
    let announced: Vec<_> = announced.filter(|(_, a)| !a.found).collect();
    match (&announced[..], &streams[..]) {
        ([], []) => Ok(Known::No),
        ([(at, _)], []) => Ok(Known::Announced(*at)),
        ([], [only]) => Ok(Known::Streamed((*only).clone())),
        _ => Err(RunError::Ambiguous(announced.len() + streams.len())),
    }
}

#[cfg(test)]
mod tests;
