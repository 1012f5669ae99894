//! `--release-on-read`: pages leave the cache as a restore takes them, and nobody is ever given a set that lacks some.

use std::io::Read;

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::run::{restore_stream, Event};
use e2e_tests::fake::{Content, DumpJob, ImageSet, Protocol, Serve};

const MIB: u64 = 1 << 20;
const PAGES: u64 = 256 * MIB;

fn pair() -> Pair {
    Options::default().cache(&["--release-on-read"]).start()
}

fn held(pair: &Pair) -> u64 {
    pair.cache.status_kib("VmRSS") * 1024
}

fn dump(pair: &Pair, seed: u64, gated: bool) -> ImageSet {
    let set = ImageSet::with_pages(seed, PAGES);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 0);
    let job = if gated { job.gated() } else { job };
    job.run_with(&set, &mut |_: Event| {}).expect("the dump");
    // Without a script the dump ends before its last bytes have arrived.
    until("all of it is there", || held(pair) > PAGES);
    set
}

/// Reads `bytes` of the pages image and leaves the rest.
fn read_some(serve: &Serve, set: &ImageSet, bytes: u64) -> impl Read {
    let mut channel = serve.open("pages-1.img").expect("a reply").expect("exists");
    let mut head = vec![0; usize::try_from(bytes).expect("fits")];
    channel.read_exact(&mut head).expect("the first part");
    let mut expected = vec![0; head.len()];
    set.get("pages-1.img").fill(0, &mut expected);
    assert!(head == expected);
    channel
}

#[test]
fn every_protocol_restores_with_it() {
    for protocol in Protocol::all() {
        let pair = pair();
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        job.run().expect("the dump");
        protocol
            .restore(&pair.target, &job.set())
            .unwrap_or_else(|e| panic!("{protocol:?}: {e}"));
        until("the set is gone", || {
            !pair.cache.log().contains("kept") && pair.cache.log().contains("restored; released")
        });
    }
}

/// What the cache still holds, and what the reader has, are together hardly more than the image.
#[test]
fn memory_goes_as_it_is_read() {
    let pair = pair();
    let idle = held(&pair);
    let set = dump(&pair, 1, true);
    let serve = Serve::connect(&pair.target).expect("connect");
    let names = set.names();
    for name in names.iter().filter(|n| **n != "pages-1.img") {
        let channel = serve.open(name).expect("a reply").expect("exists");
        set.get(name).check(&mut { channel }).expect("whole");
    }
    let pages = set.get("pages-1.img");
    let mut channel = serve.open("pages-1.img").expect("a reply").expect("exists");
    let mut taken = 0;
    let mut chunk = vec![0; 4 << 20];
    let mut expected = chunk.clone();
    while taken < PAGES {
        channel.read_exact(&mut chunk).expect("pages");
        pages.fill(taken, &mut expected);
        assert!(chunk == expected, "at {taken}");
        taken += chunk.len() as u64;
        until("both together are little more than the image", || {
            held(&pair) - idle + taken <= PAGES + PAGES / 10
        });
    }
    assert_eq!(channel.read(&mut chunk).expect("the end"), 0);
    drop(serve);
    until("the set is gone", || {
        pair.cache.log().contains("restored; released")
    });
}

/// The restore that took the set fails: later ones are told, at once, and nothing waits or is served.
#[test]
fn a_set_that_a_failed_restore_took_is_gone() {
    let pair = pair();
    let set = dump(&pair, 1, true);
    let serve = Serve::connect(&pair.target).expect("connect");
    let inventory = serve
        .open("inventory.img")
        .expect("a reply")
        .expect("exists");
    set.get("inventory.img")
        .check(&mut { inventory })
        .expect("whole");
    let half = read_some(&serve, &set, PAGES / 2);

    // While it goes on, it is the only one.
    let error = restore_stream(&pair.target, &set).expect_err("it is taken");
    assert!(error.contains("closed"), "{error}");
    drop(half);
    drop(serve);
    until("the loss is in the log", || {
        pair.cache.log().contains("the process is lost")
    });
    until("the rest goes back", || held(&pair) < PAGES / 4);
    for _ in 0..2 {
        let later = Serve::connect(&pair.target).expect("connect");
        let error = later.open("inventory.img").err().expect("gone").to_string();
        assert!(error.contains("closed"), "{error}");
    }
    assert!(pair.cache.log().contains("it is gone: a restore took"));

    // The next dump is none of its business.
    let set = dump(&pair, 2, true);
    restore_stream(&pair.target, &set).expect("the next one");
}

/// A restore that fails before it has read pages has cost nothing.
#[test]
fn a_restore_that_read_no_pages_can_be_repeated() {
    let pair = pair();
    let set = dump(&pair, 1, true);
    for _ in 0..2 {
        let serve = Serve::connect(&pair.target).expect("connect");
        let inventory = serve
            .open("inventory.img")
            .expect("a reply")
            .expect("exists");
        set.get("inventory.img")
            .check(&mut { inventory })
            .expect("whole");
        // The pipe is filled, and nobody reads it.
        drop(serve.open("pages-1.img").expect("a reply"));
    }
    until("both are over", || {
        pair.cache.log().matches("a reader left before").count() == 2
    });
    restore_stream(&pair.target, &set).expect("the third one");
}

/// Without the script nobody has said that the source's process is dead.
#[test]
fn a_set_without_a_commit_stays() {
    let pair = pair();
    let set = dump(&pair, 1, false);
    let serve = Serve::connect(&pair.target).expect("connect");
    let half = read_some(&serve, &set, PAGES / 2);
    assert!(held(&pair) > PAGES);
    drop(half);
    drop(serve);
    restore_stream(&pair.target, &set).expect("again");
}

/// Many images at once from one restore, each of them taken.
#[test]
fn images_are_taken_side_by_side() {
    let pair = pair();
    let names: Vec<String> = (1..=6).map(|n| format!("pages-{n}.img")).collect();
    let mut images: Vec<(&str, Content)> = (1..)
        .zip(&names)
        .map(|(n, name)| (name.as_str(), Content::pattern(n, n * 5 * MIB + 4096)))
        .collect();
    images.push(("inventory.img", Content::dump_inventory(1)));
    let set = ImageSet::new(images);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 0).gated();
    job.run_with(&set, &mut |_: Event| {}).expect("the dump");
    let serve = Serve::connect(&pair.target).expect("connect");
    std::thread::scope(|scope| {
        for name in &names {
            let (serve, set) = (&serve, &set);
            scope.spawn(move || {
                let channel = serve.open(name).expect("a reply").expect("exists");
                set.get(name).check(&mut { channel }).expect("whole");
            });
        }
    });
}
