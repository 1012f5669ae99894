//! Commits what is not its own.

use std::io;
use std::net::SocketAddr;

use super::{until_gone, Ended, Peer};
use crate::hand::{Hand, Hello};

/// Set `set` of a session of its own, which has none: it is somebody else's number.
pub fn attack(address: SocketAddr, set: u32) -> io::Result<Ended> {
    let hello = Hello {
        proxy: 666,
        session: "thief",
        ..Hello::default()
    };
    let (mut hand, ..) = Hand::greet(address, &hello)?;
    let (images, bytes, digest) = (0u32, 0u64, 0u64);
    let mut payload = images.to_le_bytes().to_vec();
    payload.extend(bytes.to_le_bytes());
    payload.extend(digest.to_le_bytes());
    until_gone(hand.try_frame(0x05, set, 0, &payload))?;
    Peer::of(hand.0).end()
}
