//! A restore that holds at `post-restore`, and what decides about it: image-cache, and while none runs the source, an
//! operator, another image-cache, and the end of CRIU.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, scratch, start_cache, until, Daemon};
use e2e_tests::fake::hold::{Asked, HeldRestore, ToldCache, ID, KEY, SESSION, SET};
use e2e_tests::hand::{Hand, Hello, PROXY};
use rustix::process::{kill_process, Signal};

const COMMIT: u8 = 0x06;
const SET_ABORT: u8 = 0x08;
const SET_DOUBT: u8 = 0x09;
const GOODBYE: u8 = 0x20;

const NO_SESSION: u16 = 4;

/// What an operator asks: whether that was done, and what was said.
fn operator(dir: &Path, arguments: &[&str]) -> (bool, String) {
    let control = dir.join("image-cache-control.sock");
    let mut command = Command::new(bin("image-cache"));
    command.args(arguments).arg("--control").arg(control);
    let output = command.output().expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&said).into_owned(),
    )
}

/// A restore that holds for an image-cache that says so.
fn holds(dir: &Path, port: u16) -> (HeldRestore, Asked, ToldCache) {
    let cache = ToldCache::start(dir);
    let restore = HeldRestore::start(dir, "post-restore");
    let mut asked = cache.asked();
    asked.hold(dir, port);
    assert!(socket(dir).exists());
    (restore, asked, cache)
}

fn socket(dir: &Path) -> std::path::PathBuf {
    dir.join(format!("image-cache-hold-{}.sock", &ID[1..]))
}

/// The same, and that image-cache is gone.
fn orphaned(dir: &Path, port: u16) -> HeldRestore {
    let (restore, asked, cache) = holds(dir, port);
    drop((asked, cache));
    until("the script has the port", || {
        restore.log().contains("listens on 127.0.0.1")
    });
    restore
}

fn decides() -> Hello<'static> {
    Hello {
        key: KEY,
        received: SET.into(),
        kind: 4,
        session: SESSION,
        ..Hello::default()
    }
}

fn greet(port: u16, hello: &Hello) -> (Hand, u16, Vec<u8>) {
    Hand::greet(([127, 0, 0, 1], port).into(), hello).expect("an answer")
}

/// Brings a word by a connection of its own, and gives the answer to the farewell.
fn brings(port: u16, kind: u8) -> String {
    let (mut hand, code, _) = greet(port, &decides());
    assert_eq!(code, 0, "welcome");
    match kind {
        COMMIT => hand.frame(COMMIT, SET, 0, &[]),
        _ => hand.says_why(kind, SET, "says the source"),
    }
    hand.says_why(GOODBYE, 0, "");
    let (kind, _, payload) = hand.next_frame();
    assert_eq!(kind, GOODBYE);
    String::from_utf8_lossy(&payload[2..]).into_owned()
}

#[test]
fn a_script_says_that_it_can_hold_and_hands_over_the_log() {
    let dir = scratch();
    let cache = ToldCache::start(dir.path());
    for (action, early) in [
        ("pre-stream", true),
        ("pre-restore", true),
        ("post-restore", true),
        ("pre-resume", false),
        ("post-resume", false),
    ] {
        let mut restore = HeldRestore::start(dir.path(), action);
        let mut asked = cache.asked();
        assert_eq!(asked.request["holds"] == true, early, "{action}");
        assert_eq!(asked.request["log"] == true, early, "{action}");
        assert!(asked.request["pidfd"] == true);
        if early {
            let mut text = String::new();
            let log = asked.fds.pop().expect("the log");
            fs::File::from(log)
                .read_to_string(&mut text)
                .expect("it can be read");
            assert!(text.contains("a line of CRIU"), "{text}");
        }
        asked.done();
        assert_eq!(restore.script_ends(), 0);
    }
}

#[test]
fn image_cache_decides() {
    let dir = scratch();
    for go_on in [true, false] {
        let (mut restore, mut asked, _cache) = holds(dir.path(), free_port());
        let (done, said) = operator(&dir.path().join("none"), &["release", SESSION]);
        assert!(!done, "{said}");
        match go_on {
            true => asked.done(),
            false => asked.failed("the source gave it up"),
        }
        assert_eq!(restore.script_ends(), i32::from(!go_on));
        assert_eq!(restore.log().contains("the source gave it up"), !go_on);
        assert!(!socket(dir.path()).exists(), "it goes with the hold");
    }
}

#[test]
fn an_operator_decides_only_while_no_image_cache_runs() {
    let dir = scratch();
    for (verb, status) in [("release", 0), ("drop", 1)] {
        let (mut restore, asked, cache) = holds(dir.path(), free_port());
        let mode = fs::metadata(socket(dir.path()))
            .expect("it is there")
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o600);
        // The socket of the other one is there no more, and its connection is.
        fs::remove_file(dir.path().join("image-cache-control.sock")).expect("it was there");
        let (done, said) = operator(dir.path(), &[verb, SESSION]);
        assert!(!done && said.contains("an image-cache runs"), "{said}");
        drop((asked, cache));
        until("it is known", || {
            restore.log().contains("image-cache is gone")
        });
        let (done, said) = operator(dir.path(), &["status"]);
        assert!(
            done && said.contains(ID) && said.contains("its image-cache is gone"),
            "{said}"
        );
        for other in ["db", "@000000000000", "@dc4a9c109090.2"] {
            let (done, said) = operator(dir.path(), &[verb, other]);
            assert!(!done && said.contains("nothing was done"), "{said}");
        }
        let (done, said) = operator(dir.path(), &[verb, ID]);
        assert!(done, "{said}");
        assert_eq!(restore.script_ends(), status);
        let (done, said) = operator(dir.path(), &[verb, ID]);
        assert!(!done && said.contains("cannot reach"), "{said}");
    }
}

#[test]
fn the_source_decides_by_the_link_s_port() {
    let dir = scratch();
    for (kind, status) in [(COMMIT, 0), (SET_ABORT, 1)] {
        let port = free_port();
        let mut restore = orphaned(dir.path(), port);
        for other in [
            Hello {
                kind: 1,
                key: 0,
                received: 1,
                ..decides()
            },
            Hello {
                kind: 2,
                received: 0,
                place: (1, 2),
                ..decides()
            },
            Hello {
                kind: 3,
                attempt: 1,
                ..decides()
            },
            Hello {
                key: KEY + 1,
                ..decides()
            },
            Hello {
                received: 4,
                ..decides()
            },
            Hello {
                session: "db",
                ..decides()
            },
            Hello {
                proxy: PROXY + 1,
                ..decides()
            },
        ] {
            let (_, code, body) = greet(port, &other);
            let said = String::from_utf8_lossy(&body).into_owned();
            assert!(
                code == NO_SESSION && said.contains("no image-cache runs here"),
                "{code} {said}"
            );
        }
        // A source in doubt decides nothing.
        assert_eq!(brings(port, SET_DOUBT), "");
        assert!(restore.log().contains("the restore holds on"));
        assert_eq!(brings(port, kind), "");
        assert_eq!(restore.script_ends(), status);
    }
}

/// Peers that say nothing, as many as like to, do not keep the decision out.
#[test]
fn strangers_do_not_keep_the_decision_out() {
    let dir = scratch();
    let port = free_port();
    let mut restore = orphaned(dir.path(), port);
    let silent: Vec<_> = (0..100)
        .map(|_| std::net::TcpStream::connect(("127.0.0.1", port)).expect("it listens"))
        .collect();
    // They make room when it is needed, after a moment.
    let mut answer = None;
    until("the source is heard", || {
        let Ok((mut hand, 0, _)) = Hand::greet(([127, 0, 0, 1], port).into(), &decides()) else {
            return false;
        };
        hand.frame(COMMIT, SET, 0, &[]);
        hand.says_why(GOODBYE, 0, "");
        answer = Some(hand.next_frame().0);
        true
    });
    assert_eq!(answer, Some(GOODBYE));
    assert_eq!(restore.script_ends(), 0);
    drop(silent);
}

#[test]
fn the_first_decision_counts() {
    let dir = scratch();
    let port = free_port();
    let mut restore = orphaned(dir.path(), port);
    let (mut source, code, _) = greet(port, &decides());
    assert_eq!(code, 0);
    source.frame(COMMIT, SET, 0, &[]);
    until("it is decided", || {
        operator(dir.path(), &["status"]).1.contains("goes on")
    });
    // It waits for the source's farewell.
    source.says_why(SET_ABORT, SET, "no");
    source.says_why(GOODBYE, 0, "");
    let (kind, _, payload) = source.next_frame();
    let said = String::from_utf8_lossy(&payload).into_owned();
    assert!(kind == GOODBYE && said.contains("decided before"), "{said}");
    assert_eq!(restore.script_ends(), 0);
}

#[test]
fn what_a_dead_criu_has_built_is_ended() {
    let dir = scratch();
    for daemon_lives in [true, false] {
        let (mut restore, asked, cache) = holds(dir.path(), free_port());
        let daemon = daemon_lives.then_some((asked, cache));
        until("the hold has begun", || socket(dir.path()).exists());
        assert!(!restore.tree_has_ended());
        restore.kill_criu();
        until("its tasks have ended", || restore.tree_has_ended());
        until("it is said", || {
            restore
                .log()
                .contains("its 2 tasks were asleep and were ended")
        });
        if let Some((asked, _cache)) = daemon {
            until("the script has ended", || asked.has_hung_up());
        }
        until("the socket is gone", || !socket(dir.path()).exists());
    }
}

/// Another image-cache than the one that it held for.
fn restarted(dir: &Path, port: u16, restore: &HeldRestore) -> Daemon {
    let cache = start_cache(dir, port, &[]);
    until("it has the hold", || {
        cache.log().contains("a restore holds this set here")
    });
    until("the script knows", || {
        restore.log().contains("another image-cache runs here")
    });
    cache
}

fn status(dir: &Path) -> String {
    operator(dir, &["status"]).1
}

#[test]
fn another_image_cache_takes_the_hold_over() {
    let dir = scratch();
    for (verb, code) in [("release", 0), ("drop", 1), ("commit", 0), ("abort", 1)] {
        let port = free_port();
        let mut restore = orphaned(dir.path(), port);
        // The script has its port.
        let cache = restarted(dir.path(), port, &restore);
        let said = status(dir.path());
        assert!(
            said.contains(ID) && said.contains("held by a restore here; its images were with"),
            "{said}"
        );
        assert!(
            said.contains(&format!("session {SESSION}: in doubt")),
            "{said}"
        );
        match verb {
            "commit" => {
                assert_eq!(brings(port, SET_DOUBT), "");
                assert_eq!(brings(port, COMMIT), "");
            }
            "abort" => assert_eq!(brings(port, SET_ABORT), ""),
            verb => {
                let (done, said) = operator(dir.path(), &[verb, SESSION]);
                assert!(done, "{said}");
            }
        }
        assert_eq!(restore.script_ends(), code, "{verb}");
        until("the session is gone", || {
            status(dir.path()).contains("no sessions")
        });
        // A source that has not heard the answer says it again.
        match verb {
            "commit" => {
                assert_eq!(brings(port, COMMIT), "");
                assert!(brings(port, SET_ABORT).contains("committed"));
            }
            "abort" => assert_eq!(brings(port, SET_ABORT), ""),
            _ => assert_eq!(greet(port, &decides()).1, NO_SESSION),
        }
        drop(cache);
    }
}

#[test]
fn and_that_one_may_go_too() {
    let dir = scratch();
    let port = free_port();
    let mut restore = orphaned(dir.path(), port);
    for _ in 0..2 {
        let mut cache = restarted(dir.path(), port, &restore);
        let said = operator(dir.path(), &["release", "@000000000000"]).1;
        assert!(said.contains("no session"), "{said}");
        cache.kill();
        let listens = || restore.log().matches("listens on 127.0.0.1").count();
        let before = listens();
        until("the script has the port again", || {
            Hand::greet(
                ([127, 0, 0, 1], port).into(),
                &Hello {
                    key: 1,
                    ..decides()
                },
            )
            .is_ok()
        });
        assert!(listens() >= before);
        // So that the next is waited for.
        fs::write(dir.path().join("restore.log"), "").expect("written");
    }
    assert_eq!(brings(port, COMMIT), "");
    assert_eq!(restore.script_ends(), 0);
}

#[test]
fn a_hold_goes_with_its_script() {
    let dir = scratch();
    let port = free_port();
    let mut restore = orphaned(dir.path(), port);
    let _cache = restarted(dir.path(), port, &restore);
    kill_process(restore.script(), Signal::KILL).expect("it runs");
    // As the shell says it: CRIU fails, and kills what it has built.
    assert_eq!(restore.script_ends(), 128 + 9);
    until("the session is gone", || {
        status(dir.path()).contains("no sessions")
    });
    assert_eq!(greet(port, &decides()).1, NO_SESSION);
}
