//! image-proxy: takes the images of a dump from CRIU and sends them over the link as they
//! come. `docs/architecture.md` tells the way of a byte.

mod abort;
mod commit;
pub mod config;
pub mod connect;
pub mod control;
mod evidence;
pub mod frontend;
pub mod kept;
pub mod lanes;
pub mod link;
pub mod pipes;
pub mod proxy;
pub mod replay;
pub mod room;
pub mod run;
pub mod script;
pub mod sender;
pub mod server;
pub mod session;
pub mod ship;
pub mod source;
pub mod writer;
