//! How much memory a tree of processes has, before it is dumped.

use std::collections::HashSet;
use std::fs;

/// More tasks than a dump has; a bound for what is looked at.
pub(crate) const MAX_TASKS: usize = 1 << 16;

/// About how many bytes of pages a dump of the task `root` and its descendants brings. CRIU dumps
/// what each has of anonymous memory, also if it is swapped out, and shared memory once: of that
/// what the one has that has most. What is only in files is not dumped. `None`: the task cannot be seen.
pub fn bytes_to_dump(root: i32) -> Option<u64> {
    let mut total = Memory::of(&fs::read_to_string(format!("/proc/{root}/status")).ok()?);
    let (mut seen, mut left) = (HashSet::from([root]), children(root));
    while let Some(pid) = left.pop() {
        if seen.len() >= MAX_TASKS || !seen.insert(pid) {
            continue;
        }
        // One that is gone has nothing.
        if let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) {
            let memory = Memory::of(&status);
            total.own = total.own.saturating_add(memory.own);
            total.shared = total.shared.max(memory.shared);
            left.extend(children(pid));
        }
    }
    Some(total.own.saturating_add(total.shared))
}

/// Of one process, in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Memory {
    own: u64,
    shared: u64,
}

impl Memory {
    /// From `/proc/PID/status`. A process without memory has no such lines.
    fn of(status: &str) -> Self {
        let mut memory = Self::default();
        for line in status.lines() {
            let Some((field, value)) = line.split_once(':') else {
                continue;
            };
            let kib = || {
                let number = value
                    .trim()
                    .strip_suffix("kB")?
                    .trim()
                    .parse::<u64>()
                    .ok()?;
                number.checked_mul(1024)
            };
            match field {
                "RssAnon" | "VmSwap" => {
                    memory.own = memory.own.saturating_add(kib().unwrap_or(0));
                }
                "RssShmem" => memory.shared = kib().unwrap_or(0),
                _ => {}
            }
        }
        memory
    }
}

/// Of all threads: any of them may have made one.
pub(crate) fn children(pid: i32) -> Vec<i32> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.ok()?.path().join("children")).ok());
    let mut children = Vec::new();
    for list in lists {
        children.extend(
            list.split_ascii_whitespace()
                .filter_map(|pid| pid.parse::<i32>().ok()),
        );
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    #[test]
    fn what_a_process_has() {
        let status = "Name:\tx\nVmRSS:\t  900 kB\nRssAnon:\t     100 kB\nRssFile:\t  7 kB\n\
                      RssShmem:\t      30 kB\nVmSwap:\t       5 kB\n";
        let expected = Memory {
            own: 105 * 1024,
            shared: 30 * 1024,
        };
        assert_eq!(Memory::of(status), expected);
        assert_eq!(
            Memory::of("Name:\tx: kB\nState:\tZ (zombie)\n"),
            Memory::default()
        );
        assert_eq!(bytes_to_dump(-1), None);
    }

    #[test]
    fn a_tree_is_more_than_its_root() {
        let script = "sleep 60 & echo $!; wait";
        let mut root = Command::new("sh")
            .args(["-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = root.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        let child: i32 = line.trim().parse().unwrap();
        let pid = i32::try_from(root.id()).unwrap();
        assert_eq!(children(pid), [child]);
        let (tree, alone) = (bytes_to_dump(pid), bytes_to_dump(child));
        assert!(alone > Some(0) && tree > alone, "{tree:?} {alone:?}");
        for pid in [child, pid] {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        root.wait().unwrap();
    }
}
