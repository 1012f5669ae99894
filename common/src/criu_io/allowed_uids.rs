//! Who may connect to a daemon's unix sockets: root, the daemon's own user, and those whom the
//! operator names (`--allow-uid`). The kernel tells who it is (SO_PEERCRED).

use std::path::Path;
use std::sync::Arc;

use rustix::process::geteuid;
use tokio::net::UnixStream;

use crate::log::limit::Refusals;

/// The users that a daemon serves on its unix sockets.
#[derive(Debug)]
pub struct Peers {
    ours: u32,
    others: Vec<u32>,
    refusals: Refusals,
}

impl Peers {
    /// Root, our own user, and `others`.
    pub fn new(others: &[u32]) -> Arc<Self> {
        Arc::new(Self {
            ours: geteuid().as_raw(),
            others: others.to_vec(),
            refusals: Refusals::default(),
        })
    }

    /// Whether anybody else is allowed in.
    pub fn has_others(&self) -> bool {
        !self.others.is_empty()
    }

    /// Whether this user may be served.
    pub fn may(&self, uid: u32) -> bool {
        uid == 0 || uid == self.ours || self.others.contains(&uid)
    }

    pub fn cannot_accept(&self, socket: &Path, e: &std::io::Error) {
        let socket = socket.display();
        self.refusals
            .log(|more| tracing::error!("{socket}: cannot accept a connection: {e}{more}"));
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
        let socket = socket.display();
        self.refusals.log(|more| {
            tracing::warn!(
                pid, uid,
                "{socket}: refused: the peer is neither root nor our user, nor named by --allow-uid{more}"
            );
        });
        false
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
}
