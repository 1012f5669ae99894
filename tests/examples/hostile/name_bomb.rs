//! Names that are too long for anything.

use std::io;
use std::net::SocketAddr;

use super::{session, until_gone, Ended, Peer};
use crate::hand::Hello;

/// The longest that a text's length can say.
pub const NAME_BYTES: usize = 65_535;

/// As the name of a session.
pub fn attack(address: SocketAddr) -> io::Result<Ended> {
    let name = "n".repeat(NAME_BYTES);
    let hello = Hello {
        session: &name,
        ..Hello::default()
    };
    let mut peer = Peer::connect(address)?;
    until_gone(io::Write::write_all(&mut peer.stream, &hello.bytes()))?;
    peer.end()
}

/// As the name of an image, in a session.
pub fn attack_in_session(address: SocketAddr) -> io::Result<Ended> {
    let mut hand = session(address, "names")?;
    until_gone(hand.try_open_image(1, &"n".repeat(NAME_BYTES)))?;
    Peer::of(hand.0).end()
}
