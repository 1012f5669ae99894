//! What the fuzz targets share: the fuzzer's bytes as values ([`input`]), a runtime whose clock the
//! target moves ([`world`]), the daemons' servers in this process ([`cache`], [`proxy`]), and a CRIU,
//! an operator and a link's other end that do what the bytes say ([`client`], [`link`]).
//!
//! The targets are functions ([`targets`]), so that one program can have all of them.
//!
//! A panic anywhere, also in a task, ends the fuzzer: libfuzzer-sys aborts in the panic hook.

pub mod cache;
pub mod client;
pub mod input;
pub mod link;
pub mod pages;
pub mod proxy;
pub mod targets;
pub mod unix;
pub mod world;

#[doc(hidden)]
pub use libfuzzer_sys;
