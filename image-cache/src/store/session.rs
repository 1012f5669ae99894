//! A session: the sets of one series of pre-dumps and the dump that ends it.

pub mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use image_common::control::status as shown;
use image_common::criu::dialect::{Dialect, Listing};
use image_common::criu::page_server::PagemapId;
use image_common::image::{ImageName, SessionName, SnapshotId};
use image_common::link::codec::{RoundPages, SetNumber};
use image_common::link::resumable::ResumableStream;
use image_common::link::session_id::{new_key, SessionId};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::limits::Limits;
use crate::store::changes::Changes;
use crate::store::image::{TooManyImages, WriteError};
use crate::store::journal::Ledger;
use crate::store::memory::budget::{Budget, Charge, OutOfMemory};
use crate::store::memory::segment::OwnedPiece;
use crate::store::page_rounds::{PageError, PageStore, Round, Superseded};
use crate::store::set::squash::SquashError;
use crate::store::set::{Holds, LinkLoss, Set};

/// More sets than any series has; a bound for what a peer can make us remember.
const MAX_SETS: usize = 4096;

/// Where the rounds of a series come from: what CRIU's connections to our own page server have
/// in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageSource {
    pub host: IpAddr,
    /// Ours, to which they connect.
    pub port: u16,
}

impl fmt::Display for PageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page server {}", self.port)
    }
}

/// Which proxy opens a session, and the how manieth it is that this proxy has tried to open.
#[derive(Debug, Clone, Copy)]
pub struct Opener {
    /// See `Hello::proxy`.
    pub proxy: u64,
    /// 0: not numbered.
    pub opening: u64,
}

impl From<u64> for Opener {
    fn from(proxy: u64) -> Self {
        Self { proxy, opening: 0 }
    }
}

pub struct Session {
    /// Order of arrival in this cache.
    pub number: u64,
    pub name: SessionName,
    /// What its further connections have to show: a secret (see `Answer::Welcome`).
    pub key: u64,
    /// What an operator's decision names.
    pub id: SessionId,
    /// Address of the proxy, for the log.
    pub peer: String,
    opener: Opener,
    /// Set for a series of our own page server: pages that no dump has claimed yet, and no link.
    pub page_source: Option<PageSource>,
    first_pagemap: Option<PagemapId>,
    /// A round of our own page server broke off: see [`Self::close_series`].
    closed: AtomicBool,
    /// Its first connection.
    pub link: OnceLock<Arc<ResumableStream>>,
    /// Ends the link of a session that its own proxy has replaced, or an operator decided.
    pub taken_over: CancellationToken,
    /// It is in the store no more.
    pub removed: AtomicBool,
    /// A set is prepared now: see `receiver::prepared`.
    pub prepared: Notify,
    /// Its part of all memory.
    pub budget: Arc<Budget>,
    max_images: u64,
    images: AtomicU64,
    state: Mutex<SessionState>,
    changes: Arc<Changes>,
    /// Restores that read from it now.
    readers: AtomicUsize,
    /// When one of them last took something.
    read: Mutex<Instant>,
    /// What page server rounds have brought.
    pages: Mutex<Option<PageStore>>,
    began: Instant,
    /// What merged rounds did, for the operator.
    rounds: Mutex<Rounds>,
    /// Its part of what outlives this process.
    pub ledger: OnceLock<Arc<Ledger>>,
}

struct Rounds {
    merged: Vec<shown::Round>,
    charge: Charge,
}

struct SessionState {
    sets: BTreeMap<SetNumber, Arc<Set>>,
    connected: bool,
    aborted: Option<String>,
    restored: bool,
    /// Since when it is neither written nor read.
    idle_since: Option<Instant>,
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("set number {0} is used already")]
    Used(u32),
    #[error("there is no set {0}")]
    Unknown(u32),
    #[error("the session has {MAX_SETS} sets, more than any series of dumps")]
    TooMany,
    #[error(transparent)]
    Limit(#[from] OutOfMemory),
}

/// Where a `--stream` restore stands with this session.
pub enum StreamTarget {
    Set(Arc<Set>),
    Wait,
    Gone(String),
}

/// The host of a peer's address.
pub fn host_of(peer: &str) -> Option<IpAddr> {
    let peer: Option<SocketAddr> = peer.parse().ok();
    peer.map(|peer| peer.ip().to_canonical())
}

/// Keeps a session from expiring while a restore reads it.
pub struct ReaderGuard(Arc<Session>);

impl Session {
    pub fn new(
        number: u64,
        name: SessionName,
        opener: Opener,
        peer: String,
        changes: Arc<Changes>,
        memory: &Arc<Budget>,
        limits: &Limits,
    ) -> Self {
        let budget = memory.of_session(limits.max_session_memory);
        let key = new_key();
        let state = SessionState {
            sets: BTreeMap::new(),
            connected: true,
            aborted: None,
            restored: false,
            idle_since: None,
        };
        Self {
            number,
            name,
            key,
            id: SessionId::of_key(key),
            peer,
            opener,
            page_source: None,
            first_pagemap: None,
            closed: AtomicBool::new(false),
            link: OnceLock::new(),
            taken_over: CancellationToken::new(),
            removed: AtomicBool::new(false),
            prepared: Notify::new(),
            max_images: limits.max_images,
            images: AtomicU64::new(0),
            state: Mutex::new(state),
            changes,
            readers: AtomicUsize::new(0),
            read: Mutex::new(Instant::now()),
            pages: Mutex::default(),
            began: Instant::now(),
            rounds: Mutex::new(Rounds {
                merged: Vec::new(),
                charge: budget.nothing(),
            }),
            ledger: OnceLock::new(),
            budget,
        }
    }

    /// One that an earlier process had, with its key.
    #[allow(clippy::too_many_arguments, reason = "as `new`, and what that draws")]
    pub fn refound(
        number: u64,
        name: SessionName,
        (key, opener): (u64, Opener),
        peer: String,
        age: Duration,
        changes: Arc<Changes>,
        memory: &Arc<Budget>,
        limits: &Limits,
    ) -> Self {
        let mut session = Self::new(number, name, opener, peer, changes, memory, limits);
        (session.key, session.id) = (key, SessionId::of_key(key));
        session.began = Instant::now().checked_sub(age).unwrap_or(session.began);
        session
    }

    /// A set that an earlier process had.
    pub fn put_set(&self, number: SetNumber, set: Set) {
        self.state().sets.insert(number, Arc::new(set));
    }

    pub fn opener(&self) -> Opener {
        self.opener
    }

    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// A series of our own page server, with its first round under way, which begins with
    /// `id`.
    pub fn of_pages(
        number: u64,
        source: PageSource,
        id: PagemapId,
        peer: String,
        changes: Arc<Changes>,
        memory: &Arc<Budget>,
        limits: &Limits,
    ) -> Self {
        let name = SessionName::unique();
        let mut session = Self::new(number, name, 0.into(), peer, changes, memory, limits);
        session.page_source = Some(source);
        session.first_pagemap = Some(id);
        session
    }

    /// With which pagemap the first round of a series of our own page server begins.
    pub fn first_pagemap(&self) -> Option<PagemapId> {
        self.first_pagemap
    }

    /// The host of the proxy.
    pub fn host(&self) -> Option<IpAddr> {
        host_of(&self.peer)
    }

    /// One more image begins.
    pub fn count_image(&self) -> Result<(), TooManyImages> {
        match self.images.fetch_add(1, Ordering::Relaxed) < self.max_images {
            true => Ok(()),
            false => Err(TooManyImages(self.max_images)),
        }
    }

    /// Whether the last round of the series had this pagemap, and is whole.
    pub fn has_parent(&self, id: PagemapId) -> bool {
        self.pages().as_ref().is_some_and(|pages| pages.has(id))
    }

    /// A round of a series of our own page server begins; `false` if one is under way.
    pub fn direct_round_begins(&self) -> bool {
        !std::mem::replace(&mut self.state().connected, true)
    }

    /// No round continues the series any more; its pages stay, because they may be those of a
    /// dump whose process is dead. `false` if there are none.
    pub fn close_series(&self) -> bool {
        self.closed.store(true, Ordering::Relaxed);
        self.pages().is_some()
    }

    pub fn is_closed_series(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// `--set-ttl` counts from now.
    pub fn restart_clock(&self) {
        self.state().idle_since = Some(Instant::now());
    }

    pub fn direct_round_ends(&self) {
        let mut state = self.state();
        state.connected = false;
        state.idle_since = Some(Instant::now());
    }

    /// The tasks of the last round.
    pub fn page_tasks(&self) -> BTreeSet<u64> {
        let pages = self.pages();
        let ids = pages.iter().flat_map(PageStore::ids);
        ids.filter_map(PagemapId::task).collect()
    }

    /// What the rounds have brought, no longer part of this session.
    pub fn take_pages(&self) -> Option<PageStore> {
        self.pages().take()
    }

    /// Takes the pages of a claimed series over, with the account of its rounds.
    pub fn take_over_pages(&self, series: &Session) {
        let rounds = std::mem::take(&mut series.rounds().merged);
        for round in rounds {
            self.round_done(round);
        }
        *self.pages() = series.take_pages();
    }

    fn rounds(&self) -> MutexGuard<'_, Rounds> {
        self.rounds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn open_set(
        &self,
        number: SetNumber,
        snapshot: SnapshotId,
        parent: Option<SetNumber>,
        gated: bool,
        dialect: Dialect,
    ) -> Result<Arc<Set>, SessionError> {
        let mut state = self.state();
        if number.0 == 0 || state.sets.contains_key(&number) {
            return Err(SessionError::Used(number.0));
        }
        if state.sets.len() >= MAX_SETS {
            return Err(SessionError::TooMany);
        }
        if let Some(parent) = parent.filter(|p| !state.sets.contains_key(p)) {
            return Err(SessionError::Unknown(parent.0));
        }
        // A dump would have said FINISH before the next run begins.
        for earlier in state.sets.values() {
            earlier.was_a_pre_dump();
            earlier.a_run_follows(dialect);
        }
        let changes = self.changes.clone();
        let set = Set::new(
            number,
            snapshot,
            parent,
            gated,
            dialect,
            changes,
            &self.budget,
        )?;
        let set = Arc::new(set.noted_in(self.ledger.get()));
        state.sets.insert(number, set.clone());
        drop(state);
        self.changes.bump();
        Ok(set)
    }

    pub fn set(&self, number: SetNumber) -> Result<Arc<Set>, SessionError> {
        let state = self.state();
        let set = state.sets.get(&number);
        set.cloned().ok_or(SessionError::Unknown(number.0))
    }

    /// Newest first.
    pub fn sets(&self) -> Vec<Arc<Set>> {
        self.state().sets.values().rev().cloned().collect()
    }

    /// The newest set with this snapshot id that was not given up, or else one that was: its
    /// reader is told so.
    pub fn snapshot(&self, id: &SnapshotId) -> Option<Arc<Set>> {
        let state = self.state();
        let mut of_id = state.sets.values().rev().filter(|s| s.snapshot == *id);
        let newest = of_id.clone().find(|s| !s.is_aborted());
        newest.or_else(|| of_id.next()).cloned()
    }

    /// The set that a `--stream` restore, whose first request is `first`, is about.
    pub fn stream_target(&self, first: &ImageName, holds: Holds) -> StreamTarget {
        if let Some(reason) = &self.state().aborted {
            return StreamTarget::Gone(reason.clone());
        }
        let sets = self.sets();
        // A pre-dump cannot be restored: behind it the dump is still to come.
        match sets.iter().find(|s| !s.is_aborted() && !s.is_pre_dump()) {
            Some(set) if set.answers_stream(first, holds) => StreamTarget::Set(set.clone()),
            Some(set) if set.why_taken().is_some() => {
                StreamTarget::Gone(set.why_taken().unwrap_or_default().to_owned())
            }
            _ => StreamTarget::Wait,
        }
    }

    pub fn round_done(&self, round: shown::Round) {
        let mut rounds = self.rounds();
        let bytes = (std::mem::size_of_val(&round) + round.snapshot.len()) as u64;
        // A dump does not fail for the account of its rounds.
        if rounds.merged.len() < MAX_SETS && rounds.charge.grow(bytes).is_ok() {
            rounds.merged.push(round);
        }
    }

    fn pages(&self) -> MutexGuard<'_, Option<PageStore>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A round of the series, to be merged by [`Self::merge_round`].
    pub fn begin_round(&self, page_bytes: u64, budget: &Arc<Budget>) -> Round {
        match self.pages().as_mut() {
            Some(store) => store.begin(budget),
            // Nothing is left over that could be of use to it.
            None => PageStore::new(page_bytes, budget).begin(budget),
        }
    }

    /// Makes a whole round visible.
    pub fn merge_round(
        &self,
        round: Round,
        budget: &Arc<Budget>,
    ) -> Result<(RoundPages, Superseded), PageError> {
        let mut pages = self.pages();
        let store = pages.get_or_insert_with(|| PageStore::new(round.page_bytes(), budget));
        store.merge(round)
    }

    /// The sets that the pagemaps of `set` may refer to, nearest first.
    pub fn parents(&self, set: &Set) -> Vec<Arc<Set>> {
        let mut parents = Vec::new();
        let mut next = set.parent;
        while let Some(parent) = next.and_then(|n| self.set(n).ok()) {
            next = parent.parent;
            parents.push(parent);
        }
        parents
    }

    /// The dump of a `--remote` series is complete: makes it one snapshot of its chain, whose
    /// other snapshots are not needed any more.
    pub fn squash(&self, set: &Set, budget: &Arc<Budget>) -> Result<(), SquashError> {
        let parents = self.parents(set);
        if parents.is_empty() {
            return Ok(());
        }
        set.squash(&parents, budget)?;
        for parent in parents {
            // Complete, and of a series that goes no further: it can be given up.
            let _ = parent.abort("it is a part of the dump now");
        }
        Ok(())
    }

    /// The dump of the series is complete: makes the pages of its rounds images of its set.
    /// With `lend` their memory goes back run by run, when restore has read them.
    pub fn flatten_pages(
        &self,
        set: &Set,
        budget: &Arc<Budget>,
        lend: bool,
    ) -> Result<(), WriteError> {
        let hand_out = match lend {
            true => OwnedPiece::lend,
            false => OwnedPiece::share,
        };
        match self.take_pages() {
            Some(store) => set.adopt(store.flatten(hand_out), budget),
            None => Ok(()),
        }
    }

    pub fn is_connected(&self) -> bool {
        self.state().connected
    }

    /// Its link broke, and may be resumed.
    pub fn is_away(&self) -> bool {
        self.link.get().is_some_and(|link| !link.is_attached())
    }

    pub fn is_of_proxy(&self, proxy: u64) -> bool {
        self.opener.proxy == proxy
    }

    /// Whether a HELLO of this opener was said before that which opened the session, and has come
    /// after it.
    pub fn overtook(&self, opener: Opener) -> bool {
        let numbered = opener.opening != 0 && self.is_of_proxy(opener.proxy);
        numbered && opener.opening <= self.opener.opening
    }

    pub fn aborted(&self) -> Option<String> {
        self.state().aborted.clone()
    }

    pub fn is_in_doubt(&self) -> bool {
        self.sets().iter().any(|s| s.is_in_doubt())
    }

    /// A restore holds what it had, and its images are not here.
    pub fn is_held_elsewhere(&self) -> bool {
        self.sets().iter().any(|s| s.is_held_elsewhere())
    }

    /// An operator has decided about it, and its link is there to hear what the source says.
    pub fn is_decided(&self) -> bool {
        self.sets().iter().any(|s| s.is_decided())
    }

    /// An operator has dropped it as a whole.
    pub fn drop_decided(&self, reason: &str) {
        self.state()
            .aborted
            .get_or_insert_with(|| reason.to_owned());
    }

    /// It was not done after all.
    pub fn undo_drop(&self) {
        self.state().aborted = None;
    }

    /// What to do about a set in doubt, for the log.
    pub fn advice(&self) -> String {
        let id = self.id;
        // A restore of an earlier image-cache may have been told to go on when that was gone.
        let here = match self.sets().iter().any(|set| set.doubts_a_restore()) {
            true => " and no restore of it runs here (one that sleeps comes by itself)",
            false => "",
        };
        format!(
            "If the process is dead on the source{here}, run `image-cache release {id}`; if it lives, `image-cache drop {id}`"
        )
    }

    pub fn mark_restored(&self) {
        self.state().restored = true;
    }

    pub fn was_restored(&self) -> bool {
        self.state().restored
    }

    /// Holds a dump that was not restored yet; or pages that may be a dump's, whose process
    /// is dead, since nothing tells a pre-dump's pages from them.
    pub fn is_only_copy(&self) -> bool {
        let pages = self.page_source.is_some() && self.pages().is_some();
        pages || !self.was_restored() && self.sets().iter().any(|s| s.is_only_copy())
    }

    /// Whether what is to be restored of it is there after a restart of image-cache.
    pub fn is_kept_through_restart(&self) -> bool {
        let sets = self.sets();
        let mut copies = sets.iter().filter(|s| s.is_only_copy()).peekable();
        copies.peek().is_some() && copies.all(|set| set.is_kept_through_restart())
    }

    /// Whether the series is over: its dump is whole and closed.
    pub fn has_final_dump(&self) -> bool {
        self.sets().iter().any(|s| s.is_final_dump())
    }

    /// Whether a set of it may be read by a restore that holds, before its commit.
    pub fn is_tried(&self) -> bool {
        self.sets().iter().any(|s| s.is_tried())
    }

    /// Whether `--remote` restores may be about it.
    pub fn is_remote(&self) -> bool {
        let listed = |d: Dialect| d.listing() != Listing::No;
        self.sets().iter().any(|s| listed(s.dialect()))
    }

    /// The proxy is gone. `false` if nothing is left that is worth keeping.
    pub fn disconnect(&self, reason: &str) -> bool {
        if !self.is_connected() {
            return self.aborted().is_none();
        }
        let sets = self.sets();
        let mut keep = false;
        let mut needed: Vec<SetNumber> = Vec::new();
        // Newest first, so a kept dump's parents are known when their turn comes.
        for set in &sets {
            if needed.contains(&set.number) {
                needed.extend(set.parent);
                continue;
            }
            let known_doubt = set.is_in_doubt();
            match set.link_lost(reason) {
                LinkLoss::Committed => {
                    needed.extend(set.parent);
                    keep = true;
                }
                LinkLoss::InDoubt if known_doubt => {
                    needed.extend(set.parent);
                    keep = true;
                }
                LinkLoss::InDoubt => {
                    tracing::error!(
                        session = %self.name, id = %self.id, snapshot = %set.snapshot, peer = %self.peer,
                        "in doubt: {reason} before the source committed the set; the set is kept and not served. {}",
                        self.advice()
                    );
                    needed.extend(set.parent);
                    keep = true;
                }
                LinkLoss::Aborted => {}
            }
        }
        // No round comes any more, and what was not made part of a dump is of no use.
        self.pages().take();
        drop(self.budget.release_reserved());
        let mut state = self.state();
        state.connected = false;
        state.idle_since = Some(Instant::now());
        if !keep {
            state.aborted = Some(reason.to_owned());
        }
        keep
    }

    /// Since when the session only waits to be restored.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        let idle_since = state.idle_since.filter(|_| !state.connected)?;
        match self.readers.load(Ordering::Relaxed) {
            0 => Some(idle_since),
            // One that takes nothing does not read.
            _ => Some(idle_since.max(*self.read())),
        }
    }

    fn read(&self) -> MutexGuard<'_, Instant> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A restore takes something.
    pub fn is_read(&self) {
        *self.read() = Instant::now();
    }

    pub fn reader(self: &Arc<Self>) -> ReaderGuard {
        self.is_read();
        self.readers.fetch_add(1, Ordering::Relaxed);
        ReaderGuard(self.clone())
    }
}

impl Drop for ReaderGuard {
    fn drop(&mut self) {
        self.0.state().idle_since = Some(Instant::now());
        self.0.readers.fetch_sub(1, Ordering::Relaxed);
    }
}
