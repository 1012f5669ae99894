//! TCP: the options of the link's sockets, each with its reason, and the listener.

pub mod dial;
pub mod socket;
pub mod tls;

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::time::Duration;

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};

use crate::log::limit::LogLimit;

/// How long a peer may leave sent data unacknowledged, or an idle link unanswered, before it
/// counts as dead. Tasks may be frozen meanwhile, so seconds. Linux counts a receive window
/// that stays closed for as long too: a cache that takes nothing for this time is given up.
pub const DEAD_PEER: Duration = Duration::from_secs(8);

/// A failing accept (out of descriptors) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections not yet accepted: as many as the cache serves at once, because a session may come
/// with several and 64 sessions may come together. A connection that finds the queue full is tried again by its
/// kernel a second later, while tasks are about to be frozen.
const BACKLOG: i32 = 1024;

/// Options of a link connection, the same on both ends.
///
/// - `TCP_NODELAY`: an acknowledgement or a PREPARE must not wait for more to send; the sender
///   batches by itself and marks continued data with MSG_MORE.
/// - keepalive and `TCP_USER_TIMEOUT`: a host that vanished is noticed within [`DEAD_PEER`],
///   idle or not.
pub fn configure_link(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(DEAD_PEER))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(DEAD_PEER / 2)
            .with_interval(DEAD_PEER / 4)
            .with_retries(2),
    )
}

/// Listens on `address`, or on every address of both families (IPv4 alone on a host without
/// IPv6) when there is none, as CRIU's own daemons do.
pub async fn listen(address: Option<&str>, port: u16) -> io::Result<TcpListener> {
    listen_as(address, port, false).await
}

/// The same beside others of this user that listen so: each connection comes to one of them.
pub async fn listen_shared(address: Option<&str>, port: u16) -> io::Result<TcpListener> {
    listen_as(address, port, true).await
}

async fn listen_as(address: Option<&str>, port: u16, shared: bool) -> io::Result<TcpListener> {
    let candidates: Vec<SocketAddr> = match address {
        Some(host) => tokio::net::lookup_host((unbracket(host), port))
            .await?
            .collect(),
        None => vec![
            (IpAddr::V6(Ipv6Addr::UNSPECIFIED), port).into(),
            (IpAddr::V4(Ipv4Addr::UNSPECIFIED), port).into(),
        ],
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for candidate in candidates {
        match listen_on(candidate, address.is_none(), shared) {
            Ok(listener) => return Ok(listener),
            // Another family cannot cure a port that is taken.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => return Err(e),
            Err(e) => last = e,
        }
    }
    Err(last)
}

fn listen_on(address: SocketAddr, both_families: bool, shared: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(!both_families)?;
    }
    // A restarted cache must not wait for TIME_WAIT of its own old connections.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// `[ADDR:]PORT`: where a page server listens, on loopback without ADDR.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    pub host: String,
    pub port: u16,
}

impl std::str::FromStr for ListenAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() => (host, port),
            Some(_) => return Err("the address before the colon is missing".to_owned()),
            None => ("127.0.0.1", text),
        };
        let port = port
            .parse()
            .map_err(|_| format!("`{port}` is not a TCP port"))?;
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

/// Whether it listens on loopback, so that no other host can connect.
pub fn is_loopback(listener: &TcpListener) -> bool {
    listener
        .local_addr()
        .is_ok_and(|address| address.ip().to_canonical().is_loopback())
}

/// Accepts connections until `stopped`; `what` is for the log.
pub async fn accept(
    listener: TcpListener,
    what: &str,
    stopped: impl Future<Output = ()>,
    mut serve: impl FnMut(TcpStream, SocketAddr),
) {
    tokio::pin!(stopped);
    let log_limit = LogLimit::default();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stopped => return,
        };
        match accepted {
            // A panic is logged, and costs this connection alone.
            Ok((stream, peer)) => {
                let _ = catch_unwind(AssertUnwindSafe(|| serve(stream, peer)));
            }
            Err(e) => {
                log_limit.log(|more| tracing::error!("{what}: cannot accept: {e}{more}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// `[::1]` as people write it next to a port.
pub fn unbracket(host: &str) -> &str {
    host.strip_prefix('[')
        .and_then(|h| h.strip_suffix(']'))
        .unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::net::dial::{Dial, System};

    #[test]
    fn listen_addresses() {
        for (text, host) in [("27", "127.0.0.1"), ("[::1]:27", "[::1]"), ("h:27", "h")] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, 27));
        }
        assert!("h:".parse::<ListenAddress>().is_err());
        assert!(":27".parse::<ListenAddress>().is_err());
    }

    #[tokio::test]
    async fn literals_names_and_brackets() {
        for host in ["127.0.0.1", "localhost", "[::1]"] {
            let listener = match listen(Some(host), 0).await {
                Ok(listener) => listener,
                // A machine without IPv6: the literal must fail, not fall back.
                Err(e) if host == "[::1]" => {
                    assert_ne!(e.kind(), io::ErrorKind::AddrInUse);
                    continue;
                }
                Err(e) => panic!("{host}: {e}"),
            };
            let port = listener.local_addr().unwrap().port();
            let dial = Dial::new(host, port, Arc::new(System));
            let addresses = dial.addresses().await.unwrap();
            let (client, server) = tokio::join!(dial.connect(&addresses), listener.accept());
            assert!(client.unwrap().0.nodelay().unwrap());
            configure_link(&server.unwrap().0).unwrap();
        }
    }

    #[tokio::test]
    async fn a_port_in_use_is_said_so() {
        let first = listen(None, 0).await.unwrap();
        let port = first.local_addr().unwrap().port();
        let error = listen(None, port).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    }
}
