//! Who may connect to a daemon's unix sockets: root, the daemon's own user, and those whom the
//! operator names (`--allow-uid`). The kernel tells who it is (SO_PEERCRED).

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::geteuid;
use tokio::net::UnixStream;

/// One line for so long, whatever knocks: a log that anybody can fill is no log.
const LOG_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Peers {
    ours: u32,
    others: Vec<u32>,
    refused: Mutex<Refused>,
}

#[derive(Debug, Default)]
struct Refused {
    logged: Option<Instant>,
    /// Since then.
    unlogged: u64,
}

impl Peers {
    /// Root, our own user, and `others`.
    pub fn new(others: &[u32]) -> Arc<Self> {
        Arc::new(Self {
            ours: geteuid().as_raw(),
            others: others.to_vec(),
            refused: Mutex::default(),
        })
    }

    /// Whether anybody else is allowed in.
    pub fn has_others(&self) -> bool {
        !self.others.is_empty()
    }

    fn may(&self, uid: u32) -> bool {
        uid == 0 || uid == self.ours || self.others.contains(&uid)
    }

    /// Whether whoever connected may be served; if not, the log says so.
    pub fn admit(&self, stream: &UnixStream, socket: &Path) -> bool {
        let Ok(peer) = stream.peer_cred() else {
            return false; // a kernel that cannot tell: nobody is let in unseen
        };
        let (uid, pid) = (peer.uid(), peer.pid().unwrap_or(0));
        if self.may(uid) {
            return true;
        }
        if let Some(unlogged) = self.log_now(Instant::now()) {
            let socket = socket.display();
            tracing::warn!(
                pid, uid, unlogged,
                "{socket}: refused: the peer is neither root nor our user, nor named by --allow-uid"
            );
        }
        false
    }

    /// Whether it is time for a line; gives how many went without since the last one.
    fn log_now(&self, now: Instant) -> Option<u64> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = |at: Instant| now.saturating_duration_since(at) < LOG_EVERY;
        if refused.logged.is_some_and(recent) {
            refused.unlogged += 1;
            return None;
        }
        refused.logged = Some(now);
        Some(std::mem::take(&mut refused.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may() {
        let peers = Peers::new(&[4242]);
        assert!(peers.may(0) && peers.may(geteuid().as_raw()) && peers.may(4242));
        assert!(!peers.may(4243) && !peers.may(u32::MAX));
    }

    #[tokio::test]
    async fn our_own_user_is_admitted() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(Peers::new(&[]).admit(&ours, Path::new("x.sock")));
    }

    #[test]
    fn the_log_is_not_flooded() {
        let peers = Peers::new(&[]);
        let begin = Instant::now();
        assert_eq!(peers.log_now(begin), Some(0));
        for ms in 1..100 {
            assert_eq!(peers.log_now(begin + Duration::from_millis(ms)), None);
        }
        assert_eq!(peers.log_now(begin + LOG_EVERY), Some(99));
        assert_eq!(peers.log_now(begin + 2 * LOG_EVERY), Some(0));
    }
}
