//! Who may connect to a TCP port: with TLS whoever has a certificate, without it whoever is on
//! this host and may connect to the unix sockets, too: the kernel knows who made the socket at the
//! other end of a loopback connection. Everybody only if that was said in so many words. And how many connections there may be, and what the log says of the others.

pub mod quota;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::admission::quota::{Full, Host, Place, Places};
use crate::criu_io::allowed_uids::Peers;
use crate::log::limit::Refusals;
use crate::net::is_loopback;
use crate::net::socket::Socket;
use crate::net::tls::{Server, TlsArgs, TlsError};
use crate::procfs::tcp_peer::uid_of;

/// The first byte of TLS: a handshake record. No request of the page server begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// How long a peer may take for its first byte, or its handshake, at most.
const WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    #[error(
        "{0} is open to other hosts, and without --tls everybody there could write to it and read what is sent: \
         give --tls and certificates, listen on loopback (and use a tunnel), or say --insecure-listen"
    )]
    Open(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("waiting for the first byte")]
    First(#[source] io::Error),
    #[error("plaintext on a port that wants TLS (--tls)")]
    Plaintext,
    #[error("nothing came within {0:?}")]
    Timeout(Duration),
    #[error("its user ({0}) is neither root nor ours, nor named by --allow-uid")]
    Uid(u32),
    #[error("nobody on this host has the other end, so it is not known who that is")]
    Nobody,
}

/// What a listener's guard goes by.
pub struct Rules<'a> {
    pub tls: &'a TlsArgs,
    /// If there are any, a certificate must have one of these names.
    pub allowed: &'a [String],
    pub insecure: bool,
    pub max_connections: usize,
    /// Who is served on a loopback port without a certificate.
    pub peers: &'a Arc<Peers>,
}

#[derive(Clone)]
pub struct Guard {
    tls: Option<Arc<Server>>,
    /// Nobody but this host can connect: plaintext is welcome as well.
    local: bool,
    /// And of this host not everybody.
    checks_users: bool,
    peers: Arc<Peers>,
    places: Arc<Places>,
    refusals: Arc<Refusals>,
    /// For the log.
    what: &'static str,
}

impl Guard {
    /// For this listener, which `what` names in the log.
    pub fn new(
        listener: &TcpListener,
        what: &'static str,
        rules: &Rules<'_>,
    ) -> Result<Self, GuardError> {
        let local = is_loopback(listener);
        if !rules.tls.tls && !local && !rules.insecure {
            let address = listener.local_addr();
            return Err(GuardError::Open(
                address.map_or_else(|_| "the port".to_owned(), |a| a.to_string()),
            ));
        }
        let tls = match rules.tls.tls {
            true => Some(Server::start(rules.tls, rules.allowed)?),
            false => None,
        };
        Ok(Self {
            tls,
            local,
            checks_users: local && !rules.insecure,
            peers: rules.peers.clone(),
            places: Places::new(rules.max_connections),
            refusals: Arc::default(),
            what,
        })
    }

    /// A place for a connection that was accepted. If there is none the log says so.
    pub fn place(&self, peer: SocketAddr) -> Result<Place, Full> {
        let place = self.places.take(Host::of(peer.ip()));
        place.inspect_err(|full| self.refused(&peer, full))
    }

    /// Logs that a connection was refused, and why.
    pub fn refused(&self, peer: &SocketAddr, why: &impl std::fmt::Display) {
        let what = self.what;
        let line = |more: &str| tracing::error!(%peer, "{what}: refused: {why}{more}");
        self.refusals.log(line);
    }

    /// A connection of image-proxy: with `--tls` always TLS, also on loopback. `within`: how long
    /// its handshake may take.
    pub async fn link(&self, stream: TcpStream, within: Duration) -> Result<Socket, GuardError> {
        let Some(tls) = &self.tls else {
            return self.plain(stream);
        };
        let accepted = async {
            match first_byte(&stream)
                .await?
                .is_none_or(|b| b == TLS_HANDSHAKE)
            {
                true => Ok(Socket::Unix(tls.accept(stream).await?)),
                false => Err(GuardError::Plaintext),
            }
        };
        let within = WITHIN.min(within);
        let accepted = tokio::time::timeout(within, accepted).await;
        accepted.map_err(|_| GuardError::Timeout(within))?
    }

    /// A connection of CRIU to a page server, which takes TLS if CRIU was given `--tls`, and
    /// plaintext from this host. `idle`: how long it may be silent.
    pub async fn page_server(
        &self,
        stream: TcpStream,
        idle: Duration,
    ) -> Result<Socket, GuardError> {
        let Some(tls) = &self.tls else {
            return self.plain(stream);
        };
        let within = WITHIN.min(idle);
        let accepted = async {
            match first_byte(&stream).await? {
                Some(TLS_HANDSHAKE) => Ok(Socket::Unix(tls.accept(stream).await?)),
                _ if self.local => self.plain(stream),
                _ => Err(GuardError::Plaintext),
            }
        };
        let accepted = tokio::time::timeout(within, accepted).await;
        accepted.map_err(|_| GuardError::Timeout(within))?
    }

    /// Plaintext: on loopback of those alone whom the unix sockets serve as well.
    fn plain(&self, stream: TcpStream) -> Result<Socket, GuardError> {
        if self.checks_users {
            let ends = (stream.peer_addr(), stream.local_addr());
            let (Ok(peer), Ok(local)) = ends else {
                return Err(GuardError::Nobody);
            };
            match uid_of(peer, local) {
                None => return Err(GuardError::Nobody),
                Some(uid) if !self.peers.may(uid) => return Err(GuardError::Uid(uid)),
                Some(_) => {}
            }
        }
        Ok(Socket::Tcp(stream))
    }
}

/// Without taking it; `None`: the peer has closed.
async fn first_byte(stream: &TcpStream) -> Result<Option<u8>, GuardError> {
    let mut byte = [0];
    let n = stream.peek(&mut byte).await.map_err(GuardError::First)?;
    Ok((n > 0).then_some(byte[0]))
}
