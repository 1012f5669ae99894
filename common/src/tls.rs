//! TLS 1.3 with certificates on both sides, for the link and for page servers.
//!
//! It is a filter: what reads and writes a connection has one end of a local socket pair, and a
//! task between the other end and the network encrypts. So the data path is the same with TLS
//! and without, and costs one more copy on each side beside the encryption. The options are
//! those of CRIU (`--tls` and its files, `criu/tls.c`).

use std::fmt;
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use clap::Args;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, UnixTime,
};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio::signal::unix::{signal, SignalKind};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::task::AbortOnDropHandle;

use crate::units::parse_some;

/// Read from one side before it is written to the other; TLS itself works on 16 KiB.
const BUFFER_BYTES: usize = 64 << 10;

/// After our side has closed, how long the peer may take to.
const LINGER: Duration = Duration::from_secs(5);

/// Spelled as CRIU spells them, with its default places.
#[derive(Debug, Clone, Default, Args)]
pub struct TlsArgs {
    /// TLS 1.3 with certificates on both sides
    #[arg(long)]
    pub tls: bool,

    /// Certificates of the authorities that the peer's certificate is checked against
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/pki/CA/cacert.pem",
        value_parser = parse_some::<PathBuf>,
        requires = "tls"
    )]
    pub tls_cacert: PathBuf,

    /// Revocation lists of the authorities [default: /etc/pki/CA/cacrl.pem, if that is there]
    #[arg(long, value_name = "FILE", requires = "tls", value_parser = parse_some::<PathBuf>)]
    pub tls_cacrl: Option<PathBuf>,

    /// Our own certificate, and those between it and the authority
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/pki/criu/cert.pem",
        value_parser = parse_some::<PathBuf>,
        requires = "tls"
    )]
    pub tls_cert: PathBuf,

    /// Its private key
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/pki/criu/private/key.pem",
        value_parser = parse_some::<PathBuf>,
        requires = "tls"
    )]
    pub tls_key: PathBuf,
}

const DEFAULT_CACRL: &str = "/etc/pki/CA/cacrl.pem";

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("cannot read {path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("certificates of {path}")]
    Certificates {
        path: PathBuf,
        #[source]
        source: rustls::Error,
    },
    #[error("revocation lists or authorities of {path}: {reason}")]
    Verifier { path: PathBuf, reason: String },
    #[error("cannot start the thread that encrypts")]
    Thread(#[source] io::Error),
    #[error("`{0}` is neither a host name nor an address, as certificates name peers")]
    Name(String),
    #[error("TLS handshake")]
    Handshake(#[source] io::Error),
    #[error("the peer's certificate names none of --allow-peer")]
    NotAllowed,
}

/// Who connects.
pub struct Client {
    args: TlsArgs,
    verify_name: bool,
    config: RwLock<Arc<ClientConfig>>,
    encrypts: Handle,
}

/// Who accepts.
pub struct Server {
    args: TlsArgs,
    /// Names of which the peer's certificate must have one; none: every certificate will do.
    allowed: Vec<ServerName<'static>>,
    config: RwLock<Arc<ServerConfig>>,
    encrypts: Handle,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("args", &self.args)
            .finish_non_exhaustive()
    }
}

/// What is in the files.
struct Files {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn unreadable(path: &Path) -> impl Fn(rustls::pki_types::pem::Error) -> TlsError + '_ {
    |e| TlsError::File {
        path: path.to_owned(),
        reason: e.to_string(),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path)
        .map_err(unreadable(path))?
        .collect();
    match found.map_err(unreadable(path))? {
        none if none.is_empty() => Err(TlsError::File {
            path: path.to_owned(),
            reason: "there is no certificate in it".to_owned(),
        }),
        found => Ok(found),
    }
}

impl TlsArgs {
    fn read(&self) -> Result<Files, TlsError> {
        let mut roots = RootCertStore::empty();
        for root in certificates(&self.tls_cacert)? {
            roots.add(root).map_err(|source| TlsError::Certificates {
                path: self.tls_cacert.clone(),
                source,
            })?;
        }
        let default = PathBuf::from(DEFAULT_CACRL);
        let crl = match &self.tls_cacrl {
            None if default.exists() => Some(&default),
            given => given.as_ref(),
        };
        let revoked = match crl {
            None => Vec::new(),
            Some(path) => CertificateRevocationListDer::pem_file_iter(path)
                .and_then(Iterator::collect)
                .map_err(unreadable(path))?,
        };
        Ok(Files {
            roots: Arc::new(roots),
            revoked,
            chain: certificates(&self.tls_cert)?,
            key: PrivateKeyDer::from_pem_file(&self.tls_key).map_err(unreadable(&self.tls_key))?,
        })
    }

    fn verifier_error(&self, e: impl fmt::Display) -> TlsError {
        TlsError::Verifier {
            path: self.tls_cacert.clone(),
            reason: e.to_string(),
        }
    }

    fn client(&self, verify_name: bool) -> Result<ClientConfig, TlsError> {
        let files = self.read()?;
        let verifier = WebPkiServerVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| self.verifier_error(e))?;
        let verifier: Arc<dyn ServerCertVerifier> = match verify_name {
            true => verifier,
            false => Arc::new(AnyName(verifier)),
        };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.verifier_error(e))?
            .dangerous() // is what rustls calls any verifier of one's own
            .with_custom_certificate_verifier(verifier)
            .with_client_auth_cert(files.chain, files.key)
            .map_err(|source| TlsError::Certificates {
                path: self.tls_cert.clone(),
                source,
            })?;
        // A resumed session would not look at certificates that were read anew.
        config.resumption = rustls::client::Resumption::disabled();
        Ok(config)
    }

    fn server(&self) -> Result<ServerConfig, TlsError> {
        let files = self.read()?;
        let verifier = WebPkiClientVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.revoked)
            .allow_unknown_revocation_status()
            .build()
            .map_err(|e| self.verifier_error(e))?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.verifier_error(e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(files.chain, files.key)
            .map_err(|source| TlsError::Certificates {
                path: self.tls_cert.clone(),
                source,
            })?;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }
}

/// The chain counts, the name in it does not (`--tls-no-cn-verify`).
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use CertificateError::{NotValidForName, NotValidForNameContext};
        // The name is what is looked at last: all else was right.
        match self
            .0
            .verify_server_cert(certificate, between, name, ocsp, now)
        {
            Err(rustls::Error::InvalidCertificate(
                NotValidForName | NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            verdict => verdict,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name(name.to_owned()))
}

/// The thread that encrypts, so that whoever moves images does not wait for it. It lives as
/// long as the process.
fn thread() -> Result<Handle, TlsError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(TlsError::Thread)?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("tls".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))
        .map_err(TlsError::Thread)?;
    Ok(handle)
}

/// Reads the files again at each SIGHUP. What cannot be read changes nothing.
fn on_hangup(reload: impl Fn() -> Result<(), TlsError> + Send + 'static) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(e) => return tracing::error!("cannot watch for SIGHUP: {e}"),
    };
    tokio::spawn(async move {
        while hangups.recv().await.is_some() {
            match reload() {
                Ok(()) => tracing::info!("SIGHUP: certificates were read again"),
                Err(e) => tracing::error!(
                    "SIGHUP: {}; the certificates stay as they were",
                    crate::control::chain(&e)
                ),
            }
        }
    });
}

impl Client {
    /// Reads the files, now and at each SIGHUP. Without `verify_name` the peer's certificate
    /// need not name the host that was connected to.
    pub fn start(args: &TlsArgs, verify_name: bool) -> Result<Arc<Self>, TlsError> {
        let client = Arc::new(Self {
            args: args.clone(),
            verify_name,
            config: RwLock::new(Arc::new(args.client(verify_name)?)),
            encrypts: thread()?,
        });
        let reloaded = client.clone();
        on_hangup(move || {
            let config = reloaded.args.client(reloaded.verify_name)?;
            *reloaded
                .config
                .write()
                .unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
            Ok(())
        });
        Ok(client)
    }

    /// Greets `host` on a connection to it; gives what to read and write instead. Dropped
    /// before it is done it closes the connection.
    pub async fn connect(&self, stream: TcpStream, host: &str) -> Result<UnixStream, TlsError> {
        let name = server_name(host)?;
        let config = self
            .config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let stream = stream.into_std().map_err(TlsError::Handshake)?;
        filtered(&self.encrypts, async move {
            let stream = TcpStream::from_std(stream).map_err(TlsError::Handshake)?;
            let connector = TlsConnector::from(config);
            connector
                .connect(name, stream)
                .await
                .map_err(TlsError::Handshake)
        })
        .await
    }
}

impl Server {
    /// Reads the files, now and at each SIGHUP.
    pub fn start(args: &TlsArgs, allowed: &[String]) -> Result<Arc<Self>, TlsError> {
        let allowed = allowed.iter().map(|name| server_name(name));
        let server = Arc::new(Self {
            args: args.clone(),
            allowed: allowed.collect::<Result<_, _>>()?,
            config: RwLock::new(Arc::new(args.server()?)),
            encrypts: thread()?,
        });
        let reloaded = server.clone();
        on_hangup(move || {
            let config = reloaded.args.server()?;
            *reloaded
                .config
                .write()
                .unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
            Ok(())
        });
        Ok(server)
    }

    /// Greets whoever has connected; gives what to read and write instead. Dropped before it
    /// is done it closes the connection.
    pub async fn accept(&self, stream: TcpStream) -> Result<UnixStream, TlsError> {
        let config = self
            .config
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let allowed = self.allowed.clone();
        let stream = stream.into_std().map_err(TlsError::Handshake)?;
        filtered(&self.encrypts, async move {
            let stream = TcpStream::from_std(stream).map_err(TlsError::Handshake)?;
            let acceptor = TlsAcceptor::from(config);
            let stream = acceptor.accept(stream).await.map_err(TlsError::Handshake)?;
            let certificate = stream
                .get_ref()
                .1
                .peer_certificates()
                .and_then(<[_]>::first);
            match allowed.is_empty() || certificate.is_some_and(|c| names_one_of(c, &allowed)) {
                true => Ok(stream),
                false => Err(TlsError::NotAllowed),
            }
        })
        .await
    }
}

fn names_one_of(certificate: &CertificateDer<'_>, allowed: &[ServerName<'_>]) -> bool {
    let parsed = ParsedCertificate::try_from(certificate);
    parsed.is_ok_and(|parsed| {
        let has = |name| rustls::client::verify_server_name(&parsed, name).is_ok();
        allowed.iter().any(has)
    })
}

/// Runs the handshake and the filter behind it on the thread that encrypts.
async fn filtered<S>(
    encrypts: &Handle,
    handshake: impl Future<Output = Result<S, TlsError>> + Send + 'static,
) -> Result<UnixStream, TlsError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(TlsError::Handshake)?;
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).map_err(TlsError::Handshake)?;
    }
    let shaken = AbortOnDropHandle::new(encrypts.spawn(async move {
        let secret = handshake.await?;
        let plain = UnixStream::from_std(theirs).map_err(TlsError::Handshake)?;
        tokio::spawn(filter(secret, plain));
        Ok(())
    }));
    let broken = |e: tokio::task::JoinError| TlsError::Handshake(io::Error::other(e));
    shaken.await.map_err(broken)??;
    UnixStream::from_std(ours).map_err(TlsError::Handshake)
}

/// Carries bytes both ways until one side has closed, and the other has had its time to.
async fn filter<S: AsyncRead + AsyncWrite>(secret: S, plain: UnixStream) {
    let (secret_read, mut secret_write) = tokio::io::split(secret);
    let (plain_read, plain_write) = plain.into_split();
    let out = async {
        carry(plain_read, &mut secret_write).await?;
        secret_write.shutdown().await
    };
    let back = carry(secret_read, plain_write);
    tokio::pin!(out, back);
    let ended = tokio::select! {
        ended = &mut back => match ended {
            // We have closed; what we said before that goes out all the same.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => linger(out).await,
            ended => ended,
        },
        ended = &mut out => match ended {
            Ok(()) => linger(back).await,
            Err(e) => Err(e),
        },
    };
    // Whoever uses the connection sees that it broke, and says so; why is known here alone. A
    // peer that closes without TLS's own farewell is what a killed one looks like.
    match ended {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => tracing::debug!("TLS: {e}"),
        Err(e) => tracing::warn!("TLS connection lost: {e}"),
        Ok(()) => {}
    }
}

async fn linger(rest: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(LINGER, rest).await.unwrap_or(Ok(()))
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n]).await?;
        // What TLS has encrypted and the network has not taken yet.
        to.flush().await?;
    }
}
