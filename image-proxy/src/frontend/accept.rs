//! Accepts connections of CRIU and of its script.

use std::future::Future;
use std::sync::Arc;

use image_common::criu_io::sockets::{self, Listener};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

/// Accepts until `stop`; connections outlive it.
pub async fn accept<F, T>(listener: Arc<Listener>, stop: CancellationToken, serve: F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    sockets::accept(&listener, &stop, &serve).await;
    // What is connected already must be accepted: reset, it would kill CRIU.
    sockets::accept_waiting(&listener, &serve);
}
