//! image-cache: receives the images of a dump over the link, keeps them in memory, serves
//! them to restore. `docs/architecture.md` tells the way of a byte.

pub mod config;
pub mod control;
pub mod decide;
mod filling;
pub mod frontend;
pub mod host_memory;
pub mod import;
pub mod limits;
pub mod page_server;
pub mod receiver;
pub mod script;
pub mod server;
pub mod store;
mod workers;
