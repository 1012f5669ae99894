//! A set is given to one restore at a time, and what is known of that decides about the next. What CRIU itself does when
//! it fails or is killed is in `real_criu/restores.rs`.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, scratch, start_proxy, until, wait_child, Daemon, Pair, SOON};
use e2e_tests::fake::job::RestoreJob;
use e2e_tests::fake::run::restore_stream;
use e2e_tests::fake::scenario::EarlyRestore;
use e2e_tests::fake::script::{self, ScriptResult};
use e2e_tests::fake::{restore, DumpJob, ImageSet, Protocol, Serve};

const FAKE: &str = env!("CARGO_BIN_EXE_fake-criu");

/// How long something that must not happen is watched. Too short could only hide a bug, never invent one.
const WATCH: Duration = Duration::from_millis(200);

/// image-cache as the script of a CRIU, which is this process.
fn says(action: &str, dir: &Path) -> ScriptResult {
    script::run(&bin("image-cache"), action, dir, dir, SOON).expect("the script runs")
}

fn dumped(protocol: &Protocol, source: &Path) -> ImageSet {
    let job = DumpJob::new(protocol, source, 1).gated();
    job.run().expect("the dump");
    job.set()
}

fn job(protocol: &Protocol, target: &Path) -> RestoreJob {
    RestoreJob {
        protocol: protocol.clone(),
        dir: target.to_owned(),
        seed: 1,
    }
}

fn command(verb: &str, target: &Path) -> bool {
    let mut command = Command::new(bin("image-cache"));
    let control = target.join("image-cache-control.sock");
    command.args([verb, "web", "--control"]).arg(control);
    let mut child = command.spawn().expect("it starts");
    let status = wait_child(&mut child, SOON).expect("our own child");
    status.expect("it ends").success()
}

fn is_released(cache: &Daemon) -> bool {
    cache.log().contains("restored; released")
}

/// Two restores of one set. The second has nothing before the first is known to have failed.
#[test]
fn the_next_restore_waits_until_one_has_failed() {
    for protocol in Protocol::all() {
        let pair = Pair::new();
        let set = dumped(&protocol, &pair.source);
        let mut first = job(&protocol, &pair.target).spawn(FAKE);
        first.wait_half();
        // It has everything, and could succeed at any moment.
        let second = EarlyRestore::start(&protocol, &pair.target, &set);
        let stream = Serve::connect(&pair.target).expect("connect");
        if matches!(protocol, Protocol::Stream) {
            let in_vain = stream.asks_in_vain("inventory.img", WATCH).expect("poll");
            assert!(in_vain, "given to two");
        }
        drop(stream);
        std::thread::sleep(WATCH);
        assert!(!second.is_finished(), "{protocol:?}: given to two");
        first.kill();
        second.expect(&set);
        until("the set is released", || is_released(&pair.cache));
    }
}

/// The first has succeeded: there is nothing left for the second, which is told.
#[test]
fn the_next_restore_is_told_that_one_has_succeeded() {
    for protocol in Protocol::all() {
        let pair = Pair::new();
        let set = dumped(&protocol, &pair.source);
        let mut first = job(&protocol, &pair.target).spawn(FAKE);
        first.wait_half();
        let second = EarlyRestore::start(&protocol, &pair.target, &set);
        std::thread::sleep(WATCH);
        assert!(!second.is_finished(), "{protocol:?}: given to two");
        first.go_on();
        first.wait_half();
        let told = second.end().expect_err("restored twice");
        assert!(!told.contains("lacks"), "{protocol:?}: {told}");
        assert!(is_released(&pair.cache));
        first.go_on();
        assert!(first.wait().0.success());
    }
}

/// Five at once, of which each fails but the last.
#[test]
fn of_many_restores_at_once_one_succeeds() {
    let pair = Pair::new();
    dumped(&Protocol::Stream, &pair.source);
    let restores: Vec<_> = (0..5)
        .map(|_| job(&Protocol::Stream, &pair.target).spawn(FAKE))
        .collect();
    let mut restores: Vec<_> = restores
        .into_iter()
        .map(|mut child| {
            let (said, hears) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                child.wait_half_or_end();
                // Nobody listens any more when the test is over.
                let _ = said.send(child);
            });
            hears
        })
        .collect();
    for round in 0..5 {
        let mut ready = Vec::new();
        until("one has the set", || {
            ready.extend(
                (0..restores.len()).filter_map(|n| Some((n, restores[n].try_recv().ok()?))),
            );
            !ready.is_empty()
        });
        std::thread::sleep(WATCH / 2);
        let more = restores.iter().filter(|r| r.try_recv().is_ok()).count();
        assert_eq!(ready.len() + more, 1, "in round {round}");
        let (n, mut child) = ready.remove(0);
        drop(restores.remove(n));
        match round {
            4 => {
                child.go_on();
                child.wait_half();
                until("the set is released", || is_released(&pair.cache));
                child.go_on();
                assert!(child.wait().0.success());
            }
            _ => child.kill(),
        }
    }
}

/// What the script says before it knows that the tasks run is no success: the restore may still fail.
#[test]
fn pre_resume_alone_releases_nothing() {
    let pair = Pair::new();
    let set = dumped(&Protocol::Stream, &pair.source);
    let serve = Serve::connect(&pair.target).expect("connect");
    restore(&serve, &set).expect("all of it");
    for action in ["pre-restore", "post-restore", "pre-resume"] {
        let said = says(action, &pair.target);
        assert!(said.ok(), "{action}: {said:?}");
    }
    std::thread::sleep(WATCH);
    assert!(!is_released(&pair.cache));
    drop(serve);
    until("the set is released", || is_released(&pair.cache));
    // Too late to matter, and no reason to complain.
    let said = says("post-resume", &pair.target);
    assert!(said.ok() && said.stderr.is_empty(), "{said:?}");
}

/// A script that belongs to no restore stops its CRIU while nothing is built.
#[test]
fn a_script_without_a_restore_fails_at_its_start() {
    let pair = Pair::new();
    let set = dumped(&Protocol::Stream, &pair.source);
    let mut other = job(&Protocol::Stream, &pair.target).spawn(FAKE);
    other.wait_half();
    for (action, ok) in [
        ("pre-stream", true), // it connects next
        ("pre-restore", false),
        ("setup-namespaces", true),
        ("post-restore", false),
    ] {
        let said = says(action, &pair.target);
        assert_eq!(said.ok(), ok, "{action}: {said:?}");
        assert_eq!(said.stderr.contains("reads from here"), !ok, "{said:?}");
    }
    other.kill();
    // Now it is this one's.
    let serve = Serve::connect(&pair.target).expect("connect");
    restore(&serve, &set).expect("all of it");
    assert!(says("pre-restore", &pair.target).ok());
    drop(serve);
    // And without a daemon there is none.
    let empty = scratch();
    assert!(says("pre-stream", empty.path()).ok());
    assert!(!says("pre-restore", empty.path()).ok());
}

/// Not everything was read, and it has succeeded: a CRIU may have memory by other ways.
#[test]
fn what_was_not_read_proves_nothing_against_the_script() {
    let pair = Pair::new();
    let set = dumped(&Protocol::Stream, &pair.source);
    let mut other = PartialRestore::start(&pair, &set);
    assert!(says("post-resume", &pair.target).ok());
    other.end();
    until("the set is released", || is_released(&pair.cache));
}

/// A restore that leaves its pages.
struct PartialRestore(Option<Serve>);

impl PartialRestore {
    fn start(pair: &Pair, set: &ImageSet) -> Self {
        let serve = Serve::connect(&pair.target).expect("connect");
        for name in set
            .names()
            .iter()
            .filter(|name| !name.starts_with("pages-"))
        {
            serve.fetch(name);
        }
        Self(Some(serve))
    }

    fn end(&mut self) {
        self.0 = None;
    }
}

/// A cache that sees no number of the CRIUs here.
fn apart() -> (tempfile::TempDir, Daemon, Daemon) {
    let dir = scratch();
    let port = free_port();
    let args = ["--port", &port.to_string(), "-D", "."].map(str::to_owned);
    let target = dir.path().join("t");
    let source = dir.path().join("s");
    std::fs::create_dir(&target).expect("a fresh directory");
    std::fs::create_dir(&source).expect("a fresh directory");
    let cache = Daemon::start_in_own_pids("image-cache", &target, &args);
    let proxy = start_proxy(&source, port, &["--session".to_owned(), "web".to_owned()]);
    (dir, cache, proxy)
}

/// Before Linux 6.9 a pidfd does not tell one process from another.
fn pidfds_tell() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || {
        numbers
            .next()
            .and_then(|n| n.parse::<u32>().ok())
            .unwrap_or(0)
    };
    (number(), number()) >= (6, 9)
}

/// image-cache in a container: the script shows its CRIU by a pidfd.
#[test]
fn the_script_is_known_in_another_pid_namespace() {
    let (dir, cache, _proxy) = apart();
    let (source, target) = (dir.path().join("s"), dir.path().join("t"));
    let set = dumped(&Protocol::Stream, &source);
    // Of an unseen restore and an unseen script neither need belong to the other.
    let mut other = job(&Protocol::Stream, &target).spawn(FAKE);
    other.wait_half();
    assert!(!says("pre-restore", &target).ok(), "a guess");
    other.kill();
    until("the set is in doubt", || cache.log().contains("in doubt:"));
    assert!(command("release", &target));

    let serve = Serve::connect(&target).expect("connect");
    restore(&serve, &set).expect("all of it");
    let known = says("pre-restore", &target).ok();
    assert_eq!(known, pidfds_tell());
    if known {
        assert!(says("post-resume", &target).ok());
        drop(serve);
        until("the set is released", || is_released(&cache));
    }
}

/// Nothing tells what became of a restore: its set is neither served nor dropped, until an operator decides.
#[test]
fn after_a_restore_in_doubt_the_set_is_not_served() {
    let (dir, cache, _proxy) = apart();
    let (source, target) = (dir.path().join("s"), dir.path().join("t"));
    let set = dumped(&Protocol::Stream, &source);
    let doubts = || cache.log().matches("in doubt:").count();
    for n in 1..=2 {
        let mut one = job(&Protocol::Stream, &target).spawn(FAKE);
        one.wait_half();
        one.kill();
        until("the set is in doubt", || doubts() == n);
        let refused = restore_stream(&target, &set).expect_err("offered silently");
        assert!(refused.contains("closed"), "{refused}");
        assert!(cache.log().contains("a restore of it runs here"));
        assert!(command("release", &target), "release {n}");
    }
    // It is there, whole.
    let serve = Serve::connect(&target).expect("connect");
    restore(&serve, &set).expect("after the release");
    assert!(command("drop", &target));
    drop(serve);
    assert!(!command("release", &target), "there is no such session");
}
