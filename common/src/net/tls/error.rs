//! Why there is no TLS connection.

use std::io;
use std::path::PathBuf;

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
    #[error(
        "the revocation list of {name} in {path} has expired on {until}: put a newer one there"
    )]
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
    #[error("the revocation list of {name} in {path} is of {from}, which is older than the one in use, of {known}: put a newer one there")]
    ListOlder {
        path: PathBuf,
        name: String,
        from: String,
        known: String,
    },
    #[error("{path} has no revocation list of any authority in {authorities}, so no peer can be checked: add the list of each authority")]
    NoListFits { path: PathBuf, authorities: PathBuf },
    #[error("cannot start the thread that encrypts for TLS")]
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
    #[error("the peer's certificate has none of the names of --allow-peer")]
    NotAllowed,
}
