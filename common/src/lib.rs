//! What image-proxy and image-cache share: the names of the field as types, CRIU's own
//! bytes ([`criu`]), the protocol between the two daemons ([`link`]), and how a daemon of
//! this project starts, logs, listens and stops.
//!
//! Nothing in here decides anything about a dump or a restore; that is the daemons' part.

pub mod control;
pub mod criu;
pub mod daemon;
pub mod dumped;
pub mod exit_status;
pub mod fdpass;
pub mod guard;
pub mod hardening;
pub mod idle;
pub mod image;
pub mod images_dir;
pub mod link;
pub mod net;
pub mod open_dirs;
pub mod page_server;
pub mod peers;
pub mod places;
pub mod process;
pub mod refusals;
pub mod script;
pub mod shutdown;
mod sock_diag;
pub mod sockets;
pub mod status;
pub mod tcp_peer;
pub mod tls;
pub mod tree;
pub mod units;
