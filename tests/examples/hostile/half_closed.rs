//! Closes its own half, and stays to listen.

use std::io::{self, Write};
use std::net::{Shutdown, SocketAddr};

use super::{session, Ended, Peer};
use crate::hand::Hello;

/// In the middle of a greeting.
pub fn attack(address: SocketAddr) -> io::Result<Ended> {
    let mut peer = Peer::connect(address)?;
    let hello = Hello::default().bytes();
    peer.stream.write_all(&hello[..hello.len() / 2])?;
    peer.stream.shutdown(Shutdown::Write)?;
    peer.end()
}

/// In the middle of an image.
pub fn attack_in_session(address: SocketAddr) -> io::Result<Ended> {
    let mut hand = session(address, "half")?;
    hand.open_image(1, "pages-1.img");
    hand.frame(0x11, 1, 0, &[7; 100_000]);
    hand.0.shutdown(Shutdown::Write)?;
    Peer::of(hand.0).end()
}
