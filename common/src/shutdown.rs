//! Stopping: the first SIGTERM or SIGINT asks, a second one insists.

use std::io;

use tokio::signal::unix::{signal, SignalKind};
use tokio_util::sync::CancellationToken;

/// Exit code of a daemon that had to drop sessions to stop.
pub const EXIT_SESSIONS_ABORTED: u8 = 3;

/// The two levels of "stop".
#[derive(Clone, Default)]
pub struct Shutdown {
    /// No new sessions; running ones may finish within the grace period.
    pub requested: CancellationToken,
    /// Now.
    pub forced: CancellationToken,
}

impl Shutdown {
    /// Starts to listen for the signals.
    pub fn on_signals() -> io::Result<Self> {
        let shutdown = Self::default();
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let levels = shutdown.clone();
        tokio::spawn(async move {
            for level in [&levels.requested, &levels.forced] {
                tokio::select! {
                    _ = term.recv() => tracing::info!("SIGTERM"),
                    _ = int.recv() => tracing::info!("SIGINT"),
                }
                level.cancel();
            }
        });
        Ok(shutdown)
    }
}
