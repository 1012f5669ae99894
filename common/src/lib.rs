//! What image-proxy and image-cache share: the names of the field as types, CRIU's own
//! bytes ([`criu`]), the protocol between the two daemons ([`link`]), and how a daemon of
//! this project starts, logs, listens and stops.
//!
//! Nothing in here decides anything about a dump or a restore; that is the daemons' part.
//!
//! Types, constants and free functions have a comment, and yet the lint `missing_docs` is off: it would also want one for
//! each variant and field of an error, whose message says what it is, and for fields and functions like `new` that a
//! comment could only name again. `pub` means here that the other crates of this repository use it, and no other does.

pub mod control;
pub mod criu;
pub mod criu_options;
pub mod daemon;
pub mod dial;
mod dir_lock;
pub mod dumped;
pub mod exit_status;
pub mod fdpass;
pub mod guard;
pub mod hardening;
pub mod heap;
pub mod host_memory;
pub mod idle;
pub mod image;
pub mod images_dir;
pub mod left_over;
pub mod link;
pub mod log;
pub mod net;
pub mod oom;
pub mod open_dirs;
pub mod page_server;
pub mod parents;
pub mod peers;
pub mod pidfd;
pub mod places;
pub mod process;
pub mod refusals;
pub mod script;
pub mod session_id;
pub mod shutdown;
mod sock_diag;
pub mod sockets;
pub mod status;
pub mod tasks;
pub mod tcp_peer;
pub mod text;
pub mod tls;
pub mod tree;
pub mod trust;
pub mod units;
