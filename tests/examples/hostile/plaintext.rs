//! Speaks the link's protocol to a port that wants TLS.

use std::io::{self, Write};
use std::net::SocketAddr;

use super::{until_gone, Ended, Peer};
use crate::hand::Hello;

pub fn attack(address: SocketAddr) -> io::Result<Ended> {
    let mut peer = Peer::connect(address)?;
    until_gone(peer.stream.write_all(&Hello::default().bytes()))?;
    peer.end()
}
