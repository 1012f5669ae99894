//! Who answers on a control socket is looked at before it is believed: another user may have put the socket where the
//! script, or an operator, finds it. Needs root, to be others.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{chown, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;

use e2e_tests::bins::bin;
use e2e_tests::daemons::{scratch, wait_child, SOON};
use socket2::{Domain, SockAddr, Socket, Type};
use tempfile::TempDir;

/// What the kernel says of a user whom it cannot name; also `nobody`.
const NOBODY: u32 = 65_534;
const PERSON: u32 = 1_500;
const SERVICE: u32 = 990;

const DONE: &[u8] = b"{\"answer\":\"accepted\",\"within_ms\":1000}\n{\"answer\":\"done\"}\n";

/// A daemon of this user that says "done" to whatever it is asked. The socket file may be root's: who listens counts.
fn liar(uid: u32, path: &Path) {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None).expect("a socket");
    socket
        .bind(&SockAddr::unix(path).expect("short"))
        .expect("fresh");
    fs::set_permissions(path, Permissions::from_mode(0o666)).expect("ours");
    let (listens, listening) = mpsc::channel();
    thread::spawn(move || {
        let id = libc::c_long::from(uid);
        // SAFETY: the system call itself changes the user of this thread alone, which has no other memory in it.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) };
        assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
        socket.listen(16).expect("bound");
        listens.send(()).expect("the test waits");
        loop {
            let (stream, _) = socket.accept().expect("it listens");
            let mut stream =
                std::os::unix::net::UnixStream::from(std::os::fd::OwnedFd::from(stream));
            let mut line = String::new();
            let read =
                BufReader::new(stream.try_clone().expect("a descriptor")).read_line(&mut line);
            // Who does not believe it is gone. The others may send more, and close when they have the answer.
            if read.is_ok_and(|n| n > 0) && stream.write_all(DONE).is_ok() {
                while stream.read(&mut [0; 64]).is_ok_and(|n| n > 0) {}
            }
        }
    });
    listening.recv().expect("it listens");
}

/// Below /run, where every directory is root's; of this user and with this mode.
fn directory(uid: u32, mode: u32) -> TempDir {
    let dir = tempfile::Builder::new().prefix("e2e").tempdir_in("/run");
    let dir = dir.expect("root");
    own(dir.path(), uid, mode);
    dir
}

fn own(dir: &Path, uid: u32, mode: u32) {
    chown(dir, Some(uid), Some(uid)).expect("root");
    fs::set_permissions(dir, Permissions::from_mode(mode)).expect("root");
}

/// Whether the script succeeds, and what it says.
fn script(
    program: &str,
    action: &str,
    images: &Path,
    work: &Path,
    named: Option<&Path>,
) -> (bool, String) {
    let variable = match program {
        "image-proxy" => "IMAGE_PROXY_CONTROL",
        _ => "IMAGE_CACHE_CONTROL",
    };
    let dir = fs::File::open(images).expect("it is there");
    let mut command = Command::new(bin(program));
    command
        .env("CRTOOLS_SCRIPT_ACTION", action)
        .env(
            "CRTOOLS_IMAGE_DIR",
            format!("/proc/{}/fd/{}", std::process::id(), dir.as_raw_fd()),
        )
        .env("CRTOOLS_INIT_PID", std::process::id().to_string())
        .env_remove(variable)
        .current_dir(work);
    if let Some(path) = named {
        command.env(variable, path);
    }
    let output = command.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.success(), said)
}

const SCRIPTS: [(&str, &str); 3] = [
    ("image-proxy", "pre-dump"),
    ("image-proxy", "post-dump"),
    ("image-cache", "pre-resume"),
];

/// Row c of issue 12: any user's socket in -D or -W said "done", and CRIU killed.
#[test]
fn a_strangers_socket_is_not_believed() {
    let empty = scratch();
    for (uid, mode, sticky) in [
        (NOBODY, 0o755, false),
        (PERSON, 0o755, false),
        (SERVICE, 0o755, true),
        (SERVICE, 0o777, false),
    ] {
        let dir = directory(uid, mode);
        // As in /tmp: whoever comes first has the name.
        let below = dir.path().join("d");
        if sticky {
            own(dir.path(), 0, 0o1777);
            fs::create_dir(&below).expect("fresh");
            own(&below, uid, mode);
        }
        let place = if sticky { below.as_path() } else { dir.path() };
        for program in ["image-proxy", "image-cache"] {
            liar(uid, &place.join(format!("{program}-control.sock")));
        }
        for (program, action) in SCRIPTS {
            for (images, work) in [(place, empty.path()), (empty.path(), place)] {
                let (done, said) = script(program, action, images, work, None);
                assert!(!done, "{uid} {mode:o}: {program} {action} believed it");
                let named = format!("uid {uid}");
                assert!(
                    said.contains(&named) && said.contains("not believed"),
                    "{said}"
                );
            }
        }
        for (program, command) in [
            ("image-cache", &["status"][..]),
            ("image-cache", &["drop", "web"]),
            ("image-cache", &["release", "web"]),
            ("image-cache", &["import", "."]),
            ("image-proxy", &["abort", "web"]),
            ("image-proxy", &["status"]),
        ] {
            let mut asked = Command::new(bin(program));
            let output = asked
                .args(command)
                .current_dir(place)
                .output()
                .expect("it runs");
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && said.contains("not believed"),
                "{command:?}: {said}"
            );
        }
    }
}

/// `dist/*.service`: the directory is root's gift to the service's account.
#[test]
fn a_services_own_directory_is_believed() {
    let empty = scratch();
    for uid in [SERVICE, 61_303] {
        let dir = directory(uid, 0o711);
        for program in ["image-proxy", "image-cache"] {
            liar(uid, &dir.path().join(format!("{program}-control.sock")));
        }
        for (program, action) in SCRIPTS {
            for (images, work) in [(dir.path(), empty.path()), (empty.path(), dir.path())] {
                let (done, said) = script(program, action, images, work, None);
                assert!(done, "{program} {action}: {said}");
            }
        }
    }
}

/// What the operator names is what they mean, where nobody else can have put it.
#[test]
fn a_named_socket_of_another_user_is_believed() {
    let empty = scratch();
    for (uid, mode, believed) in [
        (PERSON, 0o755, true),
        (SERVICE, 0o755, true),
        (PERSON, 0o777, false),
        (PERSON, 0o1777, false),
        (NOBODY, 0o755, false),
    ] {
        let dir = directory(uid, mode);
        for (program, action) in SCRIPTS {
            let path = dir.path().join(format!("{program}-control.sock"));
            if !path.exists() {
                liar(uid, &path);
            }
            let (done, said) = script(program, action, empty.path(), empty.path(), Some(&path));
            assert_eq!(done, believed, "{uid} {mode:o} {program} {action}: {said}");
            let mut asked = Command::new(bin(program));
            let command = match program {
                "image-proxy" => "abort",
                _ => "drop",
            };
            let asked = asked.args([command, "web", "--control"]).arg(&path);
            let output = asked.output().expect("it runs");
            assert_eq!(output.status.success(), believed, "{output:?}");
        }
    }
}

/// The same kind of fault as case 05: a socket that a daemon may not connect to is not one that nobody listens on.
#[test]
fn a_socket_that_may_not_be_tried_is_not_replaced() {
    let dir = directory(61_303, 0o755);
    let path = dir.path().join("image-proxy-control.sock");
    let _listens = std::os::unix::net::UnixListener::bind(&path).expect("fresh");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("ours");
    let mut daemon = Command::new("setpriv")
        .args(["--reuid=61303", "--regid=61303", "--clear-groups"])
        .arg(bin("image-proxy"))
        .args(["--address", "127.0.0.1", "--port", "1", "-D"])
        .arg(dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .expect("setpriv is there");
    let status = wait_child(&mut daemon, SOON).expect("our own child");
    let _ = daemon.kill();
    let output = daemon.wait_with_output().expect("our own child");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(status.and_then(|s| s.code()), Some(1), "{said}");
    assert!(said.contains("Permission denied"), "{said}");
    std::os::unix::net::UnixStream::connect(&path).expect("root's is there");
}
