//! A limit for silence, where it is the peer's turn to speak. Waiting for ourselves, or for the
//! link, is not the peer's fault and does not count.

use std::future::Future;
use std::io;
use std::time::Duration;

/// How long CRIU may send nothing, or take nothing.
#[derive(Debug, Clone, Copy)]
pub struct Idle(pub Duration);

/// Why a wait for CRIU ended without a byte.
#[derive(Debug, thiserror::Error)]
pub enum IdleError {
    #[error("CRIU's connection to the page server")]
    Io(#[from] io::Error),
    #[error("nothing came for {0:?} (--idle-timeout)")]
    Silent(Duration),
}

impl Idle {
    /// What the peer does next.
    pub async fn bounds<T>(
        self,
        next: impl Future<Output = io::Result<T>>,
    ) -> Result<T, IdleError> {
        let next = tokio::time::timeout(self.0, next).await;
        Ok(next.map_err(|_| IdleError::Silent(self.0))??)
    }
}
