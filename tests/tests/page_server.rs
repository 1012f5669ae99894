//! Rounds through image-proxy's page server: the recorded sessions of a real CRIU, byte for byte, and what becomes of
//! them: one flat set, made of the last dump and the newest copy of every page.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use e2e_tests::daemons::{free_port, Options, Pair};
use e2e_tests::fake::script::{self, ScriptResult};
use e2e_tests::fake::stream::Serve;
use e2e_tests::fake::{Dialect, Remote, Spelling};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const LIMIT: Duration = Duration::from_secs(20);

fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/fixtures/page-server-incremental"
    ))
    .join(name)
}

fn read(name: &str) -> Vec<u8> {
    let path = fixture(name);
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The right to be a client: CRIUs are known by the directories that they have open, and the tests of one process
/// would have each other's.
fn client() -> MutexGuard<'static, ()> {
    static CLIENT: Mutex<()> = Mutex::new(());
    CLIENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start() -> (Pair, u16) {
    start_with(&[])
}

fn start_with(cache: &[&str]) -> (Pair, u16) {
    let port = free_port();
    let pair = Options::default()
        .cache(cache)
        .proxy(&["--page-server", &port.to_string()])
        .start();
    (pair, port)
}

/// The same with the page server of image-cache itself.
fn start_direct() -> (Pair, u16) {
    let port = free_port();
    let pair = Options::default()
        .cache(&["--page-server", &port.to_string()])
        .start();
    (pair, port)
}

fn copied_images(pair: &Pair, round: u32) -> PathBuf {
    let images = pair.dir().join("images");
    let _ = fs::remove_dir_all(&images);
    fs::create_dir(&images).expect("a directory");
    for entry in fs::read_dir(fixture(&format!("images-{round}"))).expect("the fixture") {
        let entry = entry.expect("an entry");
        fs::copy(entry.path(), images.join(entry.file_name())).expect("a copy");
    }
    images
}

fn run_script(pair: &Pair, action: &str, images: &Path) -> ScriptResult {
    let program = e2e_tests::bins::bin("image-proxy");
    script::run(&program, action, images, &pair.source, LIMIT).expect("the script runs")
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).expect("the page server");
    stream.set_read_timeout(Some(LIMIT)).expect("a timeout");
    stream
}

/// The requests of a recorded session, each with its payload.
fn requests(session: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let mut rest = session;
    while !rest.is_empty() {
        let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four"));
        let present = word(0) & 0xffff == 6 && word(0) >> 16 & 4 != 0;
        let payload = if present { word(4) as usize * 4096 } else { 0 };
        let (request, tail) = rest.split_at(24 + payload);
        found.push(request);
        rest = tail;
    }
    found
}

/// The same with the 32-byte header of CRIU 4.2, whose padding is garbage.
fn widened(session: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for request in requests(session) {
        out.extend(&request[..4]);
        out.extend([0xa5; 4]);
        out.extend(&request[4..8]);
        out.extend([0; 4]);
        out.extend(&request[8..]);
    }
    out
}

/// Sends a session, like CRIU reads every answer, and gives the answers.
fn send(port: u16, session: &[u8], expected: &[u8]) -> Vec<u8> {
    let mut stream = connect(port);
    let mut writer = stream.try_clone().expect("a second handle");
    let bytes = session.to_vec();
    let writing = std::thread::spawn(move || writer.write_all(&bytes));
    let mut answers = vec![0; expected.len()];
    stream.read_exact(&mut answers).expect("the answers");
    writing.join().expect("no panic").expect("all is taken");
    stream.shutdown(Shutdown::Write).expect("CRIU closes");
    let mut more = Vec::new();
    stream.read_to_end(&mut more).expect("the end");
    assert_eq!(more, [0; 0], "bytes behind the last answer");
    answers
}

/// Fields 1, 2, 4 and 5 of each entry: address, old count, flags, count.
fn entries(pagemap: &[u8]) -> Vec<[Option<u64>; 4]> {
    let mut found = Vec::new();
    let mut rest = &pagemap[8..];
    while !rest.is_empty() {
        let len = u32::from_le_bytes(rest[..4].try_into().expect("four")) as usize;
        let mut body = &rest[4..4 + len];
        rest = &rest[4 + len..];
        let mut entry = [None; 4];
        while !body.is_empty() {
            let key = varint(&mut body);
            let slot = [1, 2, 4, 5].iter().position(|field| *field == key >> 3);
            entry[slot.expect("a known field")] = Some(varint(&mut body));
        }
        found.push(entry);
    }
    found.split_off(1) // behind the head
}

fn varint(from: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = from[0];
        *from = &from[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    value
}

fn restore_is_the_recorded_flat_set(pair: &Pair) {
    let serve = Serve::connect(&pair.target).expect("connect");
    // As restore does, which finds its set by the inventory.
    assert!(serve.fetch("inventory.img") == read("squashed/inventory.img"));
    for entry in fs::read_dir(fixture("squashed")).expect("the fixture") {
        let name = entry
            .expect("an entry")
            .file_name()
            .into_string()
            .expect("UTF-8");
        let (got, recorded) = (serve.fetch(&name), read(&format!("squashed/{name}")));
        if !name.starts_with("pagemap-") {
            assert!(
                got == recorded,
                "{name}: {} bytes, {} recorded",
                got.len(),
                recorded.len()
            );
            continue;
        }
        assert_eq!(entries(&got).len(), entries(&recorded).len(), "{name}");
        for (ours, theirs) in entries(&got).iter().zip(entries(&recorded)) {
            assert_eq!(
                (ours[0], ours[1], ours[2]),
                (theirs[0], theirs[1], theirs[2]),
                "{name}"
            );
            assert_eq!(ours[3], ours[1], "{name}: the count in both fields");
        }
    }
    assert!(serve.open("parent").expect("an answer").is_none());
    assert!(serve.open("pages-1.img").expect("an answer").is_none());
}

/// The same in a process that has its images directory open: a round is known by that. It is a child of ours, and so
/// is the script, which makes us their CRIU.
fn send_from(images: &Path, port: u16, session: &[u8], expected: &[u8]) -> Vec<u8> {
    let (to, from) = (images.join("session"), images.join("answers"));
    fs::write(&to, session).expect("a file");
    let program = r#"
        exec 4<"$1" 5<>"/dev/tcp/127.0.0.1/$2"
        cat "$3" >&5 &
        head -c "$4" <&5 >"$5" && wait $!
    "#;
    let status = std::process::Command::new("timeout")
        .args(["20", "bash", "-c", program, "bash"])
        .arg(images)
        .arg(port.to_string())
        .arg(&to)
        .arg(expected.len().to_string())
        .arg(&from)
        .status();
    assert!(status.expect("bash").success());
    fs::remove_file(to).expect("the file");
    fs::read(from).expect("the answers")
}

fn three_rounds(wide: bool, cache: &[&str]) {
    let (pair, port) = start_with(cache);
    let dir = |n: u32| pair.dir().join(format!("images{n}"));
    for n in 1..=3 {
        let images = dir(n);
        fs::rename(copied_images(&pair, n), &images).expect("a new name");
        if n > 1 {
            symlink(format!("../images{}", n - 1), images.join("parent")).expect("a link");
        }
        // Not images, and not to be shipped.
        fs::write(images.join("dump.log"), "log").expect("a file");
        fs::write(images.join("stats-dump"), "stats").expect("a file");
        assert!(run_script(&pair, "pre-dump", &images).ok());
        let session = read(&format!("session-{n}.client-to-server.bin"));
        let session = if wide { widened(&session) } else { session };
        let expected = read(&format!("session-{n}.server-to-client.bin"));
        assert_eq!(
            send_from(&images, port, &session, &expected),
            expected,
            "round {n}"
        );
    }
    let images = dir(3);
    what_an_operator_sees(&pair);
    let committed = run_script(&pair, "post-dump", &images);
    assert!(committed.ok(), "{committed:?}");
    if cache.contains(&"--release-on-read") {
        // One restore, and no other one.
        return restore_is_the_recorded_flat_set(&pair);
    }
    // A --remote restore sees one snapshot, named by the directory that the other images were in.
    let remote = Remote::restore(&pair.target, Dialect::Pipe, Spelling::Empty);
    let id = images.to_str().expect("UTF-8");
    assert_eq!(remote.list().expect("the list"), [id]);
    let mut pages = Vec::new();
    let channel = remote.open_read(id, "pages-65537.img").expect("an answer");
    let mut channel = channel.unwrap_or_else(|errno| panic!("errno {errno}"));
    channel.read_to_end(&mut pages).expect("bytes");
    assert!(pages == read("squashed/pages-65537.img"));
    restore_is_the_recorded_flat_set(&pair);
}

/// The recorded rounds, straight to image-cache.
fn three_rounds_direct(pair: &Pair, port: u16) {
    for n in 1..=3 {
        let session = read(&format!("session-{n}.client-to-server.bin"));
        let expected = read(&format!("session-{n}.server-to-client.bin"));
        assert_eq!(send(port, &session, &expected), expected, "round {n}");
    }
    let status = cache(pair, &["status"]);
    assert!(
        status.contains("pages, to be claimed by a dump"),
        "{status}"
    );
    assert!(status.contains("round 3"), "{status}");
}

fn cache(pair: &Pair, arguments: &[&str]) -> String {
    let mut command = std::process::Command::new(e2e_tests::bins::bin("image-cache"));
    let control = pair.target.join("image-cache-control.sock");
    let output = command
        .args(arguments)
        .arg("--control")
        .arg(control)
        .output();
    let output = output.expect("image-cache runs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Pages go straight to image-cache, the other images and the commit through image-proxy.
#[test]
fn pages_straight_to_the_cache_and_the_rest_with_the_commit() {
    let _client = client();
    let (pair, port) = start_direct();
    let images = copied_images(&pair, 3);
    assert!(run_script(&pair, "pre-dump", &images).ok());
    three_rounds_direct(&pair, port);
    let committed = run_script(&pair, "post-dump", &images);
    assert!(committed.ok(), "{committed:?}");
    restore_is_the_recorded_flat_set(&pair);
}

/// Without image-proxy: the other images are brought to the target by the user.
#[test]
fn pages_straight_to_the_cache_and_the_rest_imported() {
    let _client = client();
    let (pair, port) = start_direct();
    three_rounds_direct(&pair, port);
    let images = copied_images(&pair, 3);
    cache(
        &pair,
        &[
            "import",
            images.to_str().expect("UTF-8"),
            "--session",
            "web",
        ],
    );
    let status = cache(&pair, &["status"]);
    assert!(status.contains("session web: to be restored"), "{status}");
    assert!(!status.contains("to be claimed"), "{status}");
    restore_is_the_recorded_flat_set(&pair);
}

/// A directory in which an earlier, plain dump of other tasks has left its images. CRIU reads none of them.
#[test]
fn what_an_earlier_dump_left_in_the_directory_is_not_sent() {
    let _client = client();
    let (pair, port) = start();
    let left = [
        ("core-4.img", b"left".to_vec()),
        ("mm-4.img", b"left".to_vec()),
        ("pagemap-4.img", b"left".to_vec()),
        ("pages-1.img", vec![7; 4096]),
    ];
    let dir = |n: u32| pair.dir().join(format!("images{n}"));
    for n in 1..=3 {
        let images = dir(n);
        fs::rename(copied_images(&pair, n), &images).expect("a new name");
        if n > 1 {
            symlink(format!("../images{}", n - 1), images.join("parent")).expect("a link");
        }
        for (name, content) in left.iter().filter(|_| n == 3) {
            fs::write(images.join(name), content).expect("a file");
        }
        assert!(run_script(&pair, "pre-dump", &images).ok());
        let session = read(&format!("session-{n}.client-to-server.bin"));
        let expected = read(&format!("session-{n}.server-to-client.bin"));
        assert_eq!(send_from(&images, port, &session, &expected), expected);
    }
    let images = dir(3);
    let committed = run_script(&pair, "post-dump", &images);
    assert!(committed.ok(), "{committed:?}");
    let log = pair.proxy.log();
    let said = "an earlier dump left them in CRIU's images directory: core-4.img, mm-4.img, pagemap-4.img, pages-1.img";
    assert!(log.contains(said), "{log}");
    let serve = Serve::connect(&pair.target).expect("connect");
    serve.fetch("inventory.img");
    for (name, _) in &left {
        assert!(serve.open(name).expect("an answer").is_none(), "{name}");
    }
    drop(serve);
    restore_is_the_recorded_flat_set(&pair);
}

fn import(pair: &Pair, dir: &Path) -> std::process::Output {
    let mut command = std::process::Command::new(e2e_tests::bins::bin("image-cache"));
    let control = pair.target.join("image-cache-control.sock");
    command.arg("import").arg(dir).arg("--control").arg(control);
    command.output().expect("image-cache runs")
}

/// A dump and its two pre-dumps as files, each in a directory of its own, as `--prev-images-dir` leaves them.
fn chain_of_files(pair: &Pair) -> PathBuf {
    let chain = pair.dir().join("chain");
    let recorded = Path::new(env!("CARGO_MANIFEST_DIR"));
    let recorded = recorded.join("fixtures/remote-2018-incremental/images");
    for (name, parent) in [("dump", "pre2"), ("pre2", "pre1"), ("pre1", "")] {
        let dir = chain.join(name);
        fs::create_dir_all(&dir).expect("a directory");
        for file in fs::read_dir(recorded.join(name)).expect("the fixture") {
            let file = file.expect("an entry");
            fs::copy(file.path(), dir.join(file.file_name())).expect("a copy");
        }
        if !parent.is_empty() {
            symlink(format!("../{parent}"), dir.join("parent")).expect("a link");
        }
    }
    chain
}

/// Case 07: `criu restore --stream` follows no parents, so the import does.
#[test]
fn an_import_takes_the_pages_of_the_parents() {
    let _client = client();
    let (pair, _) = start();
    let chain = chain_of_files(&pair);
    let pages = |dir: &str| fs::read(chain.join(dir).join("pages-1.img")).expect("the fixture");
    let output = import(&pair, &chain.join("dump"));
    assert!(output.status.success(), "{output:?}");
    let serve = Serve::connect(&pair.target).expect("connect");
    serve.fetch("inventory.img");
    let map = entries(&serve.fetch("pagemap-173.img"));
    assert!(
        map.iter().all(|entry| entry[2] == Some(4)),
        "all is present: {map:?}"
    );
    let named: u64 = map.iter().filter_map(|entry| entry[3]).sum();
    let flat = serve.fetch("pages-1.img");
    assert_eq!(flat.len() as u64, named * 4096);
    assert!(flat.len() > pages("dump").len());
    // Every page is of the chain, and every page of the dump itself is there.
    let known: std::collections::HashSet<Vec<u8>> = ["dump", "pre2", "pre1"]
        .iter()
        .flat_map(|dir| {
            pages(dir)
                .chunks(4096)
                .map(<[u8]>::to_vec)
                .collect::<Vec<_>>()
        })
        .collect();
    let got: std::collections::HashSet<&[u8]> = flat.chunks(4096).collect();
    assert!(got.iter().all(|page| known.contains(*page)));
    assert!(pages("dump").chunks(4096).all(|page| got.contains(page)));
}

#[test]
fn an_import_whose_parents_are_cut_off_is_refused() {
    let _client = client();
    let (pair, _) = start();
    let chain = chain_of_files(&pair);
    let refused = |why: &str| {
        let output = import(&pair, &chain.join("dump"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{output:?}");
        let status = cache(&pair, &["status"]);
        assert!(status.contains("no sessions"), "{status}");
    };
    let away = chain.join("away");
    fs::rename(chain.join("pre1"), &away).expect("a new name");
    refused(
        "these pages are in a parent, ../pre1, which cannot be opened: No such file or directory",
    );
    fs::rename(&away, chain.join("pre1")).expect("the old name");
    fs::remove_file(chain.join("pre2/parent")).expect("the link");
    refused("these pages are in a parent, and the directory has no link `parent`");
    symlink("../dump", chain.join("pre2/parent")).expect("a link");
    refused("the parent ../dump is one of its own parents");
    fs::remove_file(chain.join("pre2/parent")).expect("the link");
    symlink("../pre1", chain.join("pre2/parent")).expect("a link");
    fs::write(chain.join("pre1/pages-1.img"), b"short").expect("a file");
    refused("its pages image is too short");
    fs::remove_file(chain.join("pre1/pagemap-173.img")).expect("the file");
    refused("has no page in any parent");
}

/// An import says that a set can be restored only if it can.
#[test]
fn an_import_without_an_image_of_a_task_is_refused() {
    let _client = client();
    let (pair, _) = start();
    let chain = chain_of_files(&pair);
    fs::remove_file(chain.join("dump/core-173.img")).expect("the file");
    let output = import(&pair, &chain.join("dump"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let why = "core-173.img is missing: pstree.img names it, and criu restore needs it";
    assert!(!output.status.success() && said.contains(why), "{output:?}");
    let status = cache(&pair, &["status"]);
    assert!(status.contains("no sessions"), "{status}");
}

/// A dump whose pages went elsewhere is not committed: its process would be lost.
#[test]
fn a_dump_without_its_pages_is_refused() {
    let _client = client();
    let (pair, _port) = start_direct();
    let images = copied_images(&pair, 3);
    assert!(run_script(&pair, "pre-dump", &images).ok());
    let committed = run_script(&pair, "post-dump", &images);
    assert!(!committed.ok(), "{committed:?}");
    let reason = format!("{committed:?}");
    assert!(
        reason.contains("pagemap-252.img is not in the dump"),
        "{reason}"
    );
}

/// Both status commands tell the same of the recorded rounds: 269 pages; then 59 of which all replace older ones, ...
fn what_an_operator_sees(pair: &Pair) {
    for (program, dir) in [("image-proxy", &pair.source), ("image-cache", &pair.target)] {
        let ask = |flags: &[&str]| {
            let control = dir.join(format!("{program}-control.sock"));
            let mut command = std::process::Command::new(e2e_tests::bins::bin(program));
            let output = command
                .arg("status")
                .args(flags)
                .arg("--control")
                .arg(control)
                .output();
            let output = output.expect("the status command");
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).expect("UTF-8")
        };
        let status: serde_json::Value = serde_json::from_str(&ask(&["--json"])).expect("JSON");
        let rounds = status["sessions"][0]["rounds"].as_array().expect("rounds");
        let pages = |field: &str| -> Vec<u64> {
            let numbers = rounds.iter().map(|round| round[field].as_u64());
            numbers.map(|n| n.expect("a number")).collect()
        };
        assert_eq!(pages("new_pages")[0], 269, "{program}");
        assert_eq!(
            pages("bytes"),
            [269 * 4096, 59 * 4096, 56 * 4096],
            "{program}"
        );
        assert_eq!(pages("unchanged_pages"), [0, 210, 213], "{program}");
        assert_eq!(pages("dropped_pages"), [0, 0, 0], "{program}");
        assert!(ask(&[]).contains("round 3"), "{program}: text");
    }
}

#[test]
fn the_recorded_rounds_make_the_recorded_flat_set() {
    let _client = client();
    three_rounds(false, &[]);
}

#[test]
fn the_same_with_the_headers_of_criu_4_2() {
    let _client = client();
    three_rounds(true, &[]);
}

/// The pages of three rounds go back run by run, and none of them too early.
#[test]
fn the_same_with_memory_that_goes_as_it_is_read() {
    let _client = client();
    three_rounds(false, &["--release-on-read"]);
}

/// A round that breaks off is nobody's parent, and what was merged before it is no longer one either: the next round
/// is told to be a full one. Cut before each command, and at random bytes.
fn a_round_without_close_makes_the_next_one_full((pair, port): (Pair, u16)) {
    let first = read("session-1.client-to-server.bin");
    let answers = read("session-1.server-to-client.bin");
    assert_eq!(send(port, &first, &answers), answers);

    let second = read("session-2.client-to-server.bin");
    let mut cuts = Vec::new();
    let mut at = 0;
    for request in requests(&second) {
        cuts.push(at);
        at += request.len();
    }
    let seed = std::process::id();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed.into());
    cuts.extend((0..20).map(|_| random.random_range(1..second.len())));
    // Before the first request nobody knows of whose series the connection would have been.
    for cut in cuts.into_iter().filter(|cut| *cut >= 24) {
        let mut stream = connect(port);
        stream.write_all(&second[..cut]).expect("what there is");
        stream.shutdown(Shutdown::Write).expect("and no more");
        let mut told = Vec::new();
        stream.read_to_end(&mut told).expect("the end");
        assert!(told.len() <= 5, "no status without CLOSE: {told:?}");

        assert_eq!(
            send(port, &first, &answers),
            answers,
            "after a cut at {cut}"
        );
    }
    drop(pair);
}

#[test]
fn a_round_without_close_through_image_proxy() {
    let _client = client();
    a_round_without_close_makes_the_next_one_full(start());
}

#[test]
fn a_round_without_close_straight_to_image_cache() {
    let _client = client();
    a_round_without_close_makes_the_next_one_full(start_direct());
}

/// A hole without a page is an error status, which CRIU takes for a failed dump.
#[test]
fn a_hole_without_a_page_is_refused() {
    let _client = client();
    let (_pair, port) = start();
    // The second session first: its holes have nothing behind them.
    let mut stream = connect(port);
    stream
        .write_all(&read("session-2.client-to-server.bin"))
        .expect("all is taken");
    let mut told = Vec::new();
    stream.read_to_end(&mut told).expect("the end");
    assert_eq!(told[..5], [0; 5], "no parent");
    assert_eq!(told[5..], [0xff; 4], "the status");
}

#[test]
fn garbage_costs_its_connection_alone() {
    let _client = client();
    let (pair, port) = start();
    for garbage in [
        &[0xff; 24][..],
        &[0; 64],
        b"GET / HTTP/1.1\r\n\r\nxxxxxxxxxx",
        &[4],
    ] {
        let mut stream = connect(port);
        stream.write_all(garbage).expect("it is taken");
        stream.shutdown(Shutdown::Write).expect("the end");
        let mut told = Vec::new();
        let _ = stream.read_to_end(&mut told);
        assert_eq!(told, [0; 0]);
    }
    let answers = read("session-1.server-to-client.bin");
    assert_eq!(
        send(port, &read("session-1.client-to-server.bin"), &answers),
        answers
    );
    drop(pair);
}

/// Without any page server round: the images are all files, and go with the commit too.
#[test]
fn a_dump_to_files_is_shipped_and_committed() {
    let _client = client();
    let (pair, _) = start();
    let images = fixture("squashed");
    assert!(run_script(&pair, "pre-dump", &images).ok());
    let committed = run_script(&pair, "post-dump", &images);
    assert!(committed.ok(), "{committed:?}");
    let serve = Serve::connect(&pair.target).expect("connect");
    for name in [
        "inventory.img",
        "pagemap-252.img",
        "pages-65537.img",
        "core-252.img",
    ] {
        assert!(
            serve.fetch(name) == read(&format!("squashed/{name}")),
            "{name}"
        );
    }
}
