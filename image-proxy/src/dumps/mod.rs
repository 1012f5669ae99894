//! Which runs and sessions there are, and which of them a connection or a script is about.

mod bring;
mod drain;
pub mod in_doubt;
mod late;
pub mod memory_check;
pub mod page_server;
pub mod proxy;
mod remote;
pub mod round_client;
mod script;
mod settings;
mod settle;
mod stream;

pub use proxy::{Active, Proxy, RunError, StreamConnection};
pub use settings::Settings;
