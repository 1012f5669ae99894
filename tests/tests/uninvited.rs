//! Who may talk to the daemons' sockets, and where these are made. Needs root, to be somebody else.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{symlink, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use e2e_tests::bins::bin;
use e2e_tests::daemons::{free_port, scratch, start_proxy, until, Daemon, Options, Pair};
use e2e_tests::fake::{DumpJob, Protocol};
use e2e_tests::hand::Hello;

const FRIEND: u32 = 61_001;
const STRANGER: u32 = 61_002;

fn chmod(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).expect("our own");
}

fn mode_of(path: &Path) -> u32 {
    fs::symlink_metadata(path)
        .expect("it is there")
        .permissions()
        .mode()
        & 0o7777
}

fn status_as(uid: u32, program: &str, dir: &Path) -> Output {
    let mut command = Command::new(bin(program));
    command
        .args(["status", "--control"])
        .arg(dir.join(format!("{program}-control.sock")))
        .uid(uid)
        .gid(uid)
        .current_dir("/");
    command.output().expect("root may be anybody")
}

/// Everything above the sockets lets everybody through, so that it is the daemon who decides.
fn open_up(pair: &Pair) {
    for dir in [pair.dir(), &pair.source, &pair.target] {
        chmod(dir, 0o755);
    }
}

#[test]
fn only_root_our_user_and_allowed_users_are_served() {
    let friend = FRIEND.to_string();
    let allow = ["--allow-uid", &friend];
    let pair = Options::default().proxy(&allow).cache(&allow).start();
    open_up(&pair);
    for (program, dir, daemon) in [
        ("image-proxy", &pair.source, &pair.proxy),
        ("image-cache", &pair.target, &pair.cache),
    ] {
        for uid in [0, FRIEND] {
            let output = status_as(uid, program, dir);
            assert!(output.status.success(), "{program} for {uid}: {output:?}");
        }
        for _ in 0..3 {
            let output = status_as(STRANGER, program, dir);
            assert_eq!(output.status.code(), Some(1), "{program}: {output:?}");
            assert!(output.stdout.is_empty());
        }
        let log = daemon.log();
        assert!(log.contains(&format!("uid={STRANGER}")), "{log}");
        assert_eq!(log.matches("refused: the peer").count(), 3, "{log}");
    }
    // It is not that nobody was served any more.
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    let restored = Protocol::Stream.restore(&pair.target, &job.set());
    restored.expect("the restore");
}

/// What a user of this host gets for `bytes` on a port of loopback: so many bytes, or fewer.
fn answer_to(uid: u32, port: u16, bytes: &[u8], wanted: usize) -> usize {
    let bytes: String = bytes.iter().map(|byte| format!(r"\x{byte:02x}")).collect();
    let script =
        format!("exec 3<>/dev/tcp/127.0.0.1/{port}; printf '{bytes}' >&3; head -c {wanted} <&3");
    let mut shell = Command::new("bash");
    shell
        .arg("-c")
        .arg(script)
        .uid(uid)
        .gid(uid)
        .current_dir("/");
    shell.output().expect("root may be anybody").stdout.len()
}

/// A page server on loopback, without TLS: everybody on this host can connect, so the kernel is asked who it is.
#[test]
fn a_page_server_on_loopback_serves_the_same_users() {
    let (here, there) = (free_port(), free_port());
    let friend = FRIEND.to_string();
    let options = |port: u16| {
        let port = port.to_string();
        let options = ["--page-server", &port, "--allow-uid", &friend];
        options.map(str::to_owned).to_vec()
    };
    let pair = Pair::with(Options {
        cache: options(there),
        proxy: options(here),
        ..Options::default()
    });
    // PS_IOV_CLOSE, in the shorter header: a round of nothing. It is answered to those who are served.
    let mut close = [0; 24];
    close[..2].copy_from_slice(&[0x23, 0x10]);
    for (port, daemon) in [(here, &pair.proxy), (there, &pair.cache)] {
        for (uid, may) in [(0, true), (FRIEND, true), (STRANGER, false)] {
            assert_eq!(answer_to(uid, port, &close, 4) == 4, may, "{uid}");
        }
        until("it is said", || {
            let text =
                format!("page server: refused: its user ({STRANGER}) is neither root nor ours");
            daemon.log().contains(&text)
        });
    }
}

/// The link's port, too: who gets in there puts sets where root's next restore takes the newest.
#[test]
fn the_link_on_loopback_serves_the_same_users() {
    let friend = FRIEND.to_string();
    let pair = Pair::with(Options {
        cache: vec!["--allow-uid".to_owned(), friend],
        ..Options::default()
    });
    let welcomed = |uid: u32| {
        let session = format!("of-{uid}");
        let hello = Hello {
            session: &session,
            ..Hello::default()
        };
        answer_to(uid, pair.port, &hello.bytes(), 8) == 8
    };
    for (uid, may) in [(0, true), (FRIEND, true), (STRANGER, false)] {
        assert_eq!(welcomed(uid), may, "{uid}");
    }
    until("it is said", || {
        let text = format!("link: refused: its user ({STRANGER}) is neither root nor ours");
        pair.cache.log().contains(&text)
    });
    assert!(!pair.cache.log().contains(&format!("of-{STRANGER}")));
}

/// Whose connection it is, is said with what goes wrong on it.
#[test]
fn log_lines_of_local_connections_say_whose_they_are() {
    let pair = Pair::new();
    for (socket, daemon) in [
        (pair.source.join("img-proxy.sock"), &pair.proxy),
        (pair.target.join("img-cache.sock"), &pair.cache),
    ] {
        let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("it listens");
        stream.write_all(&[0xff; 64]).expect("sent");
        let whose = format!("local{{pid={} uid=0}}", std::process::id());
        until("it is said", || {
            let log = daemon.log();
            log.lines()
                .any(|line| line.contains("ERROR") && line.contains(&whose))
        });
    }
}

#[test]
fn without_allowed_users_the_files_themselves_keep_others_out() {
    let pair = Options::default().proxy(&["--session", "web"]).start();
    open_up(&pair);
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect("the dump");
    let web = pair.session_dir("web");
    assert_eq!(mode_of(&web), 0o700);
    for dir in [&pair.source, &pair.target, &web] {
        let entries = fs::read_dir(dir).expect("a directory");
        let paths = entries.map(|entry| entry.expect("it").path());
        for socket in paths.filter(|path| path.extension().is_some_and(|e| e == "sock")) {
            assert_eq!(mode_of(&socket), 0o600, "{}", socket.display());
        }
    }
    let output = status_as(STRANGER, "image-cache", &pair.target);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("Permission denied"), "{text}");
}

fn refused_in(dir: &Path, reason: &str) {
    for (program, args) in [
        ("image-proxy", ["--address", "127.0.0.1", "--port", "1"]),
        ("image-cache", ["--address", "127.0.0.1", "--port", "0"]),
    ] {
        let output = Command::new(bin(program))
            .args(args)
            .arg("-D")
            .arg(dir)
            .output();
        let output = output.expect("it runs");
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(text.contains(reason), "{program}: {text}");
        assert_eq!(
            fs::read_dir(dir).expect("a directory").count(),
            0,
            "{program}"
        );
    }
}

#[test]
fn no_sockets_where_others_could_put_theirs() {
    let above = scratch();
    let dir = above.path().join("d");
    fs::create_dir(&dir).expect("fresh");
    for mode in [0o777, 0o1777, 0o775] {
        chmod(&dir, mode);
        refused_in(&dir, "others can write there");
    }
    chmod(&dir, 0o755);
    std::os::unix::fs::chown(&dir, Some(STRANGER), None).expect("root");
    refused_in(&dir, "belongs to uid 61002");
}

/// What a daemon that was killed left, or somebody with our rights planted: it is no directory of ours.
#[test]
fn a_session_directory_is_never_a_planted_link() {
    let pair = Options::default().proxy(&["--session", "web"]).start();
    let elsewhere = scratch();
    symlink(elsewhere.path(), pair.target.join("sessions")).expect("fresh");
    let job = DumpJob::new(&Protocol::Stream, &pair.source, 1).gated();
    job.run().expect_err("there is no place for its sockets");
    assert!(pair.cache.log().contains("no sockets for session web"));
    assert_eq!(fs::read_dir(elsewhere.path()).expect("ours").count(), 0);
}

#[test]
fn a_parent_that_others_can_write_is_said() {
    let above = scratch();
    let dir = above.path().join("open/d");
    fs::create_dir_all(&dir).expect("fresh");
    chmod(&above.path().join("open"), 0o777);
    let proxy: Daemon = start_proxy(&dir, free_port(), &[]);
    let log = proxy.log();
    assert!(
        log.contains("can put another directory in its place"),
        "{log}"
    );
}
