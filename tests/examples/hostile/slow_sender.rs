//! Sends what is right, and too slowly.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use super::{is_gone, Ended, Peer};
use crate::hand::Hello;

/// The greeting of image-proxy.
pub fn greeting() -> Vec<u8> {
    Hello::default().bytes()
}

/// CRIU's first request to a page server: it opens the pagemap of task 7.
pub fn page_request() -> Vec<u8> {
    let mut open = 4u32.to_le_bytes().to_vec();
    open.extend([0; 12]);
    open.extend((7u64 << 8 | 1).to_le_bytes());
    open
}

/// A byte of `bytes` each `pace`, until the daemon ends it or nothing but the last byte is left.
pub fn attack(address: SocketAddr, bytes: &[u8], pace: Duration) -> io::Result<Ended> {
    let mut peer = Peer::connect(address)?;
    for byte in &bytes[..bytes.len() - 1] {
        match peer.stream.write_all(&[*byte]) {
            Err(e) if is_gone(&e) => break,
            sent => sent?,
        }
        std::thread::sleep(pace);
    }
    peer.end()
}
