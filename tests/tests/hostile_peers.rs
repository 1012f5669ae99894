//! Peers that mean no good (`examples/hostile`): each is ended within its limits, leaves nothing behind, and is named in
//! the log, while a bystander migrates through the same daemons.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use e2e_tests::authority::Authority;
use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, until, Daemon, Options, Pair, SOON};
use e2e_tests::fake::{DumpJob, ImageSet, Protocol};
use e2e_tests::hand::{Hand, Hello};
use e2e_tests::hostile::replayed_session::Way;
use e2e_tests::hostile::{
    deaf_restore, foreign_commit, half_closed, header_bomb, name_bomb, plaintext, replayed_session,
    slow_sender, stream_flood, tls_stranger, Ended, How,
};

/// What a bystander moves, and what may be left of anything, with the allocator's own.
const SET_BYTES: u64 = 2 << 20;
const ROOM_KIB: u64 = 16 << 10;

/// The bystander's.
const SESSION: &str = "bystander";

fn start(cache: Vec<String>, mut proxy: Vec<String>) -> Pair {
    proxy.extend(["--session".to_owned(), SESSION.to_owned()]);
    Options {
        cache,
        proxy,
        ..Options::default()
    }
    .start()
}

fn limited(cache: [&str; 2]) -> Pair {
    start(cache.map(str::to_owned).to_vec(), Vec::new())
}

fn address(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// One migration, compared byte by byte.
fn migrate(pair: &Pair, seed: u64) {
    let set = ImageSet::with_pages(seed, SET_BYTES);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, seed).gated();
    job.run_with(&set, &mut |_| {}).expect("the dump");
    // Its own sockets: hostile sessions may be newer.
    let restored = Protocol::Stream.restore(&pair.session_dir(SESSION), &set);
    restored.expect("the restore");
}

struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `attack` while a bystander migrates, again and again; then the daemons are as they were.
fn beside_a_bystander<T>(pair: &Pair, attack: impl FnOnce() -> T) -> T {
    migrate(pair, 1);
    until("the first one is over", || {
        pair.cache.log().contains("restored; released")
    });
    let daemons: [&Daemon; 2] = [&pair.cache, &pair.proxy];
    let before = daemons.map(|daemon| (daemon.fd_count(), daemon.status_kib("VmRSS")));
    let over = AtomicBool::new(false);
    let outcome = std::thread::scope(|scope| {
        let bystander = scope.spawn(|| {
            for seed in 2.. {
                migrate(pair, seed);
                if over.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        // Also if the attack panics.
        let ends = Ends(&over);
        let outcome = attack();
        drop(ends);
        bystander.join().expect("the bystander's migrations");
        outcome
    });
    for (daemon, (fds, memory)) in daemons.into_iter().zip(before) {
        until("descriptors and memory have come back", || {
            daemon.fd_count() <= fds && daemon.status_kib("VmRSS") <= memory + ROOM_KIB
        });
    }
    outcome
}

fn said(daemon: &Daemon, text: &str) {
    until(&format!("the log says `{text}`"), || {
        daemon.log().contains(text)
    });
}

/// A limit of one second counts, and nothing takes much longer.
fn within_its_second(ended: &Ended) {
    assert_ne!(ended.how, How::Open, "{ended:?}");
    let bounds = Duration::from_millis(900)..Duration::from_secs(8);
    assert!(bounds.contains(&ended.after), "{ended:?}");
}

/// Nothing was waited for.
fn at_once(ended: &Ended) {
    assert_ne!(ended.how, How::Open, "{ended:?}");
    assert!(ended.after < Duration::from_secs(8), "{ended:?}");
}

#[test]
fn a_slow_sender() {
    let pair = limited(["--handshake-timeout", "1"]);
    let greeting = slow_sender::greeting();
    let pace = Duration::from_millis(50);
    let ended = beside_a_bystander(&pair, || {
        slow_sender::attack(address(pair.port), &greeting, pace)
    });
    within_its_second(&ended.expect("an end"));
    said(&pair.cache, "link: refused: no handshake within 1s");
}

/// A page server's first request, on either side.
#[test]
fn a_slow_first_request() {
    let (here, there) = (free_port(), free_port());
    let options = |port: u16| {
        let options = ["--page-server", &port.to_string(), "--idle-timeout", "1"];
        options.map(str::to_owned).to_vec()
    };
    let pair = start(options(there), options(here));
    let request = slow_sender::page_request();
    let pace = Duration::from_millis(100);
    beside_a_bystander(&pair, || {
        for port in [here, there] {
            let ended = slow_sender::attack(address(port), &request, pace);
            within_its_second(&ended.expect("an end"));
        }
    });
    for daemon in [&pair.proxy, &pair.cache] {
        said(daemon, "page server: refused: no request within 1s");
        said(daemon, "peer=127.0.0.1:");
    }
}

#[test]
fn headers_that_announce_too_much() {
    let pair = start(Vec::new(), Vec::new());
    let peak = |daemon: &Daemon| daemon.status_kib("VmHWM");
    beside_a_bystander(&pair, || {
        let before = peak(&pair.cache);
        let target = address(pair.port);
        at_once(&header_bomb::attack(target).expect("an end"));
        at_once(&header_bomb::attack_in_session(target).expect("an end"));
        assert!(peak(&pair.cache) < before + ROOM_KIB, "nothing was taken");
    });
    said(&pair.cache, "the handshake announces 4294967295 bytes");
    said(
        &pair.cache,
        "announces 4294967295 bytes, the limit is 1048576",
    );
}

#[test]
fn names_that_are_too_long() {
    let pair = start(Vec::new(), Vec::new());
    beside_a_bystander(&pair, || {
        let target = address(pair.port);
        at_once(&name_bomb::attack(target).expect("an end"));
        at_once(&name_bomb::attack_in_session(target).expect("an end"));
    });
    said(&pair.cache, "link: refused: the handshake announces");
    said(&pair.cache, "of type 0x10 announces");
    let names: usize = pair.cache.log().matches("nnnnnnnnnn").count();
    assert_eq!(names, 0, "no log has such a name");
}

#[test]
fn a_flood_of_streams() {
    let pair = limited(["--max-open-images", "100"]);
    let ended = beside_a_bystander(&pair, || stream_flood::attack(address(pair.port), 100_000));
    at_once(&ended.expect("an end"));
    said(&pair.cache, "more than 100 open images (--max-open-images)");
}

#[test]
fn half_closed_connections() {
    let pair = start(Vec::new(), Vec::new());
    beside_a_bystander(&pair, || {
        let target = address(pair.port);
        at_once(&half_closed::attack(target).expect("an end"));
        at_once(&half_closed::attack_in_session(target).expect("an end"));
    });
    said(&pair.cache, "link: refused: handshake on the link");
    said(
        &pair.cache,
        "link lost: reading from the link: the peer closed the connection",
    );
}

#[test]
fn a_replayed_session() {
    let pair = start(Vec::new(), Vec::new());
    for way in [Way::Joins, Way::Resumes] {
        let (code, ended) =
            beside_a_bystander(&pair, || replayed_session::attack(address(pair.port), way))
                .expect("an answer");
        at_once(&ended);
        // Which refusal it is depends on how far that session's end has come.
        assert!(
            code != 0 && ended.text().contains("session replay"),
            "{ended:?}"
        );
    }
    until("both are in the log", || {
        let log = pair.cache.log();
        let refused =
            |line: &&str| line.contains("link: refused:") && line.contains("session replay");
        log.lines().filter(refused).count() == 2
    });
}

/// The number of a set counts in its own session alone, and whose it is goes on.
#[test]
fn a_commit_for_anothers_session() {
    let pair = start(Vec::new(), Vec::new());
    let victim = Hello {
        session: "victim",
        ..Hello::default()
    };
    let ended = beside_a_bystander(&pair, || {
        let (mut hand, _) = Hand::welcomed(&pair, &victim);
        hand.open_set_as(1, true);
        assert_eq!(hand.next_frame().0, 0x41, "SET_GATED");
        let ended = foreign_commit::attack(address(pair.port), 1);
        hand.open_image(1, "core-1.img");
        hand.frame(0x11, 1, 0, b"x");
        hand.end_image(1, 1);
        assert_eq!(hand.next_frame().0, 0x50, "IMAGE_ACK: it goes on");
        ended
    });
    let ended = ended.expect("an end");
    at_once(&ended);
    assert!(ended.text().contains("there is no set 1"), "{ended:?}");
    let log = pair.cache.log();
    let theirs = log.lines().filter(|line| line.contains("session=thief"));
    assert!(!theirs
        .into_iter()
        .any(|line| line.contains("prepared: every image is here")));
}

#[test]
fn bad_certificates_and_none() {
    let (ours, theirs) = (
        Authority::new(&["127.0.0.1", "source"]),
        Authority::new(&["source"]),
    );
    ours.certify(&["old"], "-1");
    let pair = start(ours.of("127.0.0.1"), ours.of("source"));
    beside_a_bystander(&pair, || {
        let target = address(pair.port);
        for certificate in [theirs.file("source"), ours.file("old")] {
            let said = tls_stranger::attack(target, &certificate).expect("openssl");
            assert!(said.contains("alert"), "{said}");
        }
        at_once(&plaintext::attack(target).expect("an end"));
    });
    for why in [
        "link: refused: TLS handshake: invalid peer certificate: UnknownIssuer",
        "link: refused: TLS handshake: invalid peer certificate: Expired",
        "link: refused: plaintext on a port that wants TLS",
    ] {
        said(&pair.cache, why);
    }
}

/// It may be deaf for as long as its set is there; what it holds of a set that has gone goes with it.
#[test]
fn a_restore_that_never_reads() {
    let pair = limited(["--idle-timeout", "1"]);
    let set = ImageSet::with_pages(99, 64 << 20);
    beside_a_bystander(&pair, || ());
    let before = pair.cache.status_kib("VmRSS");
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 99).gated();
    job.run_with(&set, &mut |_| {}).expect("the dump");
    said(&pair.cache, "ready to be restored");
    let name = set
        .names()
        .into_iter()
        .find(|name| name.starts_with("pages-"));
    let deaf = deaf_restore::Deaf::begin(&pair.session_dir(SESSION), name.expect("it has pages"));
    let deaf = deaf.expect("it is served");
    deaf.is_full();
    let patience = Duration::from_secs(2);
    assert!(
        !deaf.is_over_within(patience).expect("a pipe"),
        "its set is there"
    );
    let control = pair.target.join("image-cache-control.sock");
    let mut drop = Command::new(bin("image-cache"));
    drop.args(["drop", SESSION, "--control"]).arg(control);
    assert!(drop.status().expect("it runs").success());
    assert!(
        deaf.is_over_within(SOON).expect("a pipe"),
        "its set has gone"
    );
    said(
        &pair.cache,
        "restore --stream: its set has gone, and it took nothing for 1s (--idle-timeout)",
    );
    until("the memory has come back", || {
        pair.cache.status_kib("VmRSS") < before + ROOM_KIB
    });
    migrate(&pair, 100);
}
