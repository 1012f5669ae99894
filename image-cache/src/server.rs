//! The daemon as a whole: listen, say ready, serve until told to stop.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use image_common::admission::quota::Host;
use image_common::admission::{Admission, Rules};
use image_common::control::hold::HoldTls;
use image_common::control::CACHE_CONTROL_SOCKET;
use image_common::criu_io::sockets::BoundSocket;
use image_common::daemon::shutdown::{Shutdown, EXIT_SESSIONS_ABORTED};
use image_common::daemon::{PidFile, Starting};
use image_common::error_chain::chain;
use image_common::net;
use image_common::tasks;
use image_common::units::human_size;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::cli::{Allow, Cli};
use crate::control;
use crate::control::holds::yield_port;
use crate::frontend::{accept, Frontends, HoldPlace};
use crate::keeper::{Held, Holder, Prepared};
use crate::limits::Handshakes;
use crate::page_server;
use crate::receiver;
use crate::receiver::threads::Workers;
use crate::receiver::LinkFailure;
use crate::store::journal::Journal;
use crate::store::memory::arena::{Arena, Source};
use crate::store::memory::host::Gauge;
use crate::store::session::Session;
use crate::store::set::restorable::Allowed;
use crate::store::{Policy, Scope, Store};

/// How long an image-cache that starts asks holding scripts for its port.
const YIELDED_WITHIN: Duration = Duration::from_millis(1500);
const YIELD_PAUSE: Duration = Duration::from_millis(100);

/// Runs the daemon; gives its exit code.
pub async fn run(cli: Cli, starting: Starting, prepared: Prepared) -> anyhow::Result<u8> {
    let shutdown = Shutdown::on_signals(cli.tls.tls).context("cannot watch for signals")?;
    let gauge = Gauge::default();
    let limit = memory_limit(cli.memory_limit, &gauge);
    let policy = Policy {
        keep: cli.keep,
        // 0: never.
        set_ttl: cli.set_ttl.filter(|ttl| !ttl.is_zero()),
        squash: cli.squash,
        release_on_read: cli.release_on_read,
        limits: cli.limits,
        allowed: Allowed {
            nftables: cli.allow.contains(&Allow::Nftables),
        },
    };
    let dirs = starting.dirs.clone();
    // The first -D.
    let held = prepared.open(dirs[0].path());
    let memory = held.as_ref().map(|held| Source::Arena(held.arena.clone()));
    let store = Store::gauged(limit, gauge, memory.unwrap_or_default(), policy);
    let kept = held.map(|held| Kept::begin(held, &store));
    starting.keep_dirs();
    let frontends = Frontends::new(
        dirs.clone(),
        cli.remote_dialect,
        shutdown.clone(),
        |c, store, frontends| Box::pin(control::serve(c, store, frontends)),
    );

    let port = cli.port.unwrap_or_default();
    let unsaid = (!cli.tls.tls && !cli.insecure_listen).then_some("127.0.0.1");
    let host = cli.address.as_deref().or(unsaid);
    let paths = dirs.iter().map(|dir| dir.path().to_owned()).collect();
    let listener = listen(host, port, paths)
        .await
        .with_context(|| format!("cannot listen on {}:{port}", host.unwrap_or("*")))?;
    let rules = Rules {
        tls: &cli.tls,
        allowed: &cli.allow_peer,
        insecure: cli.insecure_listen,
        max_connections: cli.limits.ports.max_connections,
        allowed_uids: &starting.allowed_uids,
    };
    let link_guard = Admission::new(&listener, "link", &rules)?;
    let address = listener.local_addr().context("cannot tell the port")?;
    let dir = cli
        .daemon
        .images_dir
        .first()
        .map_or_else(PathBuf::new, PathBuf::clone);
    let _ = frontends.holding.set(HoldPlace {
        dir: std::fs::canonicalize(&dir).unwrap_or(dir),
        listen: address,
        insecure_listen: cli.insecure_listen,
        allow_uid: cli.daemon.allow_uid.clone(),
        tls: cli.tls.tls.then(|| HoldTls {
            cert: cli.tls.tls_cert.clone(),
            key: cli.tls.tls_key.clone(),
            cacert: cli.tls.tls_cacert.clone(),
            cacrl: cli.tls.tls_cacrl.clone(),
            allow_peer: cli.allow_peer.clone(),
        }),
    });
    let sockets = frontends.serve_dirs(&store)?;
    for session in kept.iter().flat_map(|kept| &kept.found) {
        if let Err(e) = frontends.serve_session(&store, &session.name) {
            tracing::error!(session = %session.name, "no sockets for a session that was kept: {}", chain(&e));
        }
    }
    let workers = Workers::start().context("cannot start the threads that receive")?;
    let links = TaskTracker::new();
    let stop_control = CancellationToken::new();
    let mut control_sockets = Vec::new();
    for dir in &dirs {
        let (socket, listener) = BoundSocket::bind(dir, CACHE_CONTROL_SOCKET)?;
        control_sockets.push(socket);
        let (store, frontends) = (store.clone(), frontends.clone());
        tokio::spawn(accept(listener, stop_control.clone(), move |c| {
            control::serve(c, store.clone(), frontends.clone())
        }));
    }
    for address in &cli.page_server {
        let listener = net::listen(Some(&address.host), address.port)
            .await
            .with_context(|| format!("cannot listen on {}:{}", address.host, address.port))?;
        let admission = Admission::new(&listener, "page server", &rules)?;
        let (store, shutdown) = (store.clone(), shutdown.clone());
        let workers = workers.clone();
        tokio::spawn(serve_pages(
            listener,
            admission,
            store,
            shutdown,
            workers,
            links.clone(),
        ));
    }
    tracing::info!(memory_limit = human_size(limit), "listening on {address}");
    let pidfile: PidFile = starting.ready()?;
    kept.iter().for_each(Kept::ready);

    let (follows, expires) = (frontends.clone(), store.clone());
    let followed = store.clone();
    tasks::spawn_lasting("following the sessions", move || {
        follows.clone().follow(followed.clone())
    });
    tasks::spawn_lasting("--set-ttl", move || expire(expires.clone()));
    let sessions = Arc::new(receiver::Links::new(cli.link_timeout, cli.prepared_timeout));
    let accepting = accept_links(
        (listener, link_guard),
        &store,
        &frontends,
        &sessions,
        &shutdown,
        &workers,
        &links,
    );
    let serving = async {
        shutdown.requested.cancelled().await;
        wind_down(&store, &links, &shutdown, cli.daemon.grace_period).await
    };
    // A panic of what stops the daemon is no reason to end it at once: a second signal is.
    let serving = async {
        match tasks::caught("stopping", serving).await {
            Ok(clean) => clean,
            Err(_) => {
                shutdown.forced.cancelled().await;
                false
            }
        }
    };
    let clean = tokio::select! {
        clean = serving => clean,
        // New sessions are refused then, but one that goes on may have to connect again.
        () = accepting => unreachable!("it accepts for ever"),
    };
    if let Some(kept) = kept {
        kept.end(&store);
    }
    drop((sockets, control_sockets, pidfile));
    Ok(if clean { 0 } else { EXIT_SESSIONS_ABORTED })
}

/// Listens on the link's port. If scripts of restores that hold have it since an earlier image-cache went, they let go of it.
async fn listen(host: Option<&str>, port: u16, dirs: Vec<PathBuf>) -> io::Result<TcpListener> {
    let until = Instant::now() + YIELDED_WITHIN;
    loop {
        let taken = match net::listen(host, port).await {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => e,
            listening => return listening,
        };
        if Instant::now() >= until {
            return Err(taken);
        }
        let asked = dirs.clone();
        let yielded = tokio::task::spawn_blocking(move || yield_port(&asked)).await;
        // The directory of a service has gone with it, and a script makes its socket there anew after a moment.
        if yielded.unwrap_or(0) == 0 {
            tokio::time::sleep(YIELD_PAUSE).await;
        }
    }
}

/// What outlives this process.
struct Kept {
    holder: Holder,
    arena: Arc<Arena>,
    journal: Arc<Journal>,
    /// Sessions of the image-cache before.
    found: Vec<Arc<Session>>,
}

impl Kept {
    fn begin(held: Held, store: &Arc<Store>) -> Self {
        tracing::info!(
            "sets survive a restart of image-cache: {} holds their memory",
            held.holder.name()
        );
        store.keep_in(&held.journal);
        // What is in it goes back when its session goes, and not with this process.
        std::mem::forget(store.clone());
        Self {
            found: store.rebuild(held.kept, &held.arena),
            holder: held.holder,
            arena: held.arena,
            journal: held.journal,
        }
    }

    fn ready(&self) {
        self.holder.store(&self.arena, &self.journal);
    }

    fn end(self, store: &Store) {
        for session in store.newest(&Scope::Any) {
            if session.is_kept_through_restart() {
                tracing::warn!(
                    session = %session.name, id = %session.id,
                    "kept by {}: the next image-cache on this directory has it", self.holder.name()
                );
            }
        }
    }
}

impl Drop for Kept {
    /// Also of an image-cache that cannot start.
    fn drop(&mut self) {
        if self.journal.sets() == 0 {
            self.holder.end();
        }
    }
}

/// What was said, else three quarters of what there is at most.
fn memory_limit(said: Option<u64>, gauge: &Gauge) -> u64 {
    let smallest = gauge.smallest();
    if let (Some(said), Some(bound)) = (said, &smallest) {
        if said > bound.limit {
            tracing::warn!(
                "--memory-limit {} is more than {}, {}: dumps are refused before that is reached",
                human_size(said),
                bound.of,
                human_size(bound.limit)
            );
        }
    }
    said.unwrap_or_else(|| {
        let of_host = || {
            let info = rustix::system::sysinfo();
            // `totalram` is a C unsigned long: never wider than u64.
            #[allow(clippy::useless_conversion)]
            u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit))
        };
        smallest.map_or_else(of_host, |bound| bound.limit) / 4 * 3
    })
}

async fn accept_links(
    (listener, admission): (TcpListener, Admission),
    store: &Arc<Store>,
    frontends: &Arc<Frontends>,
    sessions: &Arc<receiver::Links>,
    shutdown: &Shutdown,
    workers: &Workers,
    links: &TaskTracker,
) {
    let max_handshakes = store.limits.max_handshakes;
    let within = store.limits.handshake_timeout;
    let handshakes = Arc::new(Handshakes::default());
    net::accept(listener, "link", std::future::pending(), |stream, peer| {
        let permit = match admission.permit(peer) {
            Ok(permit) => permit,
            // A connection that has said nothing yet makes room for the next one.
            Err(full) => {
                handshakes.make_room(full.host());
                return;
            }
        };
        let handshake = handshakes.begin(max_handshakes, Host::of(peer.ip()));
        if let Err(e) = net::configure_link(&stream) {
            tracing::warn!(%peer, "cannot set the options of the socket; the link goes on without them: {e}");
        }
        let (store, frontends, shutdown) = (store.clone(), frontends.clone(), shutdown.clone());
        let (sessions, admission) = (sessions.clone(), admission.clone());
        let served = workers.serve(stream, links, move |stream| async move {
            let let_in = tokio::select! {
                stream = admission.link(stream, within) => stream.map_err(|e| chain(&e)),
                () = handshake.cut() => Err(chain(&LinkFailure::ShakeCut)),
            };
            let stream = match let_in {
                Ok(stream) => stream,
                Err(why) => return admission.refused(&peer, &why),
            };
            let text = peer.to_string();
            let served = receiver::serve(
                stream, handshake, &text, store, frontends, sessions, shutdown,
            );
            match served.await {
                Ok(()) => {}
                Err(e) if e.is_refusal() => admission.refused(&peer, &chain(&e)),
                Err(e) => tracing::error!(%peer, "{}", chain(&e)),
            }
            drop(permit);
        });
        if let Err(e) = served {
            tracing::error!(%peer, "cannot serve a link: {e}");
        }
    })
    .await;
}

/// Page server rounds, until told to stop.
async fn serve_pages(
    listener: TcpListener,
    admission: Admission,
    store: Arc<Store>,
    shutdown: Shutdown,
    workers: Arc<Workers>,
    links: TaskTracker,
) {
    let port = listener.local_addr().map_or(0, |address| address.port());
    tracing::info!("page server on port {port}");
    let stopped = shutdown.requested.cancelled();
    net::accept(listener, "page server", stopped, |criu, peer| {
        let Ok(permit) = admission.permit(peer) else {
            return;
        };
        let (store, shutdown) = (store.clone(), shutdown.clone());
        let admission = admission.clone();
        let served = workers.serve(criu, &links, move |criu| async move {
            page_server::serve(criu, admission, (peer, port), store, shutdown).await;
            drop(permit);
        });
        if let Err(e) = served {
            tracing::error!(%peer, "page server: cannot serve a connection: {e}");
        }
    })
    .await;
}

/// After a stop request: lets links finish and sets be restored, for as long as the grace
/// period is. `false` if something had to be dropped.
async fn wind_down(
    store: &Arc<Store>,
    links: &TaskTracker,
    shutdown: &Shutdown,
    grace: std::time::Duration,
) -> bool {
    tracing::info!("stopping");
    links.close();
    let mut changes = store.session_changes.subscribe();
    let unfinished = || {
        let sessions = store.newest(&Scope::Any);
        sessions
            .into_iter()
            .filter(|s| s.is_connected() || s.is_only_copy())
            .collect::<Vec<_>>()
    };
    let finished = async {
        while !unfinished().is_empty() {
            let _ = changes.changed().await;
        }
        links.wait().await;
    };
    tokio::select! {
        () = finished => return true,
        () = tokio::time::sleep(grace) => tracing::error!("the grace period of {grace:?} ran out: what is left ends now"),
        () = shutdown.forced.cancelled() => tracing::error!("told to stop a second time: what is left ends now"),
    }
    let mut clean = true;
    for session in unfinished() {
        let kept = session.is_kept_through_restart();
        if kept && !session.is_connected() {
            continue; // for the next image-cache
        }
        clean = false;
        match session.is_only_copy() && !kept {
            true => {
                tracing::error!(session = %session.name, "dropped: no restore has read it, or no dump has claimed it")
            }
            false => tracing::error!(session = %session.name, "aborted"),
        }
    }
    shutdown.forced.cancel();
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), links.wait()).await;
    clean
}

/// Enforces `--set-ttl`.
async fn expire(store: Arc<Store>) {
    let mut changes = store.session_changes.subscribe();
    loop {
        changes.mark_unchanged();
        let Some(next) = store
            .sweep()
            .map(|n| n.max(std::time::Duration::from_millis(10)))
        else {
            match changes.changed().await {
                Ok(()) => continue,
                Err(_) => return,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(next) => {}
            _ = changes.changed() => {}
        }
    }
}
