//! Memory is ready on the target before the tasks are frozen, and is nobody's loss if they do not come.

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::run::restore_stream;
use e2e_tests::fake::{Dialect, DumpError, DumpJob, ImageSet, Protocol, Spelling};
use e2e_tests::hand::{number, Hand};
use e2e_tests::link::{Direction, Fault, Faults};

const MIB: u64 = 1 << 20;
const RESERVE: u8 = 0x22;
const RESERVED: u8 = 0x45;
/// Of what the cache sends: behind WELCOME (59 bytes with this version's name) and SET_GATED (16).
const IN_RESERVED: u64 = 80;

fn resident(pair: &Pair) -> u64 {
    pair.cache.status_kib("VmRSS") << 10
}

/// RESERVE behind the handshake; gives how much is ready.
fn reserve(hand: &mut Hand, bytes: u64) -> u64 {
    hand.frame(RESERVE, 0, 0, &bytes.to_le_bytes());
    let (kind, channel, payload) = hand.next_frame();
    assert_eq!((kind, channel, payload.len()), (RESERVED, 0, 8));
    number(&payload)
}

/// A dump of a process that seems to have so much memory.
fn dump(pair: &Pair, set: &ImageSet, mib: u64) {
    DumpJob::new(&Protocol::Stream, &pair.source, 0)
        .of_mib(mib)
        .gated()
        .run_with(set, &mut |_| {})
        .expect("the dump");
}

fn comes_back(pair: &Pair) {
    until("the memory is back", || resident(pair) < 48 * MIB);
}

#[test]
fn what_is_to_come_is_ready_before_the_first_image() {
    let remote = Protocol::remote(Dialect::Pipe, Spelling::Empty);
    for protocol in [Protocol::Stream, remote] {
        let pair = Pair::new();
        let set = ImageSet::with_pages(1, 200 * MIB);
        let mut before = None;
        DumpJob::new(&protocol, &pair.source, 1)
            .of_mib(200)
            .gated()
            .run_with(&set, &mut |_| {
                before.get_or_insert_with(|| resident(&pair));
            })
            .expect("the dump");
        assert!(before > Some(200 * MIB), "{protocol:?}: {before:?}");
        // What was there is what it came to: not twice as much.
        let peak = pair.cache.status_kib("VmHWM") << 10;
        assert!(peak < 232 * MIB, "{protocol:?}: {peak}");
        protocol.restore(&pair.target, &set).expect("the restore");
        comes_back(&pair);
    }
}

/// A dump with far less than was expected keeps nothing of it, and one with far more comes all the same.
#[test]
fn an_estimate_binds_nobody() {
    let pair = Pair::new();
    for (expected, bytes) in [(200, MIB), (32, 200 * MIB), (64, 0)] {
        let set = ImageSet::with_pages(expected, bytes);
        dump(&pair, &set, expected);
        until("what was too much has gone", || {
            resident(&pair) < bytes + 48 * MIB
        });
        restore_stream(&pair.target, &set).expect("the restore");
        comes_back(&pair);
    }
}

/// Each connection takes what is ready.
#[test]
fn over_several_connections() {
    let pair = Options::default().proxy(&["--connections", "3"]).start();
    let set = ImageSet::with_pages(5, 200 * MIB);
    dump(&pair, &set, 200);
    let peak = pair.cache.status_kib("VmHWM") << 10;
    assert!(peak < 248 * MIB, "{peak}");
    restore_stream(&pair.target, &set).expect("the restore");
}

#[test]
fn a_dump_that_is_here_goes_before_one_that_is_expected() {
    let pair = Options::default()
        .cache(&["--memory-limit", "100M"])
        .start();
    let (mut hand, _) = Hand::session(&pair, 1);
    assert_eq!(reserve(&mut hand, 80 * MIB), 80 * MIB);
    assert!(resident(&pair) > 80 * MIB);
    let set = ImageSet::with_pages(2, 64 * MIB);
    dump(&pair, &set, 64);
    assert!(resident(&pair) < 100 * MIB, "what was ready has gone");
    restore_stream(&pair.target, &set).expect("the restore");
}

#[test]
fn no_more_than_the_limits_allow_and_once() {
    let pair = Options::default()
        .cache(&["--memory-limit", "90M", "--max-session-memory", "40M"])
        .start();
    let (mut hand, _) = Hand::session(&pair, 1);
    assert_eq!(reserve(&mut hand, u64::MAX), 40 * MIB);
    hand.frame(RESERVE, 0, 0, &MIB.to_le_bytes());
    hand.expect_goodbye("a second RESERVE");
    comes_back(&pair);
    // Not worth a thread.
    let (mut hand, _) = Hand::session(&pair, 1);
    assert_eq!(reserve(&mut hand, MIB), 0);
    // On connection 0 alone.
    let (_first, key) = Hand::session(&pair, 2);
    let mut second = Hand::join(&pair, key, (1, 2));
    second.frame(RESERVE, 0, 0, &MIB.to_le_bytes());
    second.expect_closed();
}

#[test]
fn nothing_is_asked_for_where_nobody_waits_for_it() {
    let pair = Options::default()
        .proxy(&["--reserve-timeout", "0"])
        .start();
    let set = ImageSet::with_pages(3, 64 * MIB);
    dump(&pair, &set, 64);
    assert!(!pair.cache.log().contains("made ready"));
}

/// An answer that does not come delays the dump by so much, and no more.
#[test]
fn a_cache_that_does_not_say_ready() {
    let faults = Faults::at(Direction::Down, IN_RESERVED, Fault::Stall);
    let pair = Options::default()
        .proxy(&["--reserve-timeout", "300ms"])
        .link(faults)
        .start();
    let set = ImageSet::with_pages(4, 64 * MIB);
    let mut warned = false;
    DumpJob::new(&Protocol::Stream, &pair.source, 4)
        .of_mib(64)
        .gated()
        .run_with(&set, &mut |_| {
            warned |= pair.proxy.log().contains("the dump begins without");
            pair.link().release();
        })
        .expect("the dump");
    assert!(warned);
    restore_stream(&pair.target, &set).expect("the restore");
}

/// A link that breaks meanwhile is repaired, and the answer comes; or the dump does not begin.
#[test]
fn a_link_that_breaks_while_memory_is_made_ready() {
    let set = ImageSet::with_pages(6, 64 * MIB);
    for (timeout, begins) in [("10s", true), ("0", false)] {
        let pair = Options::default()
            .proxy(&["--link-timeout", timeout])
            .link(Faults::at(Direction::Down, IN_RESERVED, Fault::Reset))
            .start();
        let dump = DumpJob::new(&Protocol::Stream, &pair.source, 6)
            .of_mib(64)
            .gated()
            .run_with(&set, &mut |_| assert!(begins));
        match dump {
            Ok(()) => {
                assert!(pair.proxy.log().contains("has memory ready"));
                restore_stream(&pair.target, &set).expect("the restore");
            }
            Err(DumpError::PreDump(_)) => assert!(!begins),
            Err(e) => panic!("{e:?}"),
        }
    }
}
