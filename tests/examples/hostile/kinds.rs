//! Peers that mean no good, each kind in a module: what it does to a daemon, and how that ended.
//!
//! They are for tests and for the bench, and for whoever wants to try them on a pair of their own:
//! `cargo run -p e2e-tests --example hostile -- KIND ...`.

pub mod attack;
pub mod client_hello;
pub mod deaf_restore;
pub mod foreign_commit;
pub mod half_closed;
pub mod header_bomb;
pub mod name_bomb;
pub mod plaintext;
pub mod replayed_session;
pub mod slow_sender;
pub mod stream_flood;
pub mod tls_stranger;

pub use attack::{Attack, Kind};

use std::io::{self, ErrorKind, Read};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::hand::{Hand, Hello};

/// Nobody waits longer than this for a daemon to end a connection.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How a daemon ended a connection.
#[derive(Clone, Debug)]
pub struct Ended {
    /// From its begin.
    pub after: Duration,
    /// What the daemon said before.
    pub said: Vec<u8>,
    pub how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    Closed,
    Reset,
    /// It has not, within [`PATIENCE`].
    Open,
}

impl Ended {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.said).into_owned()
    }
}

/// A session of image-cache's, with a set; it wants no answers.
pub fn session(address: SocketAddr, name: &str) -> io::Result<Hand> {
    let hello = Hello {
        session: name,
        ..Hello::default()
    };
    let (mut hand, ..) = Hand::greet(address, &hello)?;
    hand.open_set();
    Ok(hand)
}

/// A connection that notes when it began.
pub struct Peer {
    pub stream: TcpStream,
    begin: Instant,
}

impl Peer {
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        TcpStream::connect(address).map(Self::of)
    }

    pub fn of(stream: TcpStream) -> Self {
        Self {
            stream,
            begin: Instant::now(),
        }
    }

    /// Reads until the daemon ends it.
    pub fn end(mut self) -> io::Result<Ended> {
        self.stream.set_read_timeout(Some(PATIENCE))?;
        let mut said = Vec::new();
        let how = match self.stream.read_to_end(&mut said) {
            Ok(_) => How::Closed,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => How::Open,
            Err(e) if is_gone(&e) => How::Reset,
            Err(e) => return Err(e),
        };
        Ok(Ended {
            after: self.begin.elapsed(),
            said,
            how,
        })
    }
}

/// The daemon has ended it.
pub fn is_gone(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
    )
}

/// An error that says that the daemon has ended the connection is no error.
pub fn until_gone(sent: io::Result<()>) -> io::Result<()> {
    match sent {
        Err(e) if is_gone(&e) => Ok(()),
        sent => sent,
    }
}
