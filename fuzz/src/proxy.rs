//! image-proxy in this process: its runs and its connections, without listening sockets, and an
//! image-cache behind it, at the other end of a real TCP connection.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use image_cache::store::set::Lookup;
use image_cache::store::Scope;
use image_common::criu_io::page_server::Connection;
use image_common::daemon::shutdown::Shutdown;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::FrameFormat;
use image_common::net::socket::Socket;
use image_proxy::cli::Parents;
use image_proxy::control;
use image_proxy::dumps::{Proxy, Settings};
use image_proxy::failure::Failure;
use image_proxy::frontend::{page_server, remote, stream};
use image_proxy::link::connect::Target;
use image_proxy::session::arrival_order::ArrivalOrder;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::cache::{pair, policy, Cache};
use crate::input::Input;
use crate::link::NAMES;
use crate::unix::Peers;
use crate::world;

pub struct Daemons {
    pub proxy: Arc<Proxy>,
    cache: Arc<Cache>,
    accepting: JoinHandle<()>,
    shutdown: Shutdown,
}

impl Daemons {
    pub async fn start(input: &mut Input<'_>) -> Self {
        let cache = Arc::new(Cache::new(policy(input)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("a port").port();
        let serving = cache.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                serving.serve_link(Socket::Tcp(socket), 1);
            }
        });
        let bits = input.u8();
        let settings = Settings {
            commit_on: image_proxy::cli::CommitOn::Auto,
            target: Target {
                host: "127.0.0.1".to_owned(),
                port,
                proxy: 7,
                connect_timeout: Duration::from_secs(10),
                connections: if bits & 1 != 0 { 3 } else { 1 },
                link_timeout: Duration::from_secs(if bits & 2 != 0 { 30 } else { 0 }),
                retransmit_buffer: 16 << 20,
                frame_format: FrameFormat::with_checksums(bits & 4 != 0),
                tls: None,
                resolver: Arc::new(image_common::net::dial::System),
                openings: Arc::default(),
            },
            session: (bits & 8 != 0).then(|| "web".parse().expect("a name")),
            // Not by the text of CRIU's executable: that is ours, and long.
            parents: if bits & 16 != 0 {
                Parents::Always
            } else {
                Parents::Never
            },
            commit_timeout: Duration::from_secs(60),
            reserve_timeout: Duration::from_secs(10),
        };
        let shutdown = Shutdown::default();
        Self {
            proxy: Proxy::new(settings, ArrivalOrder::new(), shutdown.clone()),
            cache,
            accepting,
            shutdown,
        }
    }

    /// A connection to `img-proxy.sock`.
    pub fn remote(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let theirs = Arc::new(theirs);
        let ticket = self.proxy.arrival_order.ticket(&theirs);
        tokio::spawn(remote::serve(theirs, self.proxy.clone(), ticket));
        ours
    }

    /// A connection to `streamer-capture.sock`.
    pub fn stream(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let snapshot = SnapshotId::new("/d1").expect("an id");
        tokio::spawn(stream::serve(theirs, self.proxy.clone(), snapshot));
        ours
    }

    /// A connection to its page server.
    pub fn pages(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let socket = Socket::Unix(theirs);
        let proxy = self.proxy.clone();
        let ends = (([10, 0, 0, 1], 5).into(), ([10, 0, 0, 2], 27).into());
        tokio::spawn(async move {
            if let Ok(Some(criu)) = Connection::accept(socket, Duration::from_secs(600)).await {
                page_server::receive(criu, ends, proxy).await;
            }
        });
        ours
    }

    /// A connection to `image-proxy-control.sock`.
    pub fn control(&self) -> UnixStream {
        let (ours, theirs) = pair();
        tokio::spawn(control::serve(theirs, self.proxy.clone()));
        ours
    }

    /// Whether the cache has, of what came over these sockets, nothing but whole images: what was put
    /// into a pipe until that was closed, or said on a socket until its end, or what such ones give
    /// one behind the other.
    pub fn check(&self, peers: &Peers) {
        if peers.unclear {
            return;
        }
        for session in self.cache.store.newest(&Scope::Any) {
            for set in session.sets() {
                for name in NAMES {
                    let name = ImageName::new(name).expect("a name");
                    let Lookup::Ready(image) = set.lookup(&name, None) else {
                        continue;
                    };
                    let whole = || peers.offers(&image.head(usize::MAX), 3);
                    assert!(
                        !image.is_complete() || whole(),
                        "{name} of {} was not offered like this",
                        set.snapshot
                    );
                }
            }
        }
    }

    /// When all peers are gone: image-proxy stops, and then image-cache has nothing that is under way.
    pub async fn end(self) {
        world::pass(Duration::from_secs(120)).await;
        let _ = self.proxy.status();
        self.shutdown.requested.cancel();
        self.proxy
            .abort_all(&Failure::stopped("image-proxy is stopping"));
        let proxy = self.proxy.clone();
        let stopping = tokio::spawn(async move {
            proxy.wind_down().await;
            proxy.farewells().await;
        });
        for _ in 0..100 {
            if stopping.is_finished() {
                break;
            }
            world::pass(Duration::from_secs(60)).await;
            // What was announced late.
            self.proxy
                .abort_all(&Failure::stopped("image-proxy is stopping"));
        }
        assert!(stopping.is_finished(), "image-proxy does not stop");
        self.accepting.abort();
        world::ended().await;
        let cache = Arc::into_inner(self.cache).expect("nobody serves it any more");
        cache.end().await;
    }
}
