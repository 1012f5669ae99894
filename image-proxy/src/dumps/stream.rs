//! The runs of `--stream` connections.

use std::sync::{Arc, Mutex, PoisonError};

use image_common::image::SnapshotId;
use tokio::task::JoinSet;

use crate::dumps::proxy::{Active, Proxy, RunError, StreamConnection};
use crate::dumps::settle::settle_stream;
use crate::failure::Failure;
use crate::session::criu::Criu;
use crate::session::state::RunState;

impl StreamConnection {
    /// Its run, if it has begun, cannot go on.
    pub fn fail(&self, reason: Failure) {
        let run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(active) = &*run {
            active.run.fail(reason);
        }
    }
}

impl Proxy {
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
        // Another task may have begun it meanwhile.
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
    pub async fn failure_of(&self, connection: &StreamConnection) -> Option<Failure> {
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
        let over = RunState::is_decided;
        run.wait_for(over).await.failure().cloned()
    }
}
