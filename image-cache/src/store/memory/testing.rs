//! A host of a test's own making, for the tests beside this.

use std::fs;
use std::path::PathBuf;

use crate::store::memory::host::Gauge;

const MIB: u64 = 1 << 20;

/// A host with one group, whose numbers a test sets.
pub struct Fake(tempfile::TempDir);

impl Fake {
    /// All in MiB.
    pub fn new(limit: u64) -> Self {
        let fake = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(fake.path("proc/self")).unwrap();
        fs::create_dir_all(fake.path("sys/fs/cgroup/x")).unwrap();
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        fs::write(fake.path("proc/self/mountinfo"), mounts).unwrap();
        fs::write(fake.path("proc/self/cgroup"), "0::/x\n").unwrap();
        let info = format!("MemTotal: {0} kB\nMemAvailable: {0} kB\n", 64 << 20);
        fs::write(fake.path("proc/meminfo"), info).unwrap();
        fake.limit(limit);
        fake.used(0, 0);
        fake
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join(path)
    }

    pub fn limit(&self, mib: u64) {
        let max = (mib * MIB).to_string();
        fs::write(self.path("sys/fs/cgroup/x/memory.max"), max).unwrap();
    }

    /// The group's usage, and of that the daemon's own resident memory.
    pub fn used(&self, mib: u64, own: u64) {
        let current = (mib * MIB).to_string();
        fs::write(self.path("sys/fs/cgroup/x/memory.current"), current).unwrap();
        let status = format!("RssAnon: {} kB\nVmSwap: 0 kB\n", own << 10);
        fs::write(self.path("proc/self/status"), status).unwrap();
    }

    pub fn gauge(&self) -> Gauge {
        Gauge::below(self.0.path())
    }
}
