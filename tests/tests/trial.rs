//! A restore stands on the target before the source kills. The CRIU that restores is this process. With CRIU itself:
//! `real_criu/hold.rs`.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{until, Options, Pair, SOON};
use e2e_tests::fake::job::DumpError;
use e2e_tests::fake::run::{compare, fetch};
use e2e_tests::fake::scenario::EarlyRestore;
use e2e_tests::fake::script::{self, ScriptResult};
use e2e_tests::fake::{DumpJob, ImageSet, Protocol, Serve};

/// How long something that must not happen is watched. Too short could only hide a bug, never invent one.
const WATCH: Duration = Duration::from_millis(200);

/// image-cache as the script of a CRIU, which is this process.
fn says(action: &str, dir: &Path) -> ScriptResult {
    script::run(&bin("image-cache"), action, dir, dir, SOON).expect("the script runs")
}

fn post_restore(dir: &Path) -> JoinHandle<ScriptResult> {
    let dir = dir.to_owned();
    std::thread::spawn(move || says("post-restore", &dir))
}

/// A dump with its script, under way.
fn dump(protocol: &Protocol, source: &Path) -> (JoinHandle<Result<(), DumpError>>, ImageSet) {
    let job = DumpJob::new(protocol, source, 1).gated();
    let set = job.set();
    (std::thread::spawn(move || job.run()), set)
}

fn pair(options: &[&str]) -> Pair {
    Pair::with(Options::default().proxy(options))
}

fn control(pair: &Pair) -> PathBuf {
    pair.target.join("image-cache-control.sock")
}

#[test]
fn the_source_kills_when_the_restore_stands() {
    for protocol in Protocol::all() {
        let pair = pair(&["--commit-on", "restored"]);
        assert!(says("pre-stream", &pair.target).ok());
        let (dump, set) = dump(&protocol, &pair.source);
        let early = EarlyRestore::start(&protocol, &pair.target, &set);
        early.expect(&set);
        assert!(says("pre-restore", &pair.target).ok());
        std::thread::sleep(WATCH);
        assert!(!dump.is_finished(), "{protocol:?}: nothing stands yet");
        let held = post_restore(&pair.target);
        let dumped = dump.join().expect("no panic");
        dumped.unwrap_or_else(|e| panic!("{protocol:?}: {e:?}\n{}", pair.cache.log()));
        let held = held.join().expect("no panic");
        assert!(held.ok(), "{protocol:?}: {held:?}");
        assert!(
            !pair.cache.log().contains("restored; released"),
            "nothing says yet that it runs"
        );
        assert!(says("post-resume", &pair.target).ok());
        until("the set is released", || {
            pair.cache.log().contains("restored; released")
        });
        let log = pair.cache.log();
        assert!(log.contains("restored and held"), "{log}");
    }
}

/// With `auto`, a restore that waits and says that it can hold is enough; no other restore gets the set.
#[test]
fn one_restore_that_waits_is_tried() {
    let pair = pair(&["--session", "web"]);
    assert!(says("pre-stream", &pair.target).ok());
    let first = Serve::connect(&pair.target).expect("connect");
    assert!(first.asks_in_vain("inventory.img", WATCH).expect("poll"));
    let protocol = Protocol::Stream;
    let (dump, set) = dump(&protocol, &pair.source);
    until("the trial", || pair.cache.log().contains("in trial"));
    until("the restore begins", || {
        pair.cache.log().contains("restore --stream begins")
    });
    let second = Serve::connect(&pair.target).expect("connect");
    assert!(
        second.asks_in_vain("inventory.img", WATCH).expect("poll"),
        "given to two"
    );
    assert!(!dump.is_finished());
    // The first one leaves; its process, this one, lives on, so the trial goes on until the source has waited enough.
    drop((first, second));
    let (ok, said) = pair.ask_cache(&["drop", "web"]);
    assert!(ok, "{said}");
    let failed = dump
        .join()
        .expect("no panic")
        .expect_err("its set was dropped");
    assert!(!format!("{failed:?}").is_empty());
    assert!(control(&pair).exists());
    // Nothing of the set is left.
    let third = Serve::connect(&pair.target).expect("connect");
    assert!(third.asks_in_vain("inventory.img", WATCH).expect("poll"));
    drop(set);
}

/// `--commit-timeout` covers the trial, and what comes too late is told so.
#[test]
fn a_restore_that_does_not_stand_in_time_costs_nothing() {
    let pair = pair(&["--commit-on", "restored", "--commit-timeout", "2s"]);
    assert!(says("pre-stream", &pair.target).ok());
    let (dump, set) = dump(&Protocol::Stream, &pair.source);
    let serve = Serve::connect(&pair.target).expect("connect");
    let fetched = fetch(&serve, &set.names()).expect("all of it");
    compare(&fetched, &set).expect("the set");
    assert!(says("pre-restore", &pair.target).ok());
    dump.join().expect("no panic").expect_err("nothing stood");
    let log = pair.proxy.log();
    assert!(log.contains("--commit-timeout"), "{log}");
    let late = says("post-restore", &pair.target);
    assert!(!late.ok(), "{late:?}");
}
