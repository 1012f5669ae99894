//! TLS 1.3 with certificates on both sides, for the link and for page servers.
//!
//! It is a filter: what reads and writes a connection has one end of a local socket pair, and a
//! task between the other end and the network encrypts. So the data path is the same with TLS
//! and without, and costs one more copy on each side beside the encryption. The options are
//! those of CRIU (`--tls` and its files, `criu/tls.c`).

mod dates;

use std::fmt;
use std::fs;
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
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
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

use crate::error_chain::chain;
use crate::units::parse_some;
use dates::{Date, Dates, Name, Standing};

/// Read from one side before it is written to the other; TLS itself works on 16 KiB.
const BUFFER_BYTES: usize = 64 << 10;

/// After our side has closed, how long the peer may take to.
const LINGER: Duration = Duration::from_secs(5);

/// The clock of who made a revocation list may be ahead of ours by so much.
const SLACK: Duration = Duration::from_secs(300);

/// The clock is looked at again after this, at least: it may have been set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(3600);

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
    #[error("cannot read the revocation lists of {path}: {reason}")]
    Lists { path: PathBuf, reason: String },
    #[error("the revocation list of {name} in {path} has expired on {until}: a newer one is needed there")]
    ListExpired {
        path: PathBuf,
        name: String,
        until: String,
    },
    #[error(
        "the revocation list of {name} in {path} is not valid before {from}: is the clock right?"
    )]
    ListNotYet {
        path: PathBuf,
        name: String,
        from: String,
    },
    #[error("the revocation list of {name} in {path} is of {from}, and older than the one in use, of {known}")]
    ListOlder {
        path: PathBuf,
        name: String,
        from: String,
        known: String,
    },
    #[error("{path} has no revocation list of an authority of {authorities}, so no peer could be checked")]
    NoListFits { path: PathBuf, authorities: PathBuf },
    #[error("cannot start the thread that encrypts")]
    Thread(#[source] io::Error),
    #[error("`{0}` is neither a host name nor an address, as certificates name peers")]
    Name(String),
    #[error("TLS handshake")]
    Handshake(#[source] io::Error),
    #[error(
        "TLS handshake: the revocation list in {path} has expired on {until}, so it is not known whether the peer's \
         certificate was revoked since: put a newer list there and send SIGHUP"
    )]
    ExpiredSince { path: PathBuf, until: String },
    #[error(
        "TLS handshake: {path} has no revocation list of the authority of the peer's certificate (or of one between): \
         put one there and send SIGHUP"
    )]
    NoListOfPeer { path: PathBuf },
    #[error("the peer's certificate names none of --allow-peer")]
    NotAllowed,
}

/// Who connects.
pub struct Client {
    args: TlsArgs,
    verify_name: bool,
    loaded: RwLock<Arc<Loaded<ClientConfig>>>,
    encrypts: Handle,
}

/// Who accepts.
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

/// What is in the files.
struct Files {
    roots: Arc<RootCertStore>,
    revoked: Vec<CertificateRevocationListDer<'static>>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// Where the lists are from.
    lists: Option<PathBuf>,
    papers: Vec<Paper>,
}

/// What was made of the files, and is in use.
struct Loaded<C> {
    config: Arc<C>,
    /// Where the revocation lists are from. Once there are some there are always some.
    lists: Option<PathBuf>,
    papers: Vec<Paper>,
}

/// Something with a date.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Paper {
    what: What,
    path: PathBuf,
    dates: Dates,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Authority,
    Own,
    List,
}

impl Paper {
    fn new(what: What, path: &Path, dates: Dates) -> Self {
        let path = path.to_owned();
        Self { what, path, dates }
    }

    fn standing(&self, now: Date) -> Standing {
        let slack = match self.what {
            What::List => SLACK,
            What::Authority | What::Own => Duration::ZERO,
        };
        self.dates.at(now, slack)
    }

    /// When its standing changes next.
    fn changes(&self, now: Date) -> Option<Date> {
        let Dates { from, until, .. } = self.dates;
        let changes = [from, self.dates.ends(), until].into_iter();
        changes.filter(|date| *date > now).min()
    }

    fn log(&self, standing: Standing) {
        let (path, name, Dates { from, until, .. }) =
            (self.path.display(), &self.dates.name, &self.dates);
        let what = match self.what {
            What::Authority => "the authority",
            What::Own => "our certificate",
            What::List => "the revocation list of",
        };
        let then = match self.what {
            What::Authority => "its peers may refuse what it has certified",
            What::Own => "peers refuse it",
            What::List => "no peer is let in",
        };
        match standing {
            Standing::Expired => tracing::error!(
                "{what} {name} in {path} has expired on {until}: {then}, until there is a newer one and SIGHUP was sent"
            ),
            Standing::NotYet => {
                tracing::error!("{what} {name} in {path} is not valid before {from}: {then}");
            }
            Standing::Ends => tracing::warn!(
                "{what} {name} in {path} expires on {until}: replace it before, and send SIGHUP"
            ),
            Standing::Holds if self.what == What::Authority => {}
            Standing::Holds => tracing::info!("{what} {name} in {path} is valid until {until}"),
        }
    }
}

/// Says how papers stand if that has changed since `said`; gives how long it stays so.
fn announce(papers: &[Paper], said: &mut Vec<Standing>, now: Date) -> Duration {
    let standings: Vec<_> = papers.iter().map(|paper| paper.standing(now)).collect();
    for (n, (paper, standing)) in papers.iter().zip(&standings).enumerate() {
        if said.get(n) != Some(standing) {
            paper.log(*standing);
        }
    }
    *said = standings;
    let changes = papers.iter().filter_map(|paper| paper.changes(now));
    let next = changes.min().map(|next| next.after(now));
    next.unwrap_or(LOOK_AGAIN)
        .clamp(Duration::from_secs(1), LOOK_AGAIN)
}

/// The lists to go by: of each issuer the newest that is valid comes first, since the first that fits is taken. A list
/// that has expired is refused here unless a newer one of its issuer is there.
fn newest_lists(
    lists: Vec<CertificateRevocationListDer<'static>>,
    path: &Path,
    now: Date,
) -> Result<(Vec<CertificateRevocationListDer<'static>>, Vec<Paper>), TlsError> {
    let mut dated: Vec<_> = lists
        .into_iter()
        .map(|list| (Dates::of_list(&list), list))
        .collect();
    dated.sort_by_key(|(dates, _)| std::cmp::Reverse(dates.as_ref().map(|dates| dates.from)));
    let mut papers: Vec<Paper> = Vec::new();
    let mut early = None;
    let mut usable = Vec::new();
    for (dates, list) in dated {
        match dates {
            // What is wrong with it rustls says.
            None => usable.push(list),
            Some(dates) if dates.at(now, SLACK) == Standing::NotYet => early = Some(dates),
            Some(dates) => {
                let known = papers.iter().any(|paper| paper.dates.name == dates.name);
                if !known {
                    papers.push(Paper::new(What::List, path, dates));
                }
                usable.push(list);
            }
        }
    }
    let path = path.to_owned();
    if let Some(early) = early.filter(|e| papers.iter().all(|paper| paper.dates.name != e.name)) {
        let (name, from) = (early.name.to_string(), early.from.to_string());
        return Err(TlsError::ListNotYet { path, name, from });
    }
    let expired = |paper: &&Paper| paper.standing(now) == Standing::Expired;
    match papers.iter().find(expired) {
        Some(Paper { dates, .. }) => {
            let (name, until) = (dates.name.to_string(), dates.until.to_string());
            Err(TlsError::ListExpired { path, name, until })
        }
        None => Ok((usable, papers)),
    }
}

/// The file of `--tls-cacrl`, or the default one if it is there. One that was there (`before`) does not go unnoticed.
fn lists_path(
    given: Option<&Path>,
    before: Option<&Path>,
    default: &Path,
) -> Result<Option<PathBuf>, TlsError> {
    if let Some(path) = given.or(before) {
        return Ok(Some(path.to_owned()));
    }
    match fs::metadata(default) {
        Ok(_) => Ok(Some(default.to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        // It may be there.
        Err(e) => Err(TlsError::Lists {
            path: default.to_owned(),
            reason: e.to_string(),
        }),
    }
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
    /// `before`: where revocation lists were read from, if they were.
    fn read(&self, before: Option<&Path>) -> Result<Files, TlsError> {
        let mut roots = RootCertStore::empty();
        let mut papers = Vec::new();
        for root in certificates(&self.tls_cacert)? {
            let dates = Dates::of_certificate(&root);
            papers.extend(dates.map(|d| Paper::new(What::Authority, &self.tls_cacert, d)));
            roots.add(root).map_err(|source| TlsError::Certificates {
                path: self.tls_cacert.clone(),
                source,
            })?;
        }
        let lists = lists_path(self.tls_cacrl.as_deref(), before, DEFAULT_CACRL.as_ref())?;
        let revoked = match &lists {
            None => Vec::new(),
            Some(path) => self.read_lists(path, &mut papers)?,
        };
        let chain = certificates(&self.tls_cert)?;
        let own = chain.iter().filter_map(|c| Dates::of_certificate(c));
        papers.extend(own.map(|dates| Paper::new(What::Own, &self.tls_cert, dates)));
        Ok(Files {
            roots: Arc::new(roots),
            revoked,
            chain,
            key: PrivateKeyDer::from_pem_file(&self.tls_key).map_err(unreadable(&self.tls_key))?,
            lists,
            papers,
        })
    }

    /// The revocation lists of a file. `papers` are those of the authorities, and then of the lists, too.
    fn read_lists(
        &self,
        path: &Path,
        papers: &mut Vec<Paper>,
    ) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
        let unreadable = |reason: String| TlsError::Lists {
            path: path.to_owned(),
            reason,
        };
        let found: Result<Vec<_>, _> =
            CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
        let found = found.map_err(|e| unreadable(e.to_string()))?;
        if found.is_empty() {
            return Err(unreadable("there is no revocation list in it".to_owned()));
        }
        let (usable, lists) = newest_lists(found, path, Date::now())?;
        // Every path of certificates begins with one that an authority has made.
        let listed = |name: &Name| lists.iter().any(|list| list.dates.name == *name);
        let (some, none): (Vec<_>, Vec<_>) =
            papers.iter().partition(|paper| listed(&paper.dates.name));
        if some.is_empty() && !none.is_empty() {
            return Err(TlsError::NoListFits {
                path: path.to_owned(),
                authorities: self.tls_cacert.clone(),
            });
        }
        for Paper { dates, .. } in none {
            tracing::error!(
                "{} has no revocation list of the authority {}: no peer that it has certified is let in",
                path.display(),
                dates.name
            );
        }
        papers.extend(lists);
        Ok(usable)
    }

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
            papers: files.papers,
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
            papers: files.papers,
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

/// Reads the files again at each SIGHUP. What cannot be read changes nothing. Says when something of `papers`, or of what
/// was read since, is about to expire, and when it has.
fn on_hangup(
    mut papers: Vec<Paper>,
    reload: impl Fn() -> Result<Vec<Paper>, TlsError> + Send + 'static,
) {
    let mut hangups = match signal(SignalKind::hangup()) {
        Ok(hangups) => hangups,
        Err(e) => return tracing::error!("cannot watch for SIGHUP: {e}"),
    };
    let mut said = Vec::new();
    let mut next = announce(&papers, &mut said, Date::now());
    tokio::spawn(async move {
        loop {
            tokio::select! {
                hangup = hangups.recv() => match hangup.map(|()| reload()) {
                    Some(Ok(read)) => {
                        tracing::info!("SIGHUP: certificates were read again");
                        (papers, said) = (read, Vec::new());
                    }
                    Some(Err(e)) => tracing::error!(
                        "SIGHUP: {}; the certificates stay as they were, and the revocation lists",
                        chain(&e)
                    ),
                    None => return,
                },
                () = tokio::time::sleep(next) => {}
            }
            next = announce(&papers, &mut said, Date::now());
        }
    });
}

fn clock() -> Arc<dyn TimeProvider> {
    Arc::new(DefaultTimeProvider)
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
fn replace<C>(loaded: &RwLock<Arc<Loaded<C>>>, by: Loaded<C>) -> Result<Vec<Paper>, TlsError> {
    let before = current(loaded);
    for new in by.papers.iter().filter(|new| new.what == What::List) {
        let older = |old: &&Paper| {
            let same = old.what == What::List && old.dates.name == new.dates.name;
            same && old.dates.from > new.dates.from
        };
        if let Some(old) = before.papers.iter().find(older) {
            return Err(TlsError::ListOlder {
                path: new.path.clone(),
                name: new.dates.name.to_string(),
                from: new.dates.from.to_string(),
                known: old.dates.from.to_string(),
            });
        }
    }
    let papers = by.papers.clone();
    *loaded.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(by);
    Ok(papers)
}

impl Client {
    /// Reads the files, now and at each SIGHUP. Without `verify_name` the peer's certificate
    /// need not name the host that was connected to.
    pub fn start(args: &TlsArgs, verify_name: bool) -> Result<Arc<Self>, TlsError> {
        let loaded = args.client(verify_name, None, clock())?;
        let papers = loaded.papers.clone();
        let client = Arc::new(Self {
            args: args.clone(),
            verify_name,
            loaded: RwLock::new(Arc::new(loaded)),
            encrypts: thread()?,
        });
        let reloaded = client.clone();
        on_hangup(papers, move || {
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
        let papers = loaded.papers.clone();
        let server = Arc::new(Self {
            args: args.clone(),
            allowed: allowed.collect::<Result<_, _>>()?,
            loaded: RwLock::new(Arc::new(loaded)),
            encrypts: thread()?,
        });
        let reloaded = server.clone();
        on_hangup(papers, move || {
            let Self { args, loaded, .. } = &*reloaded;
            let before = current(loaded);
            let read = args.server(before.lists.as_deref(), clock())?;
            replace(loaded, read)
        });
        Ok(server)
    }

    /// Greets whoever has connected; gives what to read and write instead. Dropped before it
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

#[cfg(test)]
mod tests;
