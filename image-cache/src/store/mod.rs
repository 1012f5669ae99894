//! What the cache holds: sessions, each with its sets, each with its images.
//!
//! Only this module decides what is kept and when memory goes back. The link puts in
//! ([`crate::receiver`]), the frontends take out ([`crate::frontend`]); neither knows the other.
//! The order of sessions is the order of their arrival: "the newest" is the last.

pub mod changes;
pub mod heard;
pub mod held;
pub mod image;
pub mod journal;
pub mod memory;
pub mod page_rounds;
pub mod rebuild;
pub mod session;
pub mod set;
pub mod sockets;
pub mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use image_common::admission::quota::Host;
use image_common::criu::page_server::PagemapId;
use image_common::image::{SessionName, SnapshotId};
use image_common::link::session_id::{new_key, SessionId};

use crate::limits::Limits;
use crate::store::changes::Changes;
use crate::store::heard::Heard;
use crate::store::memory::arena::Source;
use crate::store::memory::host::Gauge;
use crate::store::waiting::{Waiting, Waits};
use image::WriteError;
use journal::Journal;
use memory::budget::Budget;
use session::{host_of, Opener, PageSource, Session};
use set::restorable::Allowed;
use set::squash::SquashError;
use set::{Holds, Set};

/// How often `--set-ttl` looks again at sessions that are being written or read.
const BUSY_RECHECK: Duration = Duration::from_secs(1);

/// Which sessions a socket serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// The sockets in an images directory.
    Any,
    /// Those in the directory of one session.
    Session(SessionName),
}

pub struct Store {
    sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    /// Counts all that there were: a session's number is never another's.
    last_number: AtomicU64,
    /// Anything that a waiting reader may wait for.
    pub changes: Arc<Changes>,
    /// Sessions that come, end and go; a few per dump, where `changes` has one per image.
    pub session_changes: Changes,
    pub waiting: Arc<Waiting>,
    pub heard: Heard,
    pub budget: Arc<Budget>,
    pub limits: Limits,
    keep: bool,
    set_ttl: Option<Duration>,
    /// Make one snapshot of a `--remote` chain.
    pub squash: bool,
    /// A restore takes pages along as it reads them.
    pub release_on_read: bool,
    /// What a commit takes although a restore makes something else of it.
    pub allowed: Allowed,
    /// What outlives this process, once there is one.
    journal: OnceLock<Arc<Journal>>,
}

/// What is done with sets, as the operator wants it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Policy {
    pub keep: bool,
    pub set_ttl: Option<Duration>,
    pub squash: bool,
    pub release_on_read: bool,
    pub limits: Limits,
    pub allowed: Allowed,
}

/// Two CRIUs send the same pagemap from one host to one port at once.
#[derive(Debug, thiserror::Error)]
#[error("another round with {} is under way from {host}: of two dumps at once that have the same pids, each needs a page server port of its own (--page-server may be given several times)", .id.image_name())]
pub struct RoundUnderWay {
    id: PagemapId,
    host: IpAddr,
}

/// No pages for a dump that has none of its own.
#[derive(Debug, thiserror::Error)]
pub enum NoPages {
    #[error("{}.img is not in the dump, and no page server round here has its pages", .0)]
    None(String),
    #[error("{0} have these pids, all series of page server rounds, and nothing tells which is the dump's; `image-cache drop` the others")]
    Several(String),
    #[error("a page server round of this dump is under way still: try again when it has ended")]
    UnderWay,
}

/// A dump does not have all its pages.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    #[error("the images directory has pagemaps, and a page server round here has pages of the same tasks: remove what an earlier dump left in the directory, or `image-cache drop {0}`, the round's session")]
    Stale(SessionId),
    #[error(transparent)]
    Pages(#[from] NoPages),
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(transparent)]
    Squash(#[from] SquashError),
}

/// Why a session cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum NoSession {
    #[error("session {0} is in use: another proxy is connected with this name")]
    NameInUse(SessionName),
    #[error(
        "a HELLO for session {0} comes after a later one of the same proxy, which has opened it"
    )]
    Overtaken(SessionName),
    #[error(transparent)]
    TooMany(#[from] TooManySessions),
}

/// One peer has all that it may have.
#[derive(Debug, thiserror::Error)]
#[error("there are {most} sessions of {host} (--max-sessions); `image-cache drop` those that are not needed")]
pub struct TooManySessions {
    host: Host,
    most: usize,
}

/// Why a round of our page server cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum NoRound {
    #[error(transparent)]
    UnderWay(#[from] RoundUnderWay),
    #[error(transparent)]
    TooMany(#[from] TooManySessions),
}

/// Gives a new session an id that none of the others has. Of 48 random bits that is so anyhow.
fn unlike_others(sessions: &BTreeMap<u64, Arc<Session>>, mut session: Session) -> Session {
    while sessions.values().any(|other| other.id == session.id) {
        session.key = new_key();
        session.id = SessionId::of_key(session.key);
    }
    session
}

impl Store {
    /// A store in which nothing but `memory_limit` bounds the images.
    pub fn new(memory_limit: u64, policy: Policy) -> Arc<Self> {
        Self::of(Budget::with(memory_limit, policy.release_on_read), policy)
    }

    /// One that refuses also what the host, or a control group, has no memory for.
    pub fn gauged(memory_limit: u64, gauge: Gauge, memory: Source, policy: Policy) -> Arc<Self> {
        let gauge = gauge.of(memory.clone());
        Self::of(
            Budget::of(memory_limit, policy.release_on_read, memory, Some(gauge)),
            policy,
        )
    }

    fn of(budget: Arc<Budget>, policy: Policy) -> Arc<Self> {
        let Policy {
            keep,
            set_ttl,
            squash,
            release_on_read,
            limits,
            allowed,
        } = policy;
        Arc::new(Self {
            sessions: Mutex::default(),
            last_number: AtomicU64::new(0),
            changes: Arc::default(),
            session_changes: Changes::default(),
            waiting: Arc::default(),
            heard: Heard::default(),
            budget,
            limits,
            keep,
            set_ttl,
            squash,
            release_on_read,
            allowed,
            journal: OnceLock::new(),
        })
    }

    /// The order is that of arrival, as long as the sessions are locked.
    fn next_number(&self, _: &MutexGuard<'_, BTreeMap<u64, Arc<Session>>>) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn sessions(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Session>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn open_session(
        &self,
        name: SessionName,
        opener: impl Into<Opener>,
        peer: String,
    ) -> Result<Arc<Session>, NoSession> {
        let opener = opener.into();
        // A proxy that says its name again knows that its old link is dead. Another one with that
        // name may be the same, restarted, if it is on the same host: it need not wait for a link that
        // is never resumed. Another host's dump is not ended because its link is away for a moment.
        let host = host_of(&peer);
        let of_name = self.newest(&Scope::Session(name.clone()));
        // The network held it up: what it would open was opened since.
        if of_name.iter().any(|old| old.overtook(opener)) {
            return Err(NoSession::Overtaken(name));
        }
        for old in of_name {
            let restarted = old.is_away() && old.host() == host;
            if old.is_connected() && (old.is_of_proxy(opener.proxy) || restarted) {
                old.taken_over.cancel();
                self.disconnect(&old, "the proxy connected anew");
            }
        }
        let mut sessions = self.sessions();
        let mut of_name = sessions.values().filter(|s| s.name == name);
        // One that an operator has decided about has its link to hear the source, and no more use for the name.
        if of_name.clone().any(|s| s.is_connected() && !s.is_decided()) {
            return Err(NoSession::NameInUse(name));
        }
        if let Some(older) = of_name.find(|s| s.is_only_copy()) {
            tracing::warn!(
                session = %name, older = %older.id,
                "an older set of this name was not restored; it stays, behind the new one"
            );
        }
        let session = Session::new(
            self.next_number(&sessions),
            name,
            opener,
            peer,
            self.changes.clone(),
            &self.budget,
            &self.limits,
        );
        let session = unlike_others(&sessions, session);
        self.check_room(&sessions, session.host())?;
        self.note(&session);
        let (number, session) = (session.number, Arc::new(session));
        sessions.insert(number, session.clone());
        drop(sessions);
        self.bump();
        Ok(session)
    }

    /// Whether one more session of this host may begin.
    fn check_room(
        &self,
        sessions: &BTreeMap<u64, Arc<Session>>,
        host: Option<IpAddr>,
    ) -> Result<(), TooManySessions> {
        let most = self.limits.max_sessions;
        // `None` is an import by the operator.
        let Some(host) = host.map(Host::of) else {
            return Ok(());
        };
        let theirs = sessions.values();
        let theirs = theirs.filter(|s| s.host().map(Host::of) == Some(host));
        match theirs.count() < most {
            true => Ok(()),
            false => Err(TooManySessions { host, most }),
        }
    }

    /// The series that a round with `id` continues, or a new one.
    pub fn open_pages(
        &self,
        source: PageSource,
        peer: String,
        id: PagemapId,
    ) -> Result<Arc<Session>, NoRound> {
        let mut sessions = self.sessions();
        let of_source = |s: &&Arc<Session>| s.page_source == Some(source) && !s.is_closed_series();
        // A first round has nothing merged yet that would name its pagemaps.
        let earlier = sessions.values().rev().filter(of_source);
        let mut earlier = earlier.filter(|s| s.has_parent(id) || s.first_pagemap() == Some(id));
        if let Some(session) = earlier.next() {
            let host = source.host;
            return match session.direct_round_begins() {
                true => Ok(session.clone()),
                false => Err(RoundUnderWay { id, host }.into()),
            };
        }
        self.check_room(&sessions, Some(source.host))?;
        let number = self.next_number(&sessions);
        let session = Session::of_pages(
            number,
            source,
            id,
            peer,
            self.changes.clone(),
            &self.budget,
            &self.limits,
        );
        let session = Arc::new(unlike_others(&sessions, session));
        sessions.insert(number, session.clone());
        drop(sessions);
        self.bump();
        Ok(session)
    }

    /// The series of our page server that has the pages of exactly these tasks, taken out of
    /// the store. `host`: where the dump's other images come from; `None` if that is not known.
    pub fn claim_pages(
        &self,
        host: Option<IpAddr>,
        tasks: &BTreeSet<u64>,
    ) -> Result<Arc<Session>, NoPages> {
        let mut found = self.series_of(host, tasks);
        // With a commit the process is there, and its dump was the last round. A series that a
        // broken round has closed may be of another process that is dead: an import, which
        // cannot know, is refused.
        if host.is_some() && found.iter().any(|s| !s.is_closed_series()) {
            found.retain(|s| !s.is_closed_series());
        }
        match &found[..] {
            [series] if series.direct_round_begins() => {
                self.remove(series);
                Ok(series.clone())
            }
            [_] => Err(NoPages::UnderWay),
            [] => {
                let first = tasks.first().copied().unwrap_or_default();
                Err(NoPages::None(format!("pagemap-{first}")))
            }
            _ => {
                let ids: Vec<_> = found.iter().map(|s| s.id.to_string()).collect();
                Err(NoPages::Several(ids.join(", ")))
            }
        }
    }

    fn series_of(&self, host: Option<IpAddr>, tasks: &BTreeSet<u64>) -> Vec<Arc<Session>> {
        let fits = |s: &Arc<Session>| {
            let from = s.page_source.map(|source| source.host);
            from.is_some_and(|from| host.is_none_or(|host| host == from))
                && s.page_tasks() == *tasks
        };
        self.newest(&Scope::Any).into_iter().filter(fits).collect()
    }

    /// Gives a dump whose other images are all here the pages that came apart from it: those of
    /// its own session's rounds, or of a series that `host` sent to our page server.
    pub fn gather_pages(
        &self,
        session: &Session,
        set: &Set,
        host: Option<IpAddr>,
    ) -> Result<(), GatherError> {
        if set.rounds() > 0 {
            session.flatten_pages(set, &session.budget, self.release_on_read)?;
        }
        let bare = set.tasks_without_pages();
        if bare.is_empty() && set.rounds() == 0 && set.dialect().is_rounds_alone() {
            // Pagemaps that an earlier dump left in the directory, and pages of this one here?
            let tasks = set.tasks();
            if let Some(series) = self
                .series_of(host, &tasks)
                .first()
                .filter(|_| !tasks.is_empty())
            {
                return Err(GatherError::Stale(series.id));
            }
        }
        if !bare.is_empty() {
            let series = self.claim_pages(host, &bare)?;
            tracing::info!(session = %session.name, snapshot = %set.snapshot, series = %series.name, "the dump's pages came through the page server");
            session.take_over_pages(&series);
            session.flatten_pages(set, &session.budget, self.release_on_read)?;
        }
        if self.squash {
            session.squash(set, &session.budget)?;
        }
        Ok(())
    }

    /// Forgets a session. Restores that read it go on with what they hold; the memory goes
    /// back when the last of them ends.
    pub fn remove(&self, session: &Session) {
        self.sessions().remove(&session.number);
        session.removed.store(true, Ordering::Release);
        session.ledger.get().inspect(|ledger| ledger.session_gone());
        self.bump();
        memory::heap::trim_soon();
    }

    fn bump(&self) {
        self.changes.bump();
        self.session_changes.bump();
    }

    /// The link of a session ended: keeps what may have to be restored, frees the rest.
    pub fn disconnect(&self, session: &Arc<Session>, reason: &str) {
        if session.disconnect(reason) {
            self.bump();
        } else {
            self.remove(session);
        }
    }

    /// A restore of this session succeeded.
    pub fn restored(&self, session: &Arc<Session>) {
        session.mark_restored();
        session.ledger.get().inspect(|ledger| ledger.restored());
        if self.keep {
            self.session_changes.bump();
            tracing::info!(session = %session.name, "restored; kept");
        } else {
            tracing::info!(session = %session.name, "restored; released");
            self.remove(session);
        }
    }

    /// The newest session that may be restored from, now or when its dump comes. One of which no set has begun is only a
    /// connection: it does not stand before a dump that waits to be restored.
    pub fn newest_of_dumps(&self, scope: &Scope) -> Option<Arc<Session>> {
        let sessions = self.newest(scope);
        let mut of_dumps = sessions
            .into_iter()
            .filter(|s| s.page_source.is_none() && !s.is_held_elsewhere());
        let newest = of_dumps.next()?;
        if !newest.sets().is_empty() {
            return Some(newest);
        }
        let next = of_dumps.find(|s| !s.sets().is_empty());
        let waits = next.filter(|s| s.has_final_dump() && !s.is_in_doubt());
        Some(waits.unwrap_or(newest))
    }

    /// Whether a restore waits that would get this session's dump, and would hold it.
    pub fn holding_restore_waits(&self, session: &Session) -> bool {
        self.waiting.of_holding().into_iter().any(|name| {
            let scope = name.map_or(Scope::Any, Scope::Session);
            let newest = self.newest_of_dumps(&scope);
            newest.is_some_and(|newest| newest.number == session.number)
        })
    }

    /// The session with this key.
    pub fn of_key(&self, key: u64) -> Option<Arc<Session>> {
        self.sessions().values().find(|s| s.key == key).cloned()
    }

    /// Newest first.
    pub fn newest(&self, scope: &Scope) -> Vec<Arc<Session>> {
        let fits = |s: &&Arc<Session>| match scope {
            Scope::Any => true,
            Scope::Session(name) => s.name == *name,
        };
        let sessions = self.sessions();
        let mut found: Vec<_> = sessions.values().filter(fits).cloned().collect();
        found.reverse();
        found
    }

    pub fn has_session_named(&self, name: &SessionName) -> bool {
        self.sessions().values().any(|s| s.name == *name)
    }

    /// A restore waits for a dump, as long as what this gives lives.
    pub fn restore_waits(&self, scope: &Scope, holds: Holds) -> Waits {
        let session = match scope {
            Scope::Any => None,
            Scope::Session(name) => Some(name.clone()),
        };
        Waits::begin(&self.waiting, &self.changes, session, holds)
    }

    /// Why a reader that waits for this session waits in vain, if it does.
    pub fn why_gone(&self, session: &Session) -> Option<String> {
        let (id, sets) = (session.id, session.sets());
        let doubt = || {
            let why = sets.iter().find_map(|set| set.why_doubted())?;
            Some(format!(
                "{why}: `image-cache release {id}` or `image-cache drop {id}` decides"
            ))
        };
        session.aborted().or_else(doubt).or_else(|| {
            let why = match session.was_restored() {
                true => "another restore has restored it",
                false => "the session is gone",
            };
            (!self.holds(session)).then(|| why.to_owned())
        })
    }

    /// A set is kept when it was restored, and may be restored by several at once.
    pub fn keeps(&self) -> bool {
        self.keep
    }

    pub fn holds(&self, session: &Session) -> bool {
        self.sessions().contains_key(&session.number)
    }

    /// The newest set with this snapshot id.
    pub fn snapshot(&self, scope: &Scope, id: &SnapshotId) -> Option<(Arc<Session>, Arc<Set>)> {
        self.newest(scope)
            .into_iter()
            .filter(|session| !session.is_held_elsewhere())
            .find_map(|session| Some((session.clone(), session.snapshot(id)?)))
    }

    /// Drops sets that were not restored in time; gives the time until the next is due.
    pub fn sweep(&self) -> Option<Duration> {
        let ttl = self.set_ttl?;
        let mut next = None;
        for session in self.newest(&Scope::Any) {
            // What only an operator may decide, and pages that may be a dead process's.
            if session.is_in_doubt() || session.page_source.is_some() {
                continue;
            }
            // A restore has it, and may need it again: its CRIU, or the script that holds it, may be stopped.
            if session
                .sets()
                .iter()
                .any(|set| set.is_being_restored().is_some())
            {
                next = Some(BUSY_RECHECK.min(next.unwrap_or(BUSY_RECHECK)));
                continue;
            }
            match session.idle_since().map(|since| since.elapsed()) {
                Some(idle) if idle >= ttl => {
                    tracing::warn!(session = %session.name, "dropped: not restored within --set-ttl");
                    self.remove(&session);
                }
                Some(idle) => {
                    let left = ttl - idle;
                    next = Some(next.map_or(left, |n: Duration| n.min(left)));
                }
                // It is being written or read, and nothing tells when that ends.
                None => next = Some(BUSY_RECHECK.min(next.unwrap_or(BUSY_RECHECK))),
            }
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image_common::link::resumable::ResumableStream;
    use image_common::net::socket::Socket;

    /// A link that is away holds its name against all but its own host.
    #[tokio::test]
    async fn another_host_does_not_take_over() {
        let store = Store::new(1 << 20, Policy::default());
        let name: SessionName = "web".parse().unwrap();
        let open = |proxy, peer: &str| store.open_session(name.clone(), proxy, peer.to_owned());
        let old = open(1, "10.0.0.1:5").unwrap();
        let (ours, _theirs) = tokio::net::UnixStream::pair().unwrap();
        let wire = ResumableStream::new(Socket::Unix(ours));
        assert!(old.link.set(wire.clone()).is_ok());
        let in_use = |opened| matches!(opened, Err(NoSession::NameInUse(_)));
        assert!(in_use(open(2, "10.0.0.1:6")), "it is there");
        wire.detach(std::io::ErrorKind::ConnectionReset.into());
        assert!(in_use(open(3, "10.0.0.2:6")));
        assert!(old.is_connected() && !old.taken_over.is_cancelled());
        let restarted = open(2, "10.0.0.1:6").unwrap();
        assert!(!old.is_connected() && restarted.is_connected());
        assert!(open(2, "10.0.0.2:6").is_ok(), "its own number is enough");
    }

    /// A restore that has a set and reads nothing, because its CRIU is stopped or it is held, may still fail.
    #[test]
    fn a_set_that_a_restore_has_does_not_expire() {
        use crate::store::set::decision::tests::open;
        use crate::store::set::RestoreId;
        let policy = Policy {
            set_ttl: Some(Duration::from_nanos(1)),
            ..Policy::default()
        };
        let store = Store::new(1 << 24, policy);
        let session = store.open_session("web".parse().unwrap(), 1, "test".to_owned());
        let session = session.unwrap();
        let set = open(&session, 1, "committed");
        store.disconnect(&session, "done");
        assert!(set.give(RestoreId(1)));
        assert_eq!(store.sweep(), Some(BUSY_RECHECK));
        assert!(store.holds(&session));
        assert!(set.settle(RestoreId(1), false));
        store.sweep();
        assert!(!store.holds(&session));
    }

    /// Which sets are tried depends on it.
    #[test]
    fn a_restore_waits_for_the_session_that_it_would_get() {
        let store = Store::new(1 << 20, Policy::default());
        let open = |name: &str| {
            let session = store.open_session(name.parse().unwrap(), 1, "test".to_owned());
            let session = session.unwrap();
            let snapshot = SnapshotId::new("/img").unwrap();
            let dialect = image_common::criu::dialect::Dialect::Stream;
            let number = image_common::link::codec::SetNumber(1);
            session
                .open_set(number, snapshot, None, true, dialect)
                .unwrap();
            session
        };
        let (older, newer) = (open("web"), open("db"));
        let waits = store.restore_waits(&Scope::Any, Holds::Promised);
        assert!(store.holding_restore_waits(&newer) && !store.holding_restore_waits(&older));
        let named = Scope::Session(older.name.clone());
        let _without = store.restore_waits(&named, Holds::No);
        assert!(!store.holding_restore_waits(&older));
        let _with = store.restore_waits(&named, Holds::Named);
        assert!(store.holding_restore_waits(&older));
        drop(waits);
        assert!(!store.holding_restore_waits(&newer));
    }

    /// A link that was replaced ends after the session that took its place has begun, which may
    /// be when no other is there.
    #[test]
    fn a_session_that_was_replaced_takes_nobody_along() {
        let store = Store::new(1 << 20, Policy::default());
        let name: SessionName = "web".parse().unwrap();
        let open = || store.open_session(name.clone(), 1, "peer".to_owned());
        let old = open().unwrap();
        let new = open().unwrap();
        assert!(old.taken_over.is_cancelled() && !old.is_connected());
        store.disconnect(&old, "its link ended");
        assert!(store.holds(&new) && !store.holds(&old));
        store.disconnect(&new, "its link ended");
        assert!(!store.has_session_named(&name));
    }

    /// The network held up the HELLO of a proxy that has tried again since.
    #[test]
    fn a_hello_that_comes_late_opens_nothing() {
        let store = Store::new(1 << 20, Policy::default());
        let name: SessionName = "web".parse().unwrap();
        let open = |proxy, opening| {
            let opener = Opener { proxy, opening };
            store.open_session(name.clone(), opener, "peer".to_owned())
        };
        let overtaken = |opened| matches!(opened, Err(NoSession::Overtaken(_)));
        let live = open(1, 7).unwrap();
        assert!(overtaken(open(1, 6)) && overtaken(open(1, 7)));
        assert!(live.is_connected() && !live.taken_over.is_cancelled());
        // What is not numbered, or is later, is of a proxy that knows better.
        let unnumbered = open(1, 0).unwrap();
        assert!(live.taken_over.is_cancelled());
        let later = open(1, 8).unwrap();
        assert!(unnumbered.taken_over.is_cancelled());
        // Another proxy counts for itself.
        assert!(matches!(open(2, 1), Err(NoSession::NameInUse(_))));
        assert!(later.is_connected());
    }
}
