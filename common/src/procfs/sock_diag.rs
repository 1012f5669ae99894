//! One socket of the kernel's table, by its addresses: what `/proc/net/tcp` has in a line of
//! text among all others, asked for alone (sock_diag(7)). Tasks may be frozen meanwhile.

use std::io;
use std::net::{IpAddr, SocketAddr};

use rustix::io::Errno;
use rustix::net::netlink::{SocketAddrNetlink, SOCK_DIAG};
use rustix::net::{
    recv, sendto, socket_with, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const TCP_LISTEN: u8 = 10;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// `struct nlmsghdr`, then `struct inet_diag_req_v2`.
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: u32 = 16 + 56;

/// Where `idiag_state`, `id.idiag_dport`, `idiag_uid` and `idiag_inode` are in `struct inet_diag_msg`, which
/// is behind the header.
const STATE_AT: usize = HEADER_BYTES + 1;
const PEER_PORT_AT: usize = HEADER_BYTES + 6;
const UID_AT: usize = HEADER_BYTES + 64;
const INODE_AT: usize = HEADER_BYTES + 68;

/// A TCP socket that a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owned {
    pub inode: u64,
    /// The user that made it.
    pub uid: u32,
}

/// The TCP socket whose own address is `own` and whose peer's is `other`; `None`
/// if there is none. An error: the kernel cannot be asked.
pub fn tcp_socket(own: SocketAddr, other: SocketAddr) -> io::Result<Option<Owned>> {
    let flags = SocketFlags::CLOEXEC;
    let family = AddressFamily::NETLINK;
    let netlink = socket_with(family, SocketType::DGRAM, flags, Some(SOCK_DIAG))?;
    let kernel = SocketAddrNetlink::new(0, 0);
    sendto(&netlink, &request(own, other), SendFlags::empty(), &kernel)?;
    let mut answer = [0; 512];
    // The kernel has answered within `sendto`, so this cannot wait for long, or for ever.
    let (n, _) = recv(&netlink, &mut answer[..], RecvFlags::DONTWAIT)?;
    decode(&answer[..n], other.port())
}

fn request(own: SocketAddr, other: SocketAddr) -> Vec<u8> {
    let (own, other) = (canonical(own), canonical(other));
    let family = if own.is_ipv4() { AF_INET } else { AF_INET6 };
    let mut out = Vec::with_capacity(128);
    out.extend(REQUEST_BYTES.to_ne_bytes());
    out.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    out.extend(NLM_F_REQUEST.to_ne_bytes());
    out.extend([0; 8]); // sequence and port: one question, one answer
    out.extend([family, IPPROTO_TCP, 0, 0]);
    out.extend(u32::MAX.to_ne_bytes()); // in any state
    out.extend(own.port().to_be_bytes());
    out.extend(other.port().to_be_bytes());
    for address in [own, other] {
        let mut bytes = [0; 16];
        match address.ip() {
            IpAddr::V4(ip) => bytes[..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => bytes = ip.octets(),
        }
        out.extend(bytes);
    }
    out.extend([0; 4]); // any interface
    out.extend(NO_COOKIE);
    debug_assert_eq!(out.len(), REQUEST_BYTES as usize);
    out
}

/// A mapped address has a socket among those of IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn decode(answer: &[u8], peer_port: u16) -> io::Result<Option<Owned>> {
    let word = |at: usize| {
        let bytes = answer.get(at..at + 4).and_then(|b| b.first_chunk());
        bytes.copied().ok_or(io::ErrorKind::UnexpectedEof)
    };
    let kind = u16::from_ne_bytes([word(4)?[0], word(4)?[1]]);
    if kind == NLMSG_ERROR {
        let error = i32::from_ne_bytes(word(HEADER_BYTES)?);
        let error = Errno::from_raw_os_error(error.saturating_neg());
        return match error {
            Errno::NOENT => Ok(None),
            error => Err(error.into()),
        };
    }
    if kind != SOCK_DIAG_BY_FAMILY {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let inode = u64::from(u32::from_ne_bytes(word(INODE_AT)?));
    let uid = u32::from_ne_bytes(word(UID_AT)?);
    // Where there is no such connection the kernel answers with the socket that listens there
    // (`inet_diag_find_one_icsk`).
    let peer = u16::from_be_bytes([answer[PEER_PORT_AT], answer[PEER_PORT_AT + 1]]);
    if answer[STATE_AT] == TCP_LISTEN || peer != peer_port {
        return Ok(None);
    }
    // 0: the connection is over, and no process has the socket any more: its uid means nothing, and reads as
    // root's (`sock_i_uid`).
    Ok((inode != 0).then_some(Owned { inode, uid }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn both_ends_of_real_connections() {
        for listen in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = TcpListener::bind(listen) else {
                continue; // no IPv6 on this machine
            };
            let mut local = listener.local_addr().unwrap();
            if local.ip().is_unspecified() {
                local.set_ip("127.0.0.1".parse().unwrap()); // a mapped address at its end
            }
            let stream = TcpStream::connect(local).unwrap();
            let (accepted, peer) = listener.accept().unwrap();
            let inode = |socket: &dyn AsFd| rustix::fs::fstat(socket.as_fd()).unwrap().st_ino;
            let local = accepted.local_addr().unwrap();
            let uid = rustix::process::geteuid().as_raw();
            let owned = |inode| Some(Owned { inode, uid });
            assert_eq!(tcp_socket(peer, local).unwrap(), owned(inode(&stream)));
            assert_eq!(tcp_socket(local, peer).unwrap(), owned(inode(&accepted)));
            // A socket that was closed has no user, though the connection is still there.
            drop(stream);
            // What another test forks has all of our descriptors until it executes something.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while tcp_socket(peer, local).unwrap().is_some() {
                assert!(std::time::Instant::now() < deadline, "it is closed");
            }
        }
    }

    /// A process that listens on an address is not the one that connected from it.
    #[test]
    fn a_listening_socket_is_no_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let own = listener.local_addr().unwrap();
        let nobody = "127.0.0.1:1".parse().unwrap();
        assert_eq!(tcp_socket(own, nobody).unwrap(), None);
    }

    #[test]
    fn what_is_not_there() {
        let nobody = "127.0.0.1:1".parse().unwrap();
        assert_eq!(tcp_socket(nobody, nobody).unwrap(), None);
        for short in [&[][..], &[0; 8], &[20, 0, 0, 0, 20, 0]] {
            assert!(decode(short, 1).is_err());
        }
    }
}
