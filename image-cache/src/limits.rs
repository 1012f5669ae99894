//! What one peer may cost, beyond `--memory-limit`, which is for all together.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use image_common::admission::quota::{share, Host, PortArgs};
use image_common::units::{parse_count, parse_some_size, parse_some_time};
use tokio_util::sync::CancellationToken;

/// A proxy greets within milliseconds. One that has not after this long makes room when it is needed.
const SILENT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy, Args)]
pub struct Limits {
    /// Memory for the images of one session, as part of --memory-limit [default: all of it]
    #[arg(long, value_name = "SIZE", value_parser = parse_some_size)]
    pub max_session_memory: Option<u64>,

    /// Images that one session may open, one after the other or at once
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_images, value_parser = parse_count::<u64>)]
    pub max_images: u64,

    /// Images that one session may have open at once
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_open_images, value_parser = parse_count::<usize>)]
    pub max_open_images: usize,

    /// Sessions of one address, those that wait to be restored included
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_sessions, value_parser = parse_count::<usize>)]
    pub max_sessions: usize,

    /// Connections that have not said yet whose they are. When there are more, or more than three
    /// quarters of them of one host, those that have been silent for a second are closed, the
    /// oldest first
    #[arg(long, value_name = "N", default_value_t = Limits::DEFAULT.max_handshakes, value_parser = parse_count::<usize>)]
    pub max_handshakes: usize,

    /// How long a connection may take to say whose it is
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_some_time)]
    pub handshake_timeout: Duration,

    #[command(flatten)]
    pub ports: PortArgs,
}

impl Limits {
    /// Beyond what any known CRIU needs, and little enough for a host to bear.
    pub const DEFAULT: Self = Self {
        max_session_memory: None,
        max_images: 1_000_000,
        max_open_images: 4_096,
        max_sessions: 256,
        max_handshakes: 64,
        handshake_timeout: Duration::from_secs(10),
        ports: PortArgs::DEFAULT,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// The connections in their handshake, the oldest first.
#[derive(Default)]
pub struct Handshakes(Mutex<VecDeque<Waiting>>);

struct Waiting {
    since: Instant,
    host: Host,
    cut: CancellationToken,
}

/// A connection's place among them, until it is dropped.
pub struct Handshake {
    all: Arc<Handshakes>,
    cut: CancellationToken,
}

impl Handshakes {
    fn all(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection of `host` begins. None waits for a silent one: where there are `most`, the
    /// oldest are cut, and where one host has more than its share of that, its own. Many sessions
    /// that begin in the same second are let in, as far as there are connections.
    pub fn begin(self: &Arc<Self>, most: usize, host: Host) -> Handshake {
        let now = Instant::now();
        let silent = |w: &Waiting| now - w.since >= SILENT;
        let mut all = self.all();
        loop {
            let theirs = all.iter().filter(|w| w.host == host).count();
            let of = match theirs >= share(most) {
                true => Some(host),
                false if all.len() >= most => None,
                false => break,
            };
            if !cut_oldest(&mut all, of, silent) {
                break;
            }
        }
        let cut = CancellationToken::new();
        all.push_back(Waiting {
            since: now,
            host,
            cut: cut.clone(),
        });
        drop(all);
        Handshake {
            all: self.clone(),
            cut,
        }
    }

    /// Cuts the oldest, for a peer that found no connection left, or none of `host`. `false` if
    /// there is none.
    pub fn make_room(&self, of: Option<Host>) -> bool {
        cut_oldest(&mut self.all(), of, |_| true)
    }
}

/// Cuts the oldest of these: of one host, or of the one that has most.
fn cut_oldest(
    all: &mut VecDeque<Waiting>,
    of: Option<Host>,
    may: impl Fn(&Waiting) -> bool,
) -> bool {
    let host = of.or_else(|| {
        let mut counts: HashMap<Host, usize> = HashMap::new();
        for waiting in all.iter().filter(|w| may(w)) {
            *counts.entry(waiting.host).or_default() += 1;
        }
        let most = counts.into_iter().max_by_key(|&(_, count)| count);
        most.map(|(host, _)| host)
    });
    let oldest = all.iter().position(|w| Some(w.host) == host && may(w));
    let oldest = oldest.and_then(|at| all.remove(at));
    oldest.inspect(|oldest| oldest.cut.cancel()).is_some()
}

impl Handshake {
    /// Resolves when another connection needs the place.
    pub async fn cut(&self) {
        self.cut.cancelled().await;
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        // It is not cut any more; its own entry is the one that this token cancels.
        self.cut.cancel();
        self.all.all().retain(|w| !w.cut.is_cancelled());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u8) -> Host {
        Host::of([10, 0, 0, n].into())
    }

    fn cut(place: &Handshake) -> bool {
        place.cut.is_cancelled()
    }

    fn age(all: &Handshakes) {
        for waiting in all.all().iter_mut() {
            waiting.since -= SILENT;
        }
    }

    #[test]
    fn young_ones_stay_and_the_oldest_make_room() {
        let all = Arc::new(Handshakes::default());
        let places: Vec<_> = (0..3).map(|_| all.begin(2, host(1))).collect();
        assert!(!places.iter().any(cut));
        age(&all);
        let new = all.begin(2, host(2));
        assert!(cut(&places[0]) && cut(&places[1]) && !cut(&places[2]) && !cut(&new));
        drop(places);
        assert_eq!(all.all().len(), 1, "those that are over are not kept");
        assert!(!all.make_room(Some(host(3))));
        assert!(all.make_room(None) && cut(&new));
        assert!(!all.make_room(None));
    }

    #[test]
    fn who_has_most_makes_room_first() {
        let all = Arc::new(Handshakes::default());
        let old = all.begin(8, host(1));
        let many: Vec<_> = (0..6).map(|_| all.begin(8, host(2))).collect();
        age(&all);
        // Its share is used up: its own make room, while there are places for others.
        let more = all.begin(8, host(2));
        assert!(cut(&many[0]) && !cut(&old));
        let fill: Vec<_> = (3..5).map(|n| all.begin(8, host(n))).collect();
        assert!(
            cut(&many[1]) && !cut(&many[2]) && !cut(&old),
            "all are used"
        );
        assert!(all.make_room(None) && cut(&many[2]) && !cut(&old));
        assert!(!cut(&more) && !fill.iter().any(cut));
    }
}
