//! A session: one connection to the cache, and the runs of one series on it, one after
//! another. What a series remembers: the snapshot list and the parents' pagemaps.

pub mod evidence;
pub mod parent_images;
pub mod run;

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use image_common::control::status;
use image_common::criu::dialect::{Dialect, SetEnd};
use image_common::criu::page_server::PagemapId;
use image_common::error_chain::chain;
use image_common::image::{ImageName, SessionName, SnapshotId};
use image_common::link::codec::{Message, SetNumber};
use image_common::link::session_id::SessionId;
use image_common::procfs::process::{peer_pid, Process};
use image_common::tasks;
use image_common::units::human_size;
use tokio::net::UnixStream;
use tokio::sync::watch;

use crate::dumps::round_client::Origin;
use crate::frontend::Frontier;
use crate::link::connect::Target;
use crate::link::Link;
use crate::session::parent_images::{Kept, KeptImages};
use crate::session::run::{Commit, Ended, Run, State, Step};

/// What comes faster than it could be asked for.
const LEAST_RESERVED_BYTES: u64 = 16 << 20;

/// How long the link may take for the last word about a set.
const SAID_WITHIN: Duration = Duration::from_secs(1);

/// The process of a run: its pid if the kernel told it, and a handle if it was still there.
#[derive(Debug, Clone, Default)]
pub struct Criu {
    pub pid: Option<i32>,
    pub process: Option<Arc<Process>>,
}

impl Criu {
    /// That has connected.
    pub fn of_peer(stream: &UnixStream) -> Self {
        let process = Process::of_peer(stream);
        Self {
            pid: peer_pid(stream),
            process: process.map(|process| Arc::new(process.with_status())),
        }
    }

    pub fn of(pid: Option<i32>) -> Self {
        let process = pid.and_then(Process::open);
        let process = process.map(|process| Arc::new(process.with_status()));
        Self { pid, process }
    }
}

/// How the session's connection stands.
#[derive(Clone)]
enum Connection {
    Connecting,
    Up(Arc<Link>),
    Failed(String),
}

pub struct Session {
    pub name: SessionName,
    /// As image-cache has it, once it has answered.
    id: OnceLock<SessionId>,
    connection: watch::Sender<Connection>,
    next_set: AtomicU32,
    series: Mutex<Series>,
    /// Pagemaps of the last page server round that the cache merged.
    round: Mutex<HashSet<PagemapId>>,
    /// Whose page server rounds these are. `None`: it has had none.
    origin: Mutex<Option<Origin>>,
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
    kept: KeptImages,
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
            connection: watch::Sender::new(Connection::Connecting),
            next_set: AtomicU32::new(1),
            series: Mutex::default(),
            round: Mutex::default(),
            origin: Mutex::default(),
            began: Instant::now(),
            past: Mutex::default(),
        });
        let (connecting, failed) = (session.clone(), session.clone());
        let connect = async move {
            before.await;
            let connection = match Link::connect(&target, &name).await {
                Ok(link) => {
                    let _ = connecting.id.set(link.id); // once per session
                    Connection::Up(link)
                }
                Err(e) => {
                    let reason = chain(&e);
                    tracing::error!(session = %name, "{reason}");
                    Connection::Failed(reason)
                }
            };
            connecting.connection.send_replace(connection);
        };
        tasks::spawn("connecting to image-cache", connect, move |why| {
            let failed = &failed.connection;
            failed.send_replace(Connection::Failed(why.to_owned()));
        });
        session
    }

    pub fn id(&self) -> Option<SessionId> {
        self.id.get().copied()
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
    pub async fn link(&self) -> Result<Arc<Link>, String> {
        let mut connection = self.connection.subscribe();
        let settled = connection
            .wait_for(|c| !matches!(c, Connection::Connecting))
            .await;
        let settled = settled.map(|c| c.clone()).unwrap_or(Connection::Connecting);
        match settled {
            Connection::Up(link) if link.is_down() => Err(link.why()),
            Connection::Up(link) => Ok(link),
            Connection::Failed(reason) => Err(reason),
            Connection::Connecting => Err("the session is gone".to_owned()),
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
    pub async fn close(&self, reason: &str) -> bool {
        let seen = match self.link().await {
            Ok(link) => link.close(reason).await,
            Err(_) => false,
        };
        // The session is remembered for late connections; its link need not be.
        let over = match reason {
            "" => "the session ended".to_owned(),
            reason => format!("the session ended: {reason}"),
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

    /// How many runs have begun.
    pub fn runs(&self) -> u32 {
        self.next_set.load(Ordering::Relaxed) - 1
    }

    /// Has the cache make memory ready for about so many bytes, and waits for that. The tasks of the
    /// dump run meanwhile. No dump fails for want of it: then the cache makes memory ready as they
    /// come. An error: the link is gone.
    pub async fn reserve(&self, bytes: u64, within: Duration) -> Result<(), String> {
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
            series.kept.forget(&snapshot);
            if !with_parents || series.kept.overflowed() {
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

    pub fn origin(&self) -> Option<Origin> {
        let origin = self.origin.lock();
        origin.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A page server round begins, or is announced.
    pub fn round_from(&self, origin: Origin) {
        *self.origin.lock().unwrap_or_else(PoisonError::into_inner) = Some(origin);
    }

    fn past(&self) -> MutexGuard<'_, (Vec<status::Set>, Vec<status::Round>)> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn status(&self, state: &str, running: Option<status::Set>) -> status::Session {
        let past = self.past();
        status::Session {
            name: self.name.to_string(),
            id: self.id().map(|id| id.to_string()),
            peer: None,
            state: state.to_owned(),
            age_seconds: self.began.elapsed().as_secs_f64(),
            sets: past.0.iter().cloned().chain(running).collect(),
            rounds: past.1.clone(),
            page_store_bytes: 0,
        }
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
                    link.add_set(set, &opened);
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
                        opened.fail(&link.why());
                    }
                }
                Err(reason) => opened.fail(&reason),
            }
        };
        tasks::spawn("the begin of a set", open, move |why| failed.fail(why));
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
            series.kept.pagemap(&run.snapshot, name, bytes);
        } else if name.is_pages() {
            series.kept.pages(&run.snapshot, name, total);
        }
    }

    pub fn read_back(&self, snapshot: &SnapshotId, name: &ImageName) -> Option<Kept> {
        self.series().kept.get(snapshot, name)
    }
}

/// Tells the cache that nobody will ask for these any more.
async fn abort_replaced(session: Arc<Session>, replaced: Vec<(SnapshotId, SetNumber)>) {
    let Ok(link) = session.link().await else {
        return;
    };
    for (_, set) in replaced {
        let reason = "its snapshot id was pushed again".to_owned();
        link.send(&Message::SetAbort { set, reason }).await;
    }
}

/// What becomes of a run whose [`drive`] ended in a panic: the link ends with it, so that image-cache judges its sets as
/// those of a proxy that died. What CRIU was told to kill is in doubt there, and all else is given up.
pub fn broke(session: &Session, run: &Run, why: &str) -> Ended {
    run.fail(why);
    if let Connection::Up(link) = &*session.connection.borrow() {
        link.fail(why);
    }
    let state = run.state();
    let ended = match state.commit {
        Commit::Told | Commit::Committed => Ended::InDoubt(why.to_owned()),
        _ if state.outlives_failure() => Ended::InDoubt(why.to_owned()),
        _ => Ended::Failed(why.to_owned()),
    };
    tracing::error!(session = %session.name, snapshot = %run.snapshot, "{}: {why}", match &ended {
        Ended::InDoubt(_) => "in doubt",
        _ => "the dump fails, its process goes on",
    });
    run.end(ended.clone());
    ended
}

/// Carries a run from its begin to its end. Gives how it ended.
pub async fn drive(session: &Session, run: &Run, frontier: &Frontier) -> Ended {
    loop {
        let state = run.wait_for(|s| s.next_step() != Step::Wait).await;
        let outcome = match state.next_step() {
            Step::Wait => continue,
            Step::AskComplete => ask_complete(session, run, frontier).await,
            Step::Hold => hold(session, run).await,
            Step::Judge => {
                // The cache holds the set meanwhile, and is to hear that this process lives.
                match session.link().await {
                    Ok(link) => link.heard_during(run.judge()).await,
                    Err(_) => run.judge().await,
                }
                None
            }
            Step::CloseSet => close_set(session, run).await,
            Step::Doubt(reason) => doubt(session, run, reason).await,
            Step::Done(ended) => Some(ended),
        };
        if let Some(ended) = outcome {
            log_end(session, run, &state, &ended);
            match &ended {
                Ended::Failed(reason) => give_up(session, run, reason).await,
                // Of the others the cache has been told before.
                Ended::InDoubt(reason) if state.failure().is_some() => {
                    tell_doubt(session, run, reason).await;
                }
                _ => {}
            }
            run.end(ended.clone());
            session.past().0.push(run.status());
            return ended;
        }
    }
}

async fn ask_complete(session: &Session, run: &Run, frontier: &Frontier) -> Option<Ended> {
    // A connection that CRIU made earlier may still be on its way to becoming an image.
    frontier.settled().await;
    if run.state().next_step() != Step::AskComplete {
        return None;
    }
    let link = match session.link().await {
        Ok(link) => link,
        Err(reason) => return Some(Ended::Failed(reason)),
    };
    let state = run.state();
    if !state.gated && state.dialect.end() == SetEnd::Inventory {
        // Else it would be served from its completion on, and CRIU has not killed yet.
        link.send(&Message::SetGate { set: run.set }).await;
    }
    let (images, bytes) = run.asks_complete();
    link.send(&Message::SetComplete {
        set: run.set,
        images,
        bytes,
    })
    .await;
    None
}

/// The cache keeps the set from here on, whatever happens: CRIU kills without asking.
async fn hold(session: &Session, run: &Run) -> Option<Ended> {
    let link = match session.link().await {
        Ok(link) => link,
        Err(reason) => return Some(Ended::InDoubt(reason)),
    };
    run.commit(Commit::Preparing);
    let State {
        images,
        bytes,
        digest,
        ..
    } = run.state();
    let commit = Message::Prepare {
        set: run.set,
        images,
        bytes,
        digest,
    };
    // The link's failure is the run's.
    let _ = link.send_now(&commit).await;
    None
}

/// CRIU has killed: the set may be restored.
async fn close_set(session: &Session, run: &Run) -> Option<Ended> {
    let set = run.set;
    let message = match run.state().commit {
        Commit::Prepared => Message::Commit { set },
        _ => Message::SetClose { set },
    };
    let sent = match session.link().await {
        Ok(link) => link.send_now(&message).await,
        Err(reason) => Err(reason),
    };
    // The tasks are dead; the cache keeps the set even if it is not told.
    Some(sent.map_or_else(Ended::InDoubt, |()| Ended::Dump))
}

async fn doubt(session: &Session, run: &Run, reason: String) -> Option<Ended> {
    let set = run.set;
    let told = async {
        let link = session.link().await?;
        let state = run.state();
        // A streamed one is gated since it was called complete.
        if state.commit != Commit::Prepared && state.dialect.end() != SetEnd::Inventory {
            link.send_now(&Message::SetGate { set }).await?;
        }
        let reason = reason.clone();
        link.send_now(&Message::SetDoubt { set, reason }).await
    };
    // A link that is lost leaves it in doubt, too.
    let _ = told.await;
    Some(Ended::InDoubt(reason))
}

/// CRIU was told, and its process was not seen to die: the cache need not wait for the end of
/// the link to say so to its operator. The link stays, for `image-proxy abort`.
async fn tell_doubt(session: &Session, run: &Run, reason: &str) {
    let Ok(link) = session.link().await else {
        return; // then it knows
    };
    let reason = reason.to_owned();
    let message = Message::SetDoubt {
        set: run.set,
        reason,
    };
    let _ = tokio::time::timeout(SAID_WITHIN, link.send_now(&message)).await;
}

async fn give_up(session: &Session, run: &Run, reason: &str) {
    // Images that are still open are closed towards CRIU; in the socket dialect they are
    // drained, which may take as long as CRIU likes, so that is not waited for.
    run.fail(reason);
    if let Ok(link) = session.link().await {
        let reason = reason.to_owned();
        let abort = async {
            link.send_now(&Message::SetAbort {
                set: run.set,
                reason,
            })
            .await
        };
        // A link that does not take even this is closed by whoever ends the session.
        let _ = tokio::time::timeout(SAID_WITHIN, abort).await;
    }
}

fn log_end(session: &Session, run: &Run, state: &State, ended: &Ended) {
    let (images, size) = (state.images, human_size(state.bytes));
    let handle = session.handle();
    let (session, snapshot) = (&session.name, &run.snapshot);
    match ended {
        Ended::PreDump => tracing::info!(%session, %snapshot, images, size, "pre-dump sent"),
        Ended::Dump => tracing::info!(%session, %snapshot, images, size, "dump sent"),
        Ended::InDoubt(reason) => tracing::error!(
            %session, %snapshot,
            "in doubt: {reason}; the target keeps the set and does not serve it. If the process is dead here, \
             run `image-cache release {handle}` there; if it lives, `image-proxy abort {handle}` here"
        ),
        Ended::Failed(reason) => {
            tracing::error!(%session, %snapshot, "{reason}; if CRIU has not finished its dump, the process stays on this host");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::run::Told;

    fn target() -> Target {
        Target {
            host: "127.0.0.1".to_owned(),
            port: 1,
            proxy: 1,
            connect_timeout: Duration::from_secs(1),
            connections: 1,
            link_timeout: Duration::ZERO,
            retransmit_buffer: 0,
            checksum: false,
            tls: None,
            resolver: Arc::new(image_common::net::dial::System),
            openings: Arc::default(),
        }
    }

    fn session(before: impl std::future::Future<Output = ()> + Send + 'static) -> Arc<Session> {
        Session::start("web".parse().unwrap(), target(), before)
    }

    fn run() -> Arc<Run> {
        let snapshot = "/img".parse().unwrap();
        Run::new(SetNumber(1), snapshot, Dialect::Stream, true, None, None)
    }

    /// Whoever waits for the run hears how it ended; what CRIU may have killed is in doubt, and not given up.
    #[tokio::test]
    async fn a_run_whose_driver_panicked_ends() {
        let (session, dump) = (session(std::future::pending()), run());
        let ended = broke(&session, &dump, "a fault of ours");
        assert_eq!(ended, Ended::Failed("a fault of ours".to_owned()));
        assert_eq!(dump.state().ended, Some(ended));
        let told = run();
        told.commit(Commit::Prepared);
        told.tell(Told::default()).unwrap();
        let ended = broke(&session, &told, "a fault of ours");
        assert_eq!(ended, Ended::InDoubt("a fault of ours".to_owned()));
    }

    #[tokio::test]
    async fn a_session_that_panicked_while_it_connected_says_so() {
        let started = session(async { panic!("a fault of ours") });
        let link = tokio::time::timeout(Duration::from_secs(20), started.link());
        let Err(reason) = link.await.unwrap() else {
            panic!("it is connected");
        };
        assert!(reason.contains("a fault of ours"), "{reason}");
    }
}
