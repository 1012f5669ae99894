//! A CRIU that is fast enough not to be the limit, for the bench and the soak run: it dumps and restores image sets in
//! the three ways that real CRIU has, and gives its pages by reference.
//!
//! It is single-threaded, as CRIU's dump is, and lives in the process that uses it: that is what the daemons see as
//! CRIU. No wait has a limit of its own: the guard of the whole program has one.

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
pub mod work;

pub use dump::Dump;
pub use pipe::vmsplice_all;
pub use restore::{expect_end, read_exactly, Restore};
pub use work::{Done, Work};

use super::remote::{self, Spelling};

/// The ways that the images take, as `criu-remote.md` and `criu-stream.md` tell them apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Dialect {
    /// `--stream`: one connection, a pipe per image
    Stream,
    /// `--remote` since 2020: a connection and a pipe per image
    RemotePipe,
    /// `--remote` before: a connection per image, the data on it
    RemoteSocket,
}

impl Dialect {
    /// The same for `--remote`.
    fn of_remote(self) -> Option<(remote::Dialect, Spelling)> {
        match self {
            Dialect::Stream => None,
            Dialect::RemotePipe => Some((remote::Dialect::Pipe, Spelling::Empty)),
            Dialect::RemoteSocket => Some((remote::Dialect::Socket, Spelling::Empty)),
        }
    }
}
