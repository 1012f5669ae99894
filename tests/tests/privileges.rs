//! What the daemons may do, and that they can do their work with less. Needs root, to be somebody else.

use std::fs::{self, Permissions};
use std::os::unix::fs::{chown, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;

use e2e_tests::bins::{bin, workspace};
use e2e_tests::daemons::{free_port, scratch, until, Daemon, Options, Pair, SOON};
use e2e_tests::fake::pages::PageRound;
use e2e_tests::fake::{DumpJob, Protocol};

/// The account of a service (`DynamicUser=`).
const USER: u32 = 61_303;

const DAC_READ_SEARCH: u64 = 1 << 2;
const NET_BIND_SERVICE: u64 = 1 << 10;
const IPC_LOCK: u64 = 1 << 14;
const SYS_PTRACE: u64 = 1 << 19;
const SYS_NICE: u64 = 1 << 23;
const SYS_RESOURCE: u64 = 1 << 24;

/// The value of a line of `/proc/PID/task/TID/status`, for each thread.
fn of_threads(daemon: &Daemon, name: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{}/task", daemon.pid())).expect("it runs");
    // A thread may end meanwhile.
    let texts = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok());
    let value = |text: String| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.expect("the line").trim().to_owned()
    };
    texts.map(value).collect()
}

fn capabilities(daemon: &Daemon) -> u64 {
    let mut all: Vec<u64> = Vec::new();
    for name in ["CapEff", "CapPrm"] {
        let hex = of_threads(daemon, name).into_iter();
        all.extend(hex.map(|hex| u64::from_str_radix(&hex, 16).expect("hex")));
    }
    assert!(all.windows(2).all(|two| two[0] == two[1]), "{all:x?}");
    for name in ["CapInh", "CapAmb"] {
        let none = |hex: &String| u64::from_str_radix(hex, 16) == Ok(0);
        assert!(of_threads(daemon, name).iter().all(none), "{name}");
    }
    all[0]
}

fn own_capabilities() -> u64 {
    let own = fs::read_to_string("/proc/self/status").expect("Linux");
    let own = own.lines().find_map(|line| line.strip_prefix("CapEff:"));
    u64::from_str_radix(own.expect("CapEff").trim(), 16).expect("hex")
}

#[test]
fn root_keeps_what_is_needed_and_no_more() {
    let pair = Pair::new();
    let own = own_capabilities();
    for (daemon, besides) in [(&pair.proxy, SYS_NICE), (&pair.cache, 0)] {
        let needed = SYS_PTRACE | DAC_READ_SEARCH | SYS_RESOURCE | besides;
        assert_eq!(capabilities(daemon), needed & own);
        assert!(of_threads(daemon, "NoNewPrivs")
            .iter()
            .all(|value| value == "1"));
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).expect("root");
        let core = limits
            .lines()
            .find(|line| line.starts_with("Max core file size"));
        let words: Vec<&str> = core.expect("it").split_whitespace().collect();
        assert_eq!(words[4..6], ["0", "0"]);
    }
}

#[test]
fn a_privileged_port_can_be_listened_on_still() {
    let pair = Options::default()
        .proxy(&["--page-server", "127.0.0.27:27"])
        .start();
    assert_ne!(capabilities(&pair.proxy) & NET_BIND_SERVICE, 0);
    let connected = std::net::TcpStream::connect(("127.0.0.27", 27));
    connected.expect("it listens");
}

#[test]
fn locked_memory_serves_as_well() {
    let pair = Options::default()
        .proxy(&["--mlock"])
        .cache(&["--mlock"])
        .start();
    for daemon in [&pair.proxy, &pair.cache] {
        assert_ne!(capabilities(daemon) & IPC_LOCK, 0);
        assert!(
            daemon.status_kib("VmLck") > 1024,
            "{}",
            daemon.status_kib("VmLck")
        );
    }
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    let restored = Protocol::Stream.restore(&pair.target, &job.set());
    restored.expect("the restore");
}

/// Somewhere that a user may write, with a daemon's directories in it. Below /run, as systemd makes them: the action
/// script does not believe what somebody may have put into /tmp.
fn users_directory() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let above = tempfile::Builder::new().prefix("e2e").tempdir_in("/run");
    let above = above.expect("root");
    fs::set_permissions(above.path(), Permissions::from_mode(0o755)).expect("ours");
    let made = ["s", "t"].map(|name| {
        let dir = above.path().join(name);
        fs::create_dir(&dir).expect("fresh");
        chown(&dir, Some(USER), Some(USER)).expect("root");
        dir
    });
    let [source, target] = made;
    (above, source, target)
}

/// `fake-criu` as that user.
fn users_criu(dir: &Path) -> String {
    let path = dir.join("users-criu");
    let criu = env!("CARGO_BIN_EXE_fake-criu");
    let text = format!(
        "#!/bin/sh\nexec setpriv --reuid={USER} --regid={USER} --clear-groups {criu} \"$@\"\n"
    );
    fs::write(&path, text).expect("ours");
    fs::set_permissions(&path, Permissions::from_mode(0o755)).expect("ours");
    path.to_str().expect("UTF-8").to_owned()
}

/// Both daemons as that user, with these capabilities, and dumps and rounds of this `fake-criu`.
fn migrate(keep: &[&str], source: &Path, target: &Path, criu: &str) {
    let (port, pages) = (free_port(), free_port());
    let address = ["--address", "127.0.0.1", "--port"].map(str::to_owned);
    let port = [&address[..], &[port.to_string()]].concat();
    let cache = Daemon::start_as(USER, keep, "image-cache", target, &port);
    let more = ["--page-server".to_owned(), pages.to_string()];
    let more = [&port[..], &more].concat();
    let proxy = Daemon::start_as(USER, keep, "image-proxy", source, &more);
    for daemon in [&proxy, &cache] {
        assert_eq!(capabilities(daemon).count_ones() as usize, keep.len());
        // What is in the directory of a process that is not dumpable is root's.
        let memory = fs::metadata(format!("/proc/{}/mem", daemon.pid())).expect("it runs");
        assert_eq!(
            memory.uid(),
            0,
            "other processes of this user can look into it"
        );
    }

    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let job = DumpJob::new(&protocol, source, 1).gated();
        let (status, said) = job.spawn(criu).wait();
        assert!(status.success(), "{said}\n{}", proxy.log());
        until("it may be restored", || {
            cache.log().contains("ready to be restored")
        });
        let restored = protocol.restore(target, &job.set());
        restored.expect("the restore");
    }

    // The process at the other end of a TCP connection, and the directory that it has open.
    for name in ["1", "2"] {
        let dir = source.join(name);
        fs::create_dir(&dir).expect("fresh");
        chown(&dir, Some(USER), Some(USER)).expect("root");
        let round = PageRound {
            port: pages,
            images_dir: Some(dir),
            parent: (name == "2").then(|| "../1".to_owned()),
            memory: vec![1, 2, 3],
            changed: vec![1],
            dump: None,
            stop: false,
            cut: false,
        };
        let (status, said) = round.spawn(criu).wait();
        assert!(status.success(), "{said}");
        let expected = format!("parent: {}", name == "2");
        assert_eq!(said.trim(), expected, "{}", proxy.log());
    }
    // Found by its directory, and not as the next one from this address.
    let log = proxy.log();
    assert_eq!(log.matches("page server: connection").count(), 2, "{log}");
}

/// CRIU is the same user's, and nobody has any capability.
#[test]
fn a_user_can_migrate_what_is_theirs() {
    let (above, source, target) = users_directory();
    let criu = users_criu(above.path());
    migrate(&[], &source, &target, &criu);
}

/// As `dist/*.service` start them: CRIU is root's.
#[test]
fn three_capabilities_are_enough_for_roots_criu() {
    let (_above, source, target) = users_directory();
    // A sandbox may not have the third to give.
    let all = [
        ("sys_ptrace", SYS_PTRACE),
        ("dac_read_search", DAC_READ_SEARCH),
        ("sys_resource", SYS_RESOURCE),
    ];
    let here = all
        .into_iter()
        .filter(|(_, bit)| own_capabilities() & bit != 0);
    let keep: Vec<&str> = here.map(|(name, _)| name).collect();
    migrate(&keep, &source, &target, env!("CARGO_BIN_EXE_fake-criu"));
}

#[test]
fn memory_that_cannot_be_locked_is_fatal() {
    let (_above, source, _target) = users_directory();
    let user = format!("--reuid={USER}");
    let output = Command::new("prlimit")
        .args(["--memlock=4096:4096", "setpriv", &user, "--clear-groups"])
        .arg(bin("image-proxy"))
        .args(["--address", "127.0.0.1", "--port", "1", "--mlock", "-D"])
        .arg(&source)
        .output()
        .expect("prlimit and setpriv are there");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("--mlock: the memory cannot be locked"),
        "{text}"
    );
}

/// `Type=notify` in `dist/*.service`: systemd is told when every socket accepts.
#[test]
fn systemd_is_told_when_they_are_ready() {
    for (program, port) in [("image-proxy", "1"), ("image-cache", "0")] {
        let dir = scratch();
        let notify = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&notify).expect("fresh");
        systemd.set_read_timeout(Some(SOON)).expect("a time");
        let mut daemon = Command::new(bin(program))
            .args(["--address", "127.0.0.1", "--port", port, "-D"])
            .arg(dir.path())
            .env("NOTIFY_SOCKET", &notify)
            .spawn()
            .expect("it starts");
        let mut text = [0; 64];
        let told = systemd.recv(&mut text);
        let socket = dir.path().join(format!("{program}-control.sock"));
        let accepts = UnixStream::connect(socket);
        daemon.kill().expect("our own child");
        daemon.wait().expect("our own child");
        let n = told.expect("a word in time");
        assert_eq!(
            String::from_utf8_lossy(&text[..n]).trim(),
            "READY=1",
            "{program}"
        );
        accepts.expect("every socket accepts");
    }
}

/// The units give what the code keeps, and systemd understands them (where it is installed).
#[test]
fn the_units_are_units() {
    for (program, besides) in [("image-proxy", " CAP_SYS_NICE"), ("image-cache", "")] {
        let path = workspace().join(format!("dist/{program}.service"));
        let unit = fs::read_to_string(&path).expect("it is there");
        for set in ["AmbientCapabilities", "CapabilityBoundingSet"] {
            let kept = format!("CAP_SYS_PTRACE CAP_DAC_READ_SEARCH CAP_SYS_RESOURCE{besides}");
            assert!(
                unit.lines().any(|line| line == format!("{set}={kept}")),
                "{set}"
            );
        }
        assert!(unit.lines().any(|line| line == "Type=notify"));
        // A program that is there, with options that it has.
        let installed = format!("/usr/local/bin/{program}");
        assert!(unit.contains(&installed));
        let unit = unit.replace(&installed, bin(program).to_str().expect("UTF-8"));
        let dir = scratch();
        let copy = dir.path().join(format!("{program}.service"));
        fs::write(&copy, unit).expect("fresh");
        match Command::new("systemd-analyze")
            // Its man page is not installed here.
            .args(["verify", "--man=no"])
            .arg(&copy)
            .output()
        {
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                let about_it: Vec<_> = said.lines().filter(|line| line.contains(program)).collect();
                assert!(output.status.success() && about_it.is_empty(), "{said}");
            }
            Err(e) => eprintln!("no systemd-analyze here: {e}"),
        }
    }
}
