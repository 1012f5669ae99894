//! How much memory this process may still take: what the host has available, and what the memory
//! control groups leave.
//!
//! A control group that is full gets its processes killed, also where the host has plenty. Its files
//! are found as the kernel names them to this process: `/proc/self/cgroup` has the group's path in each
//! hierarchy, `/proc/self/mountinfo` where a hierarchy is mounted and from which group on. Both versions
//! count, and both at once where a host mounts them so. Groups above the ones that are mounted (outside of
//! a container) cannot be seen.
//!
//! Nothing but the paths is remembered, and these only as long as the process stays in its groups: limits
//! may change at any time.

use std::fmt;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// No host has so much: version 1 says "no limit" by such a number.
const NO_LIMIT: u64 = 1 << 62;

/// Directories that are looked through for a group whose name is not known.
const MOST_DIRECTORIES: usize = 10_000;

/// What bounds the memory of this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bounded {
    Host,
    /// The file of a control group that has the limit.
    Group(PathBuf),
}

impl fmt::Display for Bounded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => write!(f, "the memory of this host"),
            Self::Group(file) => {
                let group = file.parent().unwrap_or(Path::new("")).display();
                let file = file.file_name().unwrap_or_default().to_string_lossy();
                write!(f, "{file} of the control group {group}")
            }
        }
    }
}

/// A limit, and how much can still be taken before it is reached: what the kernel can reclaim without
/// swapping is not counted as taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bound {
    pub of: Bounded,
    pub limit: u64,
    pub left: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A group that this process is in, or that one of its groups is in.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    version: Version,
    dir: PathBuf,
}

#[derive(Debug, Default)]
struct Known {
    /// What `/proc/self/cgroup` said then.
    membership: String,
    groups: Vec<Group>,
}

/// The host and the control groups of this process.
#[derive(Debug)]
pub struct HostMemory {
    root: PathBuf,
    known: Mutex<Known>,
}

impl Default for HostMemory {
    fn default() -> Self {
        Self::below("/")
    }
}

impl HostMemory {
    /// Of the file system below `root`, where a test has made `proc` and `sys`.
    pub fn below(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            known: Mutex::default(),
        }
    }

    /// All bounds as they are now. What can be reclaimed in a group is only looked at where less than
    /// `plenty` is left without it, as that is the dearest of these files.
    pub fn bounds(&self, plenty: u64) -> Vec<Bound> {
        let mut bounds = Vec::new();
        bounds.extend(self.of_host());
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let membership = self.read("proc/self/cgroup").unwrap_or_default();
        // A group that was removed has no files any more, and its hierarchy may be mounted elsewhere.
        let gone = |group: &Group| !group.dir.is_dir();
        if membership != known.membership || known.groups.first().is_some_and(gone) {
            known.groups = self.find_groups(&membership);
            known.membership = membership;
        }
        for group in &known.groups {
            group.bounds(plenty, &mut bounds);
        }
        bounds
    }

    /// The anonymous memory that this process has, swapped out or not.
    pub fn own_anonymous(&self) -> Option<u64> {
        let status = self.read("proc/self/status")?;
        let swapped = kib(&status, "VmSwap:").unwrap_or(0);
        kib(&status, "RssAnon:")?.checked_add(swapped)
    }

    fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    fn of_host(&self) -> Option<Bound> {
        let info = self.read("proc/meminfo")?;
        Some(Bound {
            of: Bounded::Host,
            limit: kib(&info, "MemTotal:")?,
            left: kib(&info, "MemAvailable:")?,
        })
    }

    /// The groups of both versions, each followed by those that it is in.
    fn find_groups(&self, membership: &str) -> Vec<Group> {
        let mounts = self.read("proc/self/mountinfo").unwrap_or_default();
        let mounts: Vec<Mount> = mounts.lines().filter_map(Mount::parse).collect();
        let mut groups = Vec::new();
        for line in membership.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(controllers), Some(path)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let version = match controllers {
                "" => Version::Two,
                some if some.split(',').any(|name| name == "memory") => Version::One,
                _ => continue,
            };
            let of_version = mounts.iter().filter(|mount| mount.version == version);
            let seen = of_version.filter_map(|mount| {
                let top = self.inside(&mount.point);
                let dir = mount.find(&top, Path::new(path))?;
                Some((dir.components().count() - top.components().count(), dir))
            });
            // The one from which most groups above this one can be seen.
            let Some((above, dir)) = seen.max_by_key(|(above, _)| *above) else {
                continue;
            };
            for (n, dir) in dir.ancestors().take(above + 1).enumerate() {
                // Before Linux 5.11 a group may count nothing of those below it.
                let counts = |dir: &Path| number(dir, "memory.use_hierarchy") != Some(0);
                if n > 0 && version == Version::One && !counts(dir) {
                    break;
                }
                let dir = dir.to_owned();
                groups.push(Group { version, dir });
            }
        }
        groups
    }

    fn inside(&self, absolute: &Path) -> PathBuf {
        self.root
            .join(absolute.strip_prefix("/").unwrap_or(absolute))
    }
}

impl Group {
    fn bounds(&self, plenty: u64, bounds: &mut Vec<Bound>) {
        let limits: &[(&str, &str)] = match self.version {
            // `memory.high` kills nothing. It slows the daemon down until it stands still, and a dump
            // with it.
            Version::Two => &[
                ("memory.max", "memory.current"),
                ("memory.high", "memory.current"),
            ],
            Version::One => &[
                ("memory.limit_in_bytes", "memory.usage_in_bytes"),
                ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
            ],
        };
        let mut reclaimable = None;
        for (limit, usage) in limits {
            // No number: "max".
            let Some(max) = number(&self.dir, limit).filter(|&max| max < NO_LIMIT) else {
                continue;
            };
            // A limit whose usage cannot be read is believed to be reached: that refuses, no more.
            let used = number(&self.dir, usage).unwrap_or(u64::MAX);
            let mut left = max.saturating_sub(used);
            if left < plenty && used < NO_LIMIT {
                let more = *reclaimable.get_or_insert_with(|| self.reclaimable());
                left = max.saturating_sub(used.saturating_sub(more));
            }
            bounds.push(Bound {
                of: Bounded::Group(self.dir.join(limit)),
                limit: max,
                left,
            });
        }
    }

    /// What the kernel gives back before it kills: clean pages of files, and, as in MemAvailable, half
    /// of the caches that it can shrink. Memory of tmpfs is not among them.
    fn reclaimable(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let prefix = match self.version {
            Version::One => "total_",
            Version::Two => "",
        };
        let value = |name: &str| {
            let mut lines = text.lines().filter_map(|line| line.split_once(' '));
            let line = lines.find(|(key, _)| key.strip_prefix(prefix) == Some(name));
            line.and_then(|(_, value)| value.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        let dirty = match self.version {
            Version::One => value("dirty").saturating_add(value("writeback")),
            Version::Two => value("file_dirty").saturating_add(value("file_writeback")),
        };
        let files = value("inactive_file").saturating_add(value("active_file"));
        files
            .saturating_sub(dirty)
            .saturating_add(value("slab_reclaimable") / 2)
    }
}

/// The bytes of a line `FIELD 12 kB`.
fn kib(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let kib = line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    kib.checked_mul(1024)
}

fn number(dir: &Path, file: &str) -> Option<u64> {
    let text = fs::read_to_string(dir.join(file)).ok()?;
    text.trim().parse().ok()
}

/// A hierarchy that has the memory controller, as far as it is mounted.
#[derive(Debug)]
struct Mount {
    version: Version,
    /// The group that is mounted, as this process's cgroup namespace names it.
    from: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// A line of mountinfo: `ID PARENT DEVICE FROM POINT OPTIONS [TAGS] - TYPE SOURCE OPTIONS`.
    fn parse(line: &str) -> Option<Self> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (from, point) = (mount.next()?, mount.next()?);
        let mut kind = kind.split(' ');
        let version = match kind.next()? {
            "cgroup2" => Version::Two,
            "cgroup" => {
                let options = kind.nth(1)?;
                let memory = options.split(',').any(|option| option == "memory");
                memory.then_some(Version::One)?
            }
            _ => return None,
        };
        Some(Self {
            version,
            from: unescape(from).into(),
            point: unescape(point).into(),
        })
    }

    /// The directory of the group `path` below `top`, where this is mounted. `None` if it is not in what
    /// is mounted.
    fn find(&self, top: &Path, path: &Path) -> Option<PathBuf> {
        let ((from_up, from), (path_up, path)) = (place(&self.from), place(path));
        if from_up == path_up {
            let below = path.strip_prefix(&from).ok()?;
            // Joining nothing would add a slash.
            let dir = match below.as_os_str().is_empty() {
                true => top.to_owned(),
                false => top.join(below),
            };
            return dir.is_dir().then_some(dir);
        }
        // Mounted from a group above the root of the namespace: the names between are not told.
        let between = from_up.checked_sub(path_up)?;
        if !from.as_os_str().is_empty() {
            return None;
        }
        let mut left = MOST_DIRECTORIES;
        with_this_process(top, between, &path, &mut left)
    }
}

/// How many levels above the root of the cgroup namespace a path begins, and the rest.
fn place(path: &Path) -> (usize, PathBuf) {
    let up = |c: &Component<'_>| matches!(c, Component::ParentDir);
    let names = |c: &Component<'_>| matches!(c, Component::Normal(_));
    let ups = path.components().filter(up).count();
    (ups, path.components().filter(names).collect())
}

/// The group `path` below one of the directories `depth` levels below `dir` in which this process is.
fn with_this_process(dir: &Path, depth: usize, path: &Path, left: &mut usize) -> Option<PathBuf> {
    if depth == 0 {
        let group = dir.join(path);
        let members = fs::read_to_string(group.join("cgroup.procs")).ok()?;
        let ours = std::process::id().to_string();
        return members.lines().any(|pid| pid == ours).then_some(group);
    }
    let inner = fs::read_dir(dir).ok()?.flatten();
    for entry in inner.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        *left = left.checked_sub(1)?;
        let found = with_this_process(&entry.path(), depth - 1, path, left);
        if found.is_some() {
            return found;
        }
    }
    None
}

/// mountinfo writes spaces and the like as `\040`.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|n| u8::from_str_radix(n, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                out.push(char::from(code));
                out.push_str(&part[3..]);
            }
            _ => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests;
