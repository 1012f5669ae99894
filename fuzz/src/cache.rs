//! image-cache in this process: its store and its connections, without listening sockets.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use image_cache::cli::RemoteDialect;
use image_cache::frontend::{remote, stream, Frontends};
use image_cache::limits::{Handshakes, Limits};
use image_cache::receiver::{self, Links};
use image_cache::store::session::PageSource;
use image_cache::store::set::restorable::Allowed;
use image_cache::store::{Policy, Scope, Store};
use image_cache::{control, page_server};
use image_common::admission::quota::Host;
use image_common::criu::dialect::Dialect;
use image_common::daemon::shutdown::Shutdown;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::{FrameFormat, Message, SetNumber, StreamNumber};
use image_common::link::handshake::Hello;
use image_common::net::socket::Socket;

use crate::client::Client;
use crate::input::Input;
use crate::link::{data_frame, encode, hello, DUMP, PRE_DUMP};
use crate::world;

pub const MEMORY_LIMIT: u64 = 8 << 20;

pub struct Cache {
    pub store: Arc<Store>,
    frontends: Arc<Frontends>,
    links: Arc<Links>,
    shutdown: Shutdown,
    handshakes: Arc<Handshakes>,
}

/// A policy by one byte, so that each option is met.
pub fn policy(input: &mut Input<'_>) -> Policy {
    let bits = input.u8();
    let bit = |n: u8| bits & 1 << n != 0;
    Policy {
        keep: bit(0) && !bit(1),
        release_on_read: bit(1),
        squash: bit(2),
        set_ttl: None,
        limits: Limits {
            max_session_memory: bit(3).then_some(MEMORY_LIMIT / 8),
            max_images: if bit(4) {
                5
            } else {
                Limits::DEFAULT.max_images
            },
            max_open_images: if bit(5) { 3 } else { 1000 },
            max_sessions: if bit(6) { 2 } else { 256 },
            ..Limits::DEFAULT
        },
        allowed: Allowed { nftables: bit(7) },
    }
}

impl Cache {
    pub fn new(policy: Policy) -> Self {
        let shutdown = Shutdown::default();
        Self {
            store: Store::new(MEMORY_LIMIT, policy),
            frontends: Frontends::new(
                Vec::new(),
                RemoteDialect::Auto,
                shutdown.clone(),
                |c, store, frontends| Box::pin(control::serve(c, store, frontends)),
            ),
            links: Arc::new(Links::new(Duration::from_secs(30), Duration::from_secs(20))),
            shutdown,
            handshakes: Arc::default(),
        }
    }

    /// A connection to the link's port, from 10.0.0.`host`.
    pub fn link(&self, host: u8) -> UnixStream {
        let (ours, theirs) = pair();
        self.serve_link(Socket::Unix(theirs), host);
        ours
    }

    pub fn serve_link(&self, socket: Socket, host: u8) {
        let handshake = self.handshakes.begin(64, Host::of([10, 0, 0, host].into()));
        let (store, frontends) = (self.store.clone(), self.frontends.clone());
        let (links, shutdown) = (self.links.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            let peer = format!("10.0.0.{host}:5");
            let served =
                receiver::serve(socket, handshake, &peer, store, frontends, links, shutdown);
            if let Err(e) = served.await {
                tracing::error!("{}", image_common::error_chain::chain(&e));
            }
        });
    }

    /// A connection to its page server, from 10.0.0.`host`.
    pub fn pages(&self, host: u8) -> UnixStream {
        let (ours, theirs) = pair();
        let source = PageSource {
            host: IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)),
            port: 27,
        };
        let peer = SocketAddr::new(source.host, 5);
        let (store, shutdown) = (self.store.clone(), self.shutdown.clone());
        tokio::spawn(async move {
            let let_in = async { Ok(theirs) };
            let served = page_server::receive(let_in, source, &peer, &store, &shutdown).await;
            if let Err(e) = served {
                tracing::error!("{}", image_common::error_chain::chain(&e));
            }
        });
        ours
    }

    /// A connection to `img-cache.sock`.
    pub fn restore_remote(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let service = self.frontends.service(&self.store, Scope::Any);
        tokio::spawn(remote::serve(theirs, service));
        ours
    }

    /// A connection to `streamer-serve.sock`.
    pub fn restore_stream(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let service = self.frontends.service(&self.store, Scope::Any);
        tokio::spawn(stream::serve(theirs, service));
        ours
    }

    /// A connection to `image-cache-control.sock`.
    pub fn control(&self) -> UnixStream {
        let (ours, theirs) = pair();
        let (store, frontends) = (self.store.clone(), self.frontends.clone());
        tokio::spawn(control::serve(theirs, store, frontends));
        ours
    }

    /// When all peers are gone: every connection has ended, no session thinks that its link is there,
    /// and when the sessions go all memory does.
    pub async fn end(self) {
        let used = self.store.budget.used();
        assert!(
            used <= MEMORY_LIMIT + MEMORY_LIMIT / 8,
            "{used} bytes are charged, the limit is {MEMORY_LIMIT}"
        );
        // The CRIU of each restore is this process, which goes on.
        world::ended_but(|| self.frontends.watched()).await;
        for session in self.store.newest(&Scope::Any) {
            let _ = session.status();
            assert!(!session.is_connected(), "session {}", session.name);
            self.store.remove(&session);
        }
        self.frontends.reconcile(&self.store);
        let store = self.store.clone();
        drop(self);
        world::ended().await;
        let left = store.budget.used();
        assert_eq!(left, 0, "bytes are charged and nothing is there");
    }
}

/// In what nobody may be given: images that are not whole, inventories before their commit, and all of
/// a set in doubt. (Other images of a set that waits are of no use without its inventory.)
pub const UNSERVED: &[u8] = b"NOT TO BE SERVED";

/// Sets that a restore meets, one session each; their links, where they last.
pub async fn filled(input: &mut Input<'_>) -> (Cache, Vec<Client>) {
    let cache = Cache::new(policy(input));
    let mut links = Vec::new();
    for number in 0..input.below(4) {
        let kind = input.below(8);
        let client = fill(&cache, kind, number).await;
        if kind % 8 < 3 {
            links.push(client);
        }
    }
    // What is in doubt without its link is so by now.
    world::turn().await;
    (cache, links)
}

/// A session with a set of a kind: 0 and 1 are half of one, 2 waits for its COMMIT, 3 is in doubt,
/// the others can be restored.
async fn fill(cache: &Cache, kind: usize, number: usize) -> Client {
    let mut client = Client::new(cache.link(1));
    let session = ["web", "web-2", "web-3"][number % 3];
    let hello = Hello {
        session: session.parse().expect("a name"),
        patience: Duration::ZERO,
        ..hello(FrameFormat::Plain)
    };
    client.say(&hello.encode()).await;
    let (set, serve) = (SetNumber(1), kind > 3);
    let dialect = match kind {
        1 | 5 => Dialect::RemotePipe,
        6 => Dialect::RemoteSocket,
        7 => Dialect::RemoteUnknown,
        _ => Dialect::Stream,
    };
    let (gated, pre_dump) = (kind != 6 && kind != 5, kind == 7);
    let snapshot = SnapshotId::new("/d1").expect("an id");
    let mut out = encode(
        &Message::SetOpen {
            set,
            gated,
            dialect,
            parent: None,
            snapshot,
        },
        FrameFormat::Plain,
    );
    let seal = if pre_dump { PRE_DUMP } else { DUMP };
    let mark = |held: bool| if held { UNSERVED } else { b"may be served" };
    // More than a pipe or the shared segment takes.
    let large = vec![7; 70_000];
    let images = [
        ("pages-1.img", large),
        ("core-7.img", mark(kind < 2 || kind == 3).to_vec()),
        ("pstree.img", mark(kind == 3).to_vec()),
        ("inventory.img", [seal, mark(!serve)].concat()),
    ];
    let mut total = 0;
    for (stream, (name, content)) in (1..).zip(&images) {
        let path = ImageName::new(name).expect("a name");
        out.extend_from_slice(&encode(
            &Message::ImageOpen {
                stream: StreamNumber(stream),
                set,
                path,
                mode: 1,
                size: None,
            },
            FrameFormat::Plain,
        ));
        out.extend_from_slice(&data_frame(stream, 0, content, FrameFormat::Plain));
        total += content.len() as u64;
        // Of these one image is not whole.
        if kind < 2 && stream == 2 {
            continue;
        }
        let end = Message::ImageEnd {
            stream: StreamNumber(stream),
            total: content.len() as u64,
            digest: 0,
        };
        out.extend_from_slice(&encode(&end, FrameFormat::Plain));
    }
    let (images, bytes) = (4, total);
    let mut steps = vec![Message::SetComplete { set, images, bytes }];
    match (gated, pre_dump) {
        (_, true) => {}
        (true, _) => steps.push(Message::Prepare {
            set,
            images,
            bytes,
            digest: 0,
        }),
        (false, _) => steps.push(Message::SetClose { set }),
    }
    if gated && !pre_dump && serve {
        steps.push(Message::Commit { set });
    }
    if kind >= 2 {
        steps
            .iter()
            .for_each(|step| out.extend_from_slice(&encode(step, FrameFormat::Plain)));
    }
    client.say(&out).await;
    world::pass(Duration::from_millis(10)).await;
    client.hear();
    client
}

/// Our end, which does not block, and the daemon's.
pub fn pair() -> (UnixStream, tokio::net::UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).expect("a socket");
    }
    let theirs = tokio::net::UnixStream::from_std(theirs).expect("a socket");
    (ours, theirs)
}
