//! Which peers may connect to a TCP port. With TLS: peers with a certificate. Without it: users of this host that may
//! connect to the unix sockets, too (the kernel tells which user made the socket at the other end of a loopback
//! connection). Any peer only with `--insecure-listen`. Also how many connections there may be ([`quota`]), and how many
//! refusals are logged.

pub mod quota;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::admission::quota::{Full, Host, Permit, Quota};
use crate::criu_io::allowed_uids::AllowedUids;
use crate::log::limit::LogLimit;
use crate::net::is_loopback;
use crate::net::socket::Socket;
use crate::net::tls::{Server, TlsArgs, TlsError};
use crate::procfs::tcp_peer::uid_of;

/// The first byte of TLS: a handshake record. No request of the page server begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// How long a peer may take for its first byte, or its handshake, at most.
const WITHIN: Duration = Duration::from_secs(10);

/// Why a port is not opened.
#[derive(Debug, thiserror::Error)]
pub enum AdmissionError {
    #[error(
        "{0} is open to other hosts, and without --tls any peer there could write to it and read what is sent: \
         give --tls and certificates, listen on loopback (and use a tunnel), or say --insecure-listen"
    )]
    Open(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the connection broke before its first byte")]
    First(#[source] io::Error),
    #[error("plaintext on a port that wants TLS (--tls)")]
    Plaintext,
    #[error("nothing came within {0:?}")]
    Timeout(Duration),
    #[error("its user ({0}) is neither root nor ours, nor named by --allow-uid")]
    Uid(u32),
    #[error(
        "no process on this host has the other end of the connection, so its user is not known"
    )]
    NoProcess,
}

/// What a listener's admission goes by.
pub struct Rules<'a> {
    pub tls: &'a TlsArgs,
    /// If there are any, a certificate must have one of these names.
    pub allowed: &'a [String],
    pub insecure: bool,
    pub max_connections: usize,
    /// The users that are served on a loopback port without a certificate.
    pub allowed_uids: &'a Arc<AllowedUids>,
}

/// Decides which connections to a port are served, and takes them through TLS.
#[derive(Clone)]
pub struct Admission {
    tls: Option<Arc<Server>>,
    /// Only this host can connect: plaintext is accepted as well.
    local: bool,
    /// And of this host only some users.
    checks_users: bool,
    allowed_uids: Arc<AllowedUids>,
    quota: Arc<Quota>,
    log_limit: Arc<LogLimit>,
    /// For the log.
    what: &'static str,
}

impl Admission {
    /// For this listener, which `what` names in the log.
    pub fn new(
        listener: &TcpListener,
        what: &'static str,
        rules: &Rules<'_>,
    ) -> Result<Self, AdmissionError> {
        let tls = match rules.tls.tls {
            true => Some(Server::start(rules.tls, rules.allowed)?),
            false => None,
        };
        Self::with(listener, what, rules, tls)
    }

    /// The same where the files of TLS were read before.
    pub fn with(
        listener: &TcpListener,
        what: &'static str,
        rules: &Rules<'_>,
        tls: Option<Arc<Server>>,
    ) -> Result<Self, AdmissionError> {
        let local = is_loopback(listener);
        if tls.is_none() && !local && !rules.insecure {
            let address = listener.local_addr();
            return Err(AdmissionError::Open(
                address.map_or_else(|_| "the port".to_owned(), |a| a.to_string()),
            ));
        }
        Ok(Self {
            tls,
            local,
            checks_users: local && !rules.insecure,
            allowed_uids: rules.allowed_uids.clone(),
            quota: Quota::new(rules.max_connections),
            log_limit: Arc::default(),
            what,
        })
    }

    /// The right to a connection that was accepted. A refusal is logged.
    pub fn permit(&self, peer: SocketAddr) -> Result<Permit, Full> {
        let permit = self.quota.take(Host::of(peer.ip()));
        permit.inspect_err(|full| self.refused(&peer, full))
    }

    /// Logs that a connection was refused, and why.
    pub fn refused(&self, peer: &SocketAddr, why: &impl std::fmt::Display) {
        let what = self.what;
        let line = |more: &str| tracing::error!(%peer, "{what}: refused: {why}{more}");
        self.log_limit.log(line);
    }

    /// A connection of image-proxy: with `--tls` always TLS, also on loopback. `within`: how long
    /// its handshake may take.
    pub async fn link(
        &self,
        stream: TcpStream,
        within: Duration,
    ) -> Result<Socket, AdmissionError> {
        let Some(tls) = &self.tls else {
            return self.plain(stream);
        };
        let accepted = async {
            match first_byte(&stream)
                .await?
                .is_none_or(|b| b == TLS_HANDSHAKE)
            {
                true => Ok(Socket::Unix(tls.accept(stream).await?)),
                false => Err(AdmissionError::Plaintext),
            }
        };
        let within = WITHIN.min(within);
        let accepted = tokio::time::timeout(within, accepted).await;
        accepted.map_err(|_| AdmissionError::Timeout(within))?
    }

    /// A connection of CRIU to a page server, which takes TLS if CRIU was given `--tls`, and
    /// plaintext from this host. `idle`: how long it may be silent.
    pub async fn page_server(
        &self,
        stream: TcpStream,
        idle: Duration,
    ) -> Result<Socket, AdmissionError> {
        let Some(tls) = &self.tls else {
            return self.plain(stream);
        };
        let within = WITHIN.min(idle);
        let accepted = async {
            match first_byte(&stream).await? {
                Some(TLS_HANDSHAKE) => Ok(Socket::Unix(tls.accept(stream).await?)),
                _ if self.local => self.plain(stream),
                _ => Err(AdmissionError::Plaintext),
            }
        };
        let accepted = tokio::time::timeout(within, accepted).await;
        accepted.map_err(|_| AdmissionError::Timeout(within))?
    }

    /// Plaintext: on loopback only of the users that the unix sockets serve as well.
    fn plain(&self, stream: TcpStream) -> Result<Socket, AdmissionError> {
        if self.checks_users {
            let ends = (stream.peer_addr(), stream.local_addr());
            let (Ok(peer), Ok(local)) = ends else {
                return Err(AdmissionError::NoProcess);
            };
            match uid_of(peer, local) {
                None => return Err(AdmissionError::NoProcess),
                Some(uid) if !self.allowed_uids.allows(uid) => {
                    return Err(AdmissionError::Uid(uid))
                }
                Some(_) => {}
            }
        }
        Ok(Socket::Tcp(stream))
    }
}

/// Without taking it; `None`: the peer has closed.
async fn first_byte(stream: &TcpStream) -> Result<Option<u8>, AdmissionError> {
    let mut byte = [0];
    let n = stream
        .peek(&mut byte)
        .await
        .map_err(AdmissionError::First)?;
    Ok((n > 0).then_some(byte[0]))
}
