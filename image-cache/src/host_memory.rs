//! How much memory this host can still give.

use std::fs;
use std::path::{Path, PathBuf};

/// A part of all memory that stays free: what is made ready on a guess must not drive anybody out.
const SPARE_PART: u64 = 16;

/// Bytes that can be made resident without harm to others: less than what is available on the host
/// (`/proc/meminfo`), and no more than our control groups have left. 0 if the kernel does not tell.
pub fn room() -> u64 {
    let host = fs::read_to_string("/proc/meminfo").map_or(0, |info| of_meminfo(&info));
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let groups = group_path(&groups).map_or(u64::MAX, |path| of_groups(&path, Path::new(GROUPS)));
    host.min(groups)
}

const GROUPS: &str = "/sys/fs/cgroup";

fn of_meminfo(info: &str) -> u64 {
    let kib = |field: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let (total, available) = (kib("MemTotal:"), kib("MemAvailable:"));
    let spare = total.unwrap_or(u64::MAX) / SPARE_PART;
    available.unwrap_or(0).saturating_sub(spare) * 1024
}

/// Our group in the unified hierarchy: `0::/PATH`.
fn group_path(groups: &str) -> Option<PathBuf> {
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(GROUPS).join(path))
}

/// What the group and those that it is in have left below `memory.max`.
fn of_groups(group: &Path, top: &Path) -> u64 {
    let number = |group: &Path, file: &str| -> Option<u64> {
        let text = fs::read_to_string(group.join(file)).ok()?;
        text.trim().parse().ok() // no number: "max"
    };
    let within = group.ancestors().take_while(|group| group.starts_with(top));
    let left = within.filter_map(|group| {
        let max = number(group, "memory.max")?;
        Some(max.saturating_sub(number(group, "memory.current")?))
    });
    left.min().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_has() {
        let info = "MemTotal:       1600 kB\nMemFree:  7 kB\nMemAvailable:    900 kB\n";
        assert_eq!(of_meminfo(info), 800 * 1024);
        assert_eq!(of_meminfo("MemTotal: 1600 kB\nMemAvailable: 99 kB\n"), 0);
        assert_eq!(of_meminfo(""), 0);
        assert!(room() > 0);
    }

    #[test]
    fn what_our_groups_have() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        assert_eq!(of_groups(&inner, dir.path()), u64::MAX);
        let write = |group: &str, max: &str, current: &str| {
            let group = dir.path().join(group);
            fs::write(group.join("memory.max"), max).unwrap();
            fs::write(group.join("memory.current"), current).unwrap();
        };
        write("a/b", "max\n", "5\n");
        write("a", "1000\n", "400\n");
        assert_eq!(of_groups(&inner, dir.path()), 600);
        write("a/b", "100\n", "300\n");
        assert_eq!(of_groups(&inner, dir.path()), 0);
    }

    #[test]
    fn which_groups_those_are() {
        let groups = "1:name=systemd:/x\n0::/user.slice/a.service\n";
        let expected = Path::new("/sys/fs/cgroup/user.slice/a.service");
        assert_eq!(group_path(groups).as_deref(), Some(expected));
        assert_eq!(group_path("4:memory:/x\n"), None);
    }
}
