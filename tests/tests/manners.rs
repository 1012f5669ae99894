//! How the daemons start and stop: sockets, ports, files, signals, exit codes.

use std::fs;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{
    free_port, scratch, start_proxy, until, wait_child, Daemon, Options, Pair,
};
use e2e_tests::fake::{DumpJob, ImageSet, Protocol};
use rustix::process::{kill_process, Pid, Signal};

const PROXY_SOCKETS: [&str; 3] = [
    "img-proxy.sock",
    "streamer-capture.sock",
    "image-proxy-control.sock",
];
const CACHE_SOCKETS: [&str; 3] = [
    "img-cache.sock",
    "streamer-serve.sock",
    "image-cache-control.sock",
];

/// Runs a daemon that must end by itself: at once, with an exit code, at the default verbosity.
fn run(name: &str, dir: &Path, args: &[&str]) -> Output {
    let mut child = Command::new(bin(name))
        .args(args)
        .current_dir(dir)
        .env_remove("CRTOOLS_SCRIPT_ACTION")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    if wait_child(&mut child, Duration::from_secs(10))
        .expect("our own child")
        .is_none()
    {
        child.kill().expect("our own child");
        panic!(
            "{name} {args:?} does not end: {:?}",
            child.wait_with_output()
        );
    }
    child.wait_with_output().expect("our own child")
}

/// A fatal error: not zero, not a signal, and one line that says why.
fn one_line(output: &Output) {
    assert!(
        output.status.code().is_some_and(|code| code != 0),
        "{output:?}"
    );
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text.trim_end().lines().count(), 1, "not one line:\n{text}");
}

fn port_args(port: u16) -> [String; 2] {
    ["--port".into(), port.to_string()]
}

fn passes(pair: &Pair, seed: u64) {
    let job = DumpJob::new(&Protocol::Stream, &pair.source, seed).gated();
    job.run().expect("the dump");
    Protocol::Stream
        .restore(&pair.target, &job.set())
        .expect("the restore");
}

#[test]
fn a_port_in_use_is_one_line() {
    let pair = Pair::new();
    let dir = scratch();
    let port = pair.port.to_string();
    one_line(&run(
        "image-cache",
        dir.path(),
        &["--port", &port, "--address", "127.0.0.1"],
    ));
    passes(&pair, 1);
}

#[test]
fn a_socket_in_use_is_one_line() {
    let pair = Pair::new();
    let port = free_port().to_string();
    one_line(&run(
        "image-cache",
        &pair.target,
        &["--port", &port, "--address", "127.0.0.1"],
    ));
    one_line(&run(
        "image-proxy",
        &pair.source,
        &["--port", &port, "--address", "127.0.0.1"],
    ));
    passes(&pair, 1);
}

#[test]
fn a_stale_socket_is_replaced() {
    let dir = scratch();
    for name in PROXY_SOCKETS.iter().chain(&CACHE_SOCKETS) {
        drop(UnixListener::bind(dir.path().join(name)).expect("fresh"));
    }
    let port = free_port();
    let _cache = e2e_tests::daemons::start_cache(dir.path(), port, &[]);
    let _proxy = start_proxy(dir.path(), port, &[]);
    for name in PROXY_SOCKETS.iter().chain(&CACHE_SOCKETS) {
        UnixStream::connect(dir.path().join(name)).expect(name);
    }
}

/// A file that is no socket is somebody's; it is not ours to delete.
#[test]
fn a_file_in_the_place_of_a_socket_is_not_deleted() {
    for (daemon, names) in [
        ("image-proxy", PROXY_SOCKETS),
        ("image-cache", CACHE_SOCKETS),
    ] {
        for name in names {
            let dir = scratch();
            let path = dir.path().join(name);
            fs::write(&path, "precious").expect("fresh");
            let port = free_port().to_string();
            one_line(&run(
                daemon,
                dir.path(),
                &["--port", &port, "--address", "127.0.0.1"],
            ));
            assert_eq!(fs::read_to_string(&path).expect("still there"), "precious");
            // The sockets that were made before it came to this are gone again.
            let left: Vec<_> = fs::read_dir(dir.path()).expect("ours").collect();
            assert_eq!(left.len(), 1, "{left:?}");
        }
    }
}

#[test]
fn an_images_dir_that_does_not_exist_is_one_line() {
    let dir = scratch();
    for daemon in ["image-proxy", "image-cache"] {
        let args = ["--port", "1", "--address", "127.0.0.1", "-D", "nowhere"];
        one_line(&run(daemon, dir.path(), &args));
    }
}

#[test]
fn a_session_name_that_is_no_name_is_refused() {
    let dir = scratch();
    for name in ["", ".", "..", "a/b", "/", "../x", &"x".repeat(5000)] {
        let output = run(
            "image-proxy",
            dir.path(),
            &["--port", "1", "--address", "127.0.0.1", "--session", name],
        );
        assert!(
            output.status.code().is_some_and(|code| code != 0),
            "{name:?}: {output:?}"
        );
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn help_and_version() {
    let dir = scratch();
    for (name, words) in [
        (
            "image-proxy",
            [
                "--address",
                "--port",
                "--images-dir",
                "--session",
                "--commit-timeout",
            ],
        ),
        (
            "image-cache",
            [
                "--address",
                "--port",
                "--images-dir",
                "--memory-limit",
                "--keep",
            ],
        ),
    ] {
        let output = run(name, dir.path(), &["--help"]);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        for word in words.iter().chain(&[
            "--work-dir",
            "--log-file",
            "--daemon",
            "--pidfile",
            "--status-fd",
        ]) {
            assert!(
                text.contains(word),
                "{name} --help does not mention {word}:\n{text}"
            );
        }
        let output = run(name, dir.path(), &["--version"]);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains(name) && text.contains(env!("CARGO_PKG_VERSION")),
            "{text}"
        );
    }
}

#[test]
fn bad_arguments_are_refused() {
    let dir = scratch();
    for (name, args) in [
        ("image-proxy", &["--bogus"][..]),
        ("image-proxy", &[]),
        ("image-proxy", &["--port", "1"]),
        ("image-proxy", &["--address", "127.0.0.1"]),
        (
            "image-proxy",
            &["--address", "127.0.0.1", "--port", "65536"],
        ),
        (
            "image-proxy",
            &[
                "--address",
                "127.0.0.1",
                "--port",
                "1",
                "--parents",
                "perhaps",
            ],
        ),
        ("image-cache", &[]),
        ("image-cache", &["--port", "-1"]),
        ("image-cache", &["--port", "1", "--memory-limit", "lots"]),
        ("image-cache", &["--port", "1", "--set-ttl", "1 fortnight"]),
        (
            "image-cache",
            &["--port", "1", "--remote-dialect", "swedish"],
        ),
        (
            "image-cache",
            &["--port", "1", "--address", "no.such.host.invalid"],
        ),
        ("image-cache", &["--port", "1", "--status-fd", "99"]),
    ] {
        let output = run(name, dir.path(), args);
        assert!(
            output.status.code().is_some_and(|code| code != 0),
            "{name} {args:?}: {output:?}"
        );
        assert!(!output.stderr.is_empty(), "{name} {args:?}: silent");
    }
}

/// `-o` and `--pidfile` are relative to the work dir; the log goes to the file and not to stderr.
#[test]
fn log_file_pidfile_and_work_dir() {
    let dir = scratch();
    let (work, images) = (dir.path().join("work"), dir.path().join("images"));
    fs::create_dir(&work).expect("fresh");
    fs::create_dir(&images).expect("fresh");
    let port = free_port();
    let args = [port_args(port), ["--address".into(), "127.0.0.1".into()]].concat();
    let flags = [
        "-W",
        "work",
        "-D",
        "images",
        "-o",
        "log",
        "--pidfile",
        "pid",
    ]
    .map(String::from);
    let mut cache = Daemon::start("image-cache", dir.path(), &[args, flags.to_vec()].concat());
    for name in CACHE_SOCKETS {
        UnixStream::connect(work.join(name)).expect("in the work dir");
        UnixStream::connect(images.join(name)).expect("in the images dir");
    }
    let pid = fs::read_to_string(work.join("pid")).expect("the pidfile");
    assert_eq!(pid.trim(), cache.pid().to_string());
    assert!(!fs::read_to_string(work.join("log"))
        .expect("the log")
        .is_empty());
    assert_eq!(cache.log(), "", "stderr");
    assert_eq!(cache.terminate(), Some(0));
    assert_gone(&[&work, &images], &CACHE_SOCKETS);
}

fn assert_gone(dirs: &[&Path], names: &[&str]) {
    for dir in dirs {
        for name in names {
            assert!(
                !dir.join(name).exists(),
                "{name} is left in {}",
                dir.display()
            );
        }
    }
}

#[test]
fn several_images_dirs() {
    let dir = scratch();
    let make = |name: &str| -> PathBuf {
        let path = dir.path().join(name);
        fs::create_dir(&path).expect("fresh");
        path
    };
    let (one, two, three, four) = (make("1"), make("2"), make("3"), make("4"));
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let port = free_port();
    let mut cache = e2e_tests::daemons::start_cache(
        &one,
        port,
        &[
            "-D".into(),
            text(&two),
            "--images-dir".into(),
            text(&three),
            "-D".into(),
            ".".into(),
        ],
    );
    let proxy_args = [
        "-D".into(),
        text(&three),
        "-D".into(),
        text(&four),
        "-W".into(),
        text(&three),
    ];
    let mut proxy = start_proxy(dir.path(), port, &proxy_args);
    for (seed, (from, to)) in [(&three, &one), (&four, &two), (&four, &three)]
        .into_iter()
        .enumerate()
    {
        let mut job = DumpJob::new(&Protocol::Stream, from, seed as u64).gated();
        job.work_dir.clone_from(&three);
        job.run().expect("the dump");
        Protocol::Stream
            .restore(to, &job.set())
            .expect("the restore");
    }
    assert_eq!(proxy.terminate(), Some(0));
    assert_eq!(cache.terminate(), Some(0));
    assert_gone(&[&one, &two, &three, &four], &CACHE_SOCKETS);
    assert_gone(&[&one, &two, &three, &four], &PROXY_SOCKETS);
}

/// `-d`: the command returns 0 once the sockets accept, and the daemon lives on. `--status-fd` says so too.
#[test]
fn detached() {
    let dir = scratch();
    let port = free_port().to_string();
    for (name, sockets) in [
        ("image-cache", CACHE_SOCKETS),
        ("image-proxy", PROXY_SOCKETS),
    ] {
        // Descriptor 3, because a daemon gives up its standard ones.
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" --status-fd 3 3>&1 >/dev/null", "sh"])
            .arg(bin(name))
            .args([
                "--port",
                &port,
                "--address",
                "127.0.0.1",
                "-d",
                "--pidfile",
                "pid",
                "-o",
                "log",
            ])
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let status = wait_child(&mut child, Duration::from_secs(10)).expect("our own child");
        assert!(status.expect("it detaches").success());
        let mut byte = [1];
        child
            .stdout
            .take()
            .expect("piped")
            .read_exact(&mut byte)
            .expect("one byte");
        assert_eq!(byte, [0]);
        for socket in sockets {
            UnixStream::connect(dir.path().join(socket)).expect("it accepts");
        }
        let pid: i32 = fs::read_to_string(dir.path().join("pid"))
            .expect("the pidfile")
            .trim()
            .parse()
            .expect("a pid");
        assert_ne!(u32::try_from(pid).expect("a pid"), child.id());
        let exe = fs::read_link(format!("/proc/{pid}/exe")).expect("it runs");
        assert!(exe.ends_with(name), "{}", exe.display());
        if name == "image-proxy" {
            let job = DumpJob::new(&Protocol::Stream, dir.path(), 1).gated();
            job.run().expect("the dump");
            Protocol::Stream
                .restore(dir.path(), &job.set())
                .expect("the restore");
        }
        fs::rename(
            dir.path().join("pid"),
            dir.path().join(format!("{name}.pid")),
        )
        .expect("ours");
    }
    for (name, sockets) in [
        ("image-proxy", PROXY_SOCKETS),
        ("image-cache", CACHE_SOCKETS),
    ] {
        let pid = fs::read_to_string(dir.path().join(format!("{name}.pid"))).expect("ours");
        let pid = Pid::from_raw(pid.trim().parse().expect("a pid")).expect("not zero");
        kill_process(pid, Signal::TERM).expect("it runs");
        until("the sockets are gone", || {
            sockets
                .iter()
                .all(|socket| !dir.path().join(socket).exists())
        });
    }
}

/// A daemon that cannot start says so by its exit code, detached or not.
#[test]
fn a_detached_start_that_fails_is_not_silent() {
    let pair = Pair::new();
    let dir = scratch();
    let port = pair.port.to_string();
    let output = run(
        "image-cache",
        dir.path(),
        &["--port", &port, "--address", "127.0.0.1", "-d"],
    );
    one_line(&output);
}

#[test]
fn stopped_while_idle() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut pair = Pair::new();
        passes(&pair, 1);
        pair.proxy.signal(signal);
        assert_eq!(pair.proxy.wait().code(), Some(0));
        pair.cache.signal(signal);
        assert_eq!(pair.cache.wait().code(), Some(0));
        assert_gone(&[&pair.source], &PROXY_SOCKETS);
        assert_gone(&[&pair.target], &CACHE_SOCKETS);
        let left = fs::read_dir(&pair.target).expect("ours").filter(|entry| {
            entry
                .as_ref()
                .expect("ours")
                .file_type()
                .expect("ours")
                .is_dir()
        });
        assert_eq!(left.count(), 0, "directories of sessions are left");
    }
}

/// The running dump may finish; the exit code says that nothing was lost.
#[test]
fn stopped_in_mid_dump_the_dump_finishes() {
    for protocol in Protocol::all() {
        eprintln!("{protocol:?}");
        let mut pair = Options::default().proxy(&["--grace-period", "20"]).start();
        let job = DumpJob::new(&protocol, &pair.source, 1)
            .gated()
            .stop_in("pages-1.img");
        let mut child = job.spawn(env!("CARGO_BIN_EXE_fake-criu"));
        child.wait_half();
        pair.proxy.signal(Signal::TERM);
        child.go_on();
        let (status, said) = child.wait();
        assert!(status.success(), "{status}: {said}");
        assert_eq!(pair.proxy.wait().code(), Some(0));
        assert_gone(&[&pair.source], &PROXY_SOCKETS);
        protocol
            .restore(&pair.target, &job.set())
            .expect("the restore");
    }
}

/// A dump that does not finish in time is aborted; the exit code says so, and the dump fails.
#[test]
fn stopped_in_mid_dump_after_the_grace_period() {
    for daemon in ["image-proxy", "image-cache"] {
        for protocol in [
            Protocol::Stream,
            Protocol::all().pop().expect("pipe dialect"),
        ] {
            eprintln!("{daemon} {protocol:?}");
            let grace = ["--grace-period", "1"];
            let mut pair = Options::default().proxy(&grace).cache(&grace).start();
            let job = DumpJob::new(&protocol, &pair.source, 1)
                .gated()
                .stop_in("pages-1.img");
            let mut child = job.spawn(env!("CARGO_BIN_EXE_fake-criu"));
            child.wait_half();
            let stopped = if daemon == "image-proxy" {
                &mut pair.proxy
            } else {
                &mut pair.cache
            };
            let begin = Instant::now();
            assert_eq!(stopped.terminate(), Some(3));
            let took = begin.elapsed();
            assert!(
                took < Duration::from_secs(5),
                "took {took:?}, the grace period is 1 s"
            );
            child.go_on();
            let (status, said) = child.wait();
            assert!(matches!(status.code(), Some(12 | 13)), "{status}: {said}");
        }
    }
}

#[test]
fn ipv6_and_host_names() {
    for (bind, dial) in [
        ("::1", "::1"),
        ("localhost", "localhost"),
        ("::", "::1"),
        ("0.0.0.0", "localhost"),
    ] {
        eprintln!("{bind} {dial}");
        let dir = scratch();
        let (source, target) = (dir.path().join("s"), dir.path().join("t"));
        fs::create_dir(&source).expect("fresh");
        fs::create_dir(&target).expect("fresh");
        let port = free_port();
        let args = |address: &str| [port_args(port), ["--address".into(), address.into()]].concat();
        let open = [args(bind), vec!["--insecure-listen".into()]].concat();
        let _cache = Daemon::start("image-cache", &target, &open);
        let _proxy = Daemon::start("image-proxy", &source, &args(dial));
        let job = DumpJob::new(&Protocol::Stream, &source, 1).gated();
        job.run().expect("the dump");
        Protocol::Stream
            .restore(&target, &job.set())
            .expect("the restore");
    }
}

/// Without `--address`, and told that it may, the cache takes connections of both families.
#[test]
fn the_cache_without_an_address() {
    let dir = scratch();
    let (source, target) = (dir.path().join("s"), dir.path().join("t"));
    fs::create_dir(&source).expect("fresh");
    fs::create_dir(&target).expect("fresh");
    let port = free_port();
    let open = [&port_args(port)[..], &["--insecure-listen".into()]].concat();
    let _cache = Daemon::start("image-cache", &target, &open);
    for (seed, address) in ["127.0.0.1", "::1"].into_iter().enumerate() {
        let args = [port_args(port), ["--address".into(), address.into()]].concat();
        let _proxy = Daemon::start("image-proxy", &source, &args);
        let job = DumpJob::new(&Protocol::Stream, &source, seed as u64).gated();
        job.run().expect("the dump");
        Protocol::Stream
            .restore(&target, &job.set())
            .expect("the restore");
    }
}

/// At the default verbosity a dump and a restore that go well say nothing.
#[test]
fn all_is_well_is_silent() {
    let dir = scratch();
    let port = free_port().to_string();
    let mut children = ["image-cache", "image-proxy"].map(|name| {
        let log = fs::File::create(dir.path().join(name)).expect("fresh");
        let mut child = Command::new("sh")
            .args(["-c", "exec \"$@\" --status-fd 3 3>&1 >&2", "sh"])
            .arg(bin(name))
            .args(["--port", &port, "--address", "127.0.0.1"])
            .current_dir(dir.path())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("it starts");
        child
            .stdout
            .as_mut()
            .expect("piped")
            .read_exact(&mut [0])
            .expect("ready");
        child
    });
    for (seed, protocol) in (0u64..).zip(Protocol::all()) {
        let job = DumpJob::new(&protocol, dir.path(), seed).gated();
        job.run().expect("the dump");
        protocol
            .restore(dir.path(), &job.set())
            .expect("the restore");
    }
    for child in &mut children {
        child.kill().expect("our own child");
        child.wait().expect("our own child");
    }
    for name in ["image-cache", "image-proxy"] {
        assert_eq!(
            fs::read_to_string(dir.path().join(name)).expect("ours"),
            "",
            "{name}"
        );
    }
}

/// An images dir whose path does not fit a socket's address: served all the same (CRIU connects by a relative path), or
/// refused; never a socket somewhere else.
#[test]
fn a_long_path_is_never_cut() {
    let dir = scratch();
    let deep = dir.path().join("d".repeat(60)).join("e".repeat(60));
    fs::create_dir_all(&deep).expect("fresh");
    let port = free_port();
    let args = [port_args(port), ["--address".into(), "127.0.0.1".into()]].concat();
    let flags = ["-D".to_owned(), deep.to_str().expect("UTF-8").to_owned()];
    let started = Daemon::try_start("image-cache", dir.path(), &[args, flags.to_vec()].concat());
    let served = fs::File::open(&deep).expect("ours");
    let link = format!(
        "/proc/self/fd/{}/img-cache.sock",
        std::os::fd::AsRawFd::as_raw_fd(&served)
    );
    match started {
        Ok(_cache) => drop(UnixStream::connect(link).expect("in the images dir")),
        Err((status, log)) => assert!(status.is_some_and(|status| !status.success()), "{log}"),
    }
    let strays = fs::read_dir(dir.path().join("d".repeat(60)))
        .expect("ours")
        .count();
    assert_eq!(strays, 1, "a socket beside the images dir");
}

/// A complete set that nobody has restored does not keep a stopped cache alive.
#[test]
fn a_cache_stopped_with_a_set_that_nobody_restored_ends_in_time() {
    let mut pair = Options::default().cache(&["--grace-period", "1"]).start();
    DumpJob::new(&Protocol::Stream, &pair.source, 1)
        .gated()
        .run_with(&ImageSet::small(1), &mut |_| {})
        .expect("the dump");
    let begin = Instant::now();
    let code = pair.cache.terminate();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
    assert!(begin.elapsed() < Duration::from_secs(5));
}
