//! A bad link between the daemons: cut at bytes spread over the whole conversation, split, delayed, stalled.

use std::os::unix::process::ExitStatusExt;

use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::content::Random;
use e2e_tests::fake::run::Event;
use e2e_tests::fake::scenario::{dump_or_retry, Outcome};
use e2e_tests::fake::{Dialect, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::link::{Direction, Fault, Faults};

/// How many bytes a gated dump and its commit send each way when nothing is wrong.
fn conversation(protocol: &Protocol) -> (u64, u64) {
    let pair = Options::default().link(Faults::default()).start();
    let job = DumpJob::new(protocol, &pair.source, 1).gated();
    job.run().expect("the dump");
    let sent = (
        pair.link().carried(Direction::Up),
        pair.link().carried(Direction::Down),
    );
    protocol
        .restore(&pair.target, &job.set())
        .expect("the restore");
    sent
}

/// The first bytes one by one (handshake), the last ones (commit and its answer), and a spread between.
fn spread(total: u64, count: u64, random: &mut Random) -> Vec<u64> {
    let mut bytes = vec![0, 1, total.saturating_sub(1), total.saturating_sub(20)];
    bytes.extend((0..count).map(|part| {
        let width = (total / count).max(1);
        (part * width + random.between(0, width - 1)).min(total)
    }));
    bytes.sort_unstable();
    bytes.dedup();
    bytes
}

fn cut_everywhere(protocol: &Protocol) {
    let seed = std::env::var("E2E_SEED").map_or(20, |seed| seed.parse().expect("a number"));
    eprintln!("E2E_SEED={seed}");
    let mut random = Random::new(seed);
    let (up, down) = conversation(protocol);
    let kinds = [Fault::Close, Fault::Reset, Fault::Truncate];
    let mut kind = 0;
    let (mut committed, mut refused) = (0, 0);
    for (direction, total, count) in [(Direction::Up, up, 12), (Direction::Down, down, 8)] {
        for byte in spread(total, count, &mut random) {
            kind += 1;
            let fault = kinds[kind % kinds.len()];
            eprintln!("{protocol:?}: {fault:?} at byte {byte} of {total} {direction:?}");
            let options = Options::default()
                .proxy(&["--commit-timeout", "3"])
                .link(Faults::at(direction, byte, fault));
            let pair = options.start();
            match dump_or_retry(&pair, protocol, ImageSet::sample, &mut |_| {}) {
                Outcome::Committed => committed += 1,
                Outcome::Refused(_) => {
                    refused += 1;
                    assert!(pair.link().struck(), "refused over a good link");
                }
            }
        }
    }
    eprintln!("{committed} committed, {refused} refused");
    assert!(
        refused > 10,
        "the cuts did not cut: {committed} committed, {refused} refused"
    );
}

#[test]
fn stream_cut_everywhere() {
    cut_everywhere(&Protocol::Stream);
}

#[test]
fn remote_pipe_cut_everywhere() {
    cut_everywhere(&Protocol::remote(Dialect::Pipe, Spelling::Empty));
}

#[test]
fn remote_socket_cut_everywhere() {
    cut_everywhere(&Protocol::remote(Dialect::Socket, Spelling::Words));
}

#[test]
fn shreds_and_delays_change_nothing() {
    for seed in 1..=4 {
        for protocol in Protocol::all() {
            eprintln!("seed {seed} {protocol:?}");
            let pair = Options::default().link(Faults::shredded(seed)).start();
            let job = DumpJob::new(&protocol, &pair.source, seed).gated();
            let set = ImageSet::small(seed);
            job.run_with(&set, &mut |_| {}).expect("the dump");
            protocol.restore(&pair.target, &set).expect("the restore");
        }
    }
}

/// In the socket dialect nothing in CRIU ignores SIGPIPE: whoever closes its socket kills it in mid-dump. Whatever
/// happens to the link, the proxy drains to the end and refuses at the commit.
#[test]
fn criu_is_never_killed_by_sigpipe() {
    let protocol = Protocol::remote(Dialect::Socket, Spelling::Words);
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    for name in [
        "files.img",
        "pages-1.img",
        "pages-3.img",
        "pstree.img",
        "inventory.img",
    ] {
        for fault in [Fault::Close, Fault::Reset] {
            let pair = Options::default().link(Faults::default()).start();
            let mut child = DumpJob::new(&protocol, &pair.source, 1)
                .gated()
                .stop_in(name)
                .spawn(fake);
            child.wait_half();
            pair.link().strike(fault);
            refused_by_exit_code(&pair, child, name);
        }
    }
}

#[test]
fn criu_is_not_killed_when_the_cache_dies_or_is_full() {
    let protocol = Protocol::remote(Dialect::Socket, Spelling::Words);
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    let mut pair = Pair::new();
    let mut child = DumpJob::new(&protocol, &pair.source, 1)
        .gated()
        .stop_in("pages-1.img")
        .spawn(fake);
    child.wait_half();
    pair.cache.kill();
    refused_by_exit_code(&pair, child, "cache killed");

    let pair = Options::default()
        .cache(&["--memory-limit", "100K"])
        .start();
    let mut child = DumpJob::new(&protocol, &pair.source, 1)
        .gated()
        .stop_in("pages-1.img")
        .spawn(fake);
    child.wait_half();
    refused_by_exit_code(&pair, child, "memory limit");
}

fn refused_by_exit_code(pair: &Pair, mut child: e2e_tests::fake::FakeCriu, what: &str) {
    child.go_on();
    let (status, said) = child.wait();
    assert_eq!(status.signal(), None, "{what}: killed; {said}");
    assert!(
        matches!(status.code(), Some(12 | 13)),
        "{what}: {status}; {said}\n{}",
        pair.proxy.log()
    );
}

/// A stall at any point is back-pressure, not an error: what CRIU writes meanwhile waits in its own pipes.
#[test]
fn a_stall_anywhere_is_survived() {
    for protocol in [
        Protocol::Stream,
        Protocol::remote(Dialect::Pipe, Spelling::Empty),
    ] {
        let (up, down) = conversation(&protocol);
        for (direction, total) in [(Direction::Up, up), (Direction::Down, down)] {
            for byte in [0, total / 3, total - 1] {
                eprintln!("{protocol:?} {direction:?} {byte}");
                let pair = Options::default()
                    .link(Faults::at(direction, byte, Fault::Stall))
                    .start();
                let job = DumpJob::new(&protocol, &pair.source, 1).gated();
                let dump = {
                    let job = job.clone();
                    std::thread::spawn(move || job.run_with(&job.set(), &mut |_: Event| {}))
                };
                // Acknowledgements may come in fewer bytes than the time before: then there is nothing to release.
                while !pair.link().struck() && !dump.is_finished() {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
                pair.link().release();
                dump.join().expect("no panic").expect("the dump");
                protocol
                    .restore(&pair.target, &job.set())
                    .expect("the restore");
            }
        }
    }
}
