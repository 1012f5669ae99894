//! Announces more than there can be.

use std::io::{self, Write};
use std::net::SocketAddr;

use super::{session, until_gone, Ended, Peer};

/// A greeting of 4 GiB.
pub fn attack(address: SocketAddr) -> io::Result<Ended> {
    let mut peer = Peer::connect(address)?;
    let head = b"CRIULINK\x05\0\x05\0\xff\xff\xff\xff";
    until_gone(peer.stream.write_all(head))?;
    peer.end()
}

/// A frame of 4 GiB, in a session.
pub fn attack_in_session(address: SocketAddr) -> io::Result<Ended> {
    let mut hand = session(address, "bomb")?;
    let head = *b"\x11\0\0\0\xff\xff\xff\xff\x01\0\0\0\0\0\0\0";
    until_gone(hand.0.write_all(&head))?;
    Peer::of(hand.0).end()
}
