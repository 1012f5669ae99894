//! The commit: a dump says OK only when the target has everything, and what was refused is never served.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{
    free_port, scratch, start_cache, start_proxy, until, wait_child, Options, Pair,
};
use e2e_tests::fake::run::Event;
use e2e_tests::fake::scenario::{dump_or_retry, EarlyRestore, Outcome};
use e2e_tests::fake::script::{self, Script, ScriptResult};
use e2e_tests::fake::{Capture, Content, DumpError, DumpJob, ImageSet, Protocol};
use e2e_tests::link::{Fault, Faults};
use rustix::process::{Pid, Signal};

const LIMIT: Duration = Duration::from_secs(30);
/// A refusal that needs no waiting must come well within this.
const AT_ONCE: Duration = Duration::from_secs(5);

fn run_script(action: &str, dir: &Path) -> ScriptResult {
    script::run(&bin("image-proxy"), action, dir, dir, LIMIT).expect("the script ends")
}

fn refused(result: &ScriptResult) {
    assert!(result.code.is_some_and(|code| code != 0), "{result:?}");
    assert!(!result.stderr.trim().is_empty(), "no reason on stderr");
    assert!(result.took < AT_ONCE, "took {:?}", result.took);
}

#[test]
fn pre_dump_fails_at_once_without_a_daemon() {
    let dir = scratch();
    refused(&run_script("pre-dump", dir.path()));
    refused(&run_script("post-dump", dir.path()));
}

/// A socket file that nobody listens on any more.
#[test]
fn pre_dump_fails_at_once_after_the_daemon_was_killed() {
    let mut pair = Pair::new();
    let _capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source).ok());
    pair.proxy.kill();
    refused(&run_script("pre-dump", &pair.source));
    refused(&run_script("post-dump", &pair.source));
}

#[test]
fn pre_dump_fails_at_once_without_a_cache() {
    let dir = scratch();
    let _proxy = start_proxy(dir.path(), free_port(), &[]);
    refused(&run_script("pre-dump", dir.path()));
}

#[test]
fn pre_dump_fails_when_the_cache_went_away() {
    let mut pair = Pair::new();
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    pair.cache.kill();
    refused(&run_script("pre-dump", &pair.source));
}

/// A cache that accepts and says nothing is no cache.
#[test]
fn pre_dump_fails_when_the_cache_is_mute() {
    let dir = scratch();
    let mute = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = mute.local_addr().expect("bound").port();
    let args = ["--connect-timeout".to_owned(), "1".to_owned()];
    let _proxy = start_proxy(dir.path(), port, &args);
    refused(&run_script("pre-dump", dir.path()));
}

/// A post-dump for which there is no dump has nothing to confirm.
#[test]
fn post_dump_without_a_dump_is_refused() {
    let pair = Pair::new();
    refused(&run_script("post-dump", &pair.source));
}

#[test]
fn other_actions_succeed_without_anybody() {
    let dir = scratch();
    for action in [
        "pre-stream",
        "network-lock",
        "network-unlock",
        "setup-namespaces",
        "post-setup-namespaces",
        "pre-restore",
        "post-restore",
        "pre-resume",
        "post-resume",
        "orphan-pts-master",
        "status-ready",
        "query-ext-files",
        "something-new",
    ] {
        let result = run_script(action, dir.path());
        assert!(result.ok(), "{action}: {result:?}");
    }
}

/// The daemon is found by IMAGE_PROXY_CONTROL, by the images dir, or by the current directory, in this order.
#[test]
fn the_script_finds_its_daemon() {
    let pair = Pair::new();
    let empty = scratch();
    let _capture = Capture::connect(&pair.source).expect("connect");
    let control = pair.source.join("image-proxy-control.sock");
    let code = |control: Option<&Path>, images: Option<&Path>, cwd: &Path| {
        let mut command = Command::new(bin("image-proxy"));
        command
            .env("CRTOOLS_SCRIPT_ACTION", "pre-dump")
            .current_dir(cwd)
            .stderr(Stdio::null());
        for (name, value) in [
            ("IMAGE_PROXY_CONTROL", control),
            ("CRTOOLS_IMAGE_DIR", images),
        ] {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        let mut child = command.spawn().expect("it starts");
        let status = wait_child(&mut child, LIMIT).expect("our own child");
        status.expect("it ends").code()
    };
    let (here, nowhere) = (pair.source.as_path(), empty.path());
    assert_eq!(
        code(None, Some(here), nowhere),
        Some(0),
        "CRTOOLS_IMAGE_DIR"
    );
    assert_eq!(
        code(None, Some(nowhere), here),
        Some(0),
        "the current directory"
    );
    assert_eq!(
        code(None, None, here),
        Some(0),
        "the current directory alone"
    );
    assert_eq!(
        code(Some(&control), Some(nowhere), nowhere),
        Some(0),
        "IMAGE_PROXY_CONTROL"
    );
    assert_ne!(code(None, Some(nowhere), nowhere), Some(0), "nowhere");
    assert_ne!(
        code(Some(&nowhere.join("x")), Some(here), here),
        Some(0),
        "told where, and it is not there"
    );
}

fn at_written(mut act: impl FnMut()) -> impl FnMut(Event) {
    move |event| {
        if event == Event::Written {
            act();
        }
    }
}

fn must_be_refused(outcome: &Outcome) {
    assert!(matches!(outcome, Outcome::Refused(_)), "{outcome:?}");
}

/// Frozen when everything is written and cut: no acknowledgement can come any more.
#[test]
fn a_link_cut_before_the_commit_refuses_it() {
    for protocol in Protocol::all() {
        for fault in [Fault::Close, Fault::Reset] {
            eprintln!("{protocol:?} {fault:?}");
            let pair = Options::default().link(Faults::default()).start();
            let link = pair.link();
            let outcome = dump_or_retry(
                &pair,
                &protocol,
                ImageSet::sample,
                &mut at_written(|| link.strike(fault)),
            );
            must_be_refused(&outcome);
        }
    }
}

#[test]
fn a_cut_in_mid_image_refuses_the_dump() {
    for protocol in Protocol::all() {
        for name in ["files.img", "pages-1.img", "inventory.img"] {
            eprintln!("{protocol:?} {name}");
            let pair = Options::default().link(Faults::default()).start();
            let link = pair.link();
            let outcome = dump_or_retry(&pair, &protocol, ImageSet::sample, &mut |event| {
                if event == Event::Half(name) {
                    link.strike(Fault::Reset);
                }
            });
            must_be_refused(&outcome);
        }
    }
}

/// The cache dies; a new one takes its place on the same port and in the same directory (a stale socket file).
#[test]
fn a_killed_cache_refuses_the_commit_and_a_new_one_takes_the_retry() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let mut pair = Pair::new();
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        let early = EarlyRestore::start(&protocol, &pair.target, &job.set());
        let cache = &mut pair.cache;
        let result = job.run_with(&job.set(), &mut at_written(|| cache.kill()));
        assert!(
            matches!(result, Err(DumpError::PostDump(_) | DumpError::Write(_))),
            "{result:?}"
        );
        early.end().expect_err("there is no cache");
        pair.cache = start_cache(&pair.target, pair.port, &[]);
        let retry = DumpJob::new(&protocol, &pair.source, 2).gated();
        retry.run().expect("the retry");
        protocol
            .restore(&pair.target, &retry.set())
            .expect("the restore");
    }
}

/// The proxy dies before the commit: the dump fails, and readers do not wait for it.
#[test]
fn a_killed_proxy_refuses_the_commit() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let mut pair = Pair::new();
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        let early = EarlyRestore::start(&protocol, &pair.target, &job.set());
        let proxy = &mut pair.proxy;
        let result = job.run_with(&job.set(), &mut at_written(|| proxy.kill()));
        assert!(result.is_err());
        pair.proxy = start_proxy(&pair.source, pair.port, &[]);
        let retry = DumpJob::new(&protocol, &pair.source, 2).gated();
        retry.run().expect("the retry");
        match early.end() {
            Ok(fetched) => {
                e2e_tests::fake::run::compare(&fetched, &retry.set()).expect("the retry's bytes")
            }
            Err(_) => protocol
                .restore(&pair.target, &retry.set())
                .expect("the restore"),
        }
    }
}

/// Past `--memory-limit` the dump fails with a clear error, the memory comes back, and a dump that fits succeeds.
#[test]
fn the_memory_limit_refuses_the_dump() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let pair = Options::default().cache(&["--memory-limit", "4M"]).start();
        for round in 0..3 {
            let set = ImageSet::with_pages(round, 16 << 20);
            let result = DumpJob::new(&protocol, &pair.source, 0)
                .gated()
                .run_with(&set, &mut |_| {});
            assert!(
                matches!(result, Err(DumpError::PostDump(_) | DumpError::Write(_))),
                "{result:?}"
            );
        }
        let log = (pair.cache.log() + &pair.proxy.log()).to_lowercase();
        assert!(log.contains("limit"), "no clear error:\n{log}");
        let job = DumpJob::new(&protocol, &pair.source, 2).gated();
        job.run().expect("a dump that fits");
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
    }
}

/// Nothing is lost and nothing moves: the daemon's own time limit ends it.
#[test]
fn a_stalled_link_refuses_the_commit_in_time() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let options = Options::default()
            .proxy(&["--commit-timeout", "2"])
            .link(Faults::default());
        let pair = options.start();
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        let early = EarlyRestore::start(&protocol, &pair.target, &job.set());
        let mut frozen = None;
        let result = job.run_with(
            &ImageSet::small(1),
            &mut at_written(|| {
                pair.link().freeze();
                frozen = Some(Instant::now());
            }),
        );
        let took = frozen.expect("everything was written").elapsed();
        let Err(DumpError::PostDump(script)) = result else {
            panic!("{result:?}")
        };
        assert!(!script.stderr.trim().is_empty(), "no reason on stderr");
        assert!(took >= Duration::from_secs(1), "gave up after {took:?}");
        assert!(
            took < Duration::from_secs(5),
            "took {took:?}, the limit is 2 s"
        );
        pair.link().release();
        let retry = DumpJob::new(&protocol, &pair.source, 2).gated();
        retry.run().expect("the retry");
        match early.end() {
            Ok(fetched) => {
                e2e_tests::fake::run::compare(&fetched, &retry.set()).expect("the retry's bytes")
            }
            Err(_) => protocol
                .restore(&pair.target, &retry.set())
                .expect("the restore"),
        }
    }
}

/// A stall that ends before the time limit costs nothing.
#[test]
fn a_stall_that_ends_in_time_is_forgiven() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let pair = Options::default()
            .link(Faults::at(
                e2e_tests::link::Direction::Up,
                9000,
                Fault::Stall,
            ))
            .start();
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        let dump = {
            let job = job.clone();
            std::thread::spawn(move || job.run())
        };
        pair.link().wait_stalled();
        pair.link().release();
        dump.join().expect("no panic").expect("the dump");
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
    }
}

/// An image is still open when the script runs. CRIU never does that; the commit must not pretend that it is whole.
#[test]
fn an_open_image_is_never_committed() {
    let options = Options::default().proxy(&["--commit-timeout", "1"]);
    let pair = options.start();
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source).ok());
    let set = ImageSet::small(1);
    let mut open = capture.create("late.img").expect("open");
    std::io::Write::write_all(&mut open, b"half").expect("bytes");
    e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the rest");
    let result = run_script("post-dump", &pair.source);
    assert!(!result.ok(), "{result:?}");
    assert!(result.took < AT_ONCE, "took {:?}", result.took);
}

// --- after the answer ------------------------------------------------------------------------

/// What the script did, as a dump of this set would have it, with the process `task`.
fn dumped(pair: &Pair, task: &script::Task, set: &ImageSet) {
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source).ok());
    e2e_tests::fake::run::dump(&capture, set, &mut |_| {}).expect("the images");
    let dir = &pair.source;
    let result = script::run_of(task, &bin("image-proxy"), "post-dump", dir, dir, LIMIT);
    assert!(result.expect("the script ends").ok());
}

/// CRIU was told to kill the process and has not done it yet: the target holds the set, and serves it when it is done.
#[test]
fn nothing_is_served_while_the_process_lives() {
    let pair = Pair::new();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    dumped(&pair, &task, &set);
    let early = EarlyRestore::start(&Protocol::Stream, &pair.target, &set);
    until("the cache holds the set", || {
        pair.ask_cache(&["status"])
            .1
            .contains("prepared: waits for the commit")
    });
    assert!(!pair.cache.log().contains("ready to be restored"));
    drop(task);
    let fetched = early.end().expect("the restore");
    e2e_tests::fake::run::compare(&fetched, &set).expect("its bytes");
}

/// CRIU ends after it was told, and the process is still there: `--leave-running`, or somebody killed CRIU.
#[test]
fn a_process_that_was_not_killed_leaves_the_set_in_doubt() {
    for decision in ["release", "drop"] {
        let options = Options::default().proxy(&["--session", "web"]);
        let pair = options.start();
        let set = ImageSet::sample(1);
        let task = script::Task::start().expect("a process");
        let capture = Capture::connect(&pair.source).expect("connect");
        assert!(run_script("pre-dump", &pair.source).ok());
        e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
        // The shell is the CRIU of this script, and ends with it.
        let mut criu = Command::new("sh");
        criu.args(["-c", "\"$1\"; exit $?", "sh"])
            .arg(bin("image-proxy"))
            .env("CRTOOLS_SCRIPT_ACTION", "post-dump")
            .env("CRTOOLS_IMAGE_DIR", &pair.source)
            .env("CRTOOLS_INIT_PID", task.pid().to_string())
            .env_remove("IMAGE_PROXY_CONTROL")
            .current_dir(&pair.source);
        assert!(criu.status().expect("a shell").success());

        until("both sides say that it is in doubt", || {
            let said =
                |log: String| log.contains("in doubt") && log.contains("image-cache release @");
            said(pair.proxy.log()) && said(pair.cache.log())
        });
        assert!(pair.proxy.log().contains("did not kill"));
        assert!(Protocol::Stream.restore(&pair.target, &set).is_err());
        // What the source says is as good on the target as what the target says.
        let said = pair.proxy.log();
        let command = format!("image-cache {decision}");
        let said = if decision == "release" {
            said
        } else {
            pair.cache.log()
        };
        assert!(pair.follow(&said, &command).0);
        match decision {
            "release" => Protocol::Stream
                .restore(&pair.target, &set)
                .expect("it is served"),
            _ => assert!(pair.ask_cache(&["status"]).1.contains("no sessions")),
        }
    }
}

/// What `criu restore` leaves out without an error.
fn with_rules() -> ImageSet {
    let mut set = ImageSet::sample(1);
    let rules =
        Content::bytes(*b"table inet own {\n\tchain c {\n\t\ttcp dport 4242 drop\n\t}\n}\n");
    let more = ImageSet::new(vec![("nftables-9.img", rules)]);
    let inventory = set.images.len() - 1;
    set.images.splice(inventory..inventory, more.images);
    set
}

#[test]
fn rules_that_a_restore_leaves_out_refuse_the_commit_unless_they_are_allowed() {
    let dump = |pair: &Pair| {
        let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
        job.run_with(&with_rules(), &mut |_| {})
    };
    let pair = Pair::new();
    match dump(&pair) {
        Err(DumpError::PostDump(result)) => {
            refused(&result);
            let said = "the nftables rules of a network namespace (nftables-9.img)";
            assert!(result.stderr.contains(said), "{result:?}");
            assert!(result.stderr.contains("--allow nftables"), "{result:?}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!pair.cache.log().contains("prepared: every image is here"));
    let pair = Options::default().cache(&["--allow", "nftables"]).start();
    dump(&pair).expect("it is allowed");
    let restored = Protocol::Stream.restore(&pair.target, &with_rules());
    restored.expect("the restore");
}

/// Without a script CRIU kills all the same. The set may be the only copy: it is kept, and given to no restore.
#[test]
fn a_dump_without_script_that_a_restore_would_make_less_of_is_in_doubt() {
    let pair = Pair::new();
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1);
    let dumped = job.run_with(&with_rules(), &mut |_| {});
    dumped.expect("nobody asks");
    until("it is in doubt", || {
        let log = pair.cache.log();
        let line = log.lines().find(|line| line.contains("in doubt: "));
        line.is_some_and(|line| line.contains("the nftables rules"))
    });
    let restored = Protocol::Stream.restore(&pair.target, &with_rules());
    restored.expect_err("in doubt");
    let log = pair.cache.log();
    let name = log.split("image-cache release ").nth(1);
    let name = name.expect("the command").split('`').next();
    let name = name.expect("its end");
    let mut release = Command::new(bin("image-cache"));
    release.args(["release", name, "--control"]);
    release.arg(pair.target.join("image-cache-control.sock"));
    assert!(release.status().expect("it runs").success());
    let restored = Protocol::Stream.restore(&pair.target, &with_rules());
    restored.expect("the operator wants it");
}

fn web() -> Pair {
    Options::default().proxy(&["--session", "web"]).start()
}

/// In doubt on the target, for the reason that image-proxy has seen, and never served.
fn in_doubt(pair: &Pair, set: &ImageSet, reason: &str) {
    until("it is in doubt", || {
        pair.ask_cache(&["status"]).1.contains("in doubt")
    });
    let log = pair.proxy.log();
    assert!(log.contains(reason), "{reason:?} is not in {log}");
    assert!(Protocol::Stream.restore(&pair.target, set).is_err());
    assert!(!pair.cache.log().contains("ready to be restored"));
}

/// Another script fails after ours, so CRIU lets the process go; the process then ends by itself, or is killed by
/// somebody else. Neither is CRIU's kill.
#[test]
fn a_process_that_dies_after_a_failed_dump_is_not_restored() {
    for killed in [false, true] {
        let pair = web();
        let set = ImageSet::sample(1);
        let mut task = script::Task::start().expect("a process");
        dumped(&pair, &task, &set);
        task.dump_fails();
        match killed {
            true => drop(task),
            false => task.ends(),
        }
        in_doubt(&pair, &set, "has ended with exit status 1");
    }
}

/// The root dies, and CRIU with it, before it has killed the children.
#[test]
fn a_tree_whose_children_outlive_their_root_is_not_restored() {
    let pair = web();
    let set = ImageSet::sample(1);
    let task = script::Task::with_child().expect("processes");
    dumped(&pair, &task, &set);
    task.kill();
    task.criu_is_killed();
    in_doubt(&pair, &set, "and 1 of its tree are dead");
}

/// CRIU says that all is well: `--leave-running`. Whoever kills the process later is not CRIU.
#[test]
fn a_process_that_criu_left_running_is_not_restored_when_it_dies() {
    let pair = web();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    dumped(&pair, &task, &set);
    task.left_running();
    in_doubt(&pair, &set, "did not kill");
    drop(task);
    in_doubt(&pair, &set, "did not kill");
}

/// What has the process stopped is CRIU, whatever is between it and the script.
#[test]
fn behind_a_shell_around_the_script_is_the_criu_that_kills() {
    let pair = web();
    let set = ImageSet::sample(1);
    let task = script::Task::start().expect("a process");
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source).ok());
    e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
    let (program, dir) = (bin("image-proxy"), &pair.source);
    let shell = ["sh", "-c", "\"$0\"; exit $?"];
    let script = Script {
        wrapper: &shell,
        ..Script::new(&program, "post-dump", dir, LIMIT)
    };
    let result = script.run_of(&task);
    assert!(result.expect("the script ends").ok());
    // The shell is gone, CRIU is about to kill.
    assert!(!pair.proxy.log().contains("in doubt"));
    drop(task);
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("it was killed");
}

/// CRIU reads a configuration file that RPC names twice, and so has the script twice.
#[test]
fn a_script_that_runs_twice_gets_the_same_answer() {
    for fails in [false, true] {
        let pair = web();
        let set = ImageSet::sample(1);
        let task = script::Task::start().expect("a process");
        let capture = Capture::connect(&pair.source).expect("connect");
        for _ in 0..2 {
            assert!(run_script("pre-dump", &pair.source).ok());
        }
        e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
        let (program, dir) = (bin("image-proxy"), &pair.source);
        let twice = ["sh", "-c", "\"$0\" && \"$0\" && \"$0\""];
        let script = Script {
            wrapper: &twice,
            ..Script::new(&program, "post-dump", dir, LIMIT)
        };
        let result = script.run_of(&task);
        let result = result.expect("the scripts end");
        assert!(result.ok(), "{result:?}");
        match fails {
            true => {
                task.dump_fails();
                drop(task);
                in_doubt(&pair, &set, "has ended with exit status 1");
            }
            false => {
                drop(task);
                let restored = Protocol::Stream.restore(&pair.target, &set);
                restored.expect("it was killed");
            }
        }
    }
}

/// Stopped with its answer unread, for longer than any limit, and killed: nobody was told.
#[test]
fn a_script_that_never_reads_its_answer_has_told_nobody() {
    let options = Options::default().proxy(&["--session", "web"]);
    let pair = options.link(Faults::default()).start();
    let set = ImageSet::small(1);
    let task = script::Task::start().expect("a process");
    let capture = Capture::connect(&pair.source).expect("connect");
    assert!(run_script("pre-dump", &pair.source).ok());
    e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
    until("all is there", || {
        pair.cache.log().contains("dump complete")
    });
    let says = |state: &str| pair.ask_proxy(&["status"]).1.contains(state);
    pair.link().freeze();
    let mut script = Command::new(bin("image-proxy"))
        .env("CRTOOLS_SCRIPT_ACTION", "post-dump")
        .env("CRTOOLS_IMAGE_DIR", &pair.source)
        .env("CRTOOLS_INIT_PID", task.pid().to_string())
        .env_remove("IMAGE_PROXY_CONTROL")
        .current_dir(&pair.source)
        .spawn()
        .expect("it starts");
    until("it has asked", || says("preparing"));
    let pid = Pid::from_child(&script);
    rustix::process::kill_process(pid, Signal::STOP).expect("our own child");
    pair.link().release();
    until("it has its answer", || says("committed"));
    // More than image-proxy has ever waited.
    std::thread::sleep(Duration::from_secs(6));
    assert!(!pair.proxy.log().contains("in doubt"));
    script.kill().expect("our own child");
    script.wait().expect("our own child");
    until("the set is given up", || {
        pair.ask_cache(&["status"]).1.contains("no sessions")
    });
    drop(task);
    assert!(!pair.cache.log().contains("ready to be restored"));
}
