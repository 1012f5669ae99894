//! Memory control groups for daemons to live in, of the version that this machine has; and the virtual machine, which has
//! the second one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bins::{bin, use_built, workspace};

/// Where the test binary finds the daemons in the virtual machine; set there alone.
const IN_MACHINE: &str = "E2E_IN_MACHINE";

/// A memory control group with a limit. It goes when its processes are gone and this is dropped.
pub struct MemoryGroup {
    dir: PathBuf,
    limit: &'static str,
    usage: &'static str,
}

/// Where the memory controller of this machine is mounted, and whether it is version 2.
fn hierarchy() -> Option<(PathBuf, bool)> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = |line: &str| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, point, kind, options, ..] = fields[..] else {
            return None;
        };
        match kind {
            "cgroup" if options.split(',').any(|o| o == "memory") => Some((point.into(), false)),
            "cgroup2" => {
                let controllers = Path::new(point).join("cgroup.controllers");
                let controllers = fs::read_to_string(controllers).ok()?;
                let memory = controllers.split_whitespace().any(|c| c == "memory");
                memory.then(|| (point.into(), true))
            }
            _ => None,
        }
    };
    mounts.lines().find_map(mount)
}

impl MemoryGroup {
    /// `None` if this machine lets nobody make one.
    pub fn new(mib: u64) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (top, second) = hierarchy()?;
        let name = format!(
            "e2e-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let dir = top.join(name);
        if second {
            // It may be there already.
            let _ = fs::write(top.join("cgroup.subtree_control"), "+memory");
        }
        fs::create_dir(&dir).ok()?;
        let (limit, usage) = match second {
            true => ("memory.max", "memory.current"),
            false => ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        };
        let group = Self { dir, limit, usage };
        let limited = fs::write(group.dir.join(limit), (mib << 20).to_string());
        limited.ok().map(|()| group)
    }

    /// Takes a process in. What it has by now is counted where it was.
    ///
    /// # Errors
    /// If the kernel does not take it.
    pub fn admit(&self, pid: i32) -> std::io::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string())
    }

    /// What to put before a command for it to run in the group.
    pub fn enter(&self) -> Vec<String> {
        let procs = self.dir.join("cgroup.procs");
        let script = format!("echo $$ >'{}' && exec \"$@\"", procs.display());
        ["sh", "-c", &script, "sh"].map(String::from).into()
    }

    /// # Panics
    /// If the kernel does not take it.
    pub fn set_limit(&self, mib: u64) {
        let set = fs::write(self.dir.join(self.limit), (mib << 20).to_string());
        set.expect("a limit above the usage");
    }

    /// In bytes.
    ///
    /// # Panics
    /// If the kernel does not tell.
    pub fn usage(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join(self.usage)).expect("it is there");
        text.trim().parse().expect("a number")
    }

    pub fn name(&self) -> String {
        self.dir.display().to_string()
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // A process that was killed is there for a moment yet; and a test that failed has more to say than this.
        for _ in 0..400 {
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        eprintln!("{} stays", self.dir.display());
    }
}

/// Whether this test program runs in the virtual machine. To be called before anything asks for a daemon.
pub fn in_machine() -> bool {
    let dir = std::env::var_os(IN_MACHINE);
    if let Some(dir) = &dir {
        use_built(dir.into());
    }
    dir.is_some()
}

/// Runs this test program, or its tests with one of these in their names, in the virtual machine, whose control groups are of version 2; gives its output. `tmp`: where
/// there is room for its files.
///
/// # Panics
/// If a test fails there.
pub fn run_in_machine(tmp: &str, filters: &[&str]) -> String {
    let temp = tempfile::tempdir_in(tmp).expect("a directory");
    let script = temp.path().join("run.sh");
    let text = format!(
        "#!/bin/bash\nset -e\nmount -t cgroup2 cgroup2 /sys/fs/cgroup\n\
         cd /tmp\n{IN_MACHINE}=/tmp/opt RUST_BACKTRACE=0 /tmp/opt/tests --test-threads 1 --color never {}\n",
        filters.join(" ")
    );
    fs::write(&script, text).expect("a script");
    let ours = std::env::current_exe().expect("the running executable has a path");
    let mut command = Command::new(workspace().join("scripts/vm"));
    command.args(["--packages", "criu,nftables,procps", "--memory", "1536M"]);
    command.args(["--time-limit", "400"]);
    for (from, to) in [
        (ours, "tests"),
        (bin("image-proxy"), "image-proxy"),
        (bin("image-cache"), "image-cache"),
        (bin("fake-criu"), "fake-criu"),
    ] {
        command.arg("--copy");
        command.arg(format!("{}:/tmp/opt/{to}", from.display()));
    }
    let output = command.arg(&script).stdin(Stdio::null()).output();
    let output = output.expect("scripts/vm can be started");
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said += &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "scripts/vm: {}\n--- console of the machine\n{said}",
        output.status
    );
    said
}
