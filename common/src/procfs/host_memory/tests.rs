//! Trees of files as kernels show them: containers, units, both versions, and both at once.

use super::*;

const MIB: u64 = 1 << 20;

/// A host of files.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new(membership: &str, mounts: &str) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        tree.put("proc/self/cgroup", membership);
        tree.put("proc/self/mountinfo", mounts);
        tree.put(
            "proc/meminfo",
            "MemTotal:       16384 kB\nMemFree:  7 kB\nMemAvailable:   8192 kB\n",
        );
        tree
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn group2(&self, dir: &str, max: &str, high: &str, current: u64) {
        self.put(&format!("{dir}/memory.max"), max);
        self.put(&format!("{dir}/memory.high"), high);
        self.put(&format!("{dir}/memory.current"), &format!("{current}\n"));
    }

    fn group1(&self, dir: &str, limit: u64, usage: u64) {
        self.put(&format!("{dir}/memory.limit_in_bytes"), &limit.to_string());
        self.put(&format!("{dir}/memory.usage_in_bytes"), &usage.to_string());
    }

    fn memory(&self) -> HostMemory {
        HostMemory::below(self.0.path())
    }

    /// The groups' bounds: file, limit, left.
    fn groups(&self) -> Vec<(String, u64, u64)> {
        self.of(&self.memory())
    }

    fn of(&self, memory: &HostMemory) -> Vec<(String, u64, u64)> {
        let bounds = memory.bounds(u64::MAX).into_iter();
        let groups = bounds.filter_map(|bound| match bound.of {
            Bounded::Host => None,
            Bounded::Group(file) => {
                let file = file.strip_prefix(self.0.path()).unwrap();
                Some((file.display().to_string(), bound.limit, bound.left))
            }
        });
        groups.collect()
    }
}

fn of(file: &str, limit: u64, left: u64) -> (String, u64, u64) {
    (file.to_owned(), limit, left)
}

#[test]
fn what_the_host_has() {
    let tree = Tree::new("", "");
    let host = Bound {
        of: Bounded::Host,
        limit: 16 * MIB,
        left: 8 * MIB,
    };
    assert_eq!(tree.memory().bounds(0), [host]);
    tree.put("proc/meminfo", "MemTotal: 1 kB\n");
    assert_eq!(tree.memory().bounds(0), []);
}

/// A unit in slices, version 2: `memory.max` and `memory.high` of each count.
#[test]
fn a_unit_and_its_slices() {
    let tree = Tree::new(
        "0::/a.slice/b.slice/c.service\n",
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
    );
    let top = "sys/fs/cgroup/a.slice";
    tree.group2(top, "9000\n", "max\n", 4000);
    tree.group2(&format!("{top}/b.slice"), "max\n", "700\n", 600);
    tree.group2(&format!("{top}/b.slice/c.service"), "max\n", "max\n", 500);
    let expected = [
        of("sys/fs/cgroup/a.slice/b.slice/memory.high", 700, 100),
        of("sys/fs/cgroup/a.slice/memory.max", 9000, 5000),
    ];
    assert_eq!(tree.groups(), expected);
    // Limits may change while the daemon runs, and it may be put elsewhere.
    let memory = tree.memory();
    assert_eq!(tree.of(&memory), expected);
    tree.put(&format!("{top}/b.slice/c.service/memory.max"), "400\n");
    let first = of("sys/fs/cgroup/a.slice/b.slice/c.service/memory.max", 400, 0);
    assert_eq!(tree.of(&memory)[0], first);
    tree.group2("sys/fs/cgroup/z", "50\n", "max", 20);
    tree.put("proc/self/cgroup", "0::/z\n");
    assert_eq!(tree.of(&memory), [of("sys/fs/cgroup/z/memory.max", 50, 30)]);
}

/// With a cgroup namespace of its own a container sees its group as the root.
#[test]
fn a_container_with_a_namespace() {
    let mounts = "30 23 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n";
    let tree = Tree::new("0::/\n", mounts);
    tree.group2("sys/fs/cgroup", "100\n", "max\n", 60);
    let expected = [of("sys/fs/cgroup/memory.max", 100, 40)];
    assert_eq!(tree.groups(), expected);
}

/// Without one it sees the host's path, and only its own group is mounted (Docker, version 1).
#[test]
fn a_container_without_a_namespace() {
    let tree = Tree::new(
        "5:cpu,cpuacct:/docker/c0ffee\n4:memory:/docker/c0ffee\n0::/\n",
        "40 39 0:30 /docker/c0ffee /sys/fs/cgroup/cpu ro master:9 - cgroup cgroup rw,cpu,cpuacct\n\
         41 39 0:31 /docker/c0ffee /sys/fs/cgroup/memory ro master:10 - cgroup cgroup rw,memory\n",
    );
    tree.group1("sys/fs/cgroup/memory", 300, 100);
    let dir = "sys/fs/cgroup/memory";
    let expected = [of(&format!("{dir}/memory.limit_in_bytes"), 300, 200)];
    assert_eq!(tree.groups(), expected);
    // Memory and swap together are less than either would allow.
    tree.put(&format!("{dir}/memory.memsw.limit_in_bytes"), "300");
    tree.put(&format!("{dir}/memory.memsw.usage_in_bytes"), "290");
    let second = of(&format!("{dir}/memory.memsw.limit_in_bytes"), 300, 10);
    assert_eq!(tree.groups()[1], second);
}

/// Version 1 with its ancestors, beside a version 2 without controllers.
#[test]
fn both_versions_at_once() {
    let mounts = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("4:memory:/pods/a\n1:name=systemd:/x\n0::/x\n", mounts);
    tree.put("sys/fs/cgroup/unified/x/cgroup.procs", "");
    let top = "sys/fs/cgroup/memory";
    tree.group1(top, 9_223_372_036_854_771_712, 77);
    tree.group1(&format!("{top}/pods"), 1000, 900);
    tree.group1(&format!("{top}/pods/a"), 500, 100);
    let limit = |group: &str| format!("{top}/{group}/memory.limit_in_bytes");
    let expected = [
        of(&limit("pods/a"), 500, 400),
        of(&limit("pods"), 1000, 100),
    ];
    assert_eq!(tree.groups(), expected);
    // A parent that counts nothing of its children limits nothing of theirs.
    tree.put(&format!("{top}/pods/memory.use_hierarchy"), "0\n");
    assert_eq!(tree.groups(), expected[..1]);
    // The memory controller may be the second version's as well.
    tree.group2("sys/fs/cgroup/unified/x", "90\n", "max\n", 80);
    assert_eq!(tree.groups().len(), 2);
}

/// The hierarchy was mounted before the namespace was made: its root is above ours.
#[test]
fn mounted_from_above_the_namespace() {
    let mounts = "30 23 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("0::/inner\n", mounts);
    let ours = std::process::id();
    for (dir, pid) in [("pods/x/inner", 1), ("pods/y/inner", ours), ("q/r", 2)] {
        let dir = format!("sys/fs/cgroup/{dir}");
        tree.put(&format!("{dir}/cgroup.procs"), &format!("{pid}\n"));
    }
    tree.group2("sys/fs/cgroup/pods", "1000\n", "max\n", 400);
    tree.group2("sys/fs/cgroup/pods/x/inner", "1\n", "max\n", 1);
    tree.group2("sys/fs/cgroup/pods/y/inner", "100\n", "max\n", 40);
    let expected = [
        of("sys/fs/cgroup/pods/y/inner/memory.max", 100, 60),
        of("sys/fs/cgroup/pods/memory.max", 1000, 600),
    ];
    assert_eq!(tree.groups(), expected);
}

/// Of several mounts the one that shows most, and none that shows others' groups.
#[test]
fn several_mounts() {
    let mounts = "30 23 0:26 /a/b /mnt/part\\040one rw - cgroup2 cgroup2 rw\n\
                  31 23 0:26 / /mnt/all rw - cgroup2 cgroup2 rw\n\
                  32 23 0:26 /../other /mnt/other rw - cgroup2 cgroup2 rw\n\
                  33 23 0:26 / /mnt/not-there rw - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("0::/a/b\n", mounts);
    tree.group2("mnt/part one", "5\n", "max\n", 1);
    let only = [of("mnt/part one/memory.max", 5, 4)];
    assert_eq!(tree.groups(), only);
    tree.group2("mnt/all/a", "9\n", "max\n", 1);
    tree.group2("mnt/all/a/b", "5\n", "max\n", 1);
    let both = [
        of("mnt/all/a/b/memory.max", 5, 4),
        of("mnt/all/a/memory.max", 9, 8),
    ];
    assert_eq!(tree.groups(), both);
}

/// What the kernel can reclaim is not in the way; what it cannot, is.
#[test]
fn clean_pages_of_files_are_no_obstacle() {
    let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n\
                  35 31 0:32 / /v1 rw - cgroup cgroup rw,memory\n";
    let tree = Tree::new("4:memory:/x\n0::/x\n", mounts);
    tree.group2("sys/fs/cgroup/x", "1000\n", "max\n", 990);
    tree.put(
        "sys/fs/cgroup/x/memory.stat",
        "anon 1\nfile 700\ninactive_file 300\nactive_file 200\nfile_dirty 50\nfile_writeback 30\nshmem 200\nslab_reclaimable 40\n",
    );
    tree.group1("v1/x", 1000, 990);
    tree.put(
        "v1/x/memory.stat",
        "inactive_file 9\ntotal_inactive_file 30\ntotal_active_file 20\ntotal_dirty 6\ntotal_writeback 4\n",
    );
    let expected = [
        of("v1/x/memory.limit_in_bytes", 1000, 50),
        of("sys/fs/cgroup/x/memory.max", 1000, 450),
    ];
    assert_eq!(tree.groups(), expected);
    // Where there is plenty there is no question.
    let bounds = tree.memory().bounds(5);
    assert_eq!(bounds[1].left, 10);
}

#[test]
fn a_usage_that_cannot_be_read() {
    let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
    let tree = Tree::new("0::/\n", mounts);
    tree.put("sys/fs/cgroup/memory.max", "1000\n");
    assert_eq!(tree.groups(), [of("sys/fs/cgroup/memory.max", 1000, 0)]);
}

/// Of the machine that runs the tests.
#[test]
fn this_machine() {
    let bounds = HostMemory::default().bounds(1 << 30);
    assert!(bounds.iter().any(|bound| bound.of == Bounded::Host));
    assert!(bounds.iter().all(|bound| bound.left <= bound.limit));
}
