//! A CRIU of our own that is fast enough not to be the limit: it dumps and restores image sets
//! through the daemons' sockets in the three ways that real CRIU has.
//!
//! It is single-threaded, as CRIU's dump is, and lives in this process: what the daemons see as
//! the process id of CRIU, and as the parent of the action script, is the bench.

use serde::{Deserialize, Serialize};

mod dump;
pub mod pagemap;
pub mod pages;
mod pipe;
mod restore;
pub mod rounds;
#[cfg(test)]
mod selftest;
pub mod set;
pub mod space;
pub mod wire;
pub mod work;

pub use dump::Dump;
pub use pipe::{new_pipe, vmsplice_all};
pub use restore::{expect_end, read_exactly, Restore};
pub use work::{Done, Work};

/// CRIU's dialects, as `criu-remote.md` and `criu-stream.md` tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Dialect {
    /// `--stream`: one connection, a pipe per image
    Stream,
    /// `--remote` since 2020: a connection and a pipe per image
    RemotePipe,
    /// `--remote` before: a connection per image, the data on it
    RemoteSocket,
}
