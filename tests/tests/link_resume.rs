//! A link that breaks and comes back within `--link-timeout`: the dump does not fail, and the restore gets its bytes.
//! And with checksums, a link that changes them: no commit.

use std::time::{Duration, Instant};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{start_cache, until, Options, Pair, SOON};
use e2e_tests::fake::content::Random;
use e2e_tests::fake::run::{self, Event};
use e2e_tests::fake::scenario::{dump_or_retry, Outcome};
use e2e_tests::fake::script::{self, Task};
use e2e_tests::fake::{Capture, Dialect, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::hand::{number, Hand, Hello};
use e2e_tests::link::{Direction, Fault, Faults};

const CUTS: [Fault; 3] = [Fault::Close, Fault::Reset, Fault::Truncate];

fn seed() -> u64 {
    let seed = std::env::var("E2E_SEED").map_or(7, |seed| seed.parse().expect("a number"));
    eprintln!("E2E_SEED={seed}");
    seed
}

fn surviving(more: &[&str]) -> Options {
    Options::default()
        .proxy(&["--link-timeout", "20"])
        .proxy(more)
}

fn protocols() -> [Protocol; 3] {
    [
        Protocol::Stream,
        Protocol::remote(Dialect::Pipe, Spelling::Empty),
        Protocol::remote(Dialect::Socket, Spelling::Words),
    ]
}

/// A gated dump and its restore.
fn migrate(pair: &Pair, protocol: &Protocol, set: &ImageSet) {
    let job = DumpJob::new(protocol, &pair.source, 1).gated();
    job.run_with(set, &mut |_| {}).expect("the dump");
    protocol.restore(&pair.target, set).expect("the restore");
}

/// How many bytes go each way when nothing is wrong.
fn conversation(protocol: &Protocol, set: &ImageSet, more: &[&str]) -> (u64, u64) {
    let pair = surviving(more).link(Faults::default()).start();
    migrate(&pair, protocol, set);
    let link = pair.link();
    (link.carried(Direction::Up), link.carried(Direction::Down))
}

/// The first bytes after the handshake, the last ones before the farewell, and some between.
fn spread(total: u64, handshake: u64, farewell: u64, count: u64, random: &mut Random) -> Vec<u64> {
    let last = total - farewell;
    let mut bytes = vec![
        handshake,
        handshake + 1,
        handshake + 20,
        last - 20,
        last - 1,
    ];
    bytes.extend((0..count).map(|_| random.between(handshake, last - 1)));
    bytes
}

/// Wherever a connection is cut behind its handshake, the dump goes on and nothing is missing.
fn cut_everywhere(more: &[&str]) {
    let mut random = Random::new(seed());
    let (mut cuts, mut struck) = (0, 0);
    for (n, protocol) in protocols().iter().enumerate() {
        let set = ImageSet::with_pages(n as u64, 3 << 20);
        let (up, down) = conversation(protocol, &set, more);
        // HELLO: 16 + 36 + texts and checksum; GOODBYE: 16 and its reason; longer than both ever are.
        for (direction, total, handshake, farewell, count) in [
            (Direction::Up, up, 150, 100, 7),
            (Direction::Down, down, 100, 24, 4),
        ] {
            for byte in spread(total, handshake, farewell, count, &mut random) {
                let fault = CUTS[usize::try_from(byte).expect("small") % CUTS.len()];
                eprintln!(
                    "{protocol:?} {more:?}: {fault:?} at byte {byte} of {total} {direction:?}"
                );
                // With several connections it strikes the first that gets there, if one does.
                let pair = surviving(more)
                    .link(Faults::at(direction, byte, fault))
                    .start();
                migrate(&pair, protocol, &set);
                cuts += 1;
                struck += usize::from(pair.link().struck());
            }
        }
    }
    // How many frames there are, and on which connection, is not the same each time.
    let least = if more.contains(&"--connections") {
        3
    } else {
        9
    };
    assert!(struck * 12 >= cuts * least, "{struck} of {cuts} struck");
}

#[test]
fn cut_anywhere() {
    cut_everywhere(&[]);
}

#[test]
fn cut_anywhere_with_checksums() {
    cut_everywhere(&["--checksum"]);
}

#[test]
fn one_of_several_connections_cut_anywhere() {
    cut_everywhere(&["--connections", "3"]);
}

#[test]
fn one_of_several_connections_cut_anywhere_with_checksums() {
    cut_everywhere(&["--connections", "3", "--checksum"]);
}

/// Again and again, while a large image is on its way through a small window.
fn cut_again_and_again(more: &[&str]) {
    for protocol in protocols() {
        eprintln!("{protocol:?} {more:?}");
        let slow = Faults {
            up: e2e_tests::link::Plan {
                segment: 256 << 10,
                delay: Duration::from_millis(2),
                ..e2e_tests::link::Plan::default()
            },
            ..Faults::default()
        };
        let options = surviving(more).proxy(&["--retransmit-buffer", "4M"]);
        let pair = options.link(slow).start();
        let set = ImageSet::with_pages(3, 48 << 20);
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        let dump = {
            let set = set.clone();
            std::thread::spawn(move || job.run_with(&set, &mut |_| {}))
        };
        for cut in 1..=8u64 {
            until("some more has passed", || {
                pair.link().carried(Direction::Up) > cut * (4 << 20)
            });
            let fault = [Fault::Close, Fault::Reset][usize::try_from(cut % 2).expect("small")];
            pair.link().strike(fault);
        }
        dump.join().expect("no panic").expect("the dump");
        protocol.restore(&pair.target, &set).expect("the restore");
        assert!(
            pair.link().connections() > 8,
            "each cut needs another connection"
        );
    }
}

#[test]
fn cut_again_and_again_in_one_dump() {
    cut_again_and_again(&[]);
}

#[test]
fn several_connections_cut_again_and_again() {
    cut_again_and_again(&["--connections", "2"]);
}

/// Nothing moves any more, nothing is closed, and new connections get nowhere either. It is noticed, and then it ends.
#[test]
fn a_black_hole_is_survived() {
    let pair = surviving(&[]).link(Faults::default()).start();
    let set = ImageSet::with_pages(5, 24 << 20);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    let dump = {
        let set = set.clone();
        std::thread::spawn(move || job.run_with(&set, &mut |_| {}))
    };
    until("it has begun", || {
        pair.link().carried(Direction::Up) > 1 << 20
    });
    pair.link().freeze();
    until("it is noticed", || {
        pair.proxy.log().contains("trying for 20s to connect again")
    });
    pair.link().release();
    dump.join().expect("no panic").expect("the dump");
    Protocol::Stream
        .restore(&pair.target, &set)
        .expect("the restore");
}

/// What was sent gets nowhere and nothing breaks, as with a damaged length in TLS: its record is waited for, and with the
/// last word of a conversation nothing comes that would complete it. So a cache that is silent is connected to anew.
#[test]
fn a_last_word_that_gets_nowhere_is_said_again() {
    for direction in [Direction::Up, Direction::Down] {
        let pair = surviving(&[]).link(Faults::default()).start();
        let set = ImageSet::sample(1);
        let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
        let committed = job.run_with(&set, &mut |event| {
            if event == Event::Written {
                pair.link().swallow(direction);
            }
        });
        committed.expect("the dump");
        Protocol::Stream
            .restore(&pair.target, &set)
            .expect("the restore");
        assert!(pair.proxy.log().contains("no answer for 8s"));
    }
}

/// The same behind the commit: the process is dead, and the target hears of it.
#[test]
fn a_confirmation_that_gets_nowhere_is_said_again() {
    let pair = surviving(&[]).link(Faults::default()).start();
    let set = ImageSet::sample(1);
    let (program, dir) = (bin("image-proxy"), &pair.source);
    let task = Task::start().expect("a process");
    let run = |action: &str| script::run_of(&task, &program, action, dir, dir, SOON);
    let capture = Capture::connect(dir).expect("connect");
    assert!(run("pre-dump").expect("it ends").ok());
    run::dump(&capture, &set, &mut |_| {}).expect("the images");
    assert!(run("post-dump").expect("it ends").ok());
    pair.link().swallow(Direction::Up);
    drop(task);
    until("the target hears of it, or is in doubt", || {
        let log = pair.cache.log();
        log.contains("ready to be restored") || log.contains("in doubt")
    });
    Protocol::Stream
        .restore(&pair.target, &set)
        .expect("the restore");
}

/// Beyond `--link-timeout` the dump fails, and so does whoever waits for it; the next one passes.
#[test]
fn away_for_too_long() {
    let pair = Options::default()
        .proxy(&["--link-timeout", "1"])
        .link(Faults::default())
        .start();
    let set = ImageSet::with_pages(5, 24 << 20);
    let mut seen = None;
    let mut began = None;
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    let dump = {
        let (job, set) = (job.clone(), set.clone());
        std::thread::spawn(move || job.run_with(&set, &mut |_| {}))
    };
    until(
        "it is cut, each time it connects, for more than a second",
        || {
            if pair.link().carried(Direction::Up) > 1 << 20 {
                let began = began.get_or_insert_with(Instant::now);
                if began.elapsed() < Duration::from_secs(2)
                    && seen != Some(pair.link().connections())
                {
                    seen = Some(pair.link().connections());
                    pair.link().freeze();
                    pair.link().strike(Fault::Reset);
                }
            }
            dump.is_finished()
        },
    );
    dump.join().expect("no panic").expect_err("the dump");
    assert!(pair.proxy.log().contains("not connected again within 1s"));
    pair.link().release();
    until("the cache gives it up", || {
        pair.cache.log().contains("session ends")
    });
    let again = ImageSet::sample(6);
    migrate(&pair, &Protocol::Stream, &again);
}

/// Another image-cache listens there now: it has nothing of what the one before had, and says so at once.
#[test]
fn a_restarted_cache_fails_the_dump_at_once() {
    let mut pair = surviving(&[]).link(Faults::default()).start();
    let set = ImageSet::with_pages(5, 24 << 20);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    let dump = std::thread::spawn(move || job.run_with(&set, &mut |_| {}));
    until("it has begun", || {
        pair.link().carried(Direction::Up) > 1 << 20
    });
    pair.cache.kill();
    pair.cache = start_cache(&pair.target, pair.port, &[]);
    until("the dump ends", || dump.is_finished());
    dump.join().expect("no panic").expect_err("the dump");
    let log = pair.proxy.log();
    assert!(
        log.contains("no session") && log.contains("of this proxy is connected"),
        "{log}"
    );
    migrate(&pair, &Protocol::Stream, &ImageSet::sample(6));
}

/// Nobody but the proxy of a session goes on with its connections, and nobody with those of a session that does not
/// survive its link.
#[test]
fn strangers_do_not_resume() {
    let pair = surviving(&[]).start();
    let patient = Hello {
        patience_ms: 10_000,
        ..Hello::default()
    };
    let (mut first, key) = Hand::welcomed(&pair, &patient);
    let refused = |hello: Hello| {
        let (mut hand, code, body) = Hand::hello(&pair, &hello);
        assert_eq!(code, 4, "{}", String::from_utf8_lossy(&body));
        hand.expect_closed();
    };
    let resumes = |key, proxy, session| Hello {
        kind: 3,
        key,
        proxy,
        session,
        ..Hello::default()
    };
    refused(resumes(key ^ 1, e2e_tests::hand::PROXY, "hand"));
    refused(resumes(key, 5, "hand"));
    refused(resumes(key, e2e_tests::hand::PROXY, "other"));
    refused(Hello {
        checksums: true,
        ..resumes(key, e2e_tests::hand::PROXY, "hand")
    });
    // The session has not noticed: it goes on, then on another socket in the middle of a frame.
    first.open_set();
    first.open_image(1, "a.img");
    // Whatever is before it has arrived when it is answered.
    first.open_set_as(2, true);
    assert_eq!(first.next_frame().0, 0x41, "SET_GATED");
    std::io::Write::write_all(
        &mut first.0,
        &[0x11, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, b'a'],
    )
    .expect("sent");
    let hello = Hello {
        received: 16, // that answer
        ..resumes(key, e2e_tests::hand::PROXY, "hand")
    };
    let (hand, code, body) = Hand::hello(&pair, &hello);
    assert_eq!(code, 0, "welcome");
    first = hand;
    // What had not arrived by then is sent again, and the rest of the frame.
    let (last, sent) = (
        b"\x11\0\0\0\x03\0\0\0\x01\0\0\0\0\0\0\0a",
        2 * (16 + 11) + (16 + 23),
    );
    let arrived = usize::try_from(number(&body[8..])).expect("small");
    assert!(arrived >= sent && arrived <= sent + last.len(), "{arrived}");
    std::io::Write::write_all(&mut first.0, &last[arrived - sent..]).expect("sent");
    std::io::Write::write_all(&mut first.0, b"bc").expect("sent");
    first.end_image(1, 3);
    let (kind, _, payload) = first.next_frame();
    assert_eq!((kind, number(&payload)), (0x50, 3), "IMAGE_ACK");
    // An acknowledgement of what was never sent.
    first.frame(0x21, 0, 0, &1000u64.to_le_bytes());
    first.expect_closed();
    refused(resumes(key, e2e_tests::hand::PROXY, "hand"));
    // Without patience there is nothing to resume.
    let (_hand, key) = Hand::session(&pair, 1);
    refused(resumes(key, e2e_tests::hand::PROXY, "hand"));
}

/// A try to resume is given up after some seconds, and its HELLO may still be on its way when the next one has long
/// resumed the connection. It is too late then, and ends nothing; nor does it cost another connection.
#[test]
fn a_hello_that_comes_late_does_not_end_what_was_resumed() {
    // Without a number what was acknowledged tells; with one it may be as far as the live one.
    for (numbers, acknowledged) in [((0, 0), true), ((1, 2), true), ((1, 2), false)] {
        let pair = surviving(&[]).start();
        let patient = Hello {
            patience_ms: 10_000,
            ..Hello::default()
        };
        let (mut first, key) = Hand::welcomed(&pair, &patient);
        let gated = |hand: &mut Hand, set| {
            hand.open_set_as(set, true);
            let (kind, channel, _) = hand.next_frame();
            assert_eq!((kind, channel), (0x41, set), "SET_GATED");
        };
        gated(&mut first, 1);
        let resumes = |attempt| Hello {
            kind: 3,
            key,
            received: 16, // that answer
            attempt,
            ..Hello::default()
        };
        let late = std::net::TcpStream::connect(("127.0.0.1", pair.port)).expect("it listens");
        drop(first);
        let (mut live, code, _) = Hand::hello(&pair, &resumes(numbers.1));
        assert_eq!(code, 0, "welcome");
        gated(&mut live, 2);
        if acknowledged {
            live.frame(0x21, 0, 0, &32u64.to_le_bytes());
        }
        gated(&mut live, 3);
        let (mut late, code, body) = Hand::greet_on(late, &resumes(numbers.0)).expect("an answer");
        assert_eq!(code, 5, "{}", String::from_utf8_lossy(&body));
        late.expect_closed();
        gated(&mut live, 4);
        assert!(!pair.cache.log().contains("session ends"));
    }
}

/// The same of a further connection, which has no answers to count.
#[test]
fn a_late_hello_of_a_further_connection_changes_nothing() {
    let pair = surviving(&[]).start();
    let patient = |place, kind, key, attempt| Hello {
        patience_ms: 10_000,
        place,
        kind,
        key,
        attempt,
        ..Hello::default()
    };
    let (mut first, key) = Hand::welcomed(&pair, &patient((0, 2), 1, 0, 0));
    let (further, _) = Hand::welcomed(&pair, &patient((1, 2), 2, key, 0));
    drop(further);
    let (mut live, _) = Hand::welcomed(&pair, &patient((1, 2), 3, key, 2));
    first.open_set();
    first.open_image(1, "a.img");
    live.frame(0x11, 1, 0, b"ab");
    let (mut late, code, _) = Hand::hello(&pair, &patient((1, 2), 3, key, 1));
    assert_eq!(code, 5, "it is overtaken");
    late.expect_closed();
    live.frame(0x11, 1, 1, b"c");
    first.end_image(1, 3);
    let (kind, _, payload) = first.next_frame();
    assert_eq!((kind, number(&payload)), (0x50, 3), "IMAGE_ACK");
}

/// A proxy that takes no answers makes the cache wait for room among them. When it leaves then, it is given up all the
/// same, and so is what it has sent; with patience and without.
#[test]
fn a_proxy_that_leaves_with_its_answers_untaken_is_given_up() {
    for patience_ms in [500, 0] {
        let pair = Options::default().start();
        let hello = Hello {
            patience_ms,
            ..Hello::default()
        };
        let (mut hand, _) = Hand::welcomed(&pair, &hello);
        hand.open_set_as(1, true);
        // SET_GATE, which is as long as its answer: more than the cache keeps, and the socket takes.
        let gates = [0x03, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0].repeat(1024);
        hand.0
            .set_write_timeout(Some(Duration::from_secs(2)))
            .expect("a socket");
        // Until it takes no more.
        let mut sent = 0;
        while std::io::Write::write_all(&mut hand.0, &gates).is_ok() {
            sent += gates.len();
        }
        assert!(sent > 1 << 20, "{sent}");
        drop(hand);
        if patience_ms > 0 {
            until("its answers do not wait for ever", || {
                pair.cache.log().contains("acknowledges no answers")
            });
        }
        until("the session ends", || {
            pair.cache.log().contains("session ends")
        });
    }
}

/// And of one that would open the session that its proxy has opened since: its sets would be given up.
#[test]
fn a_late_hello_does_not_open_a_session_anew() {
    let pair = Options::default().start();
    let opens = |opening| Hello {
        received: opening,
        ..Hello::default()
    };
    let (mut live, _) = Hand::welcomed(&pair, &opens(2));
    let (mut late, code, _) = Hand::hello(&pair, &opens(1));
    assert_eq!(code, 5, "it is overtaken");
    late.expect_closed();
    live.open_set_as(1, true);
    assert_eq!(live.next_frame().0, 0x41, "SET_GATED");
    // A later one is from a proxy that has lost the connection.
    let (_newer, _) = Hand::welcomed(&pair, &opens(3));
    live.expect_goodbye("connected anew");
}

/// One bit anywhere, in either direction: with checksums either the dump fails, or nothing of it was damaged.
#[test]
fn a_flipped_bit_does_not_commit() {
    let mut random = Random::new(seed());
    let checked = || Options::default().proxy(&["--checksum", "--commit-timeout", "3"]);
    let (mut caught, mut flips) = (0, 0);
    for (n, protocol) in protocols().iter().enumerate() {
        let set = |seed| ImageSet::with_pages(seed, 300_000);
        let (up, down) = conversation(protocol, &set(n as u64), &["--checksum"]);
        for (direction, total, count) in [(Direction::Up, up, 12), (Direction::Down, down, 8)] {
            for _ in 0..count {
                let byte = random.between(0, total - 200);
                eprintln!(
                    "{protocol:?}: bit {} of byte {byte} of {total} {direction:?}",
                    byte % 8
                );
                let pair = checked()
                    .link(Faults::at(direction, byte, Fault::Flip))
                    .start();
                // It compares what is restored with what was dumped.
                let outcome = dump_or_retry(&pair, protocol, set, &mut |_| {});
                flips += usize::from(pair.link().struck());
                caught += usize::from(matches!(outcome, Outcome::Refused(_)));
            }
        }
    }
    eprintln!("{caught} of {flips} caught");
    assert!(flips > 40 && caught == flips, "{caught} of {flips} caught");
}

/// The same without checksums: if nothing was damaged then, the test above would prove nothing.
#[test]
fn without_checksums_a_flipped_bit_is_not_seen() {
    let pair = Options::default()
        .link(Faults::at(Direction::Up, 100_000, Fault::Flip))
        .start();
    let set = ImageSet::with_pages(1, 300_000);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run_with(&set, &mut |_| {}).expect("the dump");
    assert!(pair.link().struck());
    Protocol::Stream
        .restore(&pair.target, &set)
        .expect_err("other bytes");
}

/// A restarted proxy with the name of a session whose link is away need not wait until the cache gives that up.
#[test]
fn a_name_is_free_when_its_link_is_away() {
    let pair = Options::default().start();
    let patient = Hello {
        patience_ms: 30_000,
        ..Hello::default()
    };
    let other = Hello {
        proxy: 5,
        ..Hello::default()
    };
    let (first, _) = Hand::welcomed(&pair, &patient);
    let (_, code, _) = Hand::hello(&pair, &other);
    assert_eq!(code, 2, "the name is in use");
    drop(first);
    until("the cache has noticed", || {
        Hand::hello(&pair, &other).1 == 0
    });
}
