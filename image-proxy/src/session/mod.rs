//! A session: one connection to the cache, and the runs of one series on it, one after
//! another. What a series remembers: the snapshot list and the parents' pagemaps.

pub mod arrival_order;
pub mod criu;
pub mod drive;
pub mod evidence;
pub mod lineage;
pub mod parent_images;
pub mod phase;
pub mod run;
pub mod send_image;
pub mod state;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use image_common::control::status;
use image_common::criu::dialect::Dialect;
use image_common::criu::page_server::PagemapId;
use image_common::error_chain::chain;
use image_common::image::{ImageName, SessionName, SnapshotId};
use image_common::link::codec::{Message, SetNumber};
use image_common::link::session_id::SessionId;
use image_common::tasks;
use image_common::units::human_size;
use tokio::sync::watch;

use crate::failure::Failure;
use crate::link::connect::{ConnectError, Target};
use crate::link::decision::Address;
use crate::link::Link;
use crate::session::criu::Criu;
use crate::session::lineage::Lineage;
use crate::session::parent_images::{ParentImage, ParentImages};
use crate::session::run::Run;

/// What comes faster than it could be asked for.
const LEAST_RESERVED_BYTES: u64 = 16 << 20;

/// How the session's connection stands.
#[derive(Clone)]
enum Connection {
    Connecting,
    Up(Arc<Link>),
    Failed(Failure),
}

pub struct Session {
    pub name: SessionName,
    /// As image-cache has it, once it has answered.
    id: OnceLock<SessionId>,
    /// Where decisions are brought when the link is gone, if the cache knows of that.
    address: OnceLock<Arc<Address>>,
    connection: watch::Sender<Connection>,
    next_set: AtomicU32,
    series: Mutex<Series>,
    /// Pagemaps of the last page server round that the cache merged.
    round: Mutex<HashSet<PagemapId>>,
    /// Where its page server rounds come from. `None`: it has had none.
    lineage: Mutex<Option<Lineage>>,
    began: Instant,
    /// Sets and rounds of this session that are over, for the operator.
    past: Mutex<(Vec<status::Set>, Vec<status::Round>)>,
}

/// What `--remote` dumps of one series know of each other.
#[derive(Default)]
struct Series {
    /// Oldest first; each entry is the parent of the next.
    list: Vec<(SnapshotId, SetNumber)>,
    /// The clients of this series use parents, and so will read them back.
    with_parents: bool,
    parents: ParentImages,
}

impl Session {
    /// Begins to connect, after `before`: an older connection with the same name.
    pub fn start(
        name: SessionName,
        target: Target,
        before: impl std::future::Future<Output = ()> + Send + 'static,
    ) -> Arc<Self> {
        let session = Arc::new(Self {
            name: name.clone(),
            id: OnceLock::new(),
            address: OnceLock::new(),
            connection: watch::Sender::new(Connection::Connecting),
            next_set: AtomicU32::new(1),
            series: Mutex::default(),
            round: Mutex::default(),
            lineage: Mutex::default(),
            began: Instant::now(),
            past: Mutex::default(),
        });
        let (connecting, failed) = (session.clone(), session.clone());
        let connect = async move {
            before.await;
            let connection = match Link::connect(&target, &name).await {
                Ok(link) => {
                    // Once per session.
                    let _ = connecting.id.set(link.id);
                    if let Some(address) = link.address() {
                        let _ = connecting.address.set(address.clone());
                    }
                    Connection::Up(link)
                }
                Err(e) => {
                    tracing::error!(session = %name, "{}", chain(&e));
                    Connection::Failed(not_connected(e))
                }
            };
            connecting.connection.send_replace(connection);
        };
        tasks::spawn("connecting to image-cache", connect, move |why| {
            let failed = &failed.connection;
            failed.send_replace(Connection::Failed(Failure::bug(why)));
        });
        session
    }

    pub fn id(&self) -> Option<SessionId> {
        self.id.get().copied()
    }

    /// Where decisions are brought when the link is gone.
    pub fn address(&self) -> Option<&Arc<Address>> {
        self.address.get()
    }

    /// How an operator names it, on either host: by its id, or, as long as it has none, by its name.
    pub fn handle(&self) -> String {
        self.id()
            .map_or_else(|| self.name.to_string(), |id| id.to_string())
    }

    fn series(&self) -> MutexGuard<'_, Series> {
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The link, once it is connected. Cancel safe.
    pub async fn link(&self) -> Result<Arc<Link>, Failure> {
        let mut connection = self.connection.subscribe();
        let settled = connection
            .wait_for(|c| !matches!(c, Connection::Connecting))
            .await;
        let settled = settled.map(|c| c.clone()).unwrap_or(Connection::Connecting);
        match settled {
            Connection::Up(link) if link.is_down() => Err(link.why()),
            Connection::Up(link) => Ok(link),
            Connection::Failed(reason) => Err(reason),
            Connection::Connecting => Err(Failure::stopped("the session is gone")),
        }
    }

    /// Whether the next run of the series can go on with it.
    pub fn is_usable(&self) -> bool {
        match &*self.connection.borrow() {
            Connection::Connecting => true,
            Connection::Up(link) => !link.is_down(),
            Connection::Failed(_) => false,
        }
    }

    /// Ends the session; returns when the cache has seen that, or the link is given up. `true`:
    /// the cache has seen everything that was sent.
    pub async fn close(&self, reason: Option<&str>) -> bool {
        let seen = match self.link().await {
            Ok(link) => link.close(reason).await,
            Err(_) => false,
        };
        // The session is remembered for late connections; its link need not be.
        let over = match reason {
            None => Failure::stopped("the session ended"),
            Some(reason) => Failure::stopped(format!("the session ended: {reason}")),
        };
        self.connection.send_if_modified(|c| {
            // One that never came up has a better reason.
            let news = !matches!(c, Connection::Failed(_));
            if news {
                *c = Connection::Failed(over);
            }
            news
        });
        seen
    }

    /// The link is of no use any more, if it was connected.
    pub fn fail_link(&self, why: Failure) {
        if let Connection::Up(link) = &*self.connection.borrow() {
            link.fail(why);
        }
    }

    /// How many runs have begun.
    pub fn runs(&self) -> u32 {
        self.next_set.load(Ordering::Relaxed) - 1
    }

    /// Has the cache make memory ready for about so many bytes, and waits for that. The tasks of the
    /// dump run meanwhile. No dump fails for want of it: then the cache makes memory ready as they
    /// come. An error: the link is gone.
    pub async fn reserve(&self, bytes: u64, within: Duration) -> Result<(), Failure> {
        let link = self.link().await?;
        if within.is_zero() || bytes < LEAST_RESERVED_BYTES {
            return Ok(());
        }
        let began = Instant::now();
        let ready = tokio::time::timeout(within, link.reserve(bytes)).await;
        let (session, took) = (&self.name, began.elapsed());
        let expected = human_size(bytes);
        match ready {
            Ok(ready) => {
                let ready = human_size(ready);
                tracing::info!(%session, expected, ready, "image-cache has memory ready after {took:.1?}");
            }
            Err(_) => tracing::warn!(
                %session, expected,
                "image-cache has not made all memory ready within {within:?} (--reserve-timeout): the dump begins without"
            ),
        }
        self.link().await.map(drop)
    }

    // --- runs -----------------------------------------------------------------------------

    /// A `--stream` run begins.
    pub fn begin_stream(
        self: &Arc<Self>,
        snapshot: SnapshotId,
        gated: bool,
        criu: Criu,
    ) -> Arc<Run> {
        self.begin(snapshot, Dialect::Stream, None, gated, criu)
    }

    /// A `--remote` run begins: its snapshot goes to the end of the list.
    pub fn begin_remote(
        self: &Arc<Self>,
        snapshot: SnapshotId,
        with_parents: bool,
        gated: bool,
        criu: Criu,
    ) -> Arc<Run> {
        let mut replaced = Vec::new();
        let parent = {
            let mut series = self.series();
            // A known id starts anew. In the middle of the chain its old content is what later
            // snapshots refer to, so with it the whole chain ends.
            match series.list.iter().position(|(id, _)| *id == snapshot) {
                Some(at) if at + 1 == series.list.len() => replaced.extend(series.list.pop()),
                Some(_) => replaced.append(&mut series.list),
                None => {}
            }
            series.parents.forget(&snapshot);
            if !with_parents || series.parents.overflowed() {
                series.list.clear();
            }
            series.with_parents = with_parents;
            series.list.last().map(|(_, set)| *set)
        };
        let run = self.begin(
            snapshot.clone(),
            Dialect::RemoteUnknown,
            parent,
            gated,
            criu,
        );
        self.series().list.push((snapshot, run.set));
        if !replaced.is_empty() {
            let abort = abort_replaced(self.clone(), replaced);
            tasks::spawn("giving replaced snapshots up", abort, |_| {});
        }
        run
    }

    /// A run whose pages come through the page server.
    pub fn begin_page_server(
        self: &Arc<Self>,
        snapshot: SnapshotId,
        gated: bool,
        criu: Criu,
    ) -> Arc<Run> {
        self.begin(snapshot, Dialect::PageServer, None, gated, criu)
    }

    /// Whether the last round of this series had this pagemap, and is whole.
    pub fn has_parent(&self, id: PagemapId) -> bool {
        self.round
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(&id)
    }

    pub fn lineage(&self) -> Option<Lineage> {
        let lineage = self.lineage.lock();
        lineage.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A page server round begins, or is announced.
    pub fn round_from(&self, lineage: Lineage) {
        *self.lineage.lock().unwrap_or_else(PoisonError::into_inner) = Some(lineage);
    }

    fn past(&self) -> MutexGuard<'_, (Vec<status::Set>, Vec<status::Round>)> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    pub fn status(&self, state: &str, running: Option<status::Set>) -> status::Session {
        let past = self.past();
        status::Session {
            name: self.name.to_string(),
            id: self.id().map(|id| id.to_string()),
            peer: None,
            state: state.to_owned(),
            age_seconds: self.age().as_secs_f64(),
            sets: past.0.iter().cloned().chain(running).collect(),
            rounds: past.1.clone(),
            page_store_bytes: 0,
        }
    }

    /// A run of this session is over.
    pub fn run_over(&self, run: &Run) {
        self.past().0.push(run.status());
    }

    /// The cache has merged a round.
    pub fn round_merged(&self, ids: HashSet<PagemapId>, round: status::Round) {
        self.past().1.push(round);
        *self.round.lock().unwrap_or_else(PoisonError::into_inner) = ids;
    }

    fn begin(
        self: &Arc<Self>,
        snapshot: SnapshotId,
        dialect: Dialect,
        parent: Option<SetNumber>,
        gated: bool,
        criu: Criu,
    ) -> Arc<Run> {
        let set = SetNumber(self.next_set.fetch_add(1, Ordering::Relaxed));
        let run = Run::new(set, snapshot, dialect, gated, criu.pid, criu.process);
        let (session, opened, failed) = (self.clone(), run.clone(), run.clone());
        let open = async move {
            match session.link().await {
                Ok(link) => {
                    link.add_set(set, opened.clone());
                    let message = Message::SetOpen {
                        set,
                        gated,
                        dialect,
                        parent,
                        snapshot: opened.snapshot.clone(),
                    };
                    link.send(&message).await;
                    opened.opened();
                    // The link may have died before the run was known to it.
                    if link.is_down() {
                        opened.fail(link.why());
                    }
                }
                Err(reason) => opened.fail(reason),
            }
        };
        tasks::spawn("the begin of a set", open, move |why| {
            failed.fail(Failure::bug(why));
        });
        run
    }

    /// Ids for a list read, oldest first.
    pub fn snapshot_list(&self) -> Vec<SnapshotId> {
        self.series()
            .list
            .iter()
            .map(|(id, _)| id.clone())
            .collect()
    }

    // --- what dump reads back -------------------------------------------------------------

    pub fn keeps_pagemaps(&self) -> bool {
        self.series().with_parents
    }

    pub fn remember(&self, run: &Run, name: &ImageName, total: u64, pagemap: Option<Vec<u8>>) {
        let mut series = self.series();
        if !series.with_parents {
            return;
        }
        if let Some(bytes) = pagemap {
            series.parents.pagemap(&run.snapshot, name, bytes);
        } else if name.is_pages() {
            series.parents.pages(&run.snapshot, name, total);
        }
    }

    pub fn read_back(&self, snapshot: &SnapshotId, name: &ImageName) -> Option<ParentImage> {
        self.series().parents.get(snapshot, name)
    }
}

/// Why there is no link.
fn not_connected(e: ConnectError) -> Failure {
    let what = e.to_string();
    match &e {
        ConnectError::Refused { .. } | ConnectError::Versions { .. } => Failure::peer(what),
        ConnectError::Timeout { .. } => Failure::limit(what),
        ConnectError::Pipes(..) => Failure::bug(what),
        _ => Failure::link(what),
    }
    .caused_by(e)
}

/// Tells the cache that these are replaced.
async fn abort_replaced(session: Arc<Session>, replaced: Vec<(SnapshotId, SetNumber)>) {
    let Ok(link) = session.link().await else {
        return;
    };
    for (_, set) in replaced {
        let reason = "its snapshot id was pushed again".to_owned();
        link.send(&Message::SetAbort { set, reason }).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::answers::SetAnswers;
    use crate::link::testing;
    use crate::session::drive::broke;
    use crate::session::phase::Ended;
    use crate::session::run::Told;

    fn target() -> Target {
        Target {
            connect_timeout: Duration::from_secs(1),
            ..testing::target(1)
        }
    }

    fn session(before: impl std::future::Future<Output = ()> + Send + 'static) -> Arc<Session> {
        Session::start("web".parse().unwrap(), target(), before)
    }

    fn fault() -> Failure {
        Failure::bug("a fault of ours")
    }

    fn run() -> Arc<Run> {
        let snapshot = "/img".parse().unwrap();
        Run::new(SetNumber(1), snapshot, Dialect::Stream, true, None, None)
    }

    /// A task that waits for the run learns how it ended. What CRIU may have killed is in doubt, and not given up.
    #[tokio::test]
    async fn a_run_whose_driver_panicked_ends() {
        let (session, dump) = (session(std::future::pending()), run());
        let ended = broke(&session, &dump, fault());
        assert_eq!(ended, Ended::Failed(fault()));
        assert_eq!(dump.state().ended(), Some(&ended));
        let told = run();
        told.prepares();
        told.prepare_answered(Ok(()));
        told.tell(Told::default()).unwrap();
        let ended = broke(&session, &told, fault());
        assert_eq!(ended, Ended::InDoubt(fault()));
    }

    #[tokio::test]
    async fn a_session_that_panicked_while_it_connected_says_so() {
        let started = session(async { panic!("a fault of ours") });
        let link = tokio::time::timeout(Duration::from_secs(20), started.link());
        let Err(reason) = link.await.unwrap() else {
            panic!("it is connected");
        };
        assert!(reason.text().contains("a fault of ours"), "{reason:?}");
    }
}
