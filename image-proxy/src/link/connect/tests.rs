use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use image_common::link::codec::FrameFormat;
use image_common::link::codec::{Message, SetNumber};
use image_common::link::reader::receive_hello;
use image_common::net::dial::Resolving;
use rustix::net::{accept, bind, connect, getsockname, listen, socket, AddressFamily, SocketType};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::link::testing::{welcome, KEY};
use crate::link::Link;

const SOON: Duration = Duration::from_secs(60);

/// A name whose addresses a test chooses.
#[derive(Debug, Default)]
struct Names(Mutex<Vec<SocketAddr>>);

impl Names {
    fn set(&self, addresses: &[SocketAddr]) {
        *self.0.lock().unwrap() = addresses.to_vec();
    }
}

impl Resolve for Names {
    fn resolve(&self, _: &str, _: u16) -> Resolving {
        let addresses = self.0.lock().unwrap().clone();
        Box::pin(async { Ok(addresses) })
    }
}

fn target(names: &Arc<Names>, connections: u16) -> Target {
    Target {
        host: "cache.example".to_owned(),
        port: 7000,
        proxy: 1,
        connect_timeout: Duration::from_secs(20),
        connections,
        link_timeout: SOON,
        retransmit_buffer: 0,
        frame_format: FrameFormat::Plain,
        tls: None,
        resolver: names.clone(),
        openings: Arc::default(),
    }
}

/// A port whose queue is full, so that the kernel drops each SYN that comes.
struct Full {
    address: SocketAddr,
    listener: OwnedFd,
    _filler: OwnedFd,
}

fn swallows(host: u8) -> Full {
    let tcp = || socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    let (listener, filler) = (tcp(), tcp());
    let any = SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0));
    bind(&listener, &any).unwrap();
    listen(&listener, 0).unwrap();
    let address = getsockname(&listener).unwrap().try_into().unwrap();
    connect(&filler, &address).unwrap();
    Full {
        address,
        listener,
        _filler: filler,
    }
}

impl Full {
    /// From now on it takes connections.
    fn opens(self) -> TcpListener {
        drop(accept(&self.listener).unwrap());
        listen(&self.listener, 16).unwrap();
        let listener = std::net::TcpListener::from(self.listener);
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }
}

async fn takes(host: u8) -> (SocketAddr, TcpListener) {
    let any = (Ipv4Addr::new(127, 0, 0, host), 0);
    let listener = TcpListener::bind(any).await.unwrap();
    (listener.local_addr().unwrap(), listener)
}

/// Takes a connection as a cache does.
async fn welcomed(listener: &TcpListener) -> (TcpStream, Place) {
    let (mut cache, _) = listener.accept().await.unwrap();
    let hello = welcome(&mut cache, None).await;
    (cache, hello.place)
}

async fn soon<T>(future: impl std::future::Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("in time")
}

/// Each of the connections finds the address that is alive.
#[tokio::test]
async fn an_address_that_swallows_packets_does_not_stop_a_session() {
    let full = swallows(2);
    let (alive, listener) = takes(3).await;
    let names = Arc::new(Names::default());
    names.set(&[full.address, alive]);
    let session = "web".parse().unwrap();
    let target = target(&names, 3);
    let cache = async {
        let mut places = Vec::new();
        for _ in 0..3 {
            places.push(welcomed(&listener).await);
        }
        places
    };
    let (connected, places) =
        soon(async { tokio::join!(connect_all(&target, &session), cache) }).await;
    assert_eq!(connected.unwrap().sockets.len(), 3);
    let of = |place| places.iter().any(|(_, seen)| *seen == place);
    assert!(of(Place::First { opening: 1 }));
    for connection in [1, 2] {
        assert!(of(Place::Joins {
            connection,
            key: KEY
        }));
    }
}

/// Its kernel takes the connection, and nothing follows: the next address has its time, too.
#[tokio::test]
async fn an_address_that_takes_and_says_nothing_has_its_share_of_the_time() {
    let (mute, silent) = takes(2).await;
    let (alive, listener) = takes(3).await;
    let names = Arc::new(Names::default());
    names.set(&[mute, alive]);
    let session = "web".parse().unwrap();
    let target = Target {
        connect_timeout: Duration::from_secs(8),
        ..target(&names, 1)
    };
    let (connected, (_cache, place)) =
        soon(async { tokio::join!(connect_all(&target, &session), welcomed(&listener)) }).await;
    connected.unwrap();
    // The HELLO that is still on its way to the other address is the older one.
    assert_eq!(place, Place::First { opening: 2 });
    let (mut mute, _) = soon(silent.accept()).await.unwrap();
    let hello = soon(receive_hello(&mut mute)).await.unwrap();
    assert_eq!(hello.place, Place::First { opening: 1 });
}

/// No address answers: the time is one for all of them, and the error names them.
#[tokio::test]
async fn the_time_to_connect_is_one_for_all_addresses() {
    let (one, other) = (swallows(2), swallows(3));
    let names = Arc::new(Names::default());
    names.set(&[one.address, other.address]);
    let target = Target {
        connect_timeout: Duration::from_secs(1),
        ..target(&names, 2)
    };
    let session = "web".parse().unwrap();
    let Err(e) = soon(connect_all(&target, &session)).await else {
        panic!("no cache is there")
    };
    let text = chain(&e);
    assert!(text.contains("does not answer within 1s"), "{text}");
    for full in [&one, &other] {
        assert!(text.contains(&full.address.to_string()), "{text}");
    }
}

/// A link to the one address that its name has, and what holds that open: the listener, and the cache's end.
async fn connected() -> (Arc<Names>, Arc<Link>, (TcpListener, TcpStream)) {
    let (first, listener) = takes(2).await;
    let names = Arc::new(Names::default());
    names.set(&[first]);
    let (target, session) = (target(&names, 1), "web".parse().unwrap());
    let (link, (cache, _)) =
        soon(async { tokio::join!(Link::connect(&target, &session), welcomed(&listener)) }).await;
    (names, link.unwrap(), (listener, cache))
}

/// The address of the session is gone. One of those that its name has now swallows packets, the other
/// one has the session; each HELLO that would resume it has a number of its own.
#[tokio::test]
async fn a_connection_is_resumed_over_another_address() {
    let (names, link, first) = connected().await;
    let full = swallows(3);
    let (alive, elsewhere) = takes(4).await;
    names.set(&[full.address, alive]);
    drop(first);
    for attempt in [1, 2] {
        let (mut cache, place) = soon(welcomed(&elsewhere)).await;
        let resumes = Place::Resumes {
            connection: 0,
            key: KEY,
            received: 0,
            attempt,
        };
        assert_eq!(place, resumes);
        // It is the link's now: what is said arrives.
        link.send(&Message::SetClose { set: SetNumber(1) }).await;
        soon(cache.read_u8()).await.unwrap();
        assert!(!link.is_down());
    }
}

/// Of a name with two hosts the other one is reached while that of the session is silent: what it
/// says of the session ends nothing.
#[tokio::test]
async fn another_host_cannot_refuse_what_it_does_not_know() {
    let (names, link, first) = connected().await;
    let full = swallows(3);
    // As if it had been there.
    let (stranger, other) = takes(4).await;
    names.set(&[full.address, stranger]);
    drop(first);
    for _ in 0..2 {
        let (mut cache, _) = soon(other.accept()).await.unwrap();
        receive_hello(&mut cache).await.unwrap();
        let refusal = Answer::Refused {
            why: Refusal::NoSession,
            reason: "no such session".to_owned(),
        };
        cache.write_all(&refusal.encode()).await.unwrap();
    }
    assert!(!link.is_down());
    let (_cache, place) = soon(welcomed(&full.opens())).await;
    assert!(
        matches!(place, Place::Resumes { attempt: 3.., .. }),
        "{place:?}"
    );
}
