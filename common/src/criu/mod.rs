//! CRIU's own bytes: messages in, values out. No sockets, no clock, no async.
//!
//! Source of every fact: CRIU's `criu/img-remote.c` and `criu/img-streamer.c`, as written
//! down in `docs/criu-protocols.md` of this project.

pub mod dialect;
pub mod frame;
pub mod image_file;
pub mod inventory;
pub mod memfd;
pub mod mm;
pub mod nftables;
pub mod options;
pub mod page_server;
pub mod pagemap;
pub mod pstree;
pub mod remote;
pub mod requests;
pub mod stream;
