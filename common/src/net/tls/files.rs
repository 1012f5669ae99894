//! The options of TLS, and the files that they name.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::RootCertStore;

use super::dates::{Date, Dates, Name};
use super::error::TlsError;
use super::validity::{newest_lists, DatedFile, What};
use crate::units::parse_some;

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
        value_parser = parse_file,
        requires = "tls"
    )]
    pub tls_cacert: PathBuf,

    /// Revocation lists of the authorities [default: /etc/pki/CA/cacrl.pem, if that is there]
    #[arg(long, value_name = "FILE", requires = "tls", value_parser = parse_file)]
    pub tls_cacrl: Option<PathBuf>,

    /// Our own certificate, and those between it and the authority
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/pki/criu/cert.pem",
        value_parser = parse_file,
        requires = "tls"
    )]
    pub tls_cert: PathBuf,

    /// Its private key
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/pki/criu/private/key.pem",
        value_parser = parse_file,
        requires = "tls"
    )]
    pub tls_key: PathBuf,
}

const DEFAULT_CACRL: &str = "/etc/pki/CA/cacrl.pem";

/// What is in the files.
pub struct Files {
    pub roots: Arc<RootCertStore>,
    pub revoked: Vec<CertificateRevocationListDer<'static>>,
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    /// Where the lists are from.
    pub lists: Option<PathBuf>,
    pub dated: Vec<DatedFile>,
}

/// The file of `--tls-cacrl`, or the default one if it is there. One that was there (`before`) does not go unnoticed.
pub fn lists_path(
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

fn unreadable(path: &Path) -> impl Fn(rustls::pki_types::pem::Error) -> TlsError + '_ {
    |e| TlsError::File {
        path: path.to_owned(),
        reason: e.to_string(),
    }
}

pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
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

/// A file of the directory in which the daemon was started: it goes to another one before it reads files.
fn parse_file(text: &str) -> Result<PathBuf, String> {
    let path: PathBuf = parse_some(text).map_err(|e| e.to_string())?;
    std::path::absolute(path).map_err(|e| e.to_string())
}

impl TlsArgs {
    /// `before`: where revocation lists were read from, if they were.
    pub fn read(&self, before: Option<&Path>) -> Result<Files, TlsError> {
        let mut roots = RootCertStore::empty();
        let mut dated = Vec::new();
        for root in certificates(&self.tls_cacert)? {
            let dates = Dates::of_certificate(&root);
            dated.extend(dates.map(|d| DatedFile::new(What::Authority, &self.tls_cacert, d)));
            roots.add(root).map_err(|source| TlsError::Certificates {
                path: self.tls_cacert.clone(),
                source,
            })?;
        }
        let lists = lists_path(self.tls_cacrl.as_deref(), before, DEFAULT_CACRL.as_ref())?;
        let revoked = match &lists {
            None => Vec::new(),
            Some(path) => self.read_lists(path, &mut dated)?,
        };
        let chain = certificates(&self.tls_cert)?;
        let own = chain.iter().filter_map(|c| Dates::of_certificate(c));
        dated.extend(own.map(|dates| DatedFile::new(What::Own, &self.tls_cert, dates)));
        Ok(Files {
            roots: Arc::new(roots),
            revoked,
            chain,
            key: PrivateKeyDer::from_pem_file(&self.tls_key).map_err(unreadable(&self.tls_key))?,
            lists,
            dated,
        })
    }

    /// The revocation lists of a file. `dated` are those of the authorities, and then of the lists, too.
    fn read_lists(
        &self,
        path: &Path,
        dated: &mut Vec<DatedFile>,
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
            dated.iter().partition(|file| listed(&file.dates.name));
        if some.is_empty() && !none.is_empty() {
            return Err(TlsError::NoListFits {
                path: path.to_owned(),
                authorities: self.tls_cacert.clone(),
            });
        }
        for DatedFile { dates, .. } in none {
            tracing::error!(
                "{} has no revocation list of the authority {}: peers with its certificates are refused until the list is there and SIGHUP was sent",
                path.display(),
                dates.name
            );
        }
        dated.extend(lists);
        Ok(usable)
    }
}
