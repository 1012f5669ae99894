//! A restore at `post-restore`: a tree that does nothing, a CRIU that waits for its script, and an image-cache that says
//! what a test wants.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rustix::event::PollFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{kill_process, pidfd_open, Pid, PidfdFlags, Signal};
use serde_json::{json, Value};

use super::wire::wait_for;
use crate::bins::bin;
use crate::daemons::SOON;
use crate::hand::PROXY;

/// The key of the session, and the id that both daemons make of it.
pub const KEY: u64 = 0x0102;
pub const ID: &str = "@dc4a9c109090";
pub const SESSION: &str = "web";
pub const SET: u32 = 3;

/// The CRIU: it has built a tree of two tasks, runs its script, says how that ended, and kills what it has built.
const CRIU: &str = r#"{ sleep 600 & exec sleep 601; } >/dev/null 2>&1 & CRTOOLS_INIT_PID=$!; export CRTOOLS_INIT_PID
while [ -z "$(cat /proc/$CRTOOLS_INIT_PID/task/$CRTOOLS_INIT_PID/children)" ]; do :; done
echo $CRTOOLS_INIT_PID; echo "a line of CRIU" >&2
"$@" >/dev/null; code=$?; echo $code; kill -9 $CRTOOLS_INIT_PID"#;

/// A restore, from its script's begin to its end.
pub struct HeldRestore {
    criu: Child,
    said: BufReader<ChildStdout>,
    tree: Vec<(Pid, OwnedFd)>,
    log: PathBuf,
}

impl HeldRestore {
    /// CRIU runs its script for `action` with the images directory `dir`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(dir: &Path, action: &str) -> Self {
        let log = dir.join("restore.log");
        let images = File::open(dir).expect("the directory is there");
        let link = format!("/proc/{}/fd/{}", std::process::id(), images.as_raw_fd());
        let mut criu = Command::new("sh")
            .args(["-c", CRIU, "criu"])
            .arg(bin("image-cache"))
            .env("CRTOOLS_SCRIPT_ACTION", action)
            .env("CRTOOLS_IMAGE_DIR", link)
            .env_remove("IMAGE_CACHE_CONTROL")
            .current_dir(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("it starts");
        let mut said = BufReader::new(criu.stdout.take().expect("stdout is piped"));
        let root: i32 = line(&mut said).parse().expect("a pid");
        // The script may look for its socket by that directory as long as the tests' process has it open.
        std::mem::forget(images);
        let children = fs::read_to_string(format!("/proc/{root}/task/{root}/children"));
        let children = children.expect("it has started");
        let pids = children
            .split_whitespace()
            .map(|pid| pid.parse().expect("a pid"));
        let tree = std::iter::once(root).chain(pids).map(|pid| {
            let pid = Pid::from_raw(pid).expect("a pid");
            (
                pid,
                pidfd_open(pid, PidfdFlags::empty()).expect("it is there"),
            )
        });
        let tree = tree.collect();
        Self {
            criu,
            said,
            tree,
            log,
        }
    }

    /// What CRIU and its script have said.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The status that the script ended with.
    ///
    /// # Panics
    /// If it does not end.
    pub fn script_ends(&mut self) -> i32 {
        let ready = wait_for(self.said.get_ref().as_fd(), PollFlags::IN, SOON);
        assert!(ready.expect("poll"), "the script holds on:\n{}", self.log());
        line(&mut self.said).parse().expect("a status")
    }

    /// The script, a child of CRIU.
    ///
    /// # Panics
    /// If there is none.
    pub fn script(&self) -> Pid {
        let criu = self.criu.id();
        let children = fs::read_to_string(format!("/proc/{criu}/task/{criu}/children"));
        let children = children.expect("it runs");
        let mut pids = children
            .split_whitespace()
            .map(|pid| pid.parse().expect("a pid"));
        let script =
            pids.find(|pid| Some(*pid) != self.tree.first().map(|(p, _)| p.as_raw_nonzero().get()));
        script.and_then(Pid::from_raw).expect("the script runs")
    }

    /// SIGKILL for CRIU alone.
    ///
    /// # Panics
    /// If it is not there.
    pub fn kill_criu(&mut self) {
        self.criu.kill().expect("our own child");
        self.criu.wait().expect("our own child");
    }

    /// Whether all tasks of the tree have ended.
    ///
    /// # Panics
    /// If that cannot be seen.
    pub fn tree_has_ended(&self) -> bool {
        let ended = |(_, pidfd): &(Pid, OwnedFd)| {
            wait_for(pidfd.as_fd(), PollFlags::IN, std::time::Duration::ZERO).expect("poll")
        };
        self.tree.iter().all(ended)
    }
}

impl Drop for HeldRestore {
    fn drop(&mut self) {
        let _ = self.criu.kill();
        let _ = self.criu.wait();
        for (pid, pidfd) in &self.tree {
            // As long as it has not ended its number is its own.
            let lives =
                !wait_for(pidfd.as_fd(), PollFlags::IN, std::time::Duration::ZERO).unwrap_or(true);
            if lives {
                let _ = kill_process(*pid, Signal::KILL);
            }
        }
        if std::thread::panicking() {
            eprintln!("---- log of CRIU:\n{}----", self.log());
        }
    }
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).expect("it says something");
    line.trim().to_owned()
}

/// An image-cache that does what the test says.
pub struct ToldCache {
    listener: UnixListener,
}

/// A script that has asked it.
pub struct Asked {
    stream: UnixStream,
    pub request: Value,
    /// What came behind the line.
    pub fds: Vec<OwnedFd>,
}

impl ToldCache {
    /// # Panics
    /// If it cannot listen in `dir`.
    pub fn start(dir: &Path) -> Self {
        let path = dir.join("image-cache-control.sock");
        let _ = fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("it listens");
        Self { listener }
    }

    /// The next script that asks, with so many descriptors.
    ///
    /// # Panics
    /// If none does.
    pub fn asked(&self) -> Asked {
        let ready = wait_for(self.listener.as_fd(), PollFlags::IN, SOON);
        assert!(ready.expect("poll"), "no script asks");
        let (stream, _) = self.listener.accept().expect("it asks");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let request = request(&stream);
        let has = |field: &str| usize::from(request[field] == true);
        let count = match request["request"] == "holding" {
            true => 1,
            false => has("pidfd") + has("log"),
        };
        let fds = (0..count).map(|_| recv_fd(&stream).expect("a descriptor"));
        let fds = fds.collect();
        Asked {
            stream,
            request,
            fds,
        }
    }
}

impl Asked {
    /// # Panics
    /// If the script has gone.
    pub fn answer(&mut self, answer: &Value) {
        let line = format!("{answer}\n");
        self.stream.write_all(line.as_bytes()).expect("it listens");
    }

    /// Tells it to hold, for an image-cache in `dir` whose port is this, and hears that it does.
    pub fn hold(&mut self, dir: &Path, port: u16) {
        let held = json!({
            "id": ID, "session": SESSION, "snapshot": "/images", "set": SET, "key": KEY, "proxy": PROXY, "peer": "10.0.0.1:5",
        });
        let listen = format!("127.0.0.1:{port}");
        let hold = json!({"held": held, "dir": dir, "listen": listen});
        self.answer(&json!({"answer": "hold", "hold": hold}));
        assert_eq!(request(&self.stream)["request"], "holds");
    }

    pub fn done(&mut self) {
        self.answer(&json!({"answer": "done"}));
    }

    pub fn failed(&mut self, reason: &str) {
        self.answer(&json!({"answer": "failed", "reason": reason}));
    }

    /// Whether the script has gone.
    ///
    /// # Panics
    /// If that cannot be seen.
    pub fn has_hung_up(&self) -> bool {
        let ready = wait_for(
            self.stream.as_fd(),
            PollFlags::IN,
            std::time::Duration::ZERO,
        );
        ready.expect("poll")
    }
}

fn request(mut stream: &UnixStream) -> Value {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a line");
        line.push(byte[0]);
    }
    serde_json::from_slice(&line).expect("JSON")
}

fn recv_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.ok_or_else(|| io::ErrorKind::InvalidData.into())
}
