//! What CRIU was told, on its command line and in its configuration files, and what must not be done with it. Each
//! CRIU here is a process of its own, since that is what tells.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, until, Options, Pair};
use e2e_tests::fake::job::RestoreJob;
use e2e_tests::fake::pages::Dump;
use e2e_tests::fake::FakeCriu;
use e2e_tests::fake::{DumpJob, ImageSet, PageRound, Protocol, Started};

const FAKE_CRIU: &str = env!("CARGO_BIN_EXE_fake-criu");

/// Of `fake-criu`.
const PRE_DUMP_REFUSED: i32 = 11;
const WRITE_FAILED: i32 = 12;
const RESTORE_FAILED: i32 = 20;
const ROUND_FAILED: i32 = 30;

/// The head of a pre-dump's inventory, up to its mode.
const INVENTORY: &[u8] = b"\x16\x31\x31\x58\x0b\0\0\0\x08\0\x40\xc0\xd4\xb4\x08\x48";
const READ_MODE: &[u8] = b"\x02\x62\0";

fn lazy() -> Started {
    Started::with("dump --stream --lazy-pages -t 1")
}

/// A home whose configuration file has this line.
fn home(pair: &Pair, line: &str) -> PathBuf {
    let home = pair.dir().join("home");
    fs::create_dir_all(home.join(".criu")).expect("a directory");
    fs::write(home.join(".criu/default.conf"), format!("# ours\n{line}\n")).expect("a file");
    home
}

/// It fails so, and says why.
fn fails(criu: FakeCriu, code: i32, why: &str) {
    let (status, said) = criu.wait();
    assert_eq!(status.code(), Some(code), "{said}");
    assert!(said.contains(why), "{said}");
}

fn succeeds(criu: FakeCriu) {
    let (status, said) = criu.wait();
    assert!(status.success(), "{said}");
}

/// The sets that the cache has, of which none must be one to restore.
fn none_is_committed(pair: &Pair) {
    let (ok, said) = pair.ask_cache(&["status"]);
    assert!(ok);
    for word in ["held", "ready", "doubt"] {
        assert!(!said.contains(word), "{said}");
    }
}

#[test]
fn lazy_pages_are_refused_before_the_freeze() {
    let pair = Pair::new();
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    let by_file = Started {
        home: Some(home(&pair, "lazy-pages")),
        ..Started::with("dump --stream -t 1")
    };
    for started in [lazy(), by_file.clone()] {
        fails(
            job.spawn_as(FAKE_CRIU, &started),
            PRE_DUMP_REFUSED,
            "--lazy-pages",
        );
    }
    none_is_committed(&pair);

    // The file does not count, or a request may say otherwise.
    for words in ["dump --stream -t 1 --no-default-config", "swrk 3"] {
        let started = Started {
            words: Started::with(words).words,
            ..by_file.clone()
        };
        succeeds(job.spawn_as(FAKE_CRIU, &started));
    }
}

/// CRIU does not ask before it freezes; it must not stand still behind that.
#[test]
fn lazy_pages_without_a_script_fail_the_dump() {
    for protocol in Protocol::all() {
        let pair = Pair::new();
        let job = DumpJob::new(&protocol, &pair.source, 1);
        let criu = job.spawn_as(FAKE_CRIU, &lazy());
        let (status, said) = criu.wait();
        assert_eq!(status.code(), Some(WRITE_FAILED), "{protocol:?}: {said}");
        until("it says why", || {
            pair.proxy.log().contains("has --lazy-pages")
        });
        none_is_committed(&pair);
    }
}

#[test]
fn a_lazy_restore_is_refused_and_its_set_stays() {
    let pair = Pair::new();
    let dump = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    dump.run().expect("the dump");
    let restore = RestoreJob {
        protocol: Protocol::Stream,
        dir: pair.target.clone(),
        seed: 1,
    };
    let started = Started::with("restore --stream --lazy-pages -d");
    fails(restore.spawn_as(FAKE_CRIU, &started), RESTORE_FAILED, "");
    assert!(pair.cache.log().contains("has --lazy-pages and --stream"));
    Protocol::Stream
        .restore(&pair.target, &ImageSet::sample(1))
        .expect("an ordinary one");
}

fn round(port: u16, dir: PathBuf, parent: Option<&str>) -> PageRound {
    fs::create_dir_all(&dir).expect("a directory");
    PageRound {
        port,
        images_dir: Some(dir),
        parent: parent.map(str::to_owned),
        memory: (0..64).collect(),
        changed: vec![1, 2],
        dump: None,
        stop: false,
        cut: false,
    }
}

fn dump_of(round: PageRound, work_dir: &Path) -> PageRound {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    PageRound {
        dump: Some(Dump {
            script: bin("image-proxy"),
            work_dir: work_dir.into(),
            files: tests.join("fixtures/page-server-incremental/images-3"),
        }),
        ..round
    }
}

fn proxy_with_page_server() -> (Pair, u16) {
    let port = free_port();
    let args = ["--page-server", &port.to_string()];
    (Options::default().proxy(&args).start(), port)
}

#[test]
fn a_round_in_read_mode_is_refused() {
    let (pair, port) = proxy_with_page_server();
    let dir = |name: &str| pair.dir().join(name);
    let plain = Started::with("pre-dump --page-server -t 1");
    succeeds(round(port, dir("1"), None).spawn_as(FAKE_CRIU, &plain));
    let by_file = Started {
        home: Some(home(&pair, "pre-dump-mode \"read\"")),
        ..plain.clone()
    };
    let by_line = Started::with("pre-dump --page-server -t 1 --pre-dump-mode=read");
    for (name, started) in [("2", &by_line), ("3", &by_file)] {
        let round = round(port, dir(name), Some("../1"));
        fails(round.spawn_as(FAKE_CRIU, started), ROUND_FAILED, "");
    }
    let log = pair.proxy.log();
    assert_eq!(log.matches("has --pre-dump-mode read").count(), 2, "{log}");

    // CRIU asked before it took anything for sent, so the series goes on.
    let criu = round(port, dir("4"), Some("../1")).spawn_as(FAKE_CRIU, &plain);
    let (status, said) = criu.wait();
    assert!(status.success() && said.contains("parent: true"), "{said}");
    // A dump has the option in vain.
    let dump = dump_of(round(port, dir("5"), Some("../4")), &pair.source);
    let started = Started::with("dump --page-server -t 1 --pre-dump-mode read");
    succeeds(dump.spawn_as(FAKE_CRIU, &started));
}

#[test]
fn a_pre_dump_to_the_streamer_may_be_in_read_mode() {
    let pair = Pair::new();
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).pre_dump();
    let started = Started::with("pre-dump --stream -t 1 --pre-dump-mode read");
    succeeds(job.spawn_as(FAKE_CRIU, &started));
}

/// What cannot be seen of the round, by RPC or from another host, its inventory tells.
#[test]
fn a_dump_on_a_round_in_read_mode_is_refused_before_the_freeze() {
    let (pair, port) = proxy_with_page_server();
    let dir = |name: &str| pair.dir().join(name);
    let rpc = Started::with("swrk 3");
    succeeds(round(port, dir("1"), None).spawn_as(FAKE_CRIU, &rpc));
    let inventory = [INVENTORY, READ_MODE].concat();
    fs::write(dir("1").join("inventory.img"), inventory).expect("a file");
    succeeds(round(port, dir("2"), Some("../1")).spawn_as(FAKE_CRIU, &rpc));

    let dump = dump_of(round(port, dir("3"), Some("../2")), &pair.source);
    let criu = dump.spawn_as(FAKE_CRIU, &Started::with("dump --page-server -t 1"));
    fails(criu, ROUND_FAILED, "was made with --pre-dump-mode read");
    none_is_committed(&pair);
}

#[test]
fn a_round_in_read_mode_to_the_cache_is_refused() {
    let port = free_port();
    let args = ["--page-server", &port.to_string()];
    let pair = Options::default().cache(&args).start();
    let dir = |name: &str| pair.dir().join(name);
    let read = Started::with("pre-dump --page-server -t 1 --pre-dump-mode read");
    let criu = round(port, dir("1"), None).spawn_as(FAKE_CRIU, &read);
    fails(criu, ROUND_FAILED, "");
    until("it says why", || {
        pair.cache.log().contains("has --pre-dump-mode read")
    });
    let plain = Started::with("pre-dump --page-server -t 1");
    succeeds(round(port, dir("2"), None).spawn_as(FAKE_CRIU, &plain));
}

#[test]
fn images_that_build_on_a_round_in_read_mode_are_not_imported() {
    let pair = Pair::new();
    let (first, second) = (pair.dir().join("1"), pair.dir().join("2"));
    fs::create_dir(&first).expect("a directory");
    fs::create_dir(&second).expect("a directory");
    std::os::unix::fs::symlink("../1", second.join("parent")).expect("a link");
    let inventory = [INVENTORY, READ_MODE].concat();
    fs::write(first.join("inventory.img"), inventory).expect("a file");
    let output = Command::new(bin("image-cache"))
        .arg("import")
        .arg(&second)
        .arg("--control")
        .arg(pair.target.join("image-cache-control.sock"))
        .output()
        .expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("was made with --pre-dump-mode read"),
        "{said}"
    );
}
