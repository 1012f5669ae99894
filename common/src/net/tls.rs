//! TLS 1.3 with certificates on both sides, for the link and for page servers.
//!
//! It is a filter: what reads and writes a connection has one end of a local socket pair, and a
//! task between the other end and the network encrypts. So the data path is the same with TLS
//! and without, and costs one more copy on each side beside the encryption. The options are
//! those of CRIU (`--tls` and its files, `criu/tls.c`).

mod dates;
mod error;
mod files;
mod filter;
mod validity;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::{ring, CryptoProvider};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, ServerConfig, SignatureScheme,
};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Handle;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::error_chain::chain;
use crate::reload;
use dates::Date;
use filter::{filtered, thread};
use validity::{announce, DatedFile, What};

pub use error::TlsError;
pub use files::TlsArgs;

/// The side that connects.
pub struct Client {
    args: TlsArgs,
    verify_name: bool,
    loaded: RwLock<Arc<Loaded<ClientConfig>>>,
    encrypts: Handle,
}

/// The side that accepts.
pub struct Server {
    args: TlsArgs,
    /// Names of which the peer's certificate must have one; none: every certificate will do.
    allowed: Vec<ServerName<'static>>,
    loaded: RwLock<Arc<Loaded<ServerConfig>>>,
    encrypts: Handle,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("args", &self.args)
            .finish_non_exhaustive()
    }
}

/// What was made of the files, and is in use.
struct Loaded<C> {
    config: Arc<C>,
    /// Where the revocation lists are from. Once there are some there are always some.
    lists: Option<PathBuf>,
    dated: Vec<DatedFile>,
}

impl TlsArgs {
    fn verifier_error(&self, e: impl fmt::Display) -> TlsError {
        TlsError::Verifier {
            path: self.tls_cacert.clone(),
            reason: e.to_string(),
        }
    }

    /// `clock` is what handshakes go by.
    fn client(
        &self,
        verify_name: bool,
        before: Option<&Path>,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Loaded<ClientConfig>, TlsError> {
        let files = self.read(before)?;
        // With lists every certificate must be on none of them: what no list is about does not pass.
        let verifier = WebPkiServerVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.revoked)
            .enforce_revocation_expiration()
            .build()
            .map_err(|e| self.verifier_error(e))?;
        let verifier: Arc<dyn ServerCertVerifier> = match verify_name {
            true => verifier,
            false => Arc::new(AnyName(verifier)),
        };
        let mut config = ClientConfig::builder_with_details(provider(), clock)
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
        Ok(Loaded {
            config: Arc::new(config),
            lists: files.lists,
            dated: files.dated,
        })
    }

    fn server(
        &self,
        before: Option<&Path>,
        clock: Arc<dyn TimeProvider>,
    ) -> Result<Loaded<ServerConfig>, TlsError> {
        let files = self.read(before)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(files.roots, provider())
            .with_crls(files.revoked)
            .enforce_revocation_expiration()
            .build()
            .map_err(|e| self.verifier_error(e))?;
        let mut config = ServerConfig::builder_with_details(provider(), clock)
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
        Ok(Loaded {
            config: Arc::new(config),
            lists: files.lists,
            dated: files.dated,
        })
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

/// Reads the files again at each SIGHUP. A file that cannot be read changes nothing. Logs when something in `dated`, or in
/// what was read since, is about to expire, and when it has expired.
fn on_hangup(
    mut dated: Vec<DatedFile>,
    read_again: impl Fn() -> Result<Vec<DatedFile>, TlsError> + Send + 'static,
) {
    let mut asked = reload::subscribe();
    let mut said = Vec::new();
    let mut next = announce(&dated, &mut said, Date::now());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                asked = asked.changed() => match asked.map(|()| read_again()) {
                    Ok(Ok(read)) => {
                        tracing::info!("SIGHUP: certificates were read again");
                        (dated, said) = (read, Vec::new());
                    }
                    Ok(Err(e)) => tracing::error!(
                        "SIGHUP: {}; the certificates stay as they were, and the revocation lists",
                        chain(&e)
                    ),
                    // The process ends.
                    Err(_) => return,
                },
                () = tokio::time::sleep(next) => {}
            }
            next = announce(&dated, &mut said, Date::now());
        }
    });
}

fn clock() -> Arc<dyn TimeProvider> {
    Arc::new(DefaultTimeProvider)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Why a handshake failed. `lists`: where the revocation lists are from.
fn failed(e: io::Error, lists: Option<&Path>) -> TlsError {
    use CertificateError::{ExpiredRevocationListContext, UnknownRevocationStatus};
    let cause = e.get_ref().and_then(|e| e.downcast_ref());
    let path = lists.map(Path::to_owned);
    match (cause, path) {
        (
            Some(rustls::Error::InvalidCertificate(ExpiredRevocationListContext {
                next_update,
                ..
            })),
            Some(path),
        ) => {
            let until = i64::try_from(next_update.as_secs()).map_or(i64::MAX, |s| s);
            let until = Date(until).to_string();
            TlsError::ExpiredSince { path, until }
        }
        (Some(rustls::Error::InvalidCertificate(UnknownRevocationStatus)), Some(path)) => {
            TlsError::NoListOfPeer { path }
        }
        _ => TlsError::Handshake(e),
    }
}

fn current<C>(loaded: &RwLock<Arc<Loaded<C>>>) -> Arc<Loaded<C>> {
    loaded
        .read()
        .unwrap_or_else(PoisonError::into_inner)
        .clone()
}

/// From now on this one counts; gives what has dates in it. But a list that is older than the one in use does not know of
/// who was revoked since.
fn replace<C>(loaded: &RwLock<Arc<Loaded<C>>>, by: Loaded<C>) -> Result<Vec<DatedFile>, TlsError> {
    let before = current(loaded);
    for new in by.dated.iter().filter(|new| new.what == What::List) {
        let older = |old: &&DatedFile| {
            let same = old.what == What::List && old.dates.name == new.dates.name;
            same && old.dates.from > new.dates.from
        };
        if let Some(old) = before.dated.iter().find(older) {
            return Err(TlsError::ListOlder {
                path: new.path.clone(),
                name: new.dates.name.to_string(),
                from: new.dates.from.to_string(),
                known: old.dates.from.to_string(),
            });
        }
    }
    let dated = by.dated.clone();
    *loaded.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(by);
    Ok(dated)
}

impl Client {
    /// Reads the files, now and at each SIGHUP. Without `verify_name` the peer's certificate
    /// need not name the host that was connected to.
    pub fn start(args: &TlsArgs, verify_name: bool) -> Result<Arc<Self>, TlsError> {
        let loaded = args.client(verify_name, None, clock())?;
        let dated = loaded.dated.clone();
        let client = Arc::new(Self {
            args: args.clone(),
            verify_name,
            loaded: RwLock::new(Arc::new(loaded)),
            encrypts: thread()?,
        });
        let reloaded = client.clone();
        on_hangup(dated, move || {
            let Self {
                args,
                verify_name,
                loaded,
                ..
            } = &*reloaded;
            let before = current(loaded);
            let read = args.client(*verify_name, before.lists.as_deref(), clock())?;
            replace(loaded, read)
        });
        Ok(client)
    }

    /// Greets `host` on a connection to it; gives what to read and write instead. Dropped
    /// before it is done it closes the connection.
    pub async fn connect(&self, stream: TcpStream, host: &str) -> Result<UnixStream, TlsError> {
        let name = server_name(host)?;
        let loaded = current(&self.loaded);
        let stream = stream.into_std().map_err(TlsError::Handshake)?;
        filtered(&self.encrypts, async move {
            let stream = TcpStream::from_std(stream).map_err(TlsError::Handshake)?;
            let connector = TlsConnector::from(loaded.config.clone());
            let connected = connector.connect(name, stream).await;
            connected.map_err(|e| failed(e, loaded.lists.as_deref()))
        })
        .await
    }
}

impl Server {
    /// Reads the files, now and at each SIGHUP.
    pub fn start(args: &TlsArgs, allowed: &[String]) -> Result<Arc<Self>, TlsError> {
        let allowed = allowed.iter().map(|name| server_name(name));
        let loaded = args.server(None, clock())?;
        let dated = loaded.dated.clone();
        let server = Arc::new(Self {
            args: args.clone(),
            allowed: allowed.collect::<Result<_, _>>()?,
            loaded: RwLock::new(Arc::new(loaded)),
            encrypts: thread()?,
        });
        let reloaded = server.clone();
        on_hangup(dated, move || {
            let Self { args, loaded, .. } = &*reloaded;
            let before = current(loaded);
            let read = args.server(before.lists.as_deref(), clock())?;
            replace(loaded, read)
        });
        Ok(server)
    }

    /// Greets the peer that has connected; returns what to read and write instead. Dropped before it
    /// is done it closes the connection.
    pub async fn accept(&self, stream: TcpStream) -> Result<UnixStream, TlsError> {
        let loaded = current(&self.loaded);
        let allowed = self.allowed.clone();
        let stream = stream.into_std().map_err(TlsError::Handshake)?;
        filtered(&self.encrypts, async move {
            let stream = TcpStream::from_std(stream).map_err(TlsError::Handshake)?;
            let acceptor = TlsAcceptor::from(loaded.config.clone());
            let accepted = acceptor.accept(stream).await;
            let stream = accepted.map_err(|e| failed(e, loaded.lists.as_deref()))?;
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

#[cfg(test)]
mod tests;
