//! The first bytes on the ports with `--tls`: any, or a client's greeting, a little changed. Nobody gets
//! in who has no certificate, and plaintext of this host, which a page server takes, comes as it was
//! said.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use image_common::admission::{Admission, AdmissionError, Rules};
use image_common::criu_io::allowed_uids::AllowedUids;
use image_common::net::socket::Socket;
use image_common::net::tls::TlsArgs;
use tokio::runtime::{Builder, Runtime};

use crate::input::Input;
use crate::world;

const HANDSHAKE: u8 = 0x16;

/// More than any input takes.
const WITHIN: Duration = Duration::from_secs(600);

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let kind = input.u8();
    let (link, local) = (kind & 1 != 0, kind & 2 != 0);
    let piece = *input.pick(&[usize::MAX, 1, 5, 100]);
    let wire = input.rest();
    // What stays open is so before the world counts.
    let ports = Ports::get();
    world::run(async move {
        let (mut client, stream) = ports.connected();
        let guard = if local { &ports.local } else { &ports.open }.clone();
        let accepting = tokio::spawn(async move {
            match link {
                true => guard.link(stream, WITHIN).await,
                false => guard.page_server(stream, WITHIN).await,
            }
        });
        let mut said = 0;
        for piece in wire.chunks(piece) {
            // It may have refused what came before.
            if client.write_all(piece).is_err() {
                break;
            }
            said += piece.len();
            world::turn().await;
        }
        let _ = client.shutdown(Shutdown::Write);
        world::until(|| accepting.is_finished()).await;
        let accepted = accepting.await.expect("it has ended");
        let encrypted = wire.first().is_none_or(|&byte| byte == HANDSHAKE);
        match accepted {
            Ok(socket) => {
                assert!(local && !link, "nobody showed a certificate");
                assert!(wire.is_empty() || !encrypted, "that is no plaintext");
                assert_eq!(rest(socket), wire[..said], "what was looked at is there");
            }
            Err(AdmissionError::Plaintext) => assert!((link || !local) && (!link || !encrypted)),
            Err(e) => assert!(encrypted, "{e}"),
        }
    });
}

/// What a page server would read.
fn rest(socket: Socket) -> Vec<u8> {
    let Socket::Tcp(stream) = socket else {
        panic!("there is no TLS here");
    };
    let mut stream = stream.into_std().expect("a socket");
    stream.set_nonblocking(false).expect("a socket");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("the client has closed");
    all
}

/// Two ports with the same certificates, of which one is open to other hosts.
struct Ports {
    local: Admission,
    open: Admission,
    /// Where connections are made that one of them guards.
    listener: TcpListener,
    /// Its tasks wait for a SIGHUP, for ever; those of an input must end.
    _runtime: Runtime,
}

impl Ports {
    fn get() -> &'static Self {
        static PORTS: OnceLock<Ports> = OnceLock::new();
        PORTS.get_or_init(|| {
            let runtime = Builder::new_current_thread().enable_all().build();
            let runtime = runtime.expect("a runtime");
            let dir = tempfile::tempdir().expect("a directory");
            let args = certificates(dir.path());
            let rules = Rules {
                tls: &args,
                allowed: &[],
                insecure: false,
                max_connections: usize::MAX,
                allowed_uids: &AllowedUids::new(&[]),
            };
            let guard = |address: &str| {
                let _entered = runtime.enter();
                let listener = listener(address);
                listener.set_nonblocking(true).expect("a socket");
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                Admission::new(&listener, "port", &rules).expect("a guard")
            };
            let (local, open) = (guard("127.0.0.1:0"), guard("0.0.0.0:0"));
            Self {
                local,
                open,
                listener: listener("127.0.0.1:0"),
                _runtime: runtime,
            }
        })
    }

    /// Both ends of a connection; the client's blocks.
    fn connected(&self) -> (TcpStream, tokio::net::TcpStream) {
        let address = self.listener.local_addr().expect("an address");
        let client = TcpStream::connect(address).expect("a connection");
        let (stream, _) = self.listener.accept().expect("a connection");
        stream.set_nonblocking(true).expect("a socket");
        let stream = tokio::net::TcpStream::from_std(stream).expect("a socket");
        (client, stream)
    }
}

fn certificates(dir: &Path) -> TlsArgs {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/test-ca");
    let made = Command::new(script).arg(dir).arg("target").output();
    let made = made.expect("scripts/test-ca");
    assert!(made.status.success(), "{made:?}");
    TlsArgs {
        tls: true,
        tls_cacert: dir.join("cacert.pem"),
        tls_cacrl: None,
        tls_cert: dir.join("target/cert.pem"),
        tls_key: dir.join("target/key.pem"),
    }
}

fn listener(address: &str) -> TcpListener {
    TcpListener::bind(address).expect("a port")
}
