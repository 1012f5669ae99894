//! The users that may connect to a daemon's unix sockets: root, the daemon's own user, and those that
//! the operator names (`--allow-uid`). The kernel tells the peer's uid (SO_PEERCRED).

use std::path::Path;
use std::sync::Arc;

use rustix::process::geteuid;
use tokio::net::UnixStream;

use crate::log::limit::LogLimit;

/// The users that a daemon serves on its unix sockets.
#[derive(Debug)]
pub struct AllowedUids {
    ours: u32,
    others: Vec<u32>,
    log_limit: LogLimit,
}

impl AllowedUids {
    /// Root, our own user, and `others`.
    pub fn new(others: &[u32]) -> Arc<Self> {
        Arc::new(Self {
            ours: geteuid().as_raw(),
            others: others.to_vec(),
            log_limit: LogLimit::default(),
        })
    }

    /// Whether users besides root and our own are allowed in.
    pub fn has_others(&self) -> bool {
        !self.others.is_empty()
    }

    /// The users that the operator names.
    pub fn others(&self) -> &[u32] {
        &self.others
    }

    /// Whether this user may be served.
    pub fn allows(&self, uid: u32) -> bool {
        uid == 0 || uid == self.ours || self.others.contains(&uid)
    }

    pub fn cannot_accept(&self, socket: &Path, e: &std::io::Error) {
        let socket = socket.display();
        self.log_limit
            .log(|more| tracing::error!("{socket}: cannot accept a connection: {e}{more}"));
    }

    /// Whether the peer may be served. A refusal is logged.
    pub fn admit(&self, stream: &UnixStream, socket: &Path) -> bool {
        let Ok(peer) = stream.peer_cred() else {
            return false; // a kernel that cannot tell: no peer is served without a known uid
        };
        let (uid, pid) = (peer.uid(), peer.pid().unwrap_or(0));
        if self.allows(uid) {
            return true;
        }
        let socket = socket.display();
        self.log_limit.log(|more| {
            tracing::warn!(
                pid, uid,
                "{socket}: refused: the peer is neither root nor our user, nor named by --allow-uid; the connection was closed{more}"
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
        let allowed = AllowedUids::new(&[4242]);
        assert!(allowed.allows(0) && allowed.allows(geteuid().as_raw()) && allowed.allows(4242));
        assert!(!allowed.allows(4243) && !allowed.allows(u32::MAX));
    }

    #[tokio::test]
    async fn our_own_user_is_admitted() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(AllowedUids::new(&[]).admit(&ours, Path::new("x.sock")));
    }
}
