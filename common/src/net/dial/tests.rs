use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::*;

const SOON: Duration = Duration::from_secs(30);

/// Answers in turn; the last one again and again. `None`: never.
#[derive(Debug)]
struct Names(Mutex<VecDeque<Option<Vec<SocketAddr>>>>);

impl Names {
    fn of(answers: impl IntoIterator<Item = Option<Vec<SocketAddr>>>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(answers.into_iter().collect())))
    }
}

impl Resolve for Names {
    fn resolve(&self, _: &str, _: u16) -> Resolving {
        let mut answers = self.0.lock().unwrap();
        let answer = match answers.len() {
            1 => answers[0].clone(),
            _ => answers.pop_front().unwrap(),
        };
        Box::pin(async {
            match answer {
                Some(addresses) if addresses.is_empty() => Err(io::ErrorKind::NotFound.into()),
                Some(addresses) => Ok(addresses),
                None => std::future::pending().await,
            }
        })
    }
}

/// A port of 127.0.0.`host` whose queue is full: the kernel drops each SYN that comes. It is so as long as these live.
fn swallows(host: u8) -> (SocketAddr, [Socket; 2]) {
    let tcp = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    let (listener, filler, probe) = (tcp(), tcp(), tcp());
    let any = SocketAddr::from((Ipv4Addr::new(127, 0, 0, host), 0));
    listener.bind(&any.into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    filler.connect(&address).unwrap();
    probe.set_nonblocking(true).unwrap();
    probe.connect(&address).unwrap_err();
    assert!(probe.peer_addr().is_err(), "it is not connected");
    (address.as_socket().unwrap(), [listener, filler])
}

/// A port at which nothing listens.
async fn refuses() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    listener.local_addr().unwrap()
}

async fn takes() -> (SocketAddr, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 0, 3), 0))
        .await
        .unwrap();
    (listener.local_addr().unwrap(), listener)
}

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("in time")
}

#[tokio::test]
async fn an_address_that_swallows_packets_is_passed_over() {
    let (silent, _full) = swallows(2);
    let (alive, listener) = takes().await;
    let ((_stream, address), accepted) = soon(async {
        tokio::join!(
            async { first_of(&[silent, alive]).await.unwrap() },
            listener.accept()
        )
    })
    .await;
    assert_eq!(address, alive);
    accepted.unwrap();
}

/// One that fails makes room for the next at once: without waiting for a clock.
#[tokio::test(start_paused = true)]
async fn an_address_that_refuses_costs_no_time() {
    let (alive, _listener) = takes().await;
    let began = Instant::now();
    let (_stream, address) = first_of(&[refuses().await, alive]).await.unwrap();
    assert_eq!(address, alive);
    assert!(began.elapsed() < NEXT_ADDRESS, "{:?}", began.elapsed());
}

#[tokio::test]
async fn if_all_fail_each_says_why() {
    let (one, other) = (refuses().await, refuses().await);
    let e = first_of(&[one, other]).await.unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
    let text = e.to_string();
    assert!(
        text.contains(&one.to_string()) && text.contains(&other.to_string()),
        "{text}"
    );
    let alone = first_of(&[one]).await.unwrap_err();
    assert!(
        alone.raw_os_error().is_some(),
        "as the kernel has it: {alone}"
    );
    assert!(first_of(&[]).await.is_err());
}

fn v4(host: u8) -> SocketAddr {
    (Ipv4Addr::new(10, 0, 0, host), 7).into()
}

fn v6(host: u16) -> SocketAddr {
    (Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, host), 7).into()
}

#[test]
fn families_take_turns() {
    assert_eq!(families_in_turn(&[]), []);
    let mixed = [v6(1), v6(2), v6(2), v6(3), v4(1), v4(2)];
    assert_eq!(
        families_in_turn(&mixed),
        [v6(1), v4(1), v6(2), v4(2), v6(3)]
    );
    assert_eq!(
        families_in_turn(&[v4(1), v4(2), v6(1)]),
        [v4(1), v6(1), v4(2)]
    );
}

/// What was of use comes first, what was of none last, whatever the resolver says.
#[tokio::test]
async fn addresses_are_in_the_order_of_their_use() {
    let names = Names::of([Some(vec![v4(1), v4(2), v4(3)])]);
    let dial = Dial::new("host", 7, names);
    let tried = |address| Tried {
        dial: &dial,
        address,
        good: false,
    };
    assert_eq!(dial.addresses().await.unwrap(), [v4(1), v4(2), v4(3)]);
    drop(tried(v4(1)));
    assert_eq!(dial.addresses().await.unwrap(), [v4(2), v4(3), v4(1)]);
    tried(v4(3)).was_good();
    assert_eq!(dial.addresses().await.unwrap(), [v4(3), v4(2), v4(1)]);
    drop(tried(v4(3)));
    assert_eq!(dial.addresses().await.unwrap(), [v4(2), v4(1), v4(3)]);
    tried(v4(1)).was_good();
    assert_eq!(dial.addresses().await.unwrap(), [v4(1), v4(2), v4(3)]);
}

/// A resolver that fails or is silent stops no connection to an address that is known; the first time there is none.
#[tokio::test(start_paused = true)]
async fn what_was_known_is_tried_when_the_resolver_is_silent() {
    let names = Names::of([Some(vec![]), Some(vec![v4(1)]), Some(vec![]), None]);
    let dial = Dial::new("host", 7, names);
    assert!(dial.addresses().await.is_err());
    assert_eq!(dial.addresses().await.unwrap(), [v4(1)]);
    assert_eq!(dial.addresses().await.unwrap(), [v4(1)], "it fails");
    for _ in 0..3 {
        assert_eq!(dial.addresses().await.unwrap(), [v4(1)], "it is silent");
    }
}

#[tokio::test]
async fn literals_and_names() {
    for host in ["127.0.0.1", "localhost", "[::1]"] {
        let dial = Dial::new(host, 7, Arc::new(System));
        let addresses = dial.addresses().await.unwrap();
        assert!(
            addresses
                .iter()
                .all(|a| a.ip().is_loopback() && a.port() == 7),
            "{addresses:?}"
        );
    }
}
