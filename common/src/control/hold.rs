//! What image-cache tells the script of a restore that is to hold, and what that script tells another image-cache.
//!
//! A restore in trial holds at `post-restore` until the source has killed the process. If image-cache ends meanwhile, the
//! script is all that the decision can reach: so it is told what it needs for that.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which set a restore holds, and of which session, as the source names them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Of the session, as operators name it.
    pub id: String,
    pub session: String,
    pub snapshot: String,
    pub set: u32,
    /// Of the session's WELCOME: a secret.
    pub key: u64,
    /// Of the image-proxy.
    pub proxy: u64,
    /// Where that connected from, for the log.
    pub peer: String,
}

/// What a script that is to hold is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub held: Held,
    /// The directory in which the script listens for an operator: that of image-cache's control socket.
    pub dir: PathBuf,
    /// Where image-cache listens for image-proxy.
    pub listen: SocketAddr,
    /// Plaintext is taken from any peer (`--insecure-listen`).
    #[serde(default)]
    pub insecure_listen: bool,
    /// The users besides root and the daemon's own whose plaintext is taken on loopback (`--allow-uid`).
    #[serde(default)]
    pub allow_uid: Vec<u32>,
    /// TLS on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<HoldTls>,
}

/// The files of `--tls`, and the peers that may connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldTls {
    pub cert: PathBuf,
    pub key: PathBuf,
    pub cacert: PathBuf,
    pub cacrl: Option<PathBuf>,
    pub allow_peer: Vec<String>,
}

/// The name of a holding script's socket in its directory.
pub fn socket_name(id: &str) -> String {
    format!(
        "{SOCKET_PREFIX}{}{SOCKET_SUFFIX}",
        id.trim_start_matches('@')
    )
}

/// What the names of all such sockets have.
pub const SOCKET_PREFIX: &str = "image-cache-hold-";
pub const SOCKET_SUFFIX: &str = ".sock";
