//! Comes back with what it knows of a session that is over.

use std::io;
use std::net::SocketAddr;

use super::{Ended, Peer};
use crate::hand::{number, Hand, Hello};

/// How it wants to get in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// As a further connection.
    Joins,
    /// As one that broke.
    Resumes,
}

/// Has a session of two connections, ends it, and says its key again; gives the answer's code, too.
pub fn attack(address: SocketAddr, way: Way) -> io::Result<(u16, Ended)> {
    let first = Hello {
        place: (0, 2),
        session: "replay",
        ..Hello::default()
    };
    let (mut hand, _, welcome) = Hand::greet(address, &first)?;
    let key = number(&welcome[..8]);
    hand.frame(0x20, 0, 0, &[0, 0]);
    Peer::of(hand.0).end()?;
    let again = Hello {
        key,
        place: (if way == Way::Joins { 1 } else { 0 }, 2),
        kind: if way == Way::Joins { 2 } else { 3 },
        patience_ms: 30_000,
        ..first
    };
    let (hand, code, reason) = Hand::greet(address, &again)?;
    let mut ended = Peer::of(hand.0).end()?;
    ended.said = reason;
    Ok((code, ended))
}
