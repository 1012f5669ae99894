//! Opens images, and ends none.

use std::io;
use std::net::SocketAddr;

use super::{is_gone, session, Ended, Peer};

/// Until the daemon ends it, but at most `most`.
pub fn attack(address: SocketAddr, most: u32) -> io::Result<Ended> {
    let mut hand = session(address, "flood")?;
    for stream in 1..=most {
        match hand.try_open_image(stream, &format!("core-{stream}.img")) {
            Err(e) if is_gone(&e) => break,
            sent => sent?,
        }
    }
    Peer::of(hand.0).end()
}
