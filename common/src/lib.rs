//! What image-proxy and image-cache share: the names of the field as types, CRIU's own
//! bytes ([`criu`]), the protocol between the two daemons ([`link`]), and how a daemon of
//! this project starts, logs, listens and stops.
//!
//! Nothing in here decides anything about a dump or a restore; that is the daemons' part.

pub mod admission;
pub mod control;
pub mod criu;
pub mod criu_io;
pub mod daemon;
pub mod error_chain;
pub mod image;
pub mod link;
pub mod log;
pub mod net;
pub mod procfs;
pub mod reload;
pub mod tasks;
pub mod text;
pub mod units;
