//! image-proxy: takes the images of a dump from CRIU and sends them over the link as they
//! come. `docs/architecture.md` tells the way of a byte.

pub mod action_script;
pub mod cli;
pub mod control;
pub mod dumps;
pub mod failure;
pub mod frontend;
pub mod link;
pub mod pipe_budget;
pub mod server;
pub mod session;
pub mod transfer;
