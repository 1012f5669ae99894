//! `criu-stream.md`: when a set is complete, who waits, who is served, and what a dump that failed leaves behind.

use std::io::Read;
use std::time::Duration;

use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::job::RestoreJob;
use e2e_tests::fake::run::{check_one, compare, dump, restore_stream, Event};
use e2e_tests::fake::scenario::EarlyRestore;
use e2e_tests::fake::{restore, Capture, Content, DumpJob, ImageSet, Protocol, Serve};

/// How long something that must not happen is watched. Too short could only hide a bug, never invent one.
const WATCH: Duration = Duration::from_millis(200);

fn job(pair: &Pair, seed: u64) -> DumpJob {
    DumpJob::new(&Protocol::Stream, &pair.source, seed)
}

fn session_dirs(pair: &Pair) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(pair.target.join("sessions")).expect("ours");
    entries
        .map(|entry| entry.expect("ours").path())
        .filter(|path| path.is_dir())
        .collect()
}

#[test]
fn a_set_passes_ungated_and_gated() {
    let pair = Pair::new();
    job(&pair, 1).run().expect("ungated");
    restore_stream(&pair.target, &ImageSet::sample(1)).expect("the restore");
    job(&pair, 2).gated().run().expect("gated");
    restore_stream(&pair.target, &ImageSet::sample(2)).expect("the restore");
}

/// Every image is written and closed, and the post-dump script has not run: nothing can be restored yet.
#[test]
fn the_inventory_waits_for_the_commit() {
    let pair = Pair::new();
    let job = job(&pair, 1).gated();
    let early = EarlyRestore::start(&Protocol::Stream, &pair.target, &job.set());
    let mut watched = false;
    job.run_with(&job.set(), &mut |event| {
        if event == Event::Written {
            let serve = Serve::connect(&pair.target).expect("connect");
            assert!(
                serve.asks_in_vain("inventory.img", WATCH).expect("poll"),
                "before the commit"
            );
            watched = true;
        }
    })
    .expect("the dump");
    assert!(watched);
    early.expect(&job.set());
}

/// An ungated set is complete when inventory.img ended and no pipe is open. Then CRIU kills, and may fail to: the set is
/// served when CRIU has ended, and not when it has closed its connection.
#[test]
fn a_set_without_script_is_served_when_criu_has_ended() {
    let pair = Pair::new();
    let capture = Capture::connect_alone(&pair.source).expect("connect");
    let set = ImageSet::sample(3);
    dump(&capture, &set, &mut |_| {}).expect("the dump");
    until("the cache holds it", || {
        pair.ask_cache(&["status"])
            .1
            .contains("prepared: waits for the commit")
    });
    let criu = capture.close();
    let serve = Serve::connect(&pair.target).expect("connect");
    assert!(serve.asks_in_vain("inventory.img", WATCH).expect("poll"));
    drop((serve, criu));
    restore_stream(&pair.target, &set).expect("CRIU has ended well");
}

/// A dump without script, written by a CRIU with `task` in its hands, up to its closed connection.
fn dumped_alone(pair: &Pair, task: i32, set: &ImageSet) -> e2e_tests::fake::StandIn {
    let capture = Capture::connect_for(&pair.source, task).expect("connect");
    let mut last = 0;
    let dumped = dump(&capture, set, &mut |_| {
        // Aside, and before the dump is over: a real CRIU takes longer.
        last += 1;
        if last == 2 {
            until("image-proxy has looked for the tasks", || {
                pair.proxy
                    .log()
                    .contains("looked which tasks CRIU has stopped")
            });
        }
    });
    dumped.expect("the dump");
    capture.close()
}

fn says_in_doubt(pair: &Pair, set: &ImageSet, reason: &str) {
    until("it is in doubt", || {
        pair.ask_cache(&["status"]).1.contains("in doubt")
    });
    let log = pair.proxy.log();
    assert!(log.contains(reason), "{reason:?} is not in {log}");
    assert!(restore_stream(&pair.target, set).is_err());
}

/// CRIU has exited before image-proxy looks how it ends: its exit status is there all the same, so nothing is in doubt.
#[test]
fn a_criu_that_is_gone_at_once_leaves_no_doubt() {
    let pair = Pair::new();
    for seed in 0..20 {
        let set = ImageSet::small(seed);
        let capture = Capture::connect_alone(&pair.source).expect("connect");
        let mut known = false;
        let dumped = dump(&capture, &set, &mut |_| {
            // Its options are looked at first, and a real CRIU takes longer to freeze anything.
            if !std::mem::replace(&mut known, true) {
                until("it is a run", || {
                    pair.ask_proxy(&["status"]).1.contains("session ")
                });
            }
        });
        dumped.expect("the dump");
        drop(capture.close());
        restore_stream(&pair.target, &set).expect("the restore");
    }
    assert!(!pair.proxy.log().contains("in doubt"));
}

/// It fails behind its last image, e.g. by another script, or is killed there.
#[test]
fn a_criu_without_script_that_fails_leaves_the_set_in_doubt() {
    for killed in [false, true] {
        let pair = Pair::new();
        let set = ImageSet::sample(1);
        let criu = dumped_alone(&pair, 0, &set);
        match killed {
            true => criu.kill(),
            false => criu.ends_with(1),
        }
        drop(criu);
        says_in_doubt(&pair, &set, "has ended with");
    }
}

/// The tasks are those that CRIU has stopped, and are looked at when it has ended.
#[test]
fn without_script_the_tasks_that_criu_held_decide() {
    use e2e_tests::fake::script::Task;
    let started = || {
        let task = Task::start().expect("a process");
        let pid = i32::try_from(task.pid()).expect("a pid");
        (task, pid)
    };
    let set = ImageSet::sample(1);

    let pair = Pair::new();
    let (task, pid) = started();
    let criu = dumped_alone(&pair, pid, &set);
    task.kill();
    drop(criu);
    drop(task);
    restore_stream(&pair.target, &set).expect("it was killed");

    // --leave-running
    let pair = Pair::new();
    let (task, pid) = started();
    drop(dumped_alone(&pair, pid, &set));
    // In doubt if the tasks were seen frozen behind the last page; else it may be of two moments, and is given up.
    until("it is not restored", || {
        let said = pair.ask_cache(&["status"]).1;
        said.contains("in doubt") || said.contains("no sessions")
    });
    assert!(pair.proxy.log().contains("did not kill"));
    assert!(!pair.cache.log().contains("ready to be restored"));
    drop(task);

    // The dump has failed, and all goes on.
    let pair = Pair::new();
    let (task, pid) = started();
    let criu = dumped_alone(&pair, pid, &set);
    criu.ends_with(1);
    drop(criu);
    until("the set is given up", || {
        pair.ask_cache(&["status"]).1.contains("no sessions")
    });
    assert!(pair.proxy.log().contains("lives"));
    drop(task);
}

#[test]
fn an_inventory_at_its_end_is_not_the_end() {
    let pair = Pair::new();
    let capture = Capture::connect_alone(&pair.source).expect("connect");
    let set = ImageSet::sample(3);
    let files = set.get("files.img");
    let mut global = capture.create("files.img").expect("open");
    files.send_range(&mut global, 0, 1000, 1000).expect("some");
    for name in ["pages-1.img", "pstree.img", "inventory.img"] {
        let mut channel = capture.create(name).expect("open");
        set.get(name).send(&mut channel).expect("bytes");
    }
    let serve = Serve::connect(&pair.target).expect("connect");
    let tree = Serve::connect(&pair.target).expect("connect");
    check_one(&tree, "pstree.img", set.get("pstree.img")).expect("complete");
    assert!(
        serve.asks_in_vain("absent.img", WATCH).expect("poll"),
        "files.img is open"
    );
    files
        .send_range(&mut global, 1000, files.len(), 4096)
        .expect("the rest");
    drop(global);
    check_one(&tree, "files.img", files).expect("complete");
    drop(capture);
    assert!(tree.open("absent.img").expect("a reply").is_none());
}

#[test]
fn an_early_restore_waits() {
    for gated in [false, true] {
        let pair = Pair::new();
        let early = EarlyRestore::start(&Protocol::Stream, &pair.target, &ImageSet::sample(1));
        let job = job(&pair, 1);
        let job = if gated { job.gated() } else { job };
        job.run().expect("the dump");
        early.expect(&job.set());
    }
}

#[test]
fn a_kept_set_is_restored_again_and_again_and_at_once() {
    let pair = Options::default().cache(&["--keep"]).start();
    let job = job(&pair, 1).gated();
    job.run().expect("the dump");
    for _ in 0..3 {
        restore_stream(&pair.target, &job.set()).expect("one after another");
    }
    let restores: Vec<_> = (0..4)
        .map(|_| EarlyRestore::start(&Protocol::Stream, &pair.target, &job.set()))
        .collect();
    for restore in restores {
        restore.expect(&job.set());
    }
}

/// Several readers of one set that is not kept: one that asks for a single image beside the restore.
#[test]
fn a_reader_beside_the_restore_releases_nothing() {
    let pair = Options::default().proxy(&["--session", "one"]).start();
    let job = job(&pair, 1);
    job.run().expect("the dump");
    let set = job.set();
    for _ in 0..3 {
        let serve = Serve::connect(&pair.target).expect("connect");
        check_one(&serve, "pages-1.img", set.get("pages-1.img")).expect("one image");
    }
    let beside = Serve::connect(&pair.target).expect("connect");
    check_one(&beside, "core-7.img", set.get("core-7.img")).expect("one image");
    assert!(pair.session_dir("one").exists());
    restore_stream(&pair.target, &set).expect("the restore");
}

#[test]
fn a_restored_set_is_released_and_not_served_again() {
    let pair = Options::default().proxy(&["--session", "one"]).start();
    let first = job(&pair, 1).gated();
    first.run().expect("the dump");
    assert!(pair.session_dir("one").join("streamer-serve.sock").exists());
    restore_stream(&pair.target, &first.set()).expect("the restore");
    until("the session is gone", || !pair.session_dir("one").exists());
    let serve = Serve::connect(&pair.target).expect("connect");
    assert!(
        serve.asks_in_vain("inventory.img", WATCH).expect("poll"),
        "it was released"
    );
    drop(serve);
    let again = EarlyRestore::start(&Protocol::Stream, &pair.target, &first.set());
    let second = job(&pair, 2).gated();
    second.run().expect("the dump");
    again.expect(&second.set());
}

/// A restore that gives up in the middle has restored nothing: the set is still there for the next.
#[test]
fn an_unfinished_restore_releases_nothing() {
    let pair = Options::default().proxy(&["--session", "one"]).start();
    let job = job(&pair, 1).gated();
    job.run().expect("the dump");
    for asked in 0..4 {
        let serve = Serve::connect(&pair.target).expect("connect");
        for name in ["inventory.img", "pstree.img", "core-7.img", "pagemap-7.img"]
            .iter()
            .take(asked)
        {
            check_one(&serve, name, job.set().get(name)).expect("asked for");
        }
    }
    restore_stream(&pair.target, &job.set()).expect("the whole restore");
    until("the session is gone", || !pair.session_dir("one").exists());
}

/// A restore that is killed when it has read everything has not brought its process up: the set stays.
#[test]
fn a_killed_restore_releases_nothing() {
    let pair = Options::default().proxy(&["--session", "one"]).start();
    let job = job(&pair, 1).gated();
    job.run().expect("the dump");
    let restore = RestoreJob {
        protocol: Protocol::Stream,
        dir: pair.target.clone(),
        seed: 1,
    };
    let fake = env!("CARGO_BIN_EXE_fake-criu");
    for _ in 0..3 {
        let mut child = restore.spawn(fake);
        child.wait_half();
        child.kill();
    }
    // This one closes its connection and lives: the set is released.
    let mut child = restore.spawn(fake);
    child.wait_half();
    child.go_on();
    child.wait_half();
    until("the session is gone", || !pair.session_dir("one").exists());
    child.go_on();
    let (status, said) = child.wait();
    assert!(status.success(), "{status}: {said}");
}

#[test]
fn runs_after_one_another() {
    let pair = Pair::new();
    for seed in 1..=5 {
        let job = job(&pair, seed);
        let job = if seed % 2 == 0 { job.gated() } else { job };
        job.run().expect("the dump");
        restore_stream(&pair.target, &job.set()).expect("the restore");
    }
}

/// Two CRIUs at one proxy at the same time. Their sets do not mix, and each is found in its session's directory.
#[test]
fn runs_beside_one_another() {
    let pair = Pair::new();
    let mut children: Vec<_> = [1, 2]
        .map(|seed| job(&pair, seed).gated().stop_in("pages-1.img"))
        .map(|job| job.spawn(env!("CARGO_BIN_EXE_fake-criu")))
        .into_iter()
        .collect();
    for child in &mut children {
        child.wait_half();
    }
    for child in &mut children {
        child.go_on();
    }
    for child in children {
        let (status, said) = child.wait();
        assert!(status.success(), "{status}: {said}");
    }
    let dirs = session_dirs(&pair);
    let mut left = vec![1, 2];
    for dir in &dirs {
        let serve = Serve::connect(dir).expect("connect");
        let mut bytes = Vec::new();
        serve
            .open("inventory.img")
            .expect("a reply")
            .expect("exists")
            .read_to_end(&mut bytes)
            .expect("bytes");
        let found = left
            .iter()
            .position(|seed| Content::dump_inventory(*seed).to_vec() == bytes);
        let seed = left.remove(found.expect("one of ours, once"));
        restore(&serve, &ImageSet::sample(seed)).expect("one set, not mixed");
    }
    assert_eq!(left, [0; 0], "sessions: {dirs:?}");
}

/// A pre-dump and the dump after it are one series; the restore gets the dump.
#[test]
fn a_series_of_pre_dumps_ends_with_a_dump() {
    for gated in [false, true] {
        let pair = Pair::new();
        for round in 0..2 {
            let set = ImageSet::new(vec![
                ("pagemap-7.img", Content::pattern(round, 100)),
                ("pages-1.img", Content::pattern(round, 1 << 20)),
                ("inventory.img", Content::pre_dump_inventory()),
            ]);
            let capture = Capture::connect(&pair.source).expect("connect");
            if gated {
                pre_dump_script(&pair);
            }
            dump(&capture, &set, &mut |_| {}).expect("a pre-dump");
        }
        let job = job(&pair, 5);
        let job = if gated { job.gated() } else { job };
        job.run().expect("the dump");
        restore_stream(&pair.target, &job.set()).expect("the restore");
    }
}

/// `criu pre-dump` runs the pre-dump script too, but never a post-dump script.
fn pre_dump_script(pair: &Pair) {
    let program = e2e_tests::bins::bin("image-proxy");
    let limit = Duration::from_secs(20);
    let result =
        e2e_tests::fake::script::run(&program, "pre-dump", &pair.source, &pair.source, limit);
    let result = result.expect("the script runs");
    assert!(result.ok(), "{result:?}");
}

/// Whoever waits for an image of a dump that failed gets an error, and the set is never served.
#[test]
fn a_dump_without_inventory_is_an_error_for_whoever_waits() {
    let pair = Pair::new();
    let set = ImageSet::sample(1);
    let capture = Capture::connect(&pair.source).expect("connect");
    let mut channel = capture.create("ids-7.img").expect("open");
    set.get("ids-7.img").send(&mut channel).expect("bytes");
    drop(channel);
    let serve = Serve::connect(&pair.target).expect("connect");
    check_one(&serve, "ids-7.img", set.get("ids-7.img")).expect("it is complete");
    let waiting =
        std::thread::spawn(move || serve.open("inventory.img").map(|channel| channel.is_some()));
    drop(capture);
    let answer = waiting.join().expect("no panic");
    assert!(answer.is_err(), "served: {answer:?}");
    let next = job(&pair, 2);
    next.run().expect("the next dump");
    restore_stream(&pair.target, &next.set()).expect("the restore");
}

/// CRIU is killed in the middle of an image: all its pipes and its socket end at once, as if it had finished. (Without
/// the script a kill in the middle of `inventory.img` cannot be told from the end; docs/failures.md says what that costs.)
#[test]
fn a_killed_dump_is_never_served() {
    for gated in [false, true] {
        let names = ["files.img", "pages-1.img", "pstree.img", "inventory.img"];
        for name in names.into_iter().take(if gated { 4 } else { 3 }) {
            let pair = Pair::new();
            let early = EarlyRestore::start(&Protocol::Stream, &pair.target, &ImageSet::sample(1));
            let job = job(&pair, 1).stop_in(name);
            let job = if gated { job.gated() } else { job };
            let mut child = job.spawn(env!("CARGO_BIN_EXE_fake-criu"));
            child.wait_half();
            child.kill();
            let next = self::job(&pair, 2).gated();
            next.run().expect("the next dump");
            match early.end() {
                Ok(fetched) => compare(&fetched, &next.set())
                    .unwrap_or_else(|error| panic!("killed in {name}, gated: {gated}: {error}")),
                Err(_) => restore_stream(&pair.target, &next.set()).expect("the restore"),
            }
        }
    }
}

#[test]
fn an_image_may_be_asked_for_again() {
    let pair = Pair::new();
    let job = job(&pair, 1);
    job.run().expect("the dump");
    let serve = Serve::connect(&pair.target).expect("connect");
    for _ in 0..3 {
        for name in ["pages-1.img", "pages-2.img", "core-7.img"] {
            check_one(&serve, name, job.set().get(name)).expect("again");
        }
    }
    // The same image twice at the same time, read in turn.
    let mut one = serve.open("pages-1.img").expect("a reply").expect("exists");
    let mut two = serve.open("pages-1.img").expect("a reply").expect("exists");
    job.set().get("pages-1.img").check(&mut two).expect("whole");
    job.set().get("pages-1.img").check(&mut one).expect("whole");
}

#[test]
fn slow_and_leaving_readers_hold_up_nobody() {
    let pair = Pair::new();
    let set = ImageSet::with_pages(1, 4 << 20);
    job(&pair, 0).run_with(&set, &mut |_| {}).expect("the dump");
    let serve = Serve::connect(&pair.target).expect("connect");
    let mut slow = serve.open("pages-1.img").expect("a reply").expect("exists");
    for bytes in [0, 1, 4096, 1 << 20] {
        let mut leaving = serve.open("pages-1.img").expect("a reply").expect("exists");
        let mut head = vec![0; bytes];
        leaving.read_exact(&mut head).expect("the head");
    }
    restore(&serve, &set).expect("on the same connection");
    set.get("pages-1.img")
        .check(&mut slow)
        .expect("slow, but whole");
}

/// `pagemap-7.img` of the sample is larger than a pipe and CRIU's 4096 bytes; here it is much larger, and so are its
/// pages, and both tasks read at once.
#[test]
fn a_pagemap_larger_than_a_pipe() {
    let pair = Pair::new();
    let set = ImageSet::new(vec![
        ("pagemap-7.img", Content::pattern(1, 3_000_001)),
        ("pages-1.img", Content::pattern(2, 2 << 20)),
        ("pagemap-8.img", Content::pattern(3, 2_500_000)),
        ("pages-2.img", Content::pattern(4, 1 << 20)),
        ("pstree.img", Content::pattern(5, 26)),
        ("inventory.img", Content::dump_inventory(1)),
    ]);
    job(&pair, 0)
        .gated()
        .run_with(&set, &mut |_| {})
        .expect("the dump");
    restore_stream(&pair.target, &set).expect("the restore");
}

/// Many images open at once, written a little at a time in turn.
#[test]
fn five_hundred_images_open_at_once() {
    let pair = Pair::new();
    let capture = Capture::connect_alone(&pair.source).expect("connect");
    let contents: Vec<Content> = (0..500)
        .map(|seed| Content::pattern(seed, 9000 + seed))
        .collect();
    let mut channels: Vec<_> = (0..500)
        .map(|number| capture.create(&format!("core-{number}.img")).expect("open"))
        .collect();
    for round in 0..5 {
        for (content, channel) in contents.iter().zip(&mut channels) {
            let to = if round == 4 {
                content.len()
            } else {
                (round + 1) * 2000
            };
            content
                .send_range(channel, round * 2000, to, 2000)
                .expect("a piece");
        }
    }
    for name in ["pstree.img", "inventory.img"] {
        Content::pattern(7, 30)
            .send(&mut capture.create(name).expect("open"))
            .expect("bytes");
    }
    drop((channels, capture));
    let serve = Serve::connect(&pair.target).expect("connect");
    for (number, content) in contents.iter().enumerate() {
        check_one(&serve, &format!("core-{number}.img"), content).expect("each its own bytes");
    }
    assert!(serve.open("absent.img").expect("a reply").is_none());
}
