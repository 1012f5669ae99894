//! What one peer may cost image-cache, and that others do not pay for it.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, until, Options, Pair, SOON};
use e2e_tests::fake::{Content, DumpError, DumpJob, ImageSet, Protocol};
use e2e_tests::hand::{Hand, Hello};

fn dump(pair: &Pair, seed: u64, set: &ImageSet) -> Result<(), DumpError> {
    let job = DumpJob::new(&Protocol::Stream, &pair.source, seed).gated();
    job.run_with(set, &mut |_| {})
}

fn refused(result: Result<(), DumpError>) {
    let Err(DumpError::PreDump(_) | DumpError::PostDump(_) | DumpError::Write(_)) = result else {
        panic!("{result:?}");
    };
}

fn drop_session(pair: &Pair, name: &str) {
    let control = pair.target.join("image-cache-control.sock");
    let mut command = Command::new(bin("image-cache"));
    let status = command
        .args(["drop", name, "--control"])
        .arg(control)
        .status();
    assert!(status.expect("it runs").success());
}

/// A connection that says nothing.
fn silent(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    stream.set_read_timeout(Some(SOON)).expect("a socket");
    stream
}

/// Whether the other side has closed it.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).expect("a socket");
    match stream.read(&mut [0]) {
        Ok(n) => n == 0,
        Err(e) => e.kind() != ErrorKind::WouldBlock,
    }
}

#[test]
fn the_memory_of_one_session() {
    let pair = Options::default()
        .cache(&["--max-session-memory", "4M"])
        .start();
    for seed in 0..3 {
        refused(dump(&pair, seed, &ImageSet::with_pages(seed, 16 << 20)));
    }
    assert!(pair.cache.log().contains("4.00 MiB for one session"));
    // Each has its own 3 MiB.
    for seed in 3..6 {
        dump(&pair, seed, &ImageSet::with_pages(seed, 3 << 20)).expect("it fits");
    }
}

#[test]
fn the_number_of_images() {
    let pair = Options::default().cache(&["--max-images", "40"]).start();
    let set = |more: usize| {
        let names: Vec<String> = (0..more).map(|n| format!("core-{n}.img")).collect();
        let content = || Content::bytes(b"registers".to_vec());
        let mut images: Vec<(&str, Content)> = names
            .iter()
            .map(|name| (name.as_str(), content()))
            .collect();
        images.push(("inventory.img", Content::dump_inventory(1)));
        ImageSet::new(images)
    };
    refused(dump(&pair, 1, &set(40)));
    assert!(pair
        .cache
        .log()
        .contains("has had 40 images (--max-images)"));
    dump(&pair, 2, &set(39)).expect("as many as may be");
    Protocol::Stream
        .restore(&pair.target, &set(39))
        .expect("the restore");
}

#[test]
fn the_sessions_of_one_address() {
    let pair = Options::default()
        .cache(&["--max-sessions", "2"])
        .proxy(&["--session", "web"])
        .start();
    let set = ImageSet::small;
    dump(&pair, 1, &set(1)).expect("the first");
    until("it may be restored", || {
        pair.cache.log().contains("ready to be restored")
    });
    dump(&pair, 2, &set(2)).expect("the second");
    refused(dump(&pair, 3, &set(3)));
    assert!(pair
        .cache
        .log()
        .contains("there are 2 sessions of 127.0.0.1 (--max-sessions)"));
    // Both have the name, so one is named by its id.
    let status = pair.ask_cache(&["status"]).1;
    let ids = status
        .split([' ', ','])
        .filter(|word| word.starts_with('@'));
    assert_eq!(ids.clone().count(), 2, "{status}");
    ids.take(1).for_each(|id| drop_session(&pair, id));
    dump(&pair, 4, &set(4)).expect("there is room again");
    Protocol::Stream
        .restore(&pair.target, &set(4))
        .expect("the restore");
}

#[test]
fn a_handshake_has_its_time() {
    let pair = Options::default()
        .cache(&["--handshake-timeout", "1"])
        .start();
    let begin = Instant::now();
    let mut stream = silent(pair.port);
    stream
        .write_all(b"CRIULINK")
        .expect("the first half of a head");
    assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    until("it is said", || {
        pair.cache.log().contains("no handshake within 1s")
    });
}

/// They say nothing and stay: neither do they keep anybody out, nor are there ever many.
#[test]
fn silent_connections_make_room() {
    let limits = ["--max-handshakes", "4", "--max-connections", "8"];
    let pair = Options::default().cache(&limits).start();
    let mut all: Vec<TcpStream> = (0..8).map(|_| silent(pair.port)).collect();
    // All places are taken, and they are a second old at most: who comes in vain makes room.
    until("somebody gets in", || {
        dump(&pair, 1, &ImageSet::small(1)).is_ok()
    });
    Protocol::Stream
        .restore(&pair.target, &ImageSet::small(1))
        .expect("the restore");
    assert!(pair
        .cache
        .log()
        .contains("refused: more than 6 connections of 127.0.0.1 (--max-connections)"));
    // When they are more than a second old, each next one finds at most three of them beside itself.
    until("the oldest are closed", || {
        let _next = silent(pair.port);
        all.retain_mut(|stream| !is_closed(stream));
        all.len() <= 3
    });
    until("it is said", || {
        pair.cache.log().contains("others need the place")
    });
    dump(&pair, 2, &ImageSet::small(2)).expect("nobody is in the way");
}

#[test]
fn an_idle_page_server_connection_is_closed() {
    let pages = free_port();
    let pair = Options::default()
        .cache(&["--page-server", &pages.to_string(), "--idle-timeout", "1"])
        .start();
    let mut stream = silent(pages);
    // PS_IOV_OPEN2 of task 7's pagemap, answered by a byte; then nothing.
    let mut open = 4u32.to_le_bytes().to_vec();
    open.extend([0; 12]);
    open.extend((7u64 << 8 | 1).to_le_bytes());
    stream.write_all(&open).expect("sent");
    assert_eq!(stream.read(&mut [0]).expect("an answer"), 1);
    let begin = Instant::now();
    assert_eq!(stream.read(&mut [0]).expect("an end"), 0);
    assert!(
        begin.elapsed() < Duration::from_secs(5),
        "{:?}",
        begin.elapsed()
    );
    until("it is said", || {
        pair.cache
            .log()
            .contains("nothing came for 1s (--idle-timeout)")
    });
}

/// As many connections, and of one host three quarters of them, at each of the ports.
#[test]
fn the_connections_to_page_servers() {
    let (here, there) = (free_port(), free_port());
    let options = |port: u16| {
        let port = port.to_string();
        ["--page-server", &port, "--max-connections", "8"]
            .map(str::to_owned)
            .to_vec()
    };
    let pair = Pair::with(Options {
        cache: options(there),
        proxy: options(here),
        ..Options::default()
    });
    for (port, daemon) in [(here, &pair.proxy), (there, &pair.cache)] {
        let _six: Vec<TcpStream> = (0..6).map(|_| silent(port)).collect();
        let mut seventh = silent(port);
        assert_eq!(seventh.read(&mut [0]).expect("an end"), 0);
        let text = "page server: refused: more than 6 connections of 127.0.0.1 (--max-connections)";
        until("it is said, and to whom", || {
            let log = daemon.log();
            log.lines()
                .any(|line| line.contains(text) && line.contains("peer=127.0.0.1:"))
        });
    }
}

/// CRIU need not send all of a round that image-cache has refused, to hear that at its end.
#[test]
fn a_refused_round_ends_at_once() {
    let pages = free_port();
    let pair = Options::default()
        .proxy(&["--page-server", &pages.to_string()])
        .cache(&["--memory-limit", "4M"])
        .start();
    let mut stream = silent(pages);
    let request = |command: u32, pages: u32, address: u64| {
        let mut request = command.to_le_bytes().to_vec();
        request.extend(pages.to_le_bytes());
        request.extend(address.to_le_bytes());
        request.extend((7u64 << 8 | 1).to_le_bytes()); // task 7's pagemap
        request
    };
    stream.write_all(&request(4, 0, 0)).expect("PS_IOV_OPEN2");
    assert_eq!(stream.read(&mut [0]).expect("an answer"), 1);
    // PS_IOV_ADD_F, present: more pages than there is room for, and no CLOSE.
    stream
        .write_all(&request(6 | 4 << 16, 1 << 20, 0x1000))
        .expect("sent");
    let sent = (0..16).try_for_each(|_| stream.write_all(&[7; 1 << 20]));
    let end = stream.read(&mut [0]);
    let waits = end
        .as_ref()
        .is_err_and(|e| e.kind() == ErrorKind::WouldBlock);
    assert!(!waits && !matches!(end, Ok(1)), "{sent:?} {end:?}");
    until("it is said, of whom, and what becomes of it", || {
        let log = pair.proxy.log();
        log.lines().any(|line| {
            line.contains("the memory limit of 4.00 MiB")
                && line.contains("the dump fails, its process goes on")
                && line.contains("peer=127.0.0.1:")
        })
    });
}

/// A flood of refusals does not fill the log, and its lines count what they leave out.
#[test]
fn refusals_are_logged_so_often_and_no_more() {
    let pair = Pair::new();
    for _ in 0..400 {
        let mut stream = TcpStream::connect(("127.0.0.1", pair.port)).expect("it listens");
        stream.write_all(&[b'x'; 16]).expect("sent");
        // Until it is closed, so that each is seen.
        let _ = stream.read(&mut [0]);
    }
    let lines = || pair.cache.log().matches("link: refused: ").count();
    until("the first are logged", || lines() >= 50);
    assert!(lines() < 300, "{}", lines());
    until("the next one counts those before", || {
        let mut stream = silent(pair.port);
        stream.write_all(&[b'x'; 16]).expect("sent");
        let _ = stream.read(&mut [0]);
        pair.cache.log().contains(" more not logged")
    });
}

/// An image of two frames has memory of its own, in whole pages: many of them cost what the limit counts.
#[test]
fn tiny_images_are_counted_by_what_they_take() {
    let limits = ["--memory-limit", "64M", "--max-open-images", "40000"];
    let pair = Options::default().cache(&limits).start();
    let before = pair.cache.status_kib("VmHWM");
    let (mut hand, _) = Hand::session(&pair, 1);
    hand.open_set();
    for stream in 1..=40_000 {
        hand.open_image(stream, &format!("core-{stream}.img"));
        for sequence in 0..2 {
            hand.frame(0x11, stream, sequence, b"x");
        }
    }
    // Past the limit the first one that is too many takes the set along; the rest is read all the same.
    let (kind, _, payload) = hand.next_frame();
    let reason = String::from_utf8_lossy(&payload).into_owned();
    assert!(
        kind == 0x51 && reason.contains("memory limit"),
        "{kind:#x} {reason}"
    );
    assert_eq!(hand.next_frame().0, 0x08);
    let took = pair.cache.status_kib("VmHWM") - before;
    assert!(took < 96 << 10, "{took} KiB where 64 MiB are allowed");
}

/// Small images share memory. What goes of it only when all of them have gone is charged as long.
#[test]
fn images_that_go_do_not_leave_uncharged_memory_behind() {
    let pair = Options::default().cache(&["--memory-limit", "32M"]).start();
    let before = pair.cache.status_kib("VmHWM");
    let (mut hand, _) = Hand::session(&pair, 1);
    hand.open_set();
    let mut streams = 1..;
    let mut open = |hand: &mut Hand| {
        let stream = streams.next().expect("there are many");
        hand.open_image(stream, &format!("core-{stream}.img"));
        stream
    };
    for _ in 0..160 {
        let stays = open(&mut hand);
        hand.frame(0x11, stays, 0, b"x");
        hand.end_image(stays, 1);
        for _ in 0..16 {
            let goes = open(&mut hand);
            hand.frame(0x11, goes, 0, &[0; 60 << 10]);
            hand.frame(0x13, goes, 0, &[0, 0]);
        }
    }
    let refused = loop {
        let (kind, _, payload) = hand.next_frame();
        if kind != 0x50 {
            break String::from_utf8_lossy(&payload).into_owned();
        }
    };
    assert!(refused.contains("memory limit"), "{refused}");
    let took = pair.cache.status_kib("VmHWM") - before;
    assert!(took < 56 << 10, "{took} KiB where 32 MiB are allowed");
}

/// Sets without images, with names as long as may be.
#[test]
fn sets_and_their_names_are_charged() {
    let pair = Options::default().cache(&["--memory-limit", "4M"]).start();
    let (mut hand, _) = Hand::session(&pair, 1);
    let name = "n".repeat(4000);
    // One more than 4 MiB are for.
    for set in 1..=(4 << 20) / (4096 + 4000) + 1 {
        hand.open_set_named(set, false, &name);
    }
    hand.expect_goodbye("a set cannot be held: the memory limit of 4.00 MiB is reached");
    until("all is given back", || {
        pair.cache
            .log()
            .contains("session ends: a set cannot be held")
    });
    dump(&pair, 1, &ImageSet::with_pages(1, 3 << 20)).expect("there is room again");
}

/// One address does not get all connections: another one finds some, and so does who must resume.
#[test]
fn the_connections_of_one_address() {
    let pair = Options::default()
        .cache(&["--max-connections", "40"])
        .start();
    let hello = |session, connections| Hello {
        place: (0, connections),
        session,
        ..Hello::default()
    };
    let (_first, _) = Hand::welcomed(&pair, &hello("one", 16));
    let (_refused, code, reason) = Hand::hello(&pair, &hello("two", 16));
    let reason = String::from_utf8_lossy(&reason).into_owned();
    assert!(
        code == 3 && reason.contains("may have 30 connections"),
        "{code} {reason}"
    );
    let (_second, _) = Hand::welcomed(&pair, &hello("three", 14));
}
