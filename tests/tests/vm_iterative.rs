//! Iterative migration as a user does it, with Debian's CRIU and Debian's kernel in a virtual
//! machine: pre-dump twice while the process runs, dump the rest, restore it on another host.
//!
//! The kernel that the tests run on need not track dirty pages; the one in the machine does. It is
//! booted once for all tests; what goes on in it is `tests/vm/iterative.sh`, which judges
//! nothing: each test here judges the logs of its case.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use e2e_tests::bins::{bin, workspace};
use e2e_tests::real::content::{hash, mix, Written};

const CASES: [&str; 6] = [
    "counter_moves",
    "family_moves",
    "writer_moves",
    "direct_moves",
    "cut_link",
    "twins_move",
];

/// All cases take a third of it on an idle machine.
const TIME_LIMIT: &str = "400";

/// The 256 MiB of the writer are there twice at the end of its case, in the cache and restored.
const MEMORY: &str = "1536M";

const PAGE_BYTES: u64 = 4096;

/// What a run of the machine leaves.
struct Machine {
    console: String,
    /// Text by path, which begins with the case.
    files: BTreeMap<String, String>,
}

fn machine() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(boot)
}

fn boot() -> Machine {
    let temp = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let (console, results) = (temp.path().join("console"), temp.path().join("results"));
    let to_file = File::create(&console).expect("a file");
    let pair = |from: &Path, to: &str| format!("{}:{to}", from.display());
    let status = Command::new(workspace().join("scripts/vm"))
        .args(["--packages", "criu,nftables,procps", "--memory", MEMORY])
        .args(["--time-limit", TIME_LIMIT])
        .args(["--copy", &pair(&programs(), "/tmp/srv")])
        .args(["image-proxy", "image-cache"].iter().flat_map(|name| {
            let to = format!("/tmp/opt/{name}");
            ["--copy".to_owned(), pair(&bin(name), &to)]
        }))
        .arg("--fetch")
        .arg(format!("/tmp/results:{}", results.display()))
        .arg(workspace().join("tests/vm/iterative.sh"))
        .args(CASES)
        .stdin(Stdio::null())
        .stderr(to_file.try_clone().expect("a second handle"))
        .stdout(to_file)
        .status()
        .expect("scripts/vm can be started");
    let console = fs::read(&console).expect("the console");
    let console = String::from_utf8_lossy(&console).into_owned();
    assert!(
        status.success(),
        "scripts/vm: {status}\n--- console of the machine\n{console}"
    );
    let mut files = BTreeMap::new();
    read_below(&results, "", &mut files);
    Machine { console, files }
}

/// The directory of the test programs, compiled.
fn programs() -> std::path::PathBuf {
    let output = Command::new(workspace().join("scripts/lib/programs"))
        .stdin(Stdio::null())
        .output()
        .expect("scripts/lib/programs can be started");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "scripts/lib/programs: {errors}");
    String::from_utf8_lossy(&output.stdout).trim().into()
}

fn read_below(dir: &Path, prefix: &str, files: &mut BTreeMap<String, String>) {
    for entry in fs::read_dir(dir).expect("the results") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        let name = format!("{prefix}{name}");
        if path.is_dir() {
            read_below(&path, &format!("{name}/"), files);
        } else {
            let bytes = fs::read(&path).expect("a result");
            files.insert(name, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}

/// A round as image-proxy reports it, in pages.
#[derive(Debug)]
struct Round {
    new: u64,
    replaced: u64,
    unchanged: u64,
}

impl Round {
    fn carried(&self) -> u64 {
        self.new + self.replaced
    }

    fn total(&self) -> u64 {
        self.carried() + self.unchanged
    }

    /// Whether everything came, nothing being left to an earlier round.
    fn is_full(&self) -> bool {
        self.unchanged == 0
    }

    fn carries_less_than_a_tenth(&self) -> bool {
        self.carried() * 10 < self.total()
    }
}

/// One case. If the test fails, its logs are printed.
struct Case(&'static str);

impl Case {
    fn file(&self, name: &str) -> &'static str {
        let path = format!("{}/{name}", self.0);
        let text = machine().files.get(&path);
        text.unwrap_or_else(|| panic!("the machine left no {path}"))
    }

    fn lines(&self, name: &str, start: &str) -> Vec<&'static str> {
        let lines = self.file(name).lines();
        lines.filter(|line| line.starts_with(start)).collect()
    }

    fn fact(&self, name: &str) -> &'static str {
        let facts = self.file("facts").lines().filter_map(|l| l.split_once(' '));
        let mut values = facts.filter(|(n, _)| *n == name).map(|(_, value)| value);
        values.next().unwrap_or_else(|| panic!("no fact {name}"))
    }

    /// Those that have this word in their report.
    fn rounds_with(&self, word: &str) -> Vec<Round> {
        self.rounds_in("image-proxy.log", word)
    }

    fn rounds_in(&self, log: &str, word: &str) -> Vec<Round> {
        let log = self.file(log).lines();
        log.filter(|line| line.contains("page server round merged"))
            .filter(|line| word.is_empty() || line.split(' ').any(|w| w == word))
            .map(|line| Round {
                new: number(field(line, "new")),
                replaced: number(field(line, "replaced")),
                unchanged: number(field(line, "unchanged")),
            })
            .collect()
    }

    fn errors(&self, name: &str) -> Vec<&'static str> {
        let log = self.file(name).lines();
        log.filter(|line| line.contains(" ERROR ")).collect()
    }

    /// The last thing that the program said about itself.
    fn last_report(&self) -> &'static str {
        let reports = self.lines("program.log", "report ");
        reports.last().expect("a report")
    }

    /// What holds for every migration, whatever came before the last round.
    fn has_moved(&self) {
        assert!(
            machine().files.contains_key(&format!("{}/done", self.0)),
            "the case did not come to its end"
        );
        for name in ["criu-restore", "exit-image-proxy", "exit-image-cache"] {
            assert_eq!(self.fact(name), "0", "{name}");
        }
        assert_eq!(self.lines("program.log", "fatal"), [""; 0]);

        // It counted in its memory, and nothing was lost, repeated, or done by two at once.
        let ticks = self.lines("program.log", "tick ");
        for (n, line) in ticks.iter().enumerate() {
            let tick = line.split(' ').nth(1).expect("a number");
            assert_eq!(tick, (n + 1).to_string(), "after {n} ticks");
        }
        let at_dump = number(self.fact("ticks-at-dump"));
        assert!(
            ticks.len() as u64 >= at_dump + 40,
            "it does not go on after {at_dump}"
        );

        let images = self.file("source-images");
        assert!(images.lines().any(|image| image.ends_with("/pstree.img")));
        let names = images.lines().filter_map(|image| image.rsplit('/').next());
        let pages: Vec<_> = names.filter(|n| n.starts_with("page")).collect();
        assert_eq!(pages, [""; 0], "pages became files on the source");
        assert_eq!(self.file("target-files"), "", "files on the target");
    }

    /// Every CRIU succeeded, and no daemon had anything to complain of.
    fn is_smooth(&self) {
        for name in ["criu-1", "criu-2", "criu-3"] {
            assert_eq!(self.fact(name), "0", "{name}");
        }
        for log in ["image-proxy.log", "image-cache.log"] {
            assert_eq!(self.errors(log), [""; 0], "{log}");
        }
    }

    /// The three rounds; the first is full.
    fn three_rounds(&self) -> [Round; 3] {
        self.three_rounds_in("image-proxy.log")
    }

    fn three_rounds_in(&self, log: &str) -> [Round; 3] {
        let rounds = self.rounds_in(log, "");
        let rounds: [Round; 3] = rounds.try_into().expect("three rounds");
        eprintln!("{}: {rounds:#?}", self.0);
        assert!(rounds[0].is_full());
        rounds
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        eprintln!("--- console of the machine\n{}", machine().console);
        for (path, text) in &machine().files {
            let of_case = path.strip_prefix(self.0).unwrap_or_default();
            if of_case.ends_with(".log") && of_case != "/program.log" {
                let lines: Vec<_> = text.lines().collect();
                let last = lines.len().saturating_sub(60);
                eprintln!("--- {path} ({last} lines before)");
                lines[last..].iter().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// The value of a `name=value` word.
fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let mut words = line.split(' ').filter_map(|word| word.split_once('='));
    let found = words.find(|(n, _)| *n == name);
    found.unwrap_or_else(|| panic!("no {name} in {line}")).1
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|_| panic!("{text:?}"))
}

// --- the tests --------------------------------------------------------------------------------

#[test]
fn a_counter_is_moved_in_three_rounds() {
    let case = Case("counter_moves");
    case.has_moved();
    case.is_smooth();
    // It has no more than a few pages, and it touches some of them all the time: its stack, its
    // counter, and the C library's.
    for later in &case.three_rounds()[1..] {
        assert!(later.carried() > 0, "a counter counts");
        assert!(later.unchanged > later.carried());
    }
}

#[test]
fn processes_of_different_users_keep_their_shared_memory() {
    const WORDS: u64 = 1 << 17;
    const PRIVATE_WORDS: u64 = 16 << 17;
    let case = Case("family_moves");
    case.has_moved();
    case.is_smooth();
    let [_, second, last] = case.three_rounds();
    assert!(second.carries_less_than_a_tenth());
    assert!(last.carries_less_than_a_tenth());

    let shared = hash((1..=WORDS).map(mix));
    let children = |report: &'static str| -> Vec<Vec<&str>> {
        let words = report.split(' ').filter_map(|w| w.strip_prefix("child="));
        words.map(|child| child.split(',').collect()).collect()
    };
    let reports = case.lines("program.log", "report ");
    assert_eq!(field(case.last_report(), "shared"), shared);
    let before = children(reports[0]);
    let after = children(case.last_report());
    assert_eq!((before.len(), after.len()), (3, 3));
    for (n, (before, after)) in (0..).zip(before.iter().zip(&after)) {
        let private = hash((0..PRIVATE_WORDS).map(|i| mix((n + 1) << 32 | i)));
        let user = (1001 + n).to_string();
        assert_eq!(after[..4], [&user, &shared, &private, "1"]);
        assert!(number(after[4]) > number(before[4]), "{user} beats");
    }
    let users = case.file("target-users");
    let mut users: Vec<_> = users.split_whitespace().collect();
    users.sort_unstable();
    assert_eq!(users, ["0", "1001", "1002", "1003"]);
}

#[test]
fn a_writer_of_256_mib_is_moved_with_a_last_round_of_what_it_wrote() {
    a_writer_is_moved(Case("writer_moves"), 256, "image-proxy.log");
}

#[test]
fn pages_that_go_straight_to_the_target_are_moved_in_rounds_too() {
    a_writer_is_moved(Case("direct_moves"), 64, "image-cache.log");
}

fn a_writer_is_moved(case: Case, mib: usize, log: &str) {
    const STRIDE: usize = 50;
    let pages = (mib as u64) << 20 >> 12;
    case.has_moved();
    case.is_smooth();
    let [first, second, last] = case.three_rounds_in(log);
    assert!(first.new >= pages);
    let written = pages.div_ceil(STRIDE as u64);
    for later in [second, last] {
        assert!(later.total() >= pages);
        assert!(later.carried() >= written, "a written page is left out");
        assert!(later.carries_less_than_a_tenth());
    }
    let report = case.last_report();
    let expected = Written::new(mib, STRIDE).hash_after(number(field(report, "writes")));
    assert_eq!(field(report, "hash"), expected, "{report}");
}

#[test]
fn a_round_after_one_that_was_cut_is_full() {
    const MIB: usize = 128;
    const STRIDE: usize = 8;
    const PAGES: u64 = (MIB as u64) << 20 >> 12;
    let case = Case("cut_link");
    case.has_moved();
    for name in ["criu-1", "criu-3", "criu-4"] {
        assert_eq!(case.fact(name), "0", "{name}");
    }

    // Cut at a byte, before the round was over, by far.
    let sent = number(case.fact("cut-after"));
    let expected = (4 << 20)..=(8 << 20);
    assert!(expected.contains(&sent), "{sent} bytes");
    assert!(sent < PAGES / STRIDE as u64 * PAGE_BYTES);
    let errors = case.errors("image-proxy.log");
    let logged = |what: &str| errors.iter().any(|error| error.contains(what));
    assert!(logged("link to 10.77.0.2:7000 lost"), "{errors:?}");
    assert!(logged("page server round: "), "{errors:?}");

    // The cut one is not among them. The one after it was told of no parent, although there is
    // one in CRIU's directory and CRIU's own page server would have it.
    let [first, next, last] = case.three_rounds();
    assert!(first.new >= PAGES);
    assert!(next.is_full() && next.carried() >= PAGES);
    assert!(last.unchanged > last.carried(), "the series goes on");
    let report = case.last_report();
    let expected = Written::new(MIB, STRIDE).hash_after(number(field(report, "writes")));
    assert_eq!(field(report, "hash"), expected, "{report}");
}

/// Containers have the same pids and often the same addresses: the page server is told nothing by which their rounds
/// could be told from each other. That either restored memory is right shows that they were.
#[test]
fn two_processes_of_one_pid_are_moved_at_once() {
    const MIB: usize = 32;
    const PAGES: u64 = (MIB as u64) << 20 >> 12;
    let case = Case("twins_move");
    assert_eq!(case.file("done"), "", "the case did not come to its end");
    for (name, session, stride) in [("a", "session=twin", 20), ("b", "session=twin-2", 30)] {
        let inside = case.fact(&format!("pid-{name}")).split_whitespace().last();
        assert_eq!(inside, Some("1"));
        for criu in [1, 2, 3].map(|n| format!("criu-{name}{n}")) {
            assert_eq!(case.fact(&criu), "0", "{criu}");
        }
        assert_eq!(case.fact(&format!("criu-restore-{name}")), "0");
        let rounds: [Round; 3] = case.rounds_with(session).try_into().expect("three rounds");
        eprintln!("{name}: {rounds:#?}");
        assert!(rounds[0].is_full() && rounds[0].new >= PAGES);
        for later in &rounds[1..] {
            assert!(later.total() >= PAGES);
            assert!(later.carries_less_than_a_tenth());
        }
        let log = format!("{name}.log");
        assert_eq!(case.lines(&log, "fatal"), [""; 0]);
        let reports = case.lines(&log, "report ");
        let report = reports.last().expect("a report");
        let expected = Written::new(MIB, stride).hash_after(number(field(report, "writes")));
        assert_eq!(field(report, "hash"), expected, "{report}");
    }
    for log in ["image-proxy.log", "image-cache.log"] {
        assert_eq!(case.errors(log), [""; 0], "{log}");
    }
}
