//! Which process of this host is at the other end of a TCP connection.
//!
//! The kernel tells the peer of a unix socket, not that of a TCP connection. But a connection
//! within one network namespace has both of its ends in the kernel's table, the table gives
//! each end's inode, and `/proc/PID/fd` shows which process has it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use crate::procfs::sock_diag::{tcp_socket, Owned};

/// Tables of this process's network namespace. The other end may be an IPv6 socket that talks
/// to a mapped IPv4 address, so each connection is looked for in both.
const TABLES: [&str; 2] = ["/proc/net/tcp", "/proc/net/tcp6"];

/// The process that has the socket at the other end of a connection, and that socket's inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    pub pid: i32,
    inode: u64,
}

impl Holder {
    /// Finds the process that connected from `peer` to our `local` address; `likely` processes are looked
    /// at first, then those named `comm`. `None`: it is not on this host, in another network
    /// namespace, or cannot be seen from here. Blocking.
    pub fn find(peer: SocketAddr, local: SocketAddr, likely: &[i32], comm: &str) -> Option<Self> {
        let inode = owned(peer, local)?.inode;
        let of = |pid: i32| Some(Self { pid, inode }).filter(Self::holds);
        if let Some(found) = likely.iter().find_map(|&pid| of(pid)) {
            return Some(found);
        }
        // A process that has just connected was mostly started just before. A host has thousands of others.
        let mut newest: Vec<_> = processes().collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        let mut others = Vec::new();
        for pid in newest {
            if !is_named(pid, comm) {
                others.push(pid);
            } else if let Some(found) = of(pid) {
                return Some(found);
            }
        }
        others.into_iter().find_map(of)
    }

    /// Whether it still has the socket.
    pub fn holds(&self) -> bool {
        let socket = PathBuf::from(format!("socket:[{}]", self.inode));
        let Ok(fds) = fs::read_dir(format!("/proc/{}/fd", self.pid)) else {
            return false;
        };
        let mut links = fds.flatten().map(|fd| fs::read_link(fd.path()));
        links.any(|link| link.is_ok_and(|link| link == socket))
    }
}

/// The socket at the other end of a connection.
fn owned(peer: SocketAddr, local: SocketAddr) -> Option<Owned> {
    // The tables are for kernels, and sandboxes, that do not answer the question.
    tcp_socket(peer, local).unwrap_or_else(|_| {
        let tables = TABLES.iter().filter_map(|path| fs::read(path).ok());
        let mut found =
            tables.filter_map(|table| socket_in(&String::from_utf8_lossy(&table), peer, local));
        found.next()
    })
}

/// The user that connected from `peer` to our `local` address. `None`: the socket is not in this
/// network namespace, or no process has it any more.
pub fn uid_of(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    owned(peer, local).map(|socket| socket.uid)
}

/// Whether [`Holder::find`] would find connections of this process.
pub fn can_be_found(pid: i32) -> bool {
    let network = |of: &str| fs::read_link(format!("/proc/{of}/ns/net")).ok();
    let ours = network("self");
    ours.is_some()
        && ours == network(&pid.to_string())
        && fs::read_dir(format!("/proc/{pid}/fd")).is_ok()
        && TABLES.iter().any(|path| fs::File::open(path).is_ok())
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn is_named(pid: i32, comm: &str) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == comm)
}

/// The socket with these addresses, in the text of a table.
fn socket_in(table: &str, own: SocketAddr, other: SocketAddr) -> Option<Owned> {
    let canonical = |a: SocketAddr| (a.ip().to_canonical(), a.port());
    let wanted = (canonical(own), canonical(other));
    // "sl local_address rem_address st tx_queue:rx_queue tr:tm->when retrnsmt uid timeout inode ..."
    let of_line = |line: &str| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let ends = (address(words.next()?)?, address(words.next()?)?);
        let uid = words.nth(4)?.parse().ok()?;
        let inode: u64 = words.nth(1)?.parse().ok()?;
        // 0: the connection is over, and no process has the socket any more.
        (ends == wanted && inode != 0).then_some(Owned { inode, uid })
    };
    table.lines().find_map(of_line)
}

/// `0100007F:0016`: words of the address as this machine has them in memory, then the port.
fn address(text: &str) -> Option<(IpAddr, u16)> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| {
        Some(
            u32::from_str_radix(ip.get(at..at + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(0)?)),
        32 => {
            let words = [word(0)?, word(8)?, word(16)?, word(24)?];
            let bytes: [u8; 16] = words.concat().try_into().ok()?;
            IpAddr::from(Ipv6Addr::from(bytes))
        }
        _ => return None,
    };
    Some((ip.to_canonical(), u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
#[cfg(target_endian = "little")]
mod tests {
    use super::*;

    const V4: &str = "  \
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 17001 1 0000000000000000 100 0 0 10 0
   1: 0100007F:0016 0100007F:C350 01 00000000:00000000 02:000A7214 00000000     0        0 17002 2 0000000000000000 20 4 30 10 -1
   2: 0100007F:C350 0100007F:0016 01 00000000:00000000 02:000A7214 00000000  1000        0 17003 2 0000000000000000 20 4 30 10 -1
   3: 0200004D:C351 0100004D:0016 06 00000000:00000000 03:00000A72 00000000     0        0 0 3 0000000000000000
";
    const V6: &str = "  \
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000001000000:C352 00000000000000000000000001000000:0016 01 00000000:00000000 00:00000000 00000000     0        0 17004 1 0000000000000000 20 0 0 10 -1
   1: 0000000000000000FFFF00000100007F:C353 0000000000000000FFFF00000100007F:0016 01 00000000:00000000 00:00000000 00000000     0        0 17005 1 0000000000000000 20 0 0 10 -1
";

    fn socket(table: &str, own: &str, other: &str) -> Option<Owned> {
        socket_in(table, own.parse().unwrap(), other.parse().unwrap())
    }

    fn inode(table: &str, own: &str, other: &str) -> Option<u64> {
        socket(table, own, other).map(|socket| socket.inode)
    }

    #[test]
    fn the_end_of_the_peer_and_not_our_own() {
        assert_eq!(inode(V4, "127.0.0.1:50000", "127.0.0.1:22"), Some(17003));
        assert_eq!(inode(V4, "127.0.0.1:22", "127.0.0.1:50000"), Some(17002));
        assert_eq!(inode(V4, "127.0.0.1:50001", "127.0.0.1:22"), None);
        let uid = |own| socket(V4, own, "127.0.0.1:22").map(|socket| socket.uid);
        assert_eq!(uid("127.0.0.1:50000"), Some(1000));
        assert_eq!(inode(V6, "[::1]:50002", "[::1]:22"), Some(17004));
    }

    #[test]
    fn mapped_addresses_are_the_addresses_that_they_map() {
        let mapped = inode(V4, "[::ffff:127.0.0.1]:50000", "[::ffff:127.0.0.1]:22");
        assert_eq!(mapped, Some(17003));
        assert_eq!(inode(V6, "127.0.0.1:50003", "127.0.0.1:22"), Some(17005));
    }

    #[test]
    fn a_connection_that_is_over_is_nobodys() {
        assert_eq!(inode(V4, "77.0.0.2:50001", "77.0.0.1:22"), None);
    }

    #[test]
    fn other_text_is_no_connection() {
        for line in [
            "",
            "0:",
            "0: 0100007F 0100007F:0016",
            "0: 0100007F:C350 0100007F:0016 01 0:0 0:0 0 0 0",
            "0: 0100007F:C350 0100007F:0016 01 0:0 0:0 0 0 0 x",
            "0: \u{e4}\u{e4}\u{e4}\u{e4}:C350 0100007F:0016 01 0:0 0:0 0 0 0 5",
            "0: 0100007F:1C350 0100007F:0016 01 0:0 0:0 0 0 0 5",
        ] {
            assert_eq!(
                inode(line, "127.0.0.1:50000", "127.0.0.1:22"),
                None,
                "{line}"
            );
        }
    }

    #[test]
    fn a_real_connection() {
        for listen in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = std::net::TcpListener::bind(listen) else {
                continue; // no IPv6 on this machine
            };
            let local = listener.local_addr().unwrap();
            let stream = std::net::TcpStream::connect(local).unwrap();
            let (_accepted, peer) = listener.accept().unwrap();
            let me = i32::try_from(std::process::id()).unwrap();
            assert!(can_be_found(me));
            for likely in [&[me][..], &[]] {
                let holder = Holder::find(peer, local, likely, "criu").unwrap();
                assert!(holder.holds());
            }
            let holder = Holder::find(peer, local, &[me], "criu").unwrap();
            assert_eq!(holder.pid, me);
            let uid = rustix::process::geteuid().as_raw();
            assert_eq!(uid_of(peer, local), Some(uid));
            drop(stream);
            assert!(!holder.holds());
            // What another test forks has all of our descriptors until it executes something.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while let Some(found) = Holder::find(peer, local, &[me], "criu") {
                assert!(found.pid != me && std::time::Instant::now() < deadline);
            }
        }
    }
}
