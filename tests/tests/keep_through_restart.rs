//! `image-cache --keep-through-restart`: an image-cache that is killed comes back with its sets. What real CRIU restores of
//! them is in `real_criu/restarts.rs`.

use std::fs;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{scratch, start_cache, until, Daemon, Options, PagesAt, Pair};
use e2e_tests::fake::job::RestoreJob;
use e2e_tests::fake::pages::{bytes_of, Dump};
use e2e_tests::fake::run::{check_one, restore_stream, Snapshot};
use e2e_tests::fake::script::{self, Task};
use e2e_tests::fake::stream::Serve;
use e2e_tests::fake::{
    Capture, Content, Dialect, DumpJob, ImageSet, PageRound, Protocol, Remote, Spelling,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, Signal};

const FAKE: &str = env!("CARGO_BIN_EXE_fake-criu");
const LIMIT: Duration = Duration::from_secs(30);
const KEEPER: &str = "image-cache-keeper.sock";

/// Also where the memory of this host comes in small pages.
const ON: [&str; 2] = ["--keep-through-restart", "on"];

fn pair(options: Options) -> Pair {
    options.cache(&ON).proxy(&["--session", "web"]).start()
}

fn on() -> Vec<String> {
    ON.map(str::to_owned).to_vec()
}

fn status(pair: &Pair) -> String {
    pair.ask_cache(&["status"]).1
}

/// Kills image-cache, and starts another one in its place.
fn restart(pair: &mut Pair) {
    pair.cache.kill();
    pair.cache = start_cache(&pair.target, pair.port, &on());
}

/// The pids of keepers of this directory.
fn keepers(dir: &Path) -> Vec<i32> {
    let dir = fs::canonicalize(dir).expect("it is there");
    let processes = fs::read_dir("/proc").expect("procfs");
    let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let at = fs::read_link(format!("/proc/{pid}/cwd"));
        command == b"image-cache\0keeper\0" && at.is_ok_and(|at| at == dir)
    })
    .collect()
}

fn kill(pid: i32) {
    let pid = Pid::from_raw(pid).expect("a process");
    rustix::process::kill_process(pid, Signal::KILL).expect("it is ours");
}

/// A line of `status` with the id of the only session.
fn id(status: &str) -> String {
    let at = status
        .find('@')
        .unwrap_or_else(|| panic!("no id in {status}"));
    let id = status[at..].chars();
    id.take_while(|&c| c == '@' || c.is_ascii_hexdigit())
        .collect()
}

#[test]
fn a_committed_set_survives_the_death_of_image_cache() {
    for protocol in Protocol::all() {
        let mut pair = pair(Options::default());
        let job = DumpJob::new(&protocol, &pair.source, 1).gated();
        job.run().expect("the dump");
        until("it is ready", || status(&pair).contains("to be restored"));
        let before = id(&status(&pair));
        restart(&mut pair);
        let after = status(&pair);
        assert!(after.contains("to be restored"), "{after}");
        assert_eq!(id(&after), before);
        let dir = pair.session_dir("web");
        assert!(dir.join("img-cache.sock").exists(), "no sockets of its own");
        protocol.restore(&dir, &job.set()).expect("the very bytes");
        until("it is released", || {
            pair.cache.log().contains("restored; released")
        });
        assert_eq!(pair.cache.terminate(), Some(0));
        until("the keeper ends", || keepers(&pair.target).is_empty());
        assert!(!pair.target.join(KEEPER).exists());
    }
}

#[test]
fn ten_thousand_images_come_back_twice() {
    let mut pair = pair(Options::default());
    let mut set = ImageSet::sample(4);
    let many: Vec<_> = (0..10_000u64)
        .map(|n| {
            (
                format!("core-1{n:05}.img"),
                Content::pattern(n, 1000 + n % 5000),
            )
        })
        .collect();
    let many = many
        .iter()
        .map(|(name, content)| (name.as_str(), content.clone()));
    set.images
        .splice(1..1, ImageSet::new(many.collect()).images);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run_with(&set, &mut |_| {}).expect("the dump");
    until("it is ready", || status(&pair).contains("to be restored"));
    restart(&mut pair);
    restart(&mut pair);
    restore_stream(&pair.target, &set).expect("the very bytes");
}

fn run_script(task: &Task, action: &str, dir: &Path) {
    let result = script::run_of(task, &bin("image-proxy"), action, dir, dir, LIMIT);
    let result = result.expect("the script ends");
    assert!(result.ok(), "{result:?}");
}

/// Its link is gone with image-cache: only an operator can say what became of the process.
#[test]
fn a_prepared_set_is_in_doubt_afterwards() {
    for decision in ["release", "drop"] {
        let mut pair = pair(Options::default());
        let set = ImageSet::sample(2);
        let task = Task::start().expect("a process");
        let capture = Capture::connect(&pair.source).expect("connect");
        run_script(&task, "pre-dump", &pair.source);
        e2e_tests::fake::run::dump(&capture, &set, &mut |_| {}).expect("the images");
        run_script(&task, "post-dump", &pair.source);
        until("it is held", || status(&pair).contains("prepared"));
        let before = id(&status(&pair));
        restart(&mut pair);
        let after = status(&pair);
        assert!(
            after.contains("in doubt") && id(&after) == before,
            "{after}"
        );
        let (done, said) = pair.follow(&pair.cache.log(), &format!("image-cache {decision}"));
        assert!(done, "{said}");
        task.kill();
        drop(capture);
        match decision {
            "release" => restore_stream(&pair.target, &set).expect("the very bytes"),
            _ => assert!(!status(&pair).contains('@')),
        }
        until("nothing is left", || !status(&pair).contains('@'));
        assert_eq!(pair.cache.terminate(), Some(0));
        until("the keeper ends", || keepers(&pair.target).is_empty());
    }
}

/// Its CRIU may have had everything, so nothing but a look tells whether the process runs.
#[test]
fn a_set_that_a_restore_reads_is_in_doubt_afterwards() {
    let mut pair = pair(Options::default());
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    let restore = RestoreJob {
        protocol: Protocol::Stream,
        dir: pair.target.clone(),
        seed: 1,
    };
    let mut restore = restore.spawn(FAKE);
    restore.wait_half();
    restart(&mut pair);
    let after = status(&pair);
    assert!(after.contains("a restore of it may run here"), "{after}");
    restore.kill();
    let (done, said) = pair.follow(&pair.cache.log(), "image-cache release");
    assert!(done, "{said}");
    restore_stream(&pair.target, &job.set()).expect("the very bytes");
}

#[test]
fn what_was_not_whole_is_gone_with_its_memory() {
    let mut pair = pair(Options::default());
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1)
        .of_mib(64)
        .stop_in("pages-1.img");
    let mut dump = job.spawn(FAKE);
    dump.wait_half();
    restart(&mut pair);
    assert!(!status(&pair).contains('@'), "{}", status(&pair));
    dump.kill();
    assert_eq!(pair.cache.terminate(), Some(0));
    until("the keeper ends", || keepers(&pair.target).is_empty());
}

/// Images of a dump, and pages that are in the snapshot before it.
#[test]
fn the_parents_of_a_series_come_back() {
    let ids = ["/img/pre1", "/img/pre2", "/img/dump"];
    for dialect in [Dialect::Socket, Dialect::Pipe] {
        let mut pair = pair(Options::default());
        let dump = Remote::dump(&pair.source, dialect, Spelling::Words);
        let write = |id: &str, name: &str, content: &Content| {
            let mut channel = dump.create(id, name).expect(name);
            content.send(&mut channel).expect(name);
        };
        let pages = |n: usize| Content::pattern(n as u64, 100_000 * (n as u64 + 1));
        for (n, id) in ids.into_iter().enumerate() {
            dump.push(id).expect("push");
            dump.list().expect("list");
            write(id, "pages-1.img", &pages(n));
            match n {
                2 => write(id, "inventory.img", &Content::dump_inventory(99)),
                _ => write(id, "inventory.img", &Content::pre_dump_inventory()),
            }
        }
        dump.dump_finish().expect("FINISH");
        until("it is ready", || status(&pair).contains("to be restored"));
        restart(&mut pair);
        let restore = Remote::restore(&pair.target, dialect, Spelling::Words);
        assert_eq!(restore.list().expect("list"), ids);
        for (n, id) in ids.into_iter().enumerate() {
            let snapshot = Snapshot(&restore, id);
            check_one(&snapshot, "pages-1.img", &pages(n)).expect("every byte");
        }
    }
}

/// An operator stops image-cache to start another version of it.
#[test]
fn a_stopped_image_cache_leaves_its_sets_to_the_next() {
    let mut pair = pair(Options::default().cache(&["--grace-period", "1"]));
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    until("it is ready", || status(&pair).contains("to be restored"));
    pair.proxy.terminate();
    let code = pair.cache.terminate();
    assert_eq!(code, Some(0), "{}", pair.cache.log());
    assert!(pair
        .cache
        .log()
        .contains("the next image-cache on this directory has it"));
    // Another option leaves them alone.
    let off = ["--keep-through-restart", "off"].map(str::to_owned);
    let mut other = start_cache(&pair.target, pair.port, &off);
    assert!(other.log().contains("may be kept here"), "{}", other.log());
    assert!(!status(&pair).contains('@'));
    assert_eq!(other.terminate(), Some(0));
    pair.cache = start_cache(&pair.target, pair.port, &on());
    restore_stream(&pair.target, &job.set()).expect("the very bytes");
}

#[test]
fn a_keeper_that_is_killed_is_replaced() {
    let mut pair = pair(Options::default());
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    until("it is ready", || status(&pair).contains("to be restored"));
    let [first] = keepers(&pair.target)[..] else {
        panic!("{:?}", keepers(&pair.target))
    };
    kill(first);
    until("image-cache says so", || {
        pair.cache.log().contains("a new keeper process holds")
    });
    assert!(pair.cache.log().contains("the keeper process has ended"));
    restart(&mut pair);
    // The one that image-cache has not started itself is replaced as well.
    kill(keepers(&pair.target)[0]);
    until("image-cache says so", || {
        pair.cache.log().contains("a new keeper process holds")
    });
    restart(&mut pair);
    restore_stream(&pair.target, &job.set()).expect("the very bytes");
}

/// image-cache makes a directory again that is deleted, and so the keeper's socket is there again.
#[test]
fn a_deleted_directory_has_a_keeper_again() {
    let mut pair = pair(Options::default());
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    until("it is ready", || status(&pair).contains("to be restored"));
    fs::remove_dir_all(&pair.target).expect("our own");
    until("a keeper is there again", || {
        pair.target.join(KEEPER).exists() && pair.target.join("image-cache-control.sock").exists()
    });
    until("it has everything", || keepers(&pair.target).len() == 1);
    until("image-cache says so", || {
        pair.cache.log().contains("a new keeper process holds") || !pair.cache.log_file().exists()
    });
    restart(&mut pair);
    restore_stream(&pair.target, &job.set()).expect("the very bytes");
}

#[test]
fn nothing_is_left_of_an_image_cache_that_keeps_nothing() {
    let dir = scratch();
    let mut cache = start_cache(dir.path(), e2e_tests::daemons::free_port(), &on());
    assert_eq!(keepers(dir.path()).len(), 1);
    assert_eq!(cache.terminate(), Some(0));
    until("the keeper ends", || keepers(dir.path()).is_empty());
    assert!(!dir.path().join(KEEPER).exists());
    // A directory that is gone takes its keeper along: nothing could reach it.
    let mut cache = start_cache(dir.path(), e2e_tests::daemons::free_port(), &on());
    let [keeper] = keepers(dir.path())[..] else {
        panic!("no keeper")
    };
    cache.kill();
    fs::remove_file(dir.path().join(KEEPER)).expect("it is there");
    until("the keeper ends", || {
        !Path::new(&format!("/proc/{keeper}/cwd")).exists()
    });
}

/// Another user gets no descriptor, and no word.
#[test]
fn a_stranger_is_not_answered() {
    let dir = scratch();
    let mut cache = start_cache(dir.path(), e2e_tests::daemons::free_port(), &on());
    let socket = dir.path().join(KEEPER);
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(&socket).expect("it is there").permissions(),
    );
    assert_eq!(mode & 0o077, 0, "{mode:o}");
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // As if the directory did not protect it.
    let open = |path: &Path, mode| {
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode))
    };
    open(dir.path(), 0o755).expect("our own");
    open(&socket, 0o777).expect("our own");
    let ask = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.send(b'G'); print(len(s.recv(9)))";
    let asked = |by: &[&str]| {
        let mut command = Command::new("setpriv");
        let output = command
            .args(by)
            .args(["python3", "-c", ask])
            .arg(&socket)
            .output();
        output
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
            .unwrap_or_default()
    };
    let own = ["--clear-groups"];
    assert_ne!(asked(&own), "1\n", "image-cache is there");
    cache.kill();
    let stranger = asked(&["--reuid=65534", "--regid=65534", "--clear-groups"]);
    assert_ne!(stranger, "1\n");
    assert_eq!(asked(&own), "1\n");
}

/// Each round replaces pages of the one before, so those of the dump lie scattered.
#[test]
fn pages_of_rounds_come_back() {
    for more in [&[][..], &["--release-on-read"]] {
        let options = Options::default().page_server(PagesAt::Proxy);
        let mut pair = pair(options.cache(more));
        let mut memory: Vec<u64> = (0..64).collect();
        let mut parent = None;
        for round in 1..=4usize {
            let changed: Vec<usize> = (0..memory.len()).filter(|page| page % 7 == round).collect();
            for &page in &changed {
                memory[page] += 1 << 32;
            }
            let dir = pair.dir().join(format!("r{round}"));
            fs::create_dir_all(&dir).expect("a directory");
            let dump = (round == 4).then(|| Dump {
                script: bin("image-proxy"),
                work_dir: pair.source.clone(),
                files: Path::new(env!("CARGO_MANIFEST_DIR"))
                    .join("fixtures/page-server-incremental/images-3"),
            });
            let criu = PageRound {
                port: pair.pages_port,
                images_dir: Some(dir),
                parent: parent.replace(format!("../r{round}")),
                memory: memory.clone(),
                changed,
                dump,
                stop: false,
                cut: false,
            };
            let (status, said) = criu.spawn(FAKE).wait();
            assert!(status.success(), "{said}");
        }
        until("it is ready", || status(&pair).contains("to be restored"));
        restart(&mut pair);
        let serve = Serve::connect(&pair.target).expect("connect");
        assert!(!serve.fetch("inventory.img").is_empty());
        assert!(serve.fetch("pages-65537.img") == bytes_of(&memory));
    }
}

/// systemd, as far as it keeps descriptors.
struct Systemd {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Systemd {
    /// What it is told next: text, and descriptors.
    fn hears(&self) -> (String, Vec<OwnedFd>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 4096];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let n = rustix::net::recvmsg(&self.socket, &mut slices, &mut control, flags);
        let n = n.expect("it is told something").bytes;
        let fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let fds = fds.flatten().collect();
        (String::from_utf8_lossy(&bytes[..n]).into_owned(), fds)
    }
}

/// With `sh` between, which puts the descriptors where systemd does.
fn start_by_systemd(
    dir: &Path,
    port: u16,
    systemd: &Systemd,
    stored: &[(String, OwnedFd)],
) -> Daemon {
    use std::os::fd::AsRawFd;
    let names: Vec<_> = stored.iter().map(|(name, _)| name.as_str()).collect();
    let mut shell = format!(
        "export NOTIFY_SOCKET={} FDSTORE=2 LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={};",
        systemd.path.display(),
        stored.len(),
        names.join(":")
    );
    for (to, (_, fd)) in (3..).zip(stored) {
        // By /proc: a descriptor of this process, which no other inherits.
        let from = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        shell += &format!("exec {to}<>{from};");
    }
    shell += "exec \"$@\"";
    let by = ["sh", "-c", &shell, "sh"].map(str::to_owned);
    let args = [
        ["--address", "127.0.0.1", "--port", &port.to_string()]
            .map(str::to_owned)
            .to_vec(),
        on(),
    ];
    Daemon::start_by(&by, "image-cache", dir, &args.concat())
}

#[test]
fn systemd_keeps_the_descriptors() {
    let mut pair = pair(Options::default());
    pair.cache.terminate();
    let path = pair.dir().join("notify");
    let socket = UnixDatagram::bind(&path).expect("bind");
    socket.set_read_timeout(Some(LIMIT)).expect("our own");
    let systemd = Systemd { socket, path };
    pair.cache = start_by_systemd(&pair.target, pair.port, &systemd, &[]);
    assert!(keepers(&pair.target).is_empty());
    assert!(systemd.hears().0.contains("READY=1"), "the first word");
    let mut stored = Vec::new();
    while stored.len() < 2 {
        let (text, mut fds) = systemd.hears();
        if text.contains("FDSTORE=1") {
            assert!(text.contains("FDPOLL=0"), "{text}");
            let name = text.lines().find_map(|line| line.strip_prefix("FDNAME="));
            stored.push((name.expect("a name").to_owned(), fds.remove(0)));
        }
    }
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    until("it is ready", || status(&pair).contains("to be restored"));
    pair.cache.kill();
    pair.cache = start_by_systemd(&pair.target, pair.port, &systemd, &stored);
    restore_stream(&pair.target, &job.set()).expect("the very bytes");
    until("it is released", || !status(&pair).contains('@'));
    assert_eq!(pair.cache.terminate(), Some(0));
    let mut forgotten = 0;
    while forgotten < 2 {
        forgotten += usize::from(systemd.hears().0.contains("FDSTOREREMOVE=1"));
    }
}

/// What a user may put where the keeper listens is not believed.
#[test]
fn a_socket_that_does_not_answer_keeps_nothing_from_starting() {
    let dir = scratch();
    let _stopped = std::os::unix::net::UnixListener::bind(dir.path().join(KEEPER)).expect("bind");
    let cache = start_cache(dir.path(), e2e_tests::daemons::free_port(), &on());
    assert!(
        cache.log().contains("does not answer as one"),
        "{}",
        cache.log()
    );
    let (asks, _) = UnixStream::pair().expect("a pair");
    drop(asks);
}
