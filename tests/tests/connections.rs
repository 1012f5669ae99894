//! `image-proxy --connections`: one transfer over several TCP connections. Whatever happens to any of them, either the
//! dump says OK and the restore gets exactly its bytes, or it fails and nobody gets them.

use std::io::{Read, Write};
use std::net::TcpStream;

use e2e_tests::daemons::{until, Options, Pair, SOON};
use e2e_tests::fake::scenario::{dump_or_retry, Outcome};
use e2e_tests::fake::{Content, Dialect, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::link::{Direction, Fault, Faults};

const PAGES: u64 = 24 << 20;

/// Large enough that every connection has some of it.
fn large(seed: u64) -> ImageSet {
    ImageSet::with_pages(seed, PAGES)
}

fn over(connections: &str) -> Options {
    Options::default().proxy(&["--connections", connections])
}

#[test]
fn images_come_out_as_they_went_in() {
    for connections in ["2", "4", "16"] {
        for protocol in Protocol::all() {
            eprintln!("{connections} {protocol:?}");
            let pair = over(connections).link(Faults::default()).start();
            for set in [large(1), ImageSet::sample(2), large(3)] {
                let job = DumpJob::new(&protocol, &pair.source, 1).gated();
                job.run_with(&set, &mut |_| {}).expect("the dump");
                protocol.restore(&pair.target, &set).expect("the restore");
            }
            let expected = 3 * connections.parse::<usize>().expect("a number");
            assert_eq!(pair.link().connections(), expected, "three sessions");
        }
    }
}

/// Segments and delays differ between the connections, so frames arrive in any order.
#[test]
fn shreds_and_delays_change_nothing() {
    for seed in 1..=4 {
        for protocol in [
            Protocol::Stream,
            Protocol::remote(Dialect::Socket, Spelling::Words),
        ] {
            eprintln!("seed {seed} {protocol:?}");
            let pair = over("3").link(Faults::shredded(seed)).start();
            let set = ImageSet::with_pages(seed, 600_000);
            let job = DumpJob::new(&protocol, &pair.source, seed).gated();
            job.run_with(&set, &mut |_| {}).expect("the dump");
            protocol.restore(&pair.target, &set).expect("the restore");
        }
    }
}

/// One connection of four is cut: in its handshake, early, and in mid image.
#[test]
fn one_cut_connection_fails_the_dump_and_nothing_else() {
    let protocols = [
        Protocol::Stream,
        Protocol::remote(Dialect::Pipe, Spelling::Empty),
        Protocol::remote(Dialect::Socket, Spelling::Words),
    ];
    let kinds = [Fault::Close, Fault::Reset, Fault::Truncate];
    let (mut cuts, mut refused) = (0, 0);
    for number in 1..=4 {
        for (n, byte) in [(0, 10), (1, 70_000), (2, 1_500_000)] {
            let protocol = &protocols[(number + n) % protocols.len()];
            let fault = kinds[(number + 2 * n) % kinds.len()];
            eprintln!("{protocol:?}: {fault:?} at byte {byte} of connection {number}");
            let faults = Faults::at(Direction::Up, byte, fault).only(number);
            let pair = over("4").link(faults).start();
            let outcome = dump_or_retry(&pair, protocol, large, &mut |_| {});
            let failed = matches!(outcome, Outcome::Refused(_));
            assert_eq!(pair.link().struck(), failed, "{outcome:?}");
            cuts += 1;
            refused += usize::from(failed);
        }
    }
    // Which connection gets how much is not decided beforehand; nearly all get enough.
    assert!(refused * 4 >= cuts * 3, "{refused} of {cuts} were cut");
}

/// Nothing moves on one connection any more, and nothing is closed.
#[test]
fn a_stalled_connection_is_waited_for() {
    let (mut number, mut tries) = (1, 0);
    while number <= 3 {
        let faults = Faults::at(Direction::Up, 50_000, Fault::Stall).only(number);
        let pair = over("3").link(faults).start();
        let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
        let dump = {
            let job = job.clone();
            std::thread::spawn(move || job.run_with(&large(1), &mut |_| {}))
        };
        until(
            "the link stalls, or the dump is done without that connection",
            || pair.link().is_stalled() || dump.is_finished(),
        );
        if !pair.link().is_stalled() {
            // Which connection gets how much is not decided beforehand: the others were quicker.
            dump.join().expect("no panic").expect("the dump");
            tries += 1;
            assert!(tries < 30, "connection {number} hardly gets anything");
            continue;
        }
        // The others go on: all of the image that does not fit into the stalled one's buffers.
        until("the rest has passed by", || {
            pair.link().carried(Direction::Up) > PAGES / 3
        });
        assert!(!dump.is_finished(), "a part of the image is missing");
        pair.link().release();
        dump.join().expect("no panic").expect("the dump");
        Protocol::Stream
            .restore(&pair.target, &large(1))
            .expect("the restore");
        number += 1;
    }
}

#[test]
fn a_connection_that_stays_stalled_fails_the_commit() {
    let faults = Faults::at(Direction::Up, 50_000, Fault::Stall).only(2);
    for _ in 0..30 {
        let options = over("3").proxy(&["--commit-timeout", "2"]);
        let pair = options.link(faults).start();
        let outcome = dump_or_retry(&pair, &Protocol::Stream, large, &mut |_| {});
        let failed = matches!(outcome, Outcome::Refused(_));
        assert_eq!(pair.link().struck(), failed, "{outcome:?}");
        if failed {
            return;
        }
    }
    panic!("connection 2 hardly gets anything");
}

/// The cache gives the set up while parts of it are on their way on all connections.
#[test]
fn a_full_cache_costs_its_dump_alone() {
    let pair = over("4")
        .cache(&["--memory-limit", "8M"])
        .link(Faults::default())
        .start();
    let protocol = Protocol::remote(Dialect::Pipe, Spelling::Empty);
    let job = DumpJob::new(&protocol, &pair.source, 1).gated();
    let error = job.run_with(&large(1), &mut |_| {}).err();
    assert!(error.is_some(), "24 MiB do not fit");
    let small = ImageSet::with_pages(2, 4 << 20);
    job.run_with(&small, &mut |_| {}).expect("4 MiB do");
    protocol.restore(&pair.target, &small).expect("the restore");
}

// --- by hand ---------------------------------------------------------------------------------

const PROXY: u64 = 77;

struct Hand(TcpStream);

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend(u16::try_from(text.len()).expect("short").to_le_bytes());
    out.extend(text.as_bytes());
}

impl Hand {
    /// Says HELLO; gives the answer's code and body.
    fn hello(
        pair: &Pair,
        proxy: u64,
        key: u64,
        place: (u16, u16),
        session: &str,
    ) -> (Self, u16, Vec<u8>) {
        let mut stream = TcpStream::connect(("127.0.0.1", pair.port)).expect("the cache listens");
        stream.set_read_timeout(Some(SOON)).expect("a socket");
        let mut body = Vec::new();
        body.extend(proxy.to_le_bytes());
        body.extend(key.to_le_bytes());
        body.extend(place.0.to_le_bytes());
        body.extend(place.1.to_le_bytes());
        text(&mut body, session);
        text(&mut body, "by hand");
        let mut hello = b"CRIULINK\x02\0\x02\0".to_vec();
        hello.extend(u32::try_from(body.len()).expect("short").to_le_bytes());
        hello.extend(body);
        stream.write_all(&hello).expect("sent");
        let mut head = [0; 16];
        stream.read_exact(&mut head).expect("an answer");
        let length = u32::from_le_bytes(head[12..].try_into().expect("four"));
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body).expect("its body");
        let code = u16::from_le_bytes(head[10..12].try_into().expect("two"));
        (Hand(stream), code, body)
    }

    /// A session over so many connections, and its key.
    fn session(pair: &Pair, connections: u16) -> (Self, u64) {
        let (hand, code, body) = Hand::hello(pair, PROXY, 0, (0, connections), "hand");
        assert_eq!(code, 0, "welcome");
        (
            hand,
            u64::from_le_bytes(body[..8].try_into().expect("a key")),
        )
    }

    fn join(pair: &Pair, key: u64, place: (u16, u16)) -> Self {
        let (hand, code, _) = Hand::hello(pair, PROXY, key, place, "hand");
        assert_eq!(code, 0, "welcome");
        hand
    }

    fn frame(&mut self, kind: u8, channel: u32, sequence: u32, payload: &[u8]) {
        let mut frame = vec![kind, 0, 0, 0];
        frame.extend(u32::try_from(payload.len()).expect("short").to_le_bytes());
        frame.extend(channel.to_le_bytes());
        frame.extend(sequence.to_le_bytes());
        frame.extend(payload);
        self.0.write_all(&frame).expect("sent");
    }

    /// Opens set 1.
    fn open_set(&mut self) {
        let mut payload = vec![0, 1, 0, 0, 0, 0, 0, 0];
        text(&mut payload, "1");
        self.frame(0x01, 1, 0, &payload);
    }

    fn open_image(&mut self, stream: u32, name: &str) {
        let mut payload = 1u32.to_le_bytes().to_vec();
        payload.extend(1u32.to_le_bytes());
        payload.extend(u64::MAX.to_le_bytes());
        text(&mut payload, name);
        self.frame(0x10, stream, 0, &payload);
    }

    fn end_image(&mut self, stream: u32, total: u64) {
        self.frame(0x12, stream, 0, &total.to_le_bytes());
    }

    /// The next frame that comes: type, channel, payload.
    fn next(&mut self) -> (u8, u32, Vec<u8>) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).expect("a frame");
        let length = u32::from_le_bytes(head[4..8].try_into().expect("four"));
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).expect("its payload");
        let channel = u32::from_le_bytes(head[8..12].try_into().expect("four"));
        (head[0], channel, payload)
    }

    /// The cache ends the session and says why.
    fn expect_goodbye(&mut self, why: &str) {
        let (kind, _, payload) = self.next();
        let said = String::from_utf8_lossy(&payload).into_owned();
        assert!(kind == 0x20 && said.contains(why), "{kind:#x} {said}");
        self.expect_closed();
    }

    fn expect_closed(&mut self) {
        // Reset counts: what we sent and nobody read makes it that.
        let read = self.0.read(&mut [0; 1]);
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}

#[test]
fn strangers_do_not_join() {
    let pair = Pair::new();
    let (mut first, key) = Hand::session(&pair, 3);
    let refused = |proxy, key, place, session| {
        let (mut hand, code, body) = Hand::hello(&pair, proxy, key, place, session);
        let said = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(code, 4, "{said}");
        hand.expect_closed();
        said
    };
    // Whoever does not know the key learns nothing.
    let stranger = refused(PROXY, key ^ 1, (1, 3), "hand");
    assert_eq!(refused(PROXY ^ 1, key, (1, 3), "hand"), stranger);
    refused(PROXY, key, (1, 3), "other");
    refused(PROXY, 0, (1, 3), "nobody");
    // And the proxy itself only as announced.
    refused(PROXY, key, (1, 2), "hand");
    refused(PROXY, key, (3, 4), "hand");
    let mut second = Hand::join(&pair, key, (1, 3));
    refused(PROXY, key, (1, 3), "hand");
    // The session has not noticed.
    first.open_set();
    first.open_image(1, "a.img");
    second.frame(0x11, 1, 0, b"abc");
    first.end_image(1, 3);
    assert_eq!(first.next().0, 0x50, "IMAGE_ACK");
    // Over: all its connections close, and nobody joins.
    first.frame(0x20, 0, 0, &[0, 0]);
    first.expect_closed();
    second.expect_closed();
    refused(PROXY, key, (2, 3), "hand");
}

#[test]
fn frames_in_any_order_on_any_connection() {
    let pair = Pair::new();
    let (mut first, key) = Hand::session(&pair, 3);
    let mut others = [1, 2].map(|k| Hand::join(&pair, key, (k, 3)));
    first.open_set();
    // Before its image has begun.
    others[0].frame(0x11, 5, 2, b"three ");
    first.open_image(5, "a.img");
    others[1].frame(0x11, 5, 1, b"two ");
    first.frame(0x11, 5, 0, b"one ");
    // Its end before its last frame.
    first.end_image(5, 18);
    first.open_image(6, "b.img");
    first.end_image(6, 0);
    let (kind, stream, _) = first.next();
    assert_eq!((kind, stream), (0x50, 6), "it waits for nothing of another");
    others[1].frame(0x11, 5, 3, b"four");
    let (kind, stream, payload) = first.next();
    assert_eq!((kind, stream), (0x50, 5));
    assert_eq!(payload, 18u64.to_le_bytes());
}

#[test]
fn what_cannot_be_put_in_order_ends_the_session() {
    let pair = Pair::new();
    let session = |body: &dyn Fn(&mut Hand, &mut Hand), why| {
        let (mut first, key) = Hand::session(&pair, 2);
        let mut second = Hand::join(&pair, key, (1, 2));
        first.open_set();
        first.open_image(1, "a.img");
        body(&mut first, &mut second);
        first.expect_goodbye(why);
        second.expect_closed();
    };
    session(
        &|first, second| {
            first.frame(0x11, 1, 0, b"a");
            first.end_image(1, 3);
            second.frame(0x11, 1, 2, b"bc");
        },
        "frame 1 of image a.img is missing",
    );
    session(
        &|first, _| {
            first.frame(0x11, 1, 0, b"a");
            first.frame(0x11, 1, 0, b"a");
        },
        "frame 0 of image a.img came a second time",
    );
    session(
        &|first, second| {
            first.end_image(1, 3);
            second.frame(0x11, 1, 0, b"four");
        },
        "4 bytes arrived where 3 were announced",
    );
    session(
        &|_, second| second.frame(0x20, 0, 0, &[0, 0]),
        "more than image data",
    );
    session(
        &|_, second| drop(second.0.shutdown(std::net::Shutdown::Both)),
        "connection 1",
    );
}

/// Data of an image that nobody opens: the connection waits, and not for ever.
#[test]
fn data_that_nobody_opened_end_the_session() {
    let pair = Pair::new();
    let (mut first, key) = Hand::session(&pair, 2);
    let mut second = Hand::join(&pair, key, (1, 2));
    second.frame(0x11, 9, 0, b"lost");
    first.expect_goodbye("stream 9");
    second.expect_closed();
}

/// What comes out of turn behind a commit gives nothing up: the process may be dead.
#[test]
fn a_held_set_outlives_a_proxy_that_breaks_the_protocol() {
    const SET_GATE: u8 = 0x03;
    const SET_COMPLETE: u8 = 0x04;
    for kind in [SET_GATE, SET_COMPLETE] {
        let pair = Pair::new();
        let (mut hand, _) = Hand::session(&pair, 1);
        let mut gated = vec![1, 1, 0, 0, 0, 0, 0, 0];
        text(&mut gated, "1");
        hand.frame(0x01, 1, 0, &gated);
        let inventory = Content::dump_inventory(1).to_vec();
        let bytes = inventory.len() as u64;
        hand.open_image(1, "inventory.img");
        hand.frame(0x11, 1, 0, &inventory);
        hand.end_image(1, bytes);
        let counts = [&1u32.to_le_bytes()[..], &bytes.to_le_bytes()].concat();
        hand.frame(SET_COMPLETE, 1, 0, &counts);
        hand.frame(0x05, 1, 0, &counts);
        while hand.next().0 != 0x43 {} // COMMITTED
        let payload = if kind == SET_GATE { &[][..] } else { &counts };
        hand.frame(kind, 1, 0, payload);
        hand.expect_goodbye("after the commit");
        until("the set is in doubt", || {
            pair.cache.log().contains("in doubt:")
        });
        assert!(!pair.cache.log().contains("given up"));
    }
}
