//! The daemon as a whole: listen, say ready, serve until told to stop.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use image_common::admission::{Admission, Rules};
use image_common::control::PROXY_CONTROL_SOCKET;
use image_common::criu::stream::CAPTURE_SOCKET;
use image_common::criu_io::socket_dir::SocketDir;
use image_common::criu_io::sockets::BoundSocket;
use image_common::daemon::shutdown::{Shutdown, EXIT_SESSIONS_ABORTED};
use image_common::daemon::Starting;
use image_common::image::SnapshotId;
use image_common::link::codec::FrameFormat;
use image_common::net;
use image_common::net::dial;
use image_common::net::tls;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::cli::Cli;
use crate::control;
use crate::dumps::{Proxy, Settings};
use crate::failure::Failure;
use crate::frontend::accept::accept;
use crate::frontend::{page_server, remote, stream};
use crate::link::connect::Target;
use crate::session::arrival_order::ArrivalOrder;

/// After the grace period: how long failing runs may take to close towards CRIU and the cache.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs the daemon; gives its exit code.
pub async fn run(cli: Cli, starting: Starting) -> anyhow::Result<u8> {
    let shutdown = Shutdown::on_signals(cli.tls.tls).context("cannot watch for signals")?;
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
        .context("cannot get random bytes")?;
    // Required on the command line, but for the commands that do not come here.
    let (address, port) = (
        cli.address.clone().unwrap_or_default(),
        cli.port.unwrap_or_default(),
    );
    let settings = Settings {
        target: Target {
            host: address.clone(),
            port,
            proxy: u64::from_ne_bytes(random),
            connect_timeout: cli.connect_timeout,
            connections: cli.connections,
            link_timeout: cli.link_timeout,
            retransmit_buffer: usize::try_from(cli.retransmit_buffer).unwrap_or(usize::MAX),
            frame_format: FrameFormat::with_checksums(cli.checksum),
            tls: match cli.tls.tls {
                true => Some(tls::Client::start(&cli.tls, !cli.tls_no_cn_verify)?),
                false => None,
            },
            resolver: Arc::new(dial::System),
            openings: Arc::default(),
        },
        session: cli.session.clone(),
        parents: cli.parents,
        commit_on: cli.commit_on,
        commit_timeout: cli.commit_timeout,
        reserve_timeout: cli.reserve_timeout,
    };
    let proxy = Proxy::new(settings, ArrivalOrder::new(), shutdown.clone());
    let dirs = starting.dirs.clone();
    starting.keep_dirs();
    let remote_sockets = RemoteSockets(remote::Sockets::open(dirs.clone(), proxy.clone())?);
    let stop = CancellationToken::new();
    let mut sockets = Vec::new();
    for dir in &dirs {
        let (socket, listener) = BoundSocket::bind(dir, CAPTURE_SOCKET)?;
        sockets.push(socket);
        let (p, snapshot) = (proxy.clone(), snapshot_of(dir));
        tokio::spawn(accept(Arc::new(listener), stop.clone(), move |c| {
            stream::serve(c, p.clone(), snapshot.clone())
        }));
        let (socket, listener) = BoundSocket::bind(dir, PROXY_CONTROL_SOCKET)?;
        sockets.push(socket);
        let p = proxy.clone();
        tokio::spawn(accept(Arc::new(listener), stop.clone(), move |c| {
            control::serve(c, p.clone())
        }));
    }
    if let Some(address) = &cli.page_server {
        let listener = net::listen(Some(&address.host), address.port)
            .await
            .with_context(|| format!("cannot listen on {}:{}", address.host, address.port))?;
        let rules = Rules {
            tls: &cli.tls,
            allowed: &[],
            insecure: cli.insecure_listen,
            max_connections: cli.ports.max_connections,
            allowed_uids: &starting.allowed_uids,
        };
        let admission = Admission::new(&listener, "page server", &rules)?;
        let idle = cli.ports.idle_timeout;
        let (stop, proxy) = (stop.clone(), proxy.clone());
        tokio::spawn(serve_pages(listener, admission, idle, stop, proxy));
    }
    tracing::info!(cache = format!("{address}:{port}"), "ready");
    let pidfile = starting.ready()?;

    shutdown.requested.cancelled().await;
    tracing::info!("stopping");
    let clean = wind_down(&proxy, &shutdown, cli.daemon.grace_period).await;
    let _ = tokio::time::timeout(LAST_WORDS, proxy.farewells()).await;
    drop((remote_sockets, sockets, pidfile));
    Ok(if clean { 0 } else { EXIT_SESSIONS_ABORTED })
}

async fn serve_pages(
    listener: TcpListener,
    admission: Admission,
    idle: Duration,
    stop: CancellationToken,
    proxy: Arc<Proxy>,
) {
    if let Ok(address) = listener.local_addr() {
        tracing::info!("page server on {address}");
    }
    net::accept(listener, "page server", stop.cancelled(), |criu, peer| {
        let Ok(permit) = admission.permit(peer) else {
            return;
        };
        let (admission, proxy) = (admission.clone(), proxy.clone());
        tokio::spawn(async move {
            page_server::serve(criu, admission, idle, proxy).await;
            drop(permit);
        });
    })
    .await;
}

/// Removes the socket files on every way out of [`run`]: the sockets and the proxy know each
/// other, so neither is dropped.
struct RemoteSockets(Arc<remote::Sockets>);

impl Drop for RemoteSockets {
    fn drop(&mut self) {
        self.0.close();
    }
}

async fn wind_down(proxy: &Arc<Proxy>, shutdown: &Shutdown, grace: Duration) -> bool {
    tokio::select! {
        clean = proxy.wind_down() => return clean,
        () = tokio::time::sleep(grace) => tracing::error!("the grace period of {grace:?} ran out: dumps under way fail, their processes go on"),
        () = shutdown.forced.cancelled() => tracing::error!("told to stop a second time: dumps under way fail, their processes go on"),
    }
    proxy.abort_all(&Failure::stopped("image-proxy is stopping"));
    let _ = tokio::time::timeout(LAST_WORDS, proxy.wind_down()).await;
    proxy.leave_decisions();
    false
}

/// A streamed set has no id of its own; the directory in which CRIU found the socket is what
/// its -D names.
fn snapshot_of(dir: &SocketDir) -> SnapshotId {
    let path = dir.path().to_string_lossy();
    let unnamed = || SnapshotId::new("stream").ok();
    // Both texts are valid ids; a path with control characters is not, and gets the other.
    SnapshotId::new(&path)
        .ok()
        .or_else(unnamed)
        .unwrap_or_else(|| unreachable!("`stream` is an id"))
}
