//! Two daemons that hold processes, and what befalls daemons: a log that nobody takes, signals of every kind, options of
//! nothing, a directory that vanishes under them, a second daemon in the same directory.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, scratch, until, wait_child, Options, Pair, SOON};
use e2e_tests::fake::stream::Serve;
use e2e_tests::fake::{DumpJob, Protocol};
use e2e_tests::hand::{Hand, Hello};
use rustix::process::{kill_process, Pid, Signal};

/// A daemon whose standard error is what a test gives it.
struct Raw(Child);

impl Raw {
    /// Starts it at `-v4`, and waits until it is ready.
    fn start(name: &str, dir: &Path, port: u16, more: &[&str], stderr: impl Into<Stdio>) -> Self {
        let mut raw = Raw::spawn(name, dir, port, more, stderr);
        assert!(raw.is_ready(), "{name} is not ready");
        raw
    }

    fn spawn(name: &str, dir: &Path, port: u16, more: &[&str], stderr: impl Into<Stdio>) -> Self {
        let child = Command::new("sh")
            .args(["-c", "exec \"$@\" 3>&1 >/dev/null", "sh"])
            .arg(bin(name))
            .args(["--address", "127.0.0.1", "--port", &port.to_string()])
            .args(["-v4", "--status-fd", "3"])
            .args(more)
            .current_dir(dir)
            .env_remove("CRTOOLS_SCRIPT_ACTION")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn();
        Raw(child.expect("it starts"))
    }

    fn is_ready(&mut self) -> bool {
        let mut said = Vec::new();
        let status = self.0.stdout.take().expect("piped");
        status.take(1).read_to_end(&mut said).expect("a pipe");
        said == [0]
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a pid")).expect("not zero");
        kill_process(pid, signal).expect("our own child");
    }

    fn wait(&mut self) -> ExitStatus {
        let status = wait_child(&mut self.0, SOON).expect("our own child");
        status.expect("it ends in time")
    }

    fn runs(&mut self) -> bool {
        self.0.try_wait().expect("our own child").is_none()
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A source and a target directory.
fn two_dirs() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = scratch();
    let (source, target) = (dir.path().join("s"), dir.path().join("t"));
    fs::create_dir(&source).expect("fresh");
    fs::create_dir(&target).expect("fresh");
    (dir, source, target)
}

fn dump(source: &Path, seed: u64) -> DumpJob {
    let job = DumpJob::new(&Protocol::Stream, source, seed).gated();
    job.run().expect("the dump");
    job
}

fn restore(target: &Path, job: &DumpJob) {
    Protocol::Stream
        .restore(target, &job.set())
        .expect("the restore");
}

fn passes(source: &Path, target: &Path, seed: u64) {
    restore(target, &dump(source, seed));
}

fn command(name: &str, arguments: &[&str], dir: &Path) -> (bool, String) {
    let output = Command::new(bin(name))
        .args(arguments)
        .current_dir(dir)
        .env_remove("CRTOOLS_SCRIPT_ACTION")
        .output()
        .expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    (output.status.success(), said)
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
    (reader.into(), writer)
}

// --- the log --------------------------------------------------------------------------------

fn full_disk() -> Stdio {
    File::options()
        .write(true)
        .open("/dev/full")
        .expect("it is there")
        .into()
}

/// adv01: what is committed before the log's reader went can be restored, and all goes on.
#[test]
fn a_committed_set_outlives_the_reader_of_the_log() {
    let (_dir, source, target) = two_dirs();
    let port = free_port();
    let (cache_log, cache_err) = pipe();
    let (proxy_log, proxy_err) = pipe();
    let mut cache = Raw::start("image-cache", &target, port, &[], cache_err);
    let mut proxy = Raw::start("image-proxy", &source, port, &[], proxy_err);
    let held = dump(&source, 1);
    until("it is to be restored", || {
        let (_, said) = command("image-cache", &["status"], &target);
        said.contains("to be restored")
    });
    drop((cache_log, proxy_log));
    restore(&target, &held);
    for seed in 2..5 {
        passes(&source, &target, seed);
    }
    // What is refused is logged, too.
    let hello = Hello {
        session: "-D",
        ..Hello::default()
    };
    let _ = Hand::greet(([127, 0, 0, 1], port).into(), &hello);
    passes(&source, &target, 5);
    assert!(cache.runs() && proxy.runs());
    proxy.signal(Signal::TERM);
    cache.signal(Signal::TERM);
    assert_eq!(
        (proxy.wait().code(), cache.wait().code()),
        (Some(0), Some(0))
    );
}

#[test]
fn a_log_on_a_full_disk_costs_the_lines_alone() {
    let (_dir, source, target) = two_dirs();
    let port = free_port();
    let mut cache = Raw::start("image-cache", &target, port, &[], full_disk());
    let mut proxy = Raw::start("image-proxy", &source, port, &[], full_disk());
    passes(&source, &target, 1);
    passes(&source, &target, 2);
    assert!(cache.runs() && proxy.runs());
    cache.signal(Signal::TERM);
    assert_eq!(cache.wait().code(), Some(0));
}

/// A reader of the log that stands still, with its pipe full, holds up nobody.
#[test]
fn a_reader_of_the_log_that_stands_still_holds_up_nobody() {
    let (_dir, source, target) = two_dirs();
    let port = free_port();
    let full = || {
        let (reader, writer) = pipe();
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
        let mut writer = File::from(writer);
        writer.write_all(&[b'x'; 4096]).expect("it has room");
        (reader, OwnedFd::from(writer))
    };
    let ((cache_log, cache_err), (proxy_log, proxy_err)) = (full(), full());
    let mut cache = Raw::start("image-cache", &target, port, &[], cache_err);
    let mut proxy = Raw::start("image-proxy", &source, port, &[], proxy_err);
    passes(&source, &target, 1);
    passes(&source, &target, 2);
    // It reads again: the lines that were queued come, each whole.
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        let mut log = cache_log;
        log.read_to_string(&mut text).map(|_| text)
    });
    cache.signal(Signal::TERM);
    assert_eq!(cache.wait().code(), Some(0));
    let text = reading.join().expect("no panic").expect("text");
    let text = text.trim_start_matches('x');
    assert!(
        text.contains("listening on") && text.contains("restored; released"),
        "{text}"
    );
    // The other one stands still to the end, which is not held up either.
    proxy.signal(Signal::TERM);
    assert_eq!(proxy.wait().code(), Some(0));
    drop(proxy_log);
}

/// The script's words go nowhere: its exit status is what counts. A panic would be 101.
#[test]
fn a_script_and_a_command_without_standard_error() {
    let dir = scratch();
    for (program, action) in [("image-proxy", "pre-dump"), ("image-cache", "pre-resume")] {
        for stderr in [full_disk(), {
            let (reader, writer) = pipe();
            drop(reader);
            writer.into()
        }] {
            let mut child = Command::new(bin(program))
                .env("CRTOOLS_SCRIPT_ACTION", action)
                .current_dir(dir.path())
                .stderr(stderr)
                .spawn()
                .expect("it starts");
            let status = wait_child(&mut child, SOON).expect("our own child");
            assert_eq!(status.expect("it ends").code(), Some(1), "{program}");
        }
    }
    let pair = Pair::new();
    for (stdout, code) in [(full_disk(), 1), {
        let (reader, writer) = pipe();
        drop(reader);
        (writer.into(), 0)
    }] {
        let status = Command::new(bin("image-cache"))
            .args(["status", "--json"])
            .current_dir(&pair.target)
            .stdout(stdout)
            .stderr(Stdio::null())
            .status();
        assert_eq!(status.expect("it runs").code(), Some(code));
    }
}

#[test]
fn the_log_of_the_run_before_is_kept_and_opened_again_at_sighup() {
    let (_dir, source, target) = two_dirs();
    let port = free_port();
    for (name, dir) in [("image-cache", &target), ("image-proxy", &source)] {
        let log = dir.join("log");
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        fs::write(&log, "in doubt: of the run before\n").expect("fresh");
        let mut daemon = Raw::start(name, dir, port, &["-o", "log"], Stdio::null());
        assert!(text(&log).starts_with("in doubt: of the run before\n20"));
        let moved = dir.join("log.1");
        fs::rename(&log, &moved).expect("ours");
        daemon.signal(Signal::HUP);
        until("it is opened again", || {
            text(&log).contains("SIGHUP: the log was opened again")
        });
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.wait().code(), Some(0));
        assert!(text(&log).contains("stopping") && !text(&moved).contains("stopping"));
    }
}

/// What a peer chose shows in a log, and in what `status` prints, as what it is.
#[test]
fn characters_that_are_not_seen_are_escaped() {
    let pair = Options::default().cache(&["--keep"]).start();
    let odd = pair.dir().join("a\u{202e}b\u{2028}c");
    fs::create_dir(&odd).expect("fresh");
    let proxy_args = ["--session", "odd", "--link-timeout", "0"];
    let _proxy = Raw::start("image-proxy", &odd, pair.port, &proxy_args, Stdio::null());
    dump(&odd, 1);
    until("it is there", || {
        pair.ask_cache(&["status"]).1.contains("to be restored")
    });
    let (_, text) = pair.ask_cache(&["status"]);
    assert!(text.contains("a\\u{202e}b\\u{2028}c"), "{text}");
    let (_, json) = pair.ask_cache(&["status", "--json"]);
    assert!(json.contains("a\\u202eb\\u2028c"), "{json}");
    for text in [text, json, pair.cache.log()] {
        assert!(
            !text.contains('\u{202e}') && !text.contains('\u{2028}'),
            "{text}"
        );
    }
    assert!(pair.cache.log().contains("a\\u{202e}b\\u{2028}c"));
}

// --- signals --------------------------------------------------------------------------------

/// adv08: none of these is a reason to end, at no time of a daemon's life.
#[test]
fn no_signal_but_those_that_ask_for_it_ends_a_daemon() {
    let harmless = [
        Signal::HUP,
        Signal::USR1,
        Signal::USR2,
        Signal::PIPE,
        Signal::TTOU,
        Signal::TTIN,
        Signal::XFSZ,
    ];
    let (_dir, source, target) = two_dirs();
    let port = free_port();
    let all = |daemon: &Raw| harmless.iter().for_each(|signal| daemon.signal(*signal));
    let mut cache = Raw::start("image-cache", &target, port, &[], Stdio::null());
    let mut proxy = Raw::start("image-proxy", &source, port, &[], Stdio::null());
    all(&cache);
    all(&proxy);
    let held = dump(&source, 1);
    all(&cache);
    all(&proxy);
    passes(&source, &target, 2);
    // While it is stopping: it waits for the set to be restored.
    cache.signal(Signal::QUIT);
    until("it refuses new sessions", || {
        let hello = Hello::default();
        let greeted = Hand::greet(([127, 0, 0, 1], port).into(), &hello);
        greeted.is_ok_and(|(_, code, _)| code != 0)
    });
    all(&cache);
    assert!(cache.runs() && proxy.runs());
    restore(&target, &held);
    assert_eq!(cache.wait().code(), Some(0));
    proxy.signal(Signal::QUIT);
    assert_eq!(proxy.wait().code(), Some(0));
}

/// Before it is ready: image-proxy's port is a name that is looked up, image-cache begins; a SIGHUP comes at any time.
#[test]
fn a_sighup_while_a_daemon_starts_does_not_end_it() {
    let (_dir, source, target) = two_dirs();
    for (name, dir) in [("image-cache", &target), ("image-proxy", &source)] {
        for round in 0..10u32 {
            let mut daemon = Raw::spawn(name, dir, free_port(), &[], Stdio::null());
            // The shell is not ours to hang up: from the moment that it is the daemon.
            let exe = format!("/proc/{}/exe", daemon.0.id());
            until("it is the daemon", || {
                fs::read_link(&exe).is_ok_and(|exe| exe.ends_with(name))
            });
            // Its first instructions are the loader's, and no program can do anything about these.
            let ignores = format!("/proc/{}/status", daemon.0.id());
            until("it has begun", || {
                let text = fs::read_to_string(&ignores).unwrap_or_default();
                let line = text.lines().find_map(|l| l.strip_prefix("SigIgn:\t"));
                let ignored = line.and_then(|hex| u64::from_str_radix(hex, 16).ok());
                let caught = text.lines().find_map(|l| l.strip_prefix("SigCgt:\t"));
                let caught = caught.and_then(|hex| u64::from_str_radix(hex, 16).ok());
                (ignored.unwrap_or(0) | caught.unwrap_or(0)) & 1 != 0
            });
            for _ in 0..=round {
                daemon.signal(Signal::HUP);
            }
            assert!(daemon.is_ready() && daemon.runs());
        }
    }
}

// --- options --------------------------------------------------------------------------------

/// What an option with `value` does: it is refused, in words that name it, or the daemon is of use.
#[test]
fn nothing_means_never_or_is_refused() {
    #[derive(Clone, Copy, PartialEq)]
    enum Is {
        Refused,
        Fine,
    }
    use Is::{Fine, Refused};
    const BOTH: [(&str, &str, Is); 16] = [
        ("-D", "", Refused),
        ("-W", "", Refused),
        ("-o", "", Refused),
        ("--pidfile", "", Refused),
        ("--status-fd", "", Refused),
        ("--allow-uid", "", Refused),
        ("--allow-uid", "0", Fine),
        ("--address", "", Refused),
        ("--port", "", Refused),
        ("--grace-period", "0", Fine),
        ("--grace-period", "", Refused),
        ("--max-connections", "0", Refused),
        ("--idle-timeout", "0", Fine),
        ("--link-timeout", "0", Fine),
        ("--page-server", "", Refused),
        ("-v", "0", Fine),
    ];
    const PROXY: [(&str, &str, Is); 11] = [
        ("--port", "0", Refused),
        ("--connections", "0", Refused),
        ("--session", "", Refused),
        ("--session", "-D", Refused),
        ("--session", "--help", Refused),
        ("--commit-timeout", "0", Refused),
        ("--commit-timeout", "0ms", Refused),
        ("--connect-timeout", "0", Refused),
        ("--reserve-timeout", "0", Fine),
        ("--retransmit-buffer", "0", Fine),
        ("--parents", "", Refused),
    ];
    const CACHE: [(&str, &str, Is); 11] = [
        ("--port", "0", Fine),
        ("--set-ttl", "0", Fine),
        ("--memory-limit", "0", Refused),
        ("--memory-limit", "0K", Refused),
        ("--max-session-memory", "0", Refused),
        ("--max-images", "0", Refused),
        ("--max-open-images", "0", Refused),
        ("--max-sessions", "0", Refused),
        ("--max-handshakes", "0", Refused),
        ("--handshake-timeout", "0", Refused),
        ("--remote-dialect", "", Refused),
    ];
    for (name, own) in [("image-proxy", &PROXY), ("image-cache", &CACHE)] {
        for (option, value, is) in BOTH.iter().chain(own) {
            let dir = scratch();
            let port = free_port().to_string();
            let mut args = vec!["--address", "127.0.0.1", "--port", &port];
            match *option {
                "--address" => args = vec!["--port", &port],
                "--port" => args = vec!["--address", "127.0.0.1"],
                _ => {}
            }
            let given = format!("{option}={value}");
            // Short ones have no `=`.
            match option.strip_prefix("--") {
                Some(_) => args.push(&given),
                None => args.extend([*option, *value]),
            }
            let log = File::create(dir.path().join("said")).expect("fresh");
            let mut child = Command::new("sh")
                .args(["-c", "exec \"$@\" 3>&1 >/dev/null", "sh"])
                .arg(bin(name))
                .args(&args)
                .args(["--status-fd", "3"])
                .current_dir(dir.path())
                .env_remove("CRTOOLS_SCRIPT_ACTION")
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(log)
                .spawn()
                .map(Raw)
                .expect("it starts");
            let ready = child.is_ready();
            let said = || fs::read_to_string(dir.path().join("said")).expect("text");
            assert_eq!(ready, *is == Fine, "{name} {option} `{value}`: {}", said());
            if *is == Refused {
                assert_eq!(child.wait().code(), Some(2), "{name} {option}: {}", said());
                let said = said();
                let named = match *option {
                    "-D" => "--images-dir",
                    "-W" => "--work-dir",
                    "-o" => "--log-file",
                    long => long,
                };
                assert!(said.contains(named), "{name} {option}: {said}");
            }
        }
    }
    for (name, arguments) in [
        ("image-cache", &["drop", ""][..]),
        ("image-cache", &["release", ""]),
        ("image-cache", &["import", ""]),
        ("image-cache", &["status", "--control", ""]),
        ("image-proxy", &["abort", ""]),
        ("image-proxy", &["status", "--control", ""]),
    ] {
        let (done, said) = command(name, arguments, scratch().path());
        assert!(!done && !said.is_empty(), "{name} {arguments:?}: {said}");
    }
}

/// adv17: a committed set is kept for ever, and not for no time.
#[test]
fn set_ttl_zero_keeps_a_set() {
    let pair = Options::default().cache(&["--set-ttl", "0"]).start();
    let first = dump(&pair.source, 1);
    // Another session makes the cache look what has expired.
    passes(&pair.source, &pair.target, 2);
    let log = pair.cache.log();
    assert!(!log.contains("--set-ttl"), "{log}");
    restore(&pair.target, &first);
}

#[test]
fn a_directory_that_no_criu_can_reach_is_refused() {
    let dir = scratch();
    let deep = dir.path().join("d".repeat(60)).join("e".repeat(40));
    fs::create_dir_all(&deep).expect("fresh");
    let long = deep.to_str().expect("UTF-8");
    assert!(long.len() > 85);
    for name in ["image-proxy", "image-cache"] {
        let args = ["--address", "127.0.0.1", "--port", "1", "-D", long];
        let (done, said) = command(name, &args, dir.path());
        assert!(
            !done && said.contains("no CRIU can connect to sockets there"),
            "{said}"
        );
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
        assert_eq!(fs::read_dir(&deep).expect("ours").count(), 0);
    }
    // CRIU reaches it by the same relative name.
    let near = deep.parent().expect("above");
    let name = "e".repeat(40);
    let log = File::create(dir.path().join("log")).expect("fresh");
    let _cache = Raw::start("image-cache", near, free_port(), &["-D", &name], log);
    assert!(fs::read_to_string(dir.path().join("log"))
        .expect("text")
        .contains("with a shorter, relative -D"));
}

// --- directories ----------------------------------------------------------------------------

/// adv20: what is held can be had again, by all ways; and a dump goes through.
#[test]
fn a_deleted_directory_is_made_again() {
    let pair = Options::default().proxy(&["--session", "web"]).start();
    let held = dump(&pair.source, 1);
    until("it is to be restored", || {
        pair.ask_cache(&["status"]).1.contains("to be restored")
    });
    let mode = |path: &Path| fs::metadata(path).map(|m| m.permissions().mode() & 0o7777);
    let before = mode(&pair.target).expect("it is there");
    // Not the logs of this test, which are in there.
    for dir in [&pair.source, &pair.target] {
        let away = pair
            .dir()
            .join("away")
            .join(dir.file_name().expect("a name"));
        fs::create_dir_all(away.parent().expect("above")).expect("ours");
        fs::rename(dir, &away).expect("ours");
    }
    until("the sockets are there again", || {
        pair.ask_cache(&["status"]).1.contains("to be restored")
            && UnixStream::connect(pair.session_dir("web").join("streamer-serve.sock")).is_ok()
            && UnixStream::connect(pair.source.join("image-proxy-control.sock")).is_ok()
            && UnixStream::connect(pair.source.join("streamer-capture.sock")).is_ok()
            && UnixStream::connect(pair.source.join("img-proxy.sock")).is_ok()
    });
    assert_eq!(mode(&pair.target).expect("made again"), before);
    for (program, dir) in [("image-cache", "t"), ("image-proxy", "s")] {
        let away = pair.dir().join("away").join(dir);
        let entries = fs::read_dir(away).expect("moved");
        let logs = entries.filter_map(|entry| fs::read_to_string(entry.ok()?.path()).ok());
        let said = logs.into_iter().any(|log| {
            log.lines()
                .any(|l| l.contains("ERROR") && l.contains("while this daemon was running"))
        });
        assert!(said, "{program} says nothing of it");
    }
    restore(&pair.target, &held);
    passes(&pair.source, &pair.target, 2);
}

#[test]
fn a_removed_socket_is_made_again() {
    let pair = Pair::new();
    let held = dump(&pair.source, 1);
    for (dir, name) in [
        (&pair.target, "streamer-serve.sock"),
        (&pair.target, "img-cache.sock"),
        (&pair.target, "image-cache-control.sock"),
        (&pair.source, "streamer-capture.sock"),
        (&pair.source, "image-proxy-control.sock"),
        (&pair.source, "img-proxy.sock"),
    ] {
        fs::remove_file(dir.join(name)).expect("it is there");
        until(name, || UnixStream::connect(dir.join(name)).is_ok());
    }
    restore(&pair.target, &held);
    passes(&pair.source, &pair.target, 2);
}

/// adv12: a peer's name becomes a directory in one of ours. What was there before is not touched.
#[test]
fn a_peer_touches_no_directory_that_was_there() {
    let pair = Pair::new();
    let chmod = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
    };
    let state = |path: &Path| {
        let meta = fs::metadata(path).expect("it is there");
        let names = fs::read_dir(path).expect("ours").count();
        (
            meta.mode(),
            meta.uid(),
            meta.ctime(),
            meta.ctime_nsec(),
            names,
        )
    };
    let others = pair.target.join("others");
    fs::create_dir(&others).expect("fresh");
    chmod(&others, 0o755);
    let before = state(&others);
    let hello = |session| {
        let hello = Hello {
            session,
            ..Hello::default()
        };
        Hand::greet(([127, 0, 0, 1], pair.port).into(), &hello)
    };
    // The names of the sockets are names of sessions, too: they harm nobody.
    for session in [
        "others",
        "img-cache.sock",
        "image-proxy-control.sock",
        "sessions",
    ] {
        let (_hand, code, _) = hello(session).expect("an answer");
        assert_eq!(code, 0, "{session}");
        assert!(pair
            .session_dir(session)
            .join("streamer-serve.sock")
            .exists());
    }
    assert_eq!(state(&others), before);
    for session in ["-D", "--help", ".", "..", "_x", "a/b", "a\u{202e}b", ""] {
        let welcomed = hello(session).is_ok_and(|(_, code, _)| code == 0);
        assert!(!welcomed, "{session}");
    }
    // In the directory of the sessions, too.
    let planted = pair.session_dir("planted");
    fs::create_dir(&planted).expect("fresh");
    chmod(&planted, 0o755);
    fs::write(planted.join("file"), "theirs").expect("fresh");
    let before = state(&planted);
    let (_hand, code, why) = hello("planted").expect("an answer");
    let why = String::from_utf8_lossy(&why).into_owned();
    assert!(
        code != 0 && why.contains("it is not touched"),
        "{code} {why}"
    );
    // The answer comes first.
    until("the log says so", || {
        pair.cache.log().contains("it is not touched")
    });
    assert_eq!(state(&planted), before);
    passes(&pair.source, &pair.target, 1);
}

/// The same where the directory of the sessions is somebody's: the session is refused, and the daemon serves on.
#[test]
fn a_directory_called_sessions_is_not_taken_over() {
    let pair = Pair::new();
    let theirs = pair.target.join("sessions");
    fs::create_dir(&theirs).expect("fresh");
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect_err("no place for its sockets");
    assert!(pair.proxy.log().contains("it is not touched"));
    assert_eq!(fs::read_dir(&theirs).expect("ours").count(), 0);
    fs::remove_dir(&theirs).expect("ours");
    passes(&pair.source, &pair.target, 2);
}

/// Row i: of many that are started at once, one has the directory, always.
#[test]
fn of_daemons_started_at_once_one_has_the_directory() {
    for name in ["image-cache", "image-proxy"] {
        for _ in 0..8 {
            let dir = scratch();
            let spawn = |n: usize| {
                let log = File::create(dir.path().join(format!("log{n}"))).expect("fresh");
                Raw::spawn(name, dir.path(), free_port(), &[], log)
            };
            let mut all: Vec<Raw> = (0..6).map(spawn).collect();
            let ready: Vec<bool> = all.iter_mut().map(Raw::is_ready).collect();
            assert_eq!(ready.iter().filter(|r| **r).count(), 1, "{ready:?}");
            for (n, daemon) in all.iter_mut().enumerate() {
                let log = dir.path().join(format!("log{n}"));
                let said = || fs::read_to_string(&log).expect("text");
                if ready[n] {
                    assert!(daemon.runs(), "{}", said());
                    daemon.signal(Signal::TERM);
                    assert_eq!(daemon.wait().code(), Some(0));
                } else {
                    assert_eq!(daemon.wait().code(), Some(1), "{}", said());
                    let said = said();
                    assert!(said.contains(&format!("another {name}")), "{said}");
                }
            }
            let left = fs::read_dir(dir.path()).expect("ours");
            let left = left.filter(|e| {
                !e.as_ref()
                    .is_ok_and(|e| e.file_name().to_string_lossy().starts_with("log"))
            });
            assert_eq!(left.count(), 0, "something is left");
        }
    }
}

/// One of each kind shares a directory; a killed one leaves it to the next.
#[test]
fn a_killed_daemon_leaves_the_directory_to_the_next() {
    let dir = scratch();
    let port = free_port();
    // Else the next has its set, too.
    let off = ["--keep-through-restart", "off"];
    let mut cache = Raw::start("image-cache", dir.path(), port, &off, Stdio::null());
    let _proxy = Raw::start(
        "image-proxy",
        dir.path(),
        port,
        &["--session", "web"],
        Stdio::null(),
    );
    dump(dir.path(), 1);
    cache.0.kill().expect("our own child");
    cache.0.wait().expect("our own child");
    let web = dir.path().join("sessions/web");
    assert!(web.exists());
    let _cache = Raw::start("image-cache", dir.path(), port, &off, Stdio::null());
    passes(dir.path(), dir.path(), 2);
    until("nothing is left of either", || !web.exists());
}

/// `criu restore -D DIR/sessions/NAME --action-script image-cache`, with CRIU's work directory elsewhere.
#[test]
fn the_restores_script_finds_its_daemon_from_a_sessions_directory() {
    let pair = Options::default().proxy(&["--session", "web"]).start();
    let job = dump(&pair.source, 1);
    let web = pair.session_dir("web");
    until("it is to be restored", || {
        pair.ask_cache(&["status"]).1.contains("to be restored")
    });
    // We are its CRIU.
    let serve = Serve::connect(&web).expect("connect");
    for name in job.set().names() {
        serve.fetch(name);
    }
    let elsewhere = scratch();
    let script = Command::new(bin("image-cache"))
        .env("CRTOOLS_SCRIPT_ACTION", "pre-resume")
        .env("CRTOOLS_IMAGE_DIR", &web)
        .env_remove("IMAGE_CACHE_CONTROL")
        .current_dir(elsewhere.path())
        .output()
        .expect("it runs");
    assert!(script.status.success(), "{script:?}");
    drop(serve);
    until("it was restored", || !web.exists());
    let (done, said) = command(
        "image-cache",
        &["status", "--control", "image-cache-control.sock"],
        &pair.target,
    );
    assert!(done, "{said}");
}
