//! What one peer may cost, beyond `--memory-limit`, which is for all together.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use image_common::units::{parse_duration, parse_size};
use tokio_util::sync::CancellationToken;

/// A proxy greets within milliseconds. Who has not after this long makes room when it is needed.
const SILENT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, Args)]
pub struct Limits {
    /// Memory for the images of one session, as part of --memory-limit [default: all of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_session_memory: Option<u64>,

    /// Images that one session may open, one after the other or at once
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_images)]
    pub max_images: u64,

    /// Images that one session may have open at once
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_open_images)]
    pub max_open_images: usize,

    /// Sessions of one address, those that wait to be restored included
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_sessions)]
    pub max_sessions: usize,

    /// TCP connections at once, of all sessions; as many again to each page server
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_connections)]
    pub max_connections: usize,

    /// Connections that have not said yet whose they are. When there are more, those that have
    /// been silent for a second are closed, the oldest first
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_handshakes)]
    pub max_handshakes: usize,

    /// How long a connection may take to say whose it is
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    pub handshake_timeout: Duration,

    /// How long nothing may come on a connection to our page server
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_duration)]
    pub idle_timeout: Duration,
}

impl Limits {
    /// Beyond what any known CRIU needs, and little enough for a host to bear.
    pub const DEFAULT: Self = Self {
        max_session_memory: None,
        max_images: 1_000_000,
        max_open_images: 65_536,
        max_sessions: 256,
        max_connections: 1_024,
        max_handshakes: 64,
        handshake_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(600),
    };
}

impl Limits {
    /// Connections that the sessions of one address may have together: others find some left, also
    /// to resume theirs.
    pub fn connections_of_one(&self) -> usize {
        self.max_connections - self.max_connections / 4
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The connections in their handshake, the oldest first.
#[derive(Default)]
pub struct Handshakes(Mutex<VecDeque<(Instant, CancellationToken)>>);

/// A connection's place among them, until it is dropped.
pub struct Handshake {
    all: Arc<Handshakes>,
    cut: CancellationToken,
}

impl Handshakes {
    fn all(&self) -> MutexGuard<'_, VecDeque<(Instant, CancellationToken)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection begins. Nobody waits for a silent one: beyond `most` the oldest are cut. Many
    /// sessions that begin in the same second are let in, as far as there are connections.
    pub fn begin(self: &Arc<Self>, most: usize) -> Handshake {
        let cut = CancellationToken::new();
        let now = Instant::now();
        let mut all = self.all();
        while all.len() >= most && all.front().is_some_and(|(at, _)| now - *at >= SILENT) {
            if let Some((_, oldest)) = all.pop_front() {
                oldest.cancel();
            }
        }
        all.push_back((now, cut.clone()));
        drop(all);
        Handshake {
            all: self.clone(),
            cut,
        }
    }

    /// Cuts the oldest, for somebody who found no connection left. `false` if there is none.
    pub fn make_room(&self) -> bool {
        let oldest = self.all().pop_front();
        oldest.inspect(|(_, oldest)| oldest.cancel()).is_some()
    }
}

impl Handshake {
    /// Resolves when another connection needs the place.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        // Nobody cuts it any more; its own entry is the one that this token cancels.
        self.cut.cancel();
        self.all.all().retain(|(_, cut)| !cut.is_cancelled());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn young_ones_stay_and_the_oldest_make_room() {
        let all = Arc::new(Handshakes::default());
        let places: Vec<_> = (0..3).map(|_| all.begin(2)).collect();
        assert!(places.iter().all(|place| !place.cut.is_cancelled()));
        for (at, _) in all.all().iter_mut() {
            *at -= SILENT;
        }
        let new = all.begin(2);
        let cut = |place: &Handshake| place.cut.is_cancelled();
        assert!(cut(&places[0]) && cut(&places[1]) && !cut(&places[2]) && !cut(&new));
        drop(places);
        assert_eq!(all.all().len(), 1, "those that are over are not kept");
        assert!(all.make_room() && cut(&new));
        assert!(!all.make_room());
    }
}
