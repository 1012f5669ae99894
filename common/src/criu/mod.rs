//! CRIU's own bytes: messages in, values out. No sockets, no clock, no async.
//!
//! Source of every fact: CRIU's `criu/img-remote.c` and `criu/img-streamer.c`, as written
//! down in `docs/criu-protocols.md` of this project.

pub mod frame;
pub mod inventory;
pub mod options;
pub mod page_server;
pub mod pagemap;
pub mod remote;
pub mod requests;
pub mod stream;
