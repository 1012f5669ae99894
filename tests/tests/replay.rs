//! Recordings of real CRIU, replayed through both daemons request by request in the recorded order, byte-exact.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::content::ImageSet;
use e2e_tests::fake::run::Snapshot;
use e2e_tests::fake::wire::Channel;
use e2e_tests::fake::{run, script, Capture, Content, Dialect, Remote, Serve, Source, Spelling};
use serde::Deserialize;

#[derive(Deserialize)]
struct Request {
    side: String,
    op: String,
    name: String,
    #[serde(default)]
    snapshot: String,
    bytes: Option<u64>,
    error: Option<u8>,
    closed_early_of: Option<u64>,
    exists: Option<bool>,
}

fn fixture(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(folder)
}

fn transcript(path: &Path) -> Vec<Request> {
    let text = std::fs::read_to_string(path).expect("the recording is there");
    serde_json::from_str(&text).expect("a list of requests")
}

/// How the requests of one run lie in time.
#[derive(Clone, Copy, PartialEq)]
enum Overlap {
    /// Each to its end before the next.
    None,
    /// Each image is opened at its place in the order, but half of it is written (or its first bytes are read) only,
    /// until the run ends: everything is open at once.
    All,
}

struct Replay {
    folder: &'static str,
    dialect: Dialect,
    spelling: Spelling,
    overlap: Overlap,
    gated: bool,
}

const R2018: Replay = Replay {
    folder: "remote-2018-incremental",
    dialect: Dialect::Socket,
    spelling: Spelling::Words,
    overlap: Overlap::None,
    gated: false,
};

const R2020: Replay = Replay {
    folder: "remote-2020-plain",
    dialect: Dialect::Pipe,
    spelling: Spelling::Empty,
    overlap: Overlap::None,
    gated: false,
};

impl Replay {
    fn image(&self, snapshot: &str, name: &str) -> Content {
        let snapshot = Path::new(snapshot).file_name().expect("a path");
        let path = fixture(self.folder)
            .join("images")
            .join(snapshot)
            .join(name);
        Content::bytes(
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
    }

    fn script(&self, action: &str, pair: &Pair) {
        if self.gated {
            let program = bin("image-proxy");
            let limit = Duration::from_secs(30);
            let result = script::run(&program, action, &pair.source, &pair.source, limit);
            let result = result.expect("the script runs");
            assert!(result.ok(), "{action}: {result:?}");
        }
    }

    fn run(&self, pair: &Pair) {
        self.run_sides(pair, &["proxy", "cache"]);
    }

    fn run_sides(&self, pair: &Pair, sides: &[&str]) {
        let dump = Remote::dump(&pair.source, self.dialect, self.spelling);
        let dump = match self.gated {
            true => dump.gated(),
            false => dump,
        };
        let restore = Remote::restore(&pair.target, self.dialect, self.spelling);
        let mut pushes = snapshots(self.folder).into_iter();
        let mut writing: Vec<(Content, Channel)> = Vec::new();
        let mut reading: Vec<(String, Content, Vec<u8>, Channel)> = Vec::new();
        let requests = transcript(&fixture(self.folder).join("transcript.json")).into_iter();
        for request in requests.filter(|request| sides.contains(&request.side.as_str())) {
            let what = format!(
                "{} {} {}@{}",
                request.side, request.op, request.name, request.snapshot
            );
            let client = if request.side == "proxy" {
                &dump
            } else {
                &restore
            };
            match (request.op.as_str(), request.name.as_str()) {
                ("append", _) => {
                    finish_writes(&mut writing);
                    client
                        .push(&pushes.next().expect("as many as snapshots"))
                        .expect(&what);
                    self.script("pre-dump", pair);
                }
                ("read", "parent") => {
                    let list = client.list_or_errno().expect(&what).expect(&what);
                    let path = fixture(self.folder).join("images/_list/parent");
                    let recorded = std::fs::read(path).expect("the recording is there");
                    let len = usize::try_from(request.bytes.expect("recorded")).expect("short");
                    assert_eq!(list.1, recorded[..len], "{what}");
                }
                ("write", name) => {
                    assert_eq!(request.side, "proxy");
                    let content = self.image(&request.snapshot, name);
                    assert_eq!(Some(content.len()), request.bytes, "{what}");
                    let mut channel = client.create(&request.snapshot, name).expect(&what);
                    content
                        .send_range(&mut channel, 0, content.len() / 2, 4096)
                        .expect(&what);
                    writing.push((content, channel));
                    if self.overlap == Overlap::None {
                        finish_writes(&mut writing);
                    }
                }
                ("read", name) => {
                    let answer = client.open_read(&request.snapshot, name).expect(&what);
                    if let Some(errno) = request.error {
                        assert_eq!(answer.err(), Some(errno), "{what}");
                        continue;
                    }
                    let mut channel =
                        answer.unwrap_or_else(|errno| panic!("{what}: errno {errno}"));
                    let mut content = self.image(&request.snapshot, name);
                    if request.side == "proxy" && name.starts_with("pages-") {
                        // CRIU skips them at dump time; the proxy keeps no pages.
                        content = Content::Zeros(content.len());
                    }
                    let mut head = vec![0; 4096];
                    let count = channel.read(&mut head).expect(&what);
                    head.truncate(count);
                    if let Some(len) = request.closed_early_of {
                        assert_eq!(content.len(), len, "{what}");
                        continue;
                    }
                    assert_eq!(Some(content.len()), request.bytes, "{what}");
                    reading.push((what, content, head, channel));
                    if self.overlap == Overlap::None || request.side == "proxy" {
                        finish_reads(&mut reading);
                    }
                }
                ("finish", _) if request.side == "proxy" => {
                    finish_writes(&mut writing);
                    self.script("post-dump", pair);
                    client.dump_finish().expect(&what);
                }
                ("finish", _) => {
                    finish_reads(&mut reading);
                    client.restore_finish().expect(&what);
                }
                _ => panic!("{what}: not in any recording"),
            }
        }
    }
}

fn finish_writes(writing: &mut Vec<(Content, Channel)>) {
    for (content, mut channel) in writing.drain(..) {
        content
            .send_range(&mut channel, content.len() / 2, content.len(), 4096)
            .expect("the proxy drains");
    }
}

fn finish_reads(reading: &mut Vec<(String, Content, Vec<u8>, Channel)>) {
    for (what, content, head, channel) in reading.drain(..) {
        let check = content.check(&mut head.as_slice().chain(channel));
        check.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

/// What was pushed, in order: the recorded list names it.
fn snapshots(folder: &str) -> Vec<String> {
    let mut ids = Vec::new();
    let mut bytes =
        &std::fs::read(fixture(folder).join("images/_list/parent")).expect("recorded")[..];
    while let Some((prefix, rest)) = bytes.split_first_chunk::<4>() {
        let (message, rest) = rest.split_at(u32::from_le_bytes(*prefix) as usize);
        ids.push(String::from_utf8(message[2..].to_vec()).expect("a path"));
        bytes = rest;
    }
    ids
}

#[test]
fn remote_2018_incremental() {
    R2018.run(&Pair::new());
}

#[test]
fn remote_2018_incremental_with_everything_open_at_once() {
    Replay {
        overlap: Overlap::All,
        ..R2018
    }
    .run(&Pair::new());
}

#[test]
fn remote_2018_incremental_gated() {
    Replay {
        gated: true,
        ..R2018
    }
    .run(&Pair::new());
}

/// The cache makes one snapshot of the three: restore sees no parents, and as many pages as the last pagemap names.
#[test]
fn remote_2018_incremental_squashed() {
    for gated in [false, true] {
        let pair = Options::default().cache(&["--squash"]).start();
        Replay { gated, ..R2018 }.run_sides(&pair, &["proxy"]);
        let restore = Remote::restore(&pair.target, Dialect::Socket, Spelling::Words);
        assert_eq!(restore.list().expect("the list"), ["/tmp/dump"]);
        let fetch = |name: &str| {
            let answer = restore.open_read("/tmp/dump", name).expect(name);
            let mut bytes = Vec::new();
            let mut channel = answer.unwrap_or_else(|errno| panic!("{name}: errno {errno}"));
            channel.read_to_end(&mut bytes).expect(name);
            bytes
        };
        // 23 pages of the dump itself, the others of its parents: 269 + 1 as pre1 has them, in one run each.
        let recorded = R2018.image("/tmp/pre1", "pages-1.img").to_vec();
        let pages = fetch("pages-1.img");
        assert_eq!(
            pages.len(),
            recorded.len(),
            "the same pages as the full one, with newer content"
        );
        let same = pages
            .chunks(4096)
            .zip(recorded.chunks(4096))
            .filter(|(a, b)| a == b)
            .count();
        let all = recorded.len() / 4096;
        assert!(
            same > all / 2 && same < all,
            "{same} of {all} pages are as pre1 had them"
        );
        let own = R2018.image("/tmp/dump", "pages-1.img").to_vec();
        for page in own.chunks(4096) {
            assert!(
                pages.chunks(4096).any(|p| p == page),
                "a page of the dump is missing"
            );
        }
        assert!(fetch("core-173.img") == R2018.image("/tmp/dump", "core-173.img").to_vec());
    }
}

#[test]
fn remote_2018_incremental_twice_through_the_same_daemons() {
    let pair = Pair::new();
    R2018.run(&pair);
    Replay {
        overlap: Overlap::All,
        ..R2018
    }
    .run(&pair);
}

#[test]
fn remote_2018_incremental_with_the_dialect_said_to_the_cache() {
    R2018.run(
        &Options::default()
            .cache(&["--remote-dialect", "socket"])
            .start(),
    );
}

#[test]
fn remote_2020_plain() {
    R2020.run(&Pair::new());
}

#[test]
fn remote_2020_plain_with_everything_open_at_once() {
    Replay {
        overlap: Overlap::All,
        ..R2020
    }
    .run(&Pair::new());
}

#[test]
fn remote_2020_plain_gated_and_with_the_dialect_said_to_the_cache() {
    let pair = Options::default()
        .cache(&["--remote-dialect", "pipe"])
        .start();
    Replay {
        gated: true,
        ..R2020
    }
    .run(&pair);
}

#[test]
fn every_recording_through_the_same_daemons() {
    let pair = Pair::new();
    R2018.run(&pair);
    R2020.run(&pair);
    replay_stream(&pair);
    R2018.run(&pair);
}

fn stream_set() -> ImageSet {
    let folder = fixture("stream-plain");
    let requests = transcript(&folder.join("dump.transcript.json"));
    let images = requests.iter().map(|request| {
        let bytes = std::fs::read(folder.join("images").join(&request.name)).expect("recorded");
        (request.name.as_str(), Content::bytes(bytes))
    });
    ImageSet::new(images.collect())
}

fn replay_stream(pair: &Pair) {
    let set = stream_set();
    let capture = Capture::connect_alone(&pair.source).expect("the proxy listens");
    run::dump(&capture, &set, &mut |_| {}).expect("the proxy drains");
    drop(capture);
    serve_stream(pair, &set, 1);
}

fn serve_stream(pair: &Pair, set: &ImageSet, times: usize) {
    let requests = transcript(&fixture("stream-plain").join("restore.transcript.json"));
    for _ in 0..times {
        let serve = Serve::connect(&pair.target).expect("the cache listens");
        let mut open = Vec::new();
        for request in &requests {
            let channel = serve.open(&request.name).expect(&request.name);
            assert_eq!(
                channel.is_some(),
                request.exists.expect("recorded"),
                "{}",
                request.name
            );
            open.extend(channel.map(|channel| (request.name.clone(), channel)));
        }
        for (name, mut channel) in open {
            let check = set.get(&name).check(&mut channel);
            check.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}

#[test]
fn stream_plain() {
    replay_stream(&Pair::new());
}

#[test]
fn stream_plain_kept_and_served_three_times() {
    let pair = Options::default().cache(&["--keep"]).start();
    replay_stream(&pair);
    serve_stream(&pair, &stream_set(), 3);
}

#[test]
fn recordings_pass_a_link_in_shreds() {
    for seed in 1..=3 {
        eprintln!("seed {seed}");
        let faults = e2e_tests::link::Faults::shredded(seed);
        let faults = e2e_tests::link::Faults {
            // A megabyte in single bytes would take a minute; the small sets in `link_faults.rs` do that.
            up: e2e_tests::link::Plan {
                segment: 5000,
                ..faults.up
            },
            ..faults
        };
        let pair = Options::default().link(faults).start();
        Replay {
            overlap: Overlap::All,
            ..R2018
        }
        .run(&pair);
        R2020.run(&pair);
        replay_stream(&pair);
    }
}

/// The parents of a restore are read in the order of the recording; here once more level by level, as another reader
/// would, while the restore has not finished.
#[test]
fn a_second_reader_of_the_chain_reads_the_same() {
    let pair = Options::default().cache(&["--keep"]).start();
    R2018.run(&pair);
    let client = Remote::restore(&pair.target, R2018.dialect, R2018.spelling);
    for (snapshot, pagemap) in [("/tmp/pre1", 112), ("/tmp/pre2", 154), ("/tmp/dump", 153)] {
        let source = Snapshot(&client, snapshot);
        let bytes = run::read_all(&source as &dyn Source, "pagemap-173.img").expect("it is kept");
        let bytes = bytes.expect("it exists");
        assert_eq!(bytes.len(), pagemap);
        let content = R2018.image(snapshot, "pages-1.img");
        run::check_one(&source, "pages-1.img", &content).expect("it is kept");
    }
}
