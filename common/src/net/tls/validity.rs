//! From when until when the certificates and revocation lists in use are valid, and what the log says of that.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::pki_types::CertificateRevocationListDer;

use super::dates::{Date, Dates, Standing};
use super::error::TlsError;

/// The clock of the authority that made a revocation list may be ahead of ours by so much.
const SLACK: Duration = Duration::from_secs(300);

/// The clock is looked at again after this, at least: it may have been set meanwhile.
pub const LOOK_AGAIN: Duration = Duration::from_secs(3600);

/// A certificate or list that is read from a file, and its dates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatedFile {
    pub what: What,
    pub path: PathBuf,
    pub dates: Dates,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Authority,
    Own,
    List,
}

impl DatedFile {
    pub fn new(what: What, path: &Path, dates: Dates) -> Self {
        let path = path.to_owned();
        Self { what, path, dates }
    }

    pub fn standing(&self, now: Date) -> Standing {
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
            What::Authority => "peers may refuse the certificates that it signed",
            What::Own => "peers refuse it",
            What::List => "every peer is refused",
        };
        match standing {
            Standing::Expired => tracing::error!(
                "{what} {name} in {path} has expired on {until}: {then} until a newer one is there and SIGHUP was sent"
            ),
            Standing::NotYet => {
                tracing::error!("{what} {name} in {path} is not valid before {from}: {then} until then; check the clock");
            }
            Standing::Ends => tracing::warn!(
                "{what} {name} in {path} expires on {until}: replace it before, and send SIGHUP"
            ),
            Standing::Holds if self.what == What::Authority => {}
            Standing::Holds => tracing::info!("{what} {name} in {path} is valid until {until}"),
        }
    }
}

/// Logs the standing of each file that has changed since `said`. Returns how long all stay as they are.
pub fn announce(dated: &[DatedFile], said: &mut Vec<Standing>, now: Date) -> Duration {
    let standings: Vec<_> = dated.iter().map(|file| file.standing(now)).collect();
    for (n, (file, standing)) in dated.iter().zip(&standings).enumerate() {
        if said.get(n) != Some(standing) {
            file.log(*standing);
        }
    }
    *said = standings;
    let changes = dated.iter().filter_map(|file| file.changes(now));
    let next = changes.min().map(|next| next.after(now));
    next.unwrap_or(LOOK_AGAIN)
        .clamp(Duration::from_secs(1), LOOK_AGAIN)
}

/// The lists to go by: of each issuer the newest that is valid comes first, since the first that fits is taken. A list
/// that has expired is refused here unless a newer one of its issuer is there.
pub fn newest_lists(
    lists: Vec<CertificateRevocationListDer<'static>>,
    path: &Path,
    now: Date,
) -> Result<(Vec<CertificateRevocationListDer<'static>>, Vec<DatedFile>), TlsError> {
    let mut sorted: Vec<_> = lists
        .into_iter()
        .map(|list| (Dates::of_list(&list), list))
        .collect();
    sorted.sort_by_key(|(dates, _)| std::cmp::Reverse(dates.as_ref().map(|dates| dates.from)));
    let mut dated: Vec<DatedFile> = Vec::new();
    let mut early = None;
    let mut usable = Vec::new();
    for (dates, list) in sorted {
        match dates {
            // What is wrong with it rustls says.
            None => usable.push(list),
            Some(dates) if dates.at(now, SLACK) == Standing::NotYet => early = Some(dates),
            Some(dates) => {
                let known = dated.iter().any(|file| file.dates.name == dates.name);
                if !known {
                    dated.push(DatedFile::new(What::List, path, dates));
                }
                usable.push(list);
            }
        }
    }
    let path = path.to_owned();
    if let Some(early) = early.filter(|e| dated.iter().all(|file| file.dates.name != e.name)) {
        let (name, from) = (early.name.to_string(), early.from.to_string());
        return Err(TlsError::ListNotYet { path, name, from });
    }
    let expired = |file: &&DatedFile| file.standing(now) == Standing::Expired;
    match dated.iter().find(expired) {
        Some(DatedFile { dates, .. }) => {
            let (name, until) = (dates.name.to_string(), dates.until.to_string());
            Err(TlsError::ListExpired { path, name, until })
        }
        None => Ok((usable, dated)),
    }
}
