//! image-cache: receives the images of a dump over the link, keeps them in memory, serves
//! them to restore. `docs/architecture.md` tells the way of a byte.

pub mod action_script;
pub mod cli;
pub mod control;
pub mod frontend;
pub mod keeper;
pub mod limits;
pub mod page_server;
pub mod receiver;
pub mod server;
pub mod store;
