//! image-cache in a memory control group (a container, a unit): what does not fit is refused, and the kernel never kills
//! the only copy of a process.
//!
//! Where this machine lets nobody make such a group the tests say so and rest on the run in the virtual machine, which is
//! a test of this program as well.

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, until, Options, Pair};
use e2e_tests::fake::pages::PageRound;
use e2e_tests::fake::run::restore_stream;
use e2e_tests::fake::{Content, DumpError, DumpJob, ImageSet, Protocol};
use e2e_tests::hand::{number, Hand};
use e2e_tests::memory_group::{in_machine, run_in_machine, MemoryGroup};

const MIB: u64 = 1 << 20;
const RESERVE: u8 = 0x22;
const RESERVED: u8 = 0x45;

/// Of the group.
const LIMIT_MIB: u64 = 144;

/// A cache in a group, with a committed set of 40 MiB in it.
struct Held {
    pair: Pair,
    set: ImageSet,
    // Behind the daemons, which are in it.
    group: MemoryGroup,
}

impl Held {
    /// `None`: see [`in_the_second_version`].
    fn start(cache: &[&str]) -> Option<Self> {
        let machine = in_machine();
        let Some(group) = MemoryGroup::new(LIMIT_MIB) else {
            assert!(!machine, "the virtual machine has control groups");
            eprintln!(
                "no memory control group can be made here; the virtual machine runs this test"
            );
            return None;
        };
        let options = Options::default().cache(cache);
        let mut held = Self {
            pair: Pair::with_by(options, &group.enter(), &[]),
            set: ImageSet::with_pages(1, 40 * MIB),
            group,
        };
        dump(&held.pair, &held.set, 0).expect("it fits");
        held.lives();
        Some(held)
    }

    fn lives(&mut self) {
        assert!(self.pair.cache.running(), "image-cache was killed");
        assert!(self.group.usage() <= LIMIT_MIB * MIB);
    }

    /// The set that was committed first, behind `others` that came later.
    fn restores(mut self, others: &[&ImageSet]) {
        self.lives();
        // What has failed, or was restored, is the newest for a moment yet.
        let only = |left: usize| {
            until("the other sessions have gone", || {
                let (_, status) = self.pair.ask_cache(&["status", "--json"]);
                let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
                status["sessions"].as_array().map(Vec::len) == Some(left)
            });
        };
        for (n, other) in others.iter().enumerate() {
            only(others.len() + 1 - n);
            restore_stream(&self.pair.target, other).expect("the later one");
        }
        only(1);
        restore_stream(&self.pair.target, &self.set).expect("what was committed");
    }

    fn is_refused(&mut self, result: Result<(), DumpError>) {
        let refused = matches!(result, Err(DumpError::PostDump(_) | DumpError::Write(_)));
        assert!(refused, "{result:?}");
        self.lives();
        for daemon in [&self.pair.cache, &self.pair.proxy] {
            until("it has told the reason", || {
                daemon.log().contains("memory is short")
            });
        }
        assert!(self.pair.cache.log().contains(&self.group.name()));
    }
}

fn dump(pair: &Pair, set: &ImageSet, expected_mib: u64) -> Result<(), DumpError> {
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    let job = match expected_mib {
        0 => job,
        mib => job.of_mib(mib),
    };
    job.run_with(set, &mut |_| {})
}

/// A set of so many images of `bytes` besides what each set has.
fn of_many(images: usize, bytes: u64) -> ImageSet {
    let names: Vec<String> = (0..images)
        .map(|n| format!("fdinfo-{}.img", n + 10))
        .collect();
    let mut all = vec![("inventory.img", Content::dump_inventory(7))];
    let content = |n| Content::pattern(n as u64, bytes);
    all.extend(
        names
            .iter()
            .enumerate()
            .map(|(n, name)| (name.as_str(), content(n))),
    );
    // The inventory is the last that CRIU writes.
    all.rotate_left(1);
    ImageSet::new(all)
}

/// 24 bytes of a peer ask for more than there is. A dump that comes takes the place of what was made ready.
#[test]
fn a_reservation_does_not_get_it_killed() {
    let Some(mut held) = Held::start(&["--memory-limit", "1T"]) else {
        return;
    };
    assert!(held
        .pair
        .cache
        .log()
        .contains("--memory-limit 1.00 TiB is more than"));
    let (mut hand, _) = Hand::session(&held.pair, 1);
    hand.frame(RESERVE, 0, 0, &u64::MAX.to_le_bytes());
    let (kind, _, ready) = hand.next_frame();
    let ready = number(&ready);
    assert_eq!(kind, RESERVED);
    assert!((16 * MIB..90 * MIB).contains(&ready), "{ready}");
    held.lives();
    let second = ImageSet::with_pages(2, 60 * MIB);
    dump(&held.pair, &second, 0).expect("what was made ready goes back");
    let third = ImageSet::with_pages(3, 60 * MIB);
    let result = dump(&held.pair, &third, 0);
    held.is_refused(result);
    drop(hand);
    held.restores(&[&second]);
}

/// One large image, and one whose memory is made ready before.
#[test]
fn a_large_dump_is_refused() {
    let Some(mut held) = Held::start(&["--memory-limit", "1T"]) else {
        return;
    };
    for expected_mib in [0, 200] {
        let large = ImageSet::with_pages(2, 200 * MIB);
        let result = dump(&held.pair, &large, expected_mib);
        held.is_refused(result);
    }
    held.restores(&[]);
}

#[test]
fn a_dump_of_small_images_is_refused() {
    let Some(mut held) = Held::start(&["--memory-limit", "1T"]) else {
        return;
    };
    let result = dump(&held.pair, &of_many(2200, 60 << 10), 0);
    held.is_refused(result);
    held.restores(&[]);
}

/// Small images do not use what was made ready for large ones; both together would be too much.
#[test]
fn what_was_made_ready_in_vain_makes_room() {
    let Some(held) = Held::start(&["--memory-limit", "1T"]) else {
        return;
    };
    let many = of_many(1000, 60 << 10);
    dump(&held.pair, &many, 58).expect("it fits alone");
    held.restores(&[&many]);
}

/// Pages of a round straight to the page server of image-cache.
#[test]
fn a_page_server_round_is_refused() {
    let port = free_port();
    let Some(mut held) = Held::start(&["--memory-limit", "1T", "--page-server", &port.to_string()])
    else {
        return;
    };
    let second = ImageSet::with_pages(2, 60 * MIB);
    dump(&held.pair, &second, 0).expect("it fits");
    let round = PageRound {
        port,
        images_dir: None,
        parent: None,
        memory: vec![1; 12_000],
        changed: Vec::new(),
        dump: None,
        stop: false,
        cut: false,
    };
    let criu = round.spawn(&bin("fake-criu").display().to_string());
    let (status, _) = criu.wait();
    assert!(!status.success(), "all of it was taken");
    assert!(held.pair.cache.log().contains("memory is short"));
    held.lives();
    held.restores(&[&second]);
}

/// Limits are read anew.
#[test]
fn a_limit_that_is_lowered_counts() {
    let Some(mut held) = Held::start(&["--memory-limit", "1T"]) else {
        return;
    };
    held.group.set_limit(90);
    let second = ImageSet::with_pages(2, 70 * MIB);
    let result = dump(&held.pair, &second, 0);
    held.is_refused(result);
    held.group.set_limit(LIMIT_MIB);
    dump(&held.pair, &second, 0).expect("it fits again");
    held.restores(&[&second]);
}

/// Without `--memory-limit` it is three quarters of the group's, not of the host's.
#[test]
fn the_default_limit_is_of_the_group() {
    let Some(mut held) = Held::start(&[]) else {
        return;
    };
    let log = held.pair.cache.log();
    assert!(log.contains("memory_limit=\"108 MiB\""), "{log}");
    let large = ImageSet::with_pages(2, 80 * MIB);
    assert!(dump(&held.pair, &large, 0).is_err());
    assert!(held
        .pair
        .cache
        .log()
        .contains("the memory limit of 108 MiB is reached"));
    held.lives();
    held.restores(&[]);
}

/// In the virtual machine, whose groups are of version 2: all of this, or what differs there if the rest runs here.
#[test]
fn in_the_second_version() {
    if in_machine() {
        return;
    }
    let here = MemoryGroup::new(LIMIT_MIB).is_some();
    let different = ["a_reservation", "the_default_limit"];
    let said = run_in_machine(
        env!("CARGO_TARGET_TMPDIR"),
        if here { &different } else { &[] },
    );
    let passed = said
        .lines()
        .find(|line| line.starts_with("test result: ok."));
    let passed = passed.unwrap_or_else(|| panic!("no result in\n{said}"));
    assert!(
        passed.contains(if here { " 2 passed" } else { " 9 passed" }),
        "{passed}"
    );
}

/// The same on the source: a dump for which image-proxy has no room fails before anything is frozen.
#[test]
fn a_proxy_without_room_refuses_before_the_freeze() {
    in_machine();
    let Some(group) = MemoryGroup::new(64) else {
        eprintln!("no memory control group can be made here; the virtual machine runs this test");
        return;
    };
    let mut pair = Pair::with_by(Options::default(), &[], &group.enter());
    let set = ImageSet::with_pages(1, 40 * MIB);
    dump(&pair, &set, 0).expect("there is room");
    group.set_limit((group.usage() >> 20) + 10);
    let Err(DumpError::PreDump(script)) = dump(&pair, &set, 0) else {
        panic!("there was room")
    };
    assert!(
        script.stderr.contains("memory is short on this host"),
        "{script:?}"
    );
    assert!(pair.proxy.running());
    group.set_limit(64);
    dump(&pair, &set, 0).expect("there is room again");
}
