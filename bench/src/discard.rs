//! The least that anybody who listens does with a peer: accepts, reads once, and closes.

use anyhow::Result;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

/// Serves `port` of loopback until it is killed.
pub fn run(port: u16) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind(("127.0.0.1", port)).await?;
        loop {
            let (mut peer, _) = listener.accept().await?;
            tokio::spawn(async move {
                // Who says nothing stays until it goes.
                let _ = peer.read(&mut [0; 4096]).await;
            });
        }
    })
}
