//! Several CRIUs at once at one page server. Their pagemaps have the same ids and addresses, as those of containers
//! have: nothing but the images directories tells their rounds apart.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, until, Options, Pair};
use e2e_tests::fake::child::FakeCriu;
use e2e_tests::fake::pages::{bytes_of, Dump, TASK};
use e2e_tests::fake::stream::Serve;
use e2e_tests::fake::{script, PageRound};

const FAKE_CRIU: &str = env!("CARGO_BIN_EXE_fake-criu");

const PAGES: usize = 64;

/// All images of a dump but those of the memory.
fn images_of_dump() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.join("fixtures/page-server-incremental/images-3")
}

fn start() -> (Pair, u16) {
    let port = free_port();
    let pair = Options::default()
        .proxy(&["--page-server", &port.to_string(), "--session", "web"])
        .start();
    (pair, port)
}

/// A process that is migrated, with its rounds in directories of its own.
struct Process<'a> {
    pair: &'a Pair,
    port: u16,
    /// Where the control socket of its image-proxy is.
    work_dir: PathBuf,
    name: &'static str,
    rounds: usize,
    memory: Vec<u64>,
}

impl<'a> Process<'a> {
    fn new(pair: &'a Pair, port: u16, name: &'static str) -> Self {
        let first = u64::from(name.as_bytes()[0]) << 32;
        let memory = (0..PAGES as u64).map(|n| first | n << 16).collect();
        Process {
            pair,
            port,
            work_dir: pair.source.clone(),
            name,
            rounds: 0,
            memory,
        }
    }

    fn dir(&self, round: usize) -> PathBuf {
        self.pair.dir().join(format!("{}{round}", self.name))
    }

    /// The next round, after it has written some of its pages.
    fn next(&mut self) -> PageRound {
        let before = self.rounds;
        let round = self.after((before > 0).then_some(before));
        self.rounds += 1;
        round
    }

    /// A round with that one as its parent.
    fn after(&mut self, parent: Option<usize>) -> PageRound {
        let round = self.rounds + 1;
        let changed = vec![round, PAGES - round];
        for page in &changed {
            self.memory[*page] += 1;
        }
        let dir = self.dir(round);
        fs::create_dir_all(&dir).expect("a directory");
        PageRound {
            port: self.port,
            images_dir: Some(dir),
            parent: parent.map(|parent| format!("../{}{parent}", self.name)),
            memory: self.memory.clone(),
            changed,
            dump: None,
            stop: false,
            cut: false,
        }
    }

    fn dump(&mut self) -> PageRound {
        PageRound {
            dump: Some(Dump {
                script: bin("image-proxy"),
                work_dir: self.work_dir.clone(),
                files: images_of_dump(),
            }),
            ..self.next()
        }
    }
}

/// Whether the round had a parent.
fn ends(criu: FakeCriu) -> bool {
    let (status, said) = criu.wait();
    assert!(status.success(), "{said}");
    said.trim()
        .strip_prefix("parent: ")
        .expect("what it says")
        .parse()
        .expect("a bool")
}

fn done(round: &PageRound) -> bool {
    ends(round.spawn(FAKE_CRIU))
}

fn standing(round: PageRound) -> FakeCriu {
    let mut criu = PageRound {
        stop: true,
        ..round
    }
    .spawn(FAKE_CRIU);
    criu.wait_half();
    criu
}

/// The set of this session has the memory of that process, and nothing else.
fn is_restored(process: &Process, session: &str) {
    let serve = Serve::connect(&process.pair.session_dir(session)).expect("connect");
    assert!(!serve.fetch("inventory.img").is_empty());
    let pagemap = serve.fetch(&format!("pagemap-{TASK}.img"));
    // Behind the magic numbers: the length of the head, which is field 1, the number of the pages image.
    let head = &pagemap[12..12 + usize::from(pagemap[8])];
    let digits = head[1..].iter().enumerate();
    let number: u64 = digits
        .map(|(n, byte)| u64::from(byte & 0x7f) << (7 * n))
        .sum();
    let pages = serve.fetch(&format!("pages-{number}.img"));
    let words = |bytes: &[u8]| -> Vec<u64> {
        let pages = bytes
            .chunks(4096)
            .map(|page| page.first_chunk().expect("a page"));
        pages.map(|word| u64::from_le_bytes(*word)).collect()
    };
    assert_eq!(words(&pages), process.memory, "{}", process.name);
    assert!(pages == bytes_of(&process.memory));
}

fn status(pair: &Pair) -> serde_json::Value {
    let output = Command::new(bin("image-proxy"))
        .args(["status", "--json", "--control"])
        .arg(pair.source.join("image-proxy-control.sock"))
        .output()
        .expect("the status command");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The sessions that wait for their next round, each with the number of its rounds.
fn waiting(pair: &Pair) -> Vec<(String, usize)> {
    let status = status(pair);
    let sessions = status["sessions"].as_array().expect("a list").iter();
    let waiting = sessions.filter(|s| s["state"] == "waits for the next run");
    let mut found: Vec<_> = waiting
        .map(|s| {
            let name = s["name"].as_str().expect("a name").to_owned();
            (name, s["rounds"].as_array().expect("a list").len())
        })
        .collect();
    found.sort();
    found
}

fn waits(pair: &Pair, expected: &[(&str, usize)]) {
    until(&format!("{expected:?} wait"), || {
        let waiting = waiting(pair);
        let names = waiting
            .iter()
            .map(|(name, rounds)| (name.as_str(), *rounds));
        names.eq(expected.iter().copied())
    });
}

/// One after the other, both in the middle of a round, and a dump beside a dump.
#[test]
fn two_processes_of_one_pid_do_not_meet() {
    let (pair, port) = start();
    let mut a = Process::new(&pair, port, "a");
    let mut b = Process::new(&pair, port, "b");
    assert!(!done(&a.next()));
    assert!(!done(&b.next()));
    assert!(done(&a.next()));
    assert!(done(&b.next()));
    waits(&pair, &[("web", 2), ("web-2", 2)]);

    let (mut in_a, mut in_b) = (standing(a.next()), standing(b.next()));
    in_a.go_on();
    assert!(ends(in_a));
    // While a round of the other is open.
    assert!(done(&a.next()));
    in_b.go_on();
    assert!(ends(in_b));
    waits(&pair, &[("web", 4), ("web-2", 3)]);

    // The pre-dump of one in the middle of the other's dump, and then two dumps.
    let mut in_a = standing(a.dump());
    assert!(done(&b.next()));
    assert!(done(&b.dump()));
    in_a.go_on();
    assert!(ends(in_a));
    is_restored(&b, "web-2");
    is_restored(&a, "web");
    assert_eq!(waiting(&pair), []);
}

/// The dumps of two processes: both announced before either sends a page.
#[test]
fn dumps_find_their_announcements() {
    let (pair, port) = start();
    let mut a = Process::new(&pair, port, "a");
    let mut b = Process::new(&pair, port, "b");
    assert!(!done(&a.next()));
    let (mut in_b, mut in_a) = (standing(b.dump()), standing(a.dump()));
    in_a.go_on();
    assert!(ends(in_a), "it has a parent");
    in_b.go_on();
    assert!(!ends(in_b), "its first round");
    is_restored(&a, "web");
    is_restored(&b, "web-2");
}

#[test]
fn a_broken_round_is_nobodys_parent_and_harms_nobody_else() {
    let (pair, port) = start();
    let mut a = Process::new(&pair, port, "a");
    let mut b = Process::new(&pair, port, "b");
    assert!(!done(&a.next()));
    assert!(!done(&b.next()));
    let cut = PageRound {
        cut: true,
        ..a.next()
    };
    assert!(done(&cut), "it began with a parent");
    assert!(done(&b.next()));
    // After the broken one, and after the one before that.
    assert!(!done(&a.next()));
    assert!(done(&a.dump()));
    is_restored(&a, "web");
    assert!(done(&b.dump()));
    is_restored(&b, "web-2");
}

#[test]
fn only_the_last_round_is_a_parent() {
    let (pair, port) = start();
    let mut a = Process::new(&pair, port, "a");
    assert!(!done(&a.next()));
    assert!(done(&a.next()));
    let skipping = a.after(Some(1));
    assert!(
        !done(&skipping),
        "what the second round took is not dirty any more"
    );
    a.rounds += 1;
    assert!(done(&a.dump()));
    is_restored(&a, "web-2");
}

/// Given up and begun anew: in the same directory, and after that was removed.
#[test]
fn an_abandoned_series_makes_room() {
    let (pair, port) = start();
    let mut a = Process::new(&pair, port, "a");
    assert!(!done(&a.next()));
    waits(&pair, &[("web", 1)]);
    a.rounds = 0;
    assert!(!done(&a.next()));
    waits(&pair, &[("web", 1)]);
    fs::remove_dir_all(a.dir(1)).expect("its directory");
    let mut b = Process::new(&pair, port, "b");
    assert!(!done(&b.next()));
    waits(&pair, &[("web", 1)]);
    assert!(done(&b.dump()));
    is_restored(&b, "web");
}

/// A client that has no directory open continues what such a client began, and nothing else.
#[test]
fn unidentified_rounds_join_each_other_alone() {
    let (pair, port) = start();
    let unseen = |mut round: PageRound| {
        round.images_dir = None;
        round
    };
    let mut a = Process::new(&pair, port, "a");
    let mut u = Process::new(&pair, port, "u");
    assert!(!done(&a.next()));
    assert!(!done(&unseen(u.next())));
    assert!(done(&a.next()));
    assert!(done(&unseen(u.next())));
    waits(&pair, &[("web", 2), ("web-2", 2)]);
    assert!(done(&a.dump()));
    is_restored(&a, "web");
    // A dump that can be seen is none of those that cannot.
    assert!(!done(&u.dump()));
    is_restored(&u, "web");
    waits(&pair, &[("web-2", 2)]);
}

/// An image-proxy that sees no process but its own, as in a container: one series at a time works as ever.
#[test]
fn a_proxy_that_sees_no_process_takes_one_series() {
    let (pair, _) = start();
    let port = free_port();
    let dir = pair.dir().join("apart");
    fs::create_dir(&dir).expect("a directory");
    let mut apart = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
        .arg(bin("image-proxy"))
        .args(["--address", "127.0.0.1", "--session", "apart"])
        .args(["--port", &pair.port.to_string()])
        .args(["--page-server", &port.to_string()])
        .current_dir(&dir)
        .stdin(Stdio::null())
        .spawn()
        .expect("unshare can be started");
    until("it listens", || {
        TcpStream::connect(("127.0.0.1", port)).is_ok()
    });
    let mut a = Process::new(&pair, port, "a");
    a.work_dir = dir;
    let parents = [done(&a.next()), done(&a.next())];
    // The script of a dump is refused before anything is frozen: whether CRIU has killed could not be seen.
    let said = a.dump().spawn(env!("CARGO_BIN_EXE_fake-criu")).wait().1;
    apart.kill().expect("our own child");
    apart.wait().expect("our own child");
    assert_eq!(parents, [false, true]);
    assert!(said.contains("pid namespace"), "{said}");
}

fn script_of_test(pair: &Pair, action: &str, images: &Path) -> script::ScriptResult {
    let limit = Duration::from_secs(20);
    script::run(&bin("image-proxy"), action, images, &pair.source, limit).expect("it runs")
}

/// A dump has one connection; with a second one somebody else's pages could be in it.
#[test]
fn a_second_connection_fails_the_dump() {
    let (pair, port) = start();
    let images = images_of_dump();
    assert!(script_of_test(&pair, "pre-dump", &images).ok());
    let open = [5_u32.to_le_bytes(), [0; 4]].concat();
    let open = [&open[..], &[0; 8], &(TASK << 8 | 1).to_le_bytes()].concat();
    let ask = || {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the page server");
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a timeout");
        stream.write_all(&open).expect("it is taken");
        let mut answer = [0; 4];
        (stream.read_exact(&mut answer).is_ok(), stream)
    };
    let (first, _held) = ask();
    let (second, _) = ask();
    assert!(first && !second);
    let refused = script_of_test(&pair, "post-dump", &images);
    assert!(refused.stderr.contains("a second time"), "{refused:?}");
}
