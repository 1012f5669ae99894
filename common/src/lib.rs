//! What image-proxy and image-cache share: the names of the field as types, CRIU's own
//! bytes ([`criu`]), the protocol between the two daemons ([`link`]), and how a daemon of
//! this project starts, logs, listens and stops.
//!
//! Nothing in here decides anything about a dump or a restore; that is the daemons' part.
//!
//! Types, constants and free functions have a comment, and yet the lint `missing_docs` is off: it would also want one for
//! each variant and field of an error, whose message says what it is, and for fields and functions like `new` that a
//! comment could only name again. `pub` means here that the other crates of this repository use it, and no other does.

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
