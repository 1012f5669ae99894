//! `image-proxy --connections`: one transfer over several TCP connections. Whatever happens to any of them, either the
//! dump says OK and the restore gets exactly its bytes, or it fails and nobody gets them.

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::scenario::{dump_or_retry, Outcome};
use e2e_tests::fake::{Content, Dialect, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::hand::{Hand, Hello, PROXY};
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

#[test]
fn strangers_do_not_join() {
    let pair = Pair::new();
    let (mut first, key) = Hand::session(&pair, 3);
    let refused = |proxy, key, place, session| {
        let hello = Hello {
            proxy,
            key,
            place,
            kind: 2,
            session,
            ..Hello::default()
        };
        let (mut hand, code, body) = Hand::hello(&pair, &hello);
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
    assert_eq!(first.next_frame().0, 0x50, "IMAGE_ACK");
    // Over: all its connections close, and nobody joins.
    first.frame(0x20, 0, 0, &[0, 0]);
    first.expect_goodbye("");
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
    let (kind, stream, _) = first.next_frame();
    assert_eq!((kind, stream), (0x50, 6), "it waits for nothing of another");
    others[1].frame(0x11, 5, 3, b"four");
    let (kind, stream, payload) = first.next_frame();
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
fn a_prepared_set_outlives_a_proxy_that_breaks_the_protocol() {
    const SET_GATE: u8 = 0x03;
    const SET_COMPLETE: u8 = 0x04;
    for kind in [SET_GATE, SET_COMPLETE] {
        let pair = Pair::new();
        let (mut hand, _) = Hand::session(&pair, 1);
        let mut gated = vec![1, 1, 0, 0, 0, 0, 0, 0];
        gated.extend(b"\x01\x001"); // a text: its length, and the snapshot id "1"
        hand.frame(0x01, 1, 0, &gated);
        let inventory = Content::dump_inventory(1).to_vec();
        let bytes = inventory.len() as u64;
        hand.open_image(1, "inventory.img");
        hand.frame(0x11, 1, 0, &inventory);
        hand.end_image(1, bytes);
        let counts = [&1u32.to_le_bytes()[..], &bytes.to_le_bytes()].concat();
        hand.frame(SET_COMPLETE, 1, 0, &counts);
        // Without checksums the digest is 0.
        hand.frame(0x05, 1, 0, &[&counts[..], &[0; 8]].concat());
        while hand.next_frame().0 != 0x43 {} // PREPARED
        let payload = if kind == SET_GATE { &[][..] } else { &counts };
        hand.frame(kind, 1, 0, payload);
        hand.expect_goodbye("after PREPARE");
        until("the set is in doubt", || {
            pair.cache.log().contains("in doubt:")
        });
        assert!(!pair.cache.log().contains("given up"));
    }
}
