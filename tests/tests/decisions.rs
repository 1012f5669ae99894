//! What an operator on the target may decide, and what they hear: each command hits the set that it names, and there is
//! one in every state.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{until, Options, Pair};
use e2e_tests::fake::script::{self, Task};
use e2e_tests::fake::{Capture, DumpJob, ImageSet, Protocol};
use e2e_tests::link::{Fault, Faults};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

fn run_script(task: &Task, action: &str, dir: &Path) {
    let result = script::run_of(task, &bin("image-proxy"), action, dir, dir, LIMIT);
    let result = result.expect("the script ends");
    assert!(result.ok(), "{result:?}");
}

/// A dump up to its answered commit; the caller is its CRIU, and `task` lives.
fn committed(pair: &Pair, task: &Task, set: &ImageSet) {
    let capture = Capture::connect(&pair.source).expect("connect");
    run_script(task, "pre-dump", &pair.source);
    e2e_tests::fake::run::dump(&capture, set, &mut |_| {}).expect("the images");
    run_script(task, "post-dump", &pair.source);
    until("it is held", || {
        let status = pair.ask_cache(&["status"]).1;
        status.contains("prepared: waits for the commit") || status.contains("in doubt")
    });
}

fn status(pair: &Pair) -> String {
    pair.ask_cache(&["status"]).1
}

fn refused(pair: &Pair, arguments: &[&str]) -> String {
    let mut command = Command::new(bin("image-cache"));
    command
        .args(arguments)
        .arg("--control")
        .arg(pair.target.join("image-cache-control.sock"));
    let output = command.output().expect("it runs");
    assert!(!output.status.success(), "{arguments:?} was done");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Case adv06: the second migration of a name is in doubt, and what the log advises does nothing to the first.
#[test]
fn the_advice_about_one_set_hits_no_other() {
    for decision in ["drop", "release"] {
        let options = Options::default().proxy(&["--session", "web"]);
        let pair = options.link(Faults::default()).start();
        let first = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
        first.run().expect("the first dump");
        until("it may be restored", || {
            status(&pair).contains("to be restored")
        });
        let second = ImageSet::sample(2);
        let task = Task::start().expect("a process");
        committed(&pair, &task, &second);
        pair.link().strike(Fault::Reset);
        until("the log says that the second is in doubt", || {
            pair.cache.log().contains("in doubt: ")
        });

        let said = refused(&pair, &["drop", "web"]);
        assert!(said.contains("image-cache drop ID"), "{said}");
        for state in ["in doubt", "to be restored"] {
            assert!(
                said.contains(state) && status(&pair).contains(state),
                "{said}"
            );
        }
        let command = format!("image-cache {decision}");
        let (done, said) = pair.follow(&pair.cache.log(), &command);
        assert!(done, "{said}");
        // From its directory the newest one of the name is served.
        if decision == "release" {
            let restored = Protocol::Stream.restore(&pair.target, &second);
            restored.expect("the released one");
            until("it is gone", || {
                status(&pair).matches("session web: ").count() == 1
            });
        }
        let restored = Protocol::Stream.restore(&pair.target, &first.set());
        restored.expect("the first one is as it was");
        let log = pair.cache.log();
        let decided = ["dropped by the operator", "released by the operator"];
        let decided: usize = decided.iter().map(|text| log.matches(text).count()).sum();
        assert_eq!(decided, 1, "{log}");
    }
}

/// Case adv11: image-proxy is stopped behind "committed". After a documented time the set is in doubt, and when image-proxy
/// goes on its word still counts.
#[test]
fn a_proxy_that_is_stopped_leaves_its_set_in_doubt() {
    let options = Options::default().cache(&["--prepared-timeout", "5s"]);
    let pair = options.start();
    let set = ImageSet::sample(1);
    let task = Task::start().expect("a process");
    committed(&pair, &task, &set);
    pair.proxy.signal(Signal::STOP);
    drop(task);
    until("it is in doubt", || {
        pair.cache.log().contains("image-proxy says nothing for 5s")
    });
    assert!(status(&pair).contains("in doubt"));
    assert!(Protocol::Stream.restore(&pair.target, &set).is_err());
    pair.proxy.signal(Signal::CONT);
    until("the source confirms", || {
        pair.cache.log().contains("not in doubt any more")
    });
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("the restore");
    until("the source is content", || {
        pair.proxy.log().contains("dump sent")
    });
}

/// The operator need not wait for that, but has to say what they have seen; and the source's word comes afterwards.
#[test]
fn a_prepared_set_is_decided_by_the_operators_word() {
    for (decision, word) in [
        ("release", "--process-is-dead"),
        ("drop", "--process-lives"),
    ] {
        let pair = Options::default().proxy(&["--session", "web"]).start();
        let set = ImageSet::sample(1);
        let task = Task::start().expect("a process");
        committed(&pair, &task, &set);
        pair.proxy.signal(Signal::STOP);
        drop(task);
        let said = refused(&pair, &[decision, "web"]);
        assert!(said.contains(word), "{said}");
        assert!(status(&pair).contains("prepared: waits for the commit"));
        assert!(pair.ask_cache(&[decision, "web", word]).0);
        if decision == "release" {
            let restored = Protocol::Stream.restore(&pair.target, &set);
            restored.expect("the restore");
        } else {
            assert!(status(&pair).contains("no sessions"));
        }
        pair.proxy.signal(Signal::CONT);
        let expected = match decision {
            "release" => "the source commits what the operator has released",
            _ => "the process is lost",
        };
        until("the source's word is heard", || {
            pair.cache.log().contains(expected)
        });
        // Nothing is broken by it.
        until("the session is over", || {
            pair.cache.log().contains("the source ended the session")
        });
        let next = DumpJob::new(&Protocol::Stream, &pair.source, 2).gated();
        next.run().expect("the next dump");
        until("it may be restored", || {
            status(&pair).contains("to be restored")
        });
    }
}

/// What is not held can be dropped while it arrives: its dump fails, and the process goes on.
#[test]
fn a_dump_that_arrives_can_be_dropped() {
    let pair = Options::default().proxy(&["--session", "web"]).start();
    let set = ImageSet::sample(1);
    let task = Task::start().expect("a process");
    let capture = Capture::connect(&pair.source).expect("connect");
    run_script(&task, "pre-dump", &pair.source);
    e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
    until("it is complete", || status(&pair).contains("dump complete"));
    assert!(pair.ask_cache(&["drop", "web"]).0);
    let dir = &pair.source;
    let result = script::run_of(&task, &bin("image-proxy"), "post-dump", dir, dir, LIMIT);
    let result = result.expect("the script ends");
    assert!(!result.ok(), "{result:?}");
    assert!(status(&pair).contains("no sessions"));
}

/// A kill that takes its time, as that of a large process does: image-proxy lives, and its set is not in doubt.
#[test]
fn a_proxy_that_waits_for_a_slow_kill_is_not_doubted() {
    let options = Options::default().cache(&["--prepared-timeout", "10s"]);
    let pair = options.start();
    let set = ImageSet::sample(1);
    let task = Task::start().expect("a process");
    committed(&pair, &task, &set);
    // Nothing happens in this time, which is what is looked at.
    std::thread::sleep(Duration::from_secs(13));
    assert!(status(&pair).contains("prepared: waits for the commit"));
    drop(task);
    let restored = Protocol::Stream.restore(&pair.target, &set);
    restored.expect("the restore");
    assert!(!pair.cache.log().contains("in doubt"));
}
