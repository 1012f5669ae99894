//! Descriptors that come behind a request.

use std::os::fd::OwnedFd;
use std::time::Duration;

use image_common::criu_io::fdpass::{recv_handover, Handover};
use image_common::error_chain::chain;
use tokio::net::UnixStream;

/// For those of an action script, which come with the line.
pub const WITHIN: Duration = Duration::from_secs(5);

/// The next one. `what`: for the error.
pub async fn handed_over(stream: &UnixStream, what: &str) -> Result<OwnedFd, String> {
    match recv_handover(stream).await {
        Ok(Handover::Fd(fd)) => Ok(fd),
        Ok(_) => Err(format!("{what} did not come")),
        Err(e) => Err(chain(&e)),
    }
}
