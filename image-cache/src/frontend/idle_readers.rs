//! Restores that read nothing.
//!
//! A CRIU that restores may stand still for as long as it likes: it waits for its tasks, or an operator
//! has stopped it, and its set is in memory anyhow. What is left of a set that has gone (dropped,
//! expired, restored by another) is kept for its readers alone. A reader of such a set that takes
//! nothing for `--idle-timeout`, on none of its pipes, is given up.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;

use crate::frontend::pump::Sink;
use crate::store::memory::segment::Piece;
use crate::store::session::Session;
use crate::store::Store;

/// Measures how long a restore has read nothing.
pub struct IdleClock {
    store: Arc<Store>,
    session: Arc<Session>,
    last: Mutex<Instant>,
}

impl IdleClock {
    pub fn new(store: &Arc<Store>, session: &Arc<Session>) -> Arc<Self> {
        Arc::new(Self {
            store: store.clone(),
            session: session.clone(),
            last: Mutex::new(Instant::now()),
        })
    }

    fn last(&self) -> MutexGuard<'_, Instant> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has taken something, or asked for it.
    pub fn takes(&self) {
        *self.last() = Instant::now();
        self.session.is_read();
    }

    /// Resolves when its set is gone, and it has taken nothing since for too long.
    pub async fn lost(&self) {
        let mut changes = self.store.session_changes.subscribe();
        while self.store.holds(&self.session) {
            // The sender lives in the store, so this only returns for a change.
            let _ = changes.changed().await;
        }
        let idle = self.store.limits.ports.idle_timeout;
        let gone = Instant::now();
        loop {
            let due = gone.max(*self.last()) + idle;
            if due <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(due).await;
        }
    }
}

/// A sink that sets the clock back with each write.
pub struct ClockedSink<'a, S> {
    pub sink: S,
    pub idle_clock: &'a IdleClock,
}

impl<S: Sink + Send> Sink for ClockedSink<'_, S> {
    async fn write(&mut self, pieces: &[Piece]) -> io::Result<usize> {
        let written = self.sink.write(pieces).await?;
        self.idle_clock.takes();
        Ok(written)
    }
}
