//! Has a certificate, and not a good one: of another authority, or one that has expired. It takes
//! whatever the daemon shows.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::hand::Hello;

/// Greets with `cert.pem` and `key.pem` of `certificate`; gives what openssl says of the end.
pub fn attack(address: SocketAddr, certificate: &Path) -> io::Result<String> {
    let mut client = Command::new("openssl")
        .args(["s_client", "-tls1_3", "-quiet", "-no_ign_eof", "-connect"])
        .arg(address.to_string())
        .arg("-cert")
        .arg(certificate.join("cert.pem"))
        .arg("-key")
        .arg(certificate.join("key.pem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdin = client.stdin.take();
    let greeted = stdin.map_or(Ok(()), |mut stdin| {
        stdin.write_all(&Hello::default().bytes())
    });
    super::until_gone(greeted)?;
    let said = client.wait_with_output()?.stderr;
    Ok(String::from_utf8_lossy(&said).into_owned())
}
