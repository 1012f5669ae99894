//! Has a certificate, and not a good one: of another authority, or one that has expired. It takes
//! whatever the daemon shows.

use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

/// Shakes hands with `cert.pem` and `key.pem` of `certificate`, and waits; gives what openssl says
/// of the end.
pub fn attack(address: SocketAddr, certificate: &Path) -> io::Result<String> {
    let mut client = Command::new("openssl")
        .args(["s_client", "-tls1_3", "-quiet", "-connect"])
        .arg(address.to_string())
        .arg("-cert")
        .arg(certificate.join("cert.pem"))
        .arg("-key")
        .arg(certificate.join("key.pem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    // Nothing is sent, and the input stays open: it is the daemon that ends this.
    let input = client.stdin.take();
    let mut said = String::new();
    if let Some(mut errors) = client.stderr.take() {
        errors.read_to_string(&mut said)?;
    }
    client.wait()?;
    drop(input);
    Ok(said)
}
