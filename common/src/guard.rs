//! Who may connect to a TCP port: with TLS whoever has a certificate, without it whoever is on
//! this host, and everybody only if that was said in so many words.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};

use crate::link::wire::Socket;
use crate::net::is_loopback;
use crate::tls::{Server, TlsArgs, TlsError};

/// The first byte of TLS: a handshake record. No request of the page server begins with it.
const TLS_HANDSHAKE: u8 = 0x16;

/// How long a peer may take for its first byte, or its handshake.
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
    #[error("nothing came within {} s", WITHIN.as_secs())]
    Timeout,
}

#[derive(Clone)]
pub struct Guard {
    tls: Option<Arc<Server>>,
    /// Plaintext is welcome as well: nobody but this host can connect.
    local: bool,
}

impl Guard {
    /// For this listener. With names in `allowed` a certificate must have one of them.
    pub fn new(
        listener: &TcpListener,
        args: &TlsArgs,
        allowed: &[String],
        insecure: bool,
    ) -> Result<Self, GuardError> {
        let local = is_loopback(listener);
        if !args.tls {
            if !local && !insecure {
                let address = listener.local_addr();
                return Err(GuardError::Open(
                    address.map_or_else(|_| "the port".to_owned(), |a| a.to_string()),
                ));
            }
            return Ok(Self {
                tls: None,
                local: true,
            });
        }
        Ok(Self {
            tls: Some(Server::start(args, allowed)?),
            local,
        })
    }

    /// A connection of image-proxy: with `--tls` always TLS, also on loopback.
    pub async fn link(&self, stream: TcpStream) -> Result<Socket, GuardError> {
        let Some(tls) = &self.tls else {
            return Ok(Socket::Tcp(stream));
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
        let accepted = tokio::time::timeout(WITHIN, accepted).await;
        accepted.map_err(|_| GuardError::Timeout)?
    }

    /// A connection of CRIU to a page server, which takes TLS if CRIU was given `--tls`, and
    /// plaintext from this host.
    pub async fn page_server(&self, stream: TcpStream) -> Result<Socket, GuardError> {
        let Some(tls) = &self.tls else {
            return Ok(Socket::Tcp(stream));
        };
        let accepted = async {
            match first_byte(&stream).await? {
                Some(TLS_HANDSHAKE) => Ok(Socket::Unix(tls.accept(stream).await?)),
                _ if self.local => Ok(Socket::Tcp(stream)),
                _ => Err(GuardError::Plaintext),
            }
        };
        let accepted = tokio::time::timeout(WITHIN, accepted).await;
        accepted.map_err(|_| GuardError::Timeout)?
    }
}

/// Without taking it; `None`: the peer has closed.
async fn first_byte(stream: &TcpStream) -> Result<Option<u8>, GuardError> {
    let mut byte = [0];
    let n = stream.peek(&mut byte).await.map_err(GuardError::First)?;
    Ok((n > 0).then_some(byte[0]))
}
