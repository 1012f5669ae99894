//! CRIU's images directory, which is what a round of pre-dump or dump can be known by.
//!
//! CRIU opens it first of all (`open_image_dir` in `criu/image.c`), has it open until its end,
//! and with `--prev-images-dir` makes a link `parent` in it before it connects to anything.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    open, openat, openat2, readlinkat, statx, AtFlags, FileType, Mode, OFlags, ResolveFlags,
    StatxFlags, CWD,
};

/// CRIU's name of the link to the round before (`CR_PARENT_LINK`).
const PARENT: &str = "parent";

/// A directory, whatever its paths are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirId {
    device: (u32, u32),
    inode: u64,
    /// Inode numbers are used again. `None`: the file system has no times of birth; those
    /// that have none (tmpfs of older kernels) count their inodes up.
    born: Option<(i64, u32)>,
}

impl DirId {
    fn of(at: impl AsFd, path: impl rustix::path::Arg, flags: AtFlags) -> io::Result<Self> {
        let mask = StatxFlags::TYPE | StatxFlags::INO | StatxFlags::BTIME;
        let found = statx(at, path, flags, mask)?;
        if FileType::from_raw_mode(found.stx_mode.into()) != FileType::Directory {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        let has_birth = found.stx_mask & StatxFlags::BTIME.bits() != 0;
        Ok(Self {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born: has_birth.then_some((found.stx_btime.tv_sec, found.stx_btime.tv_nsec)),
        })
    }

    fn at(path: &Path) -> io::Result<Self> {
        Self::of(CWD, path, AtFlags::empty())
    }

    fn of_fd(fd: impl AsFd) -> io::Result<Self> {
        Self::of(fd, c"", AtFlags::EMPTY_PATH)
    }
}

/// The images directory of one round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesDir {
    pub id: DirId,
    /// That of the round before, if this one has a parent.
    pub parent: Option<DirId>,
    /// Where it was, if that is a path here as well.
    path: Option<PathBuf>,
}

impl ImagesDir {
    /// The directory itself; `criu` has opened it.
    pub fn of(dir: &OwnedFd, criu: i32) -> io::Result<Self> {
        let id = DirId::of_fd(dir)?;
        let path = fs::read_link(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(dir)
        ));
        Ok(Self {
            id,
            parent: parent(dir, criu),
            path: path
                .ok()
                .filter(|path| DirId::at(path).is_ok_and(|there| there == id)),
        })
    }

    /// Whether it was removed or renamed: then no later round can have it as its parent under
    /// the name that it had.
    pub fn has_gone(&self) -> bool {
        let elsewhere = |path: &PathBuf| {
            DirId::at(path).map_or_else(
                |e| e.kind() == io::ErrorKind::NotFound,
                |there| there != self.id,
            )
        };
        self.path.as_ref().is_some_and(elsewhere)
    }
}

/// What can be said of the images directory of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenDirs {
    /// It has this one open, and no other that it could be.
    One(ImagesDir),
    /// There are several. To take one for the other could join what must not be joined.
    Several,
    None,
}

impl OpenDirs {
    /// Of a CRIU that is dumping. What else it has open are directories of pseudo file
    /// systems, and the root of what it dumps. Blocking.
    pub fn of_process(pid: i32) -> Self {
        let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return Self::None;
        };
        let mut dirs: Vec<(DirId, OwnedFd)> = Vec::new();
        for path in fds.flatten().map(|fd| fd.path()) {
            // Looked at before it is opened: to open a FIFO or a device does something.
            let Ok(id) = DirId::at(&path) else {
                continue;
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let Ok(dir) = open(&path, flags, Mode::empty()) else {
                continue;
            };
            let known = dirs.iter().any(|(known, _)| *known == id);
            if !known && DirId::of_fd(&dir).is_ok_and(|opened| opened == id) && !is_pseudo(&dir) {
                dirs.push((id, dir));
            }
        }
        if dirs.len() > 1 {
            let roots = roots();
            dirs.retain(|(id, _)| !roots.contains(id));
        }
        match &dirs[..] {
            [] => Self::None,
            [(_, dir)] => ImagesDir::of(dir, pid).map_or(Self::None, Self::One),
            _ => Self::Several,
        }
    }
}

/// The target of the link `parent`, as CRIU sees it.
fn parent(dir: &OwnedFd, criu: i32) -> Option<DirId> {
    let target = readlinkat(dir, PARENT, Vec::new()).ok()?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let found = if target.as_bytes().starts_with(b"/") {
        // CRIU's root need not be ours.
        let root = open(format!("/proc/{criu}/root"), flags, Mode::empty()).ok()?;
        openat2(root, target, flags, Mode::empty(), ResolveFlags::IN_ROOT)
    } else {
        openat(dir, target, flags, Mode::empty())
    };
    DirId::of_fd(found.ok()?).ok()
}

/// Whether it is of proc, sysfs, or cgroups.
fn is_pseudo(dir: &OwnedFd) -> bool {
    /// `linux/magic.h`
    const MAGICS: [u64; 4] = [0x9fa0, 0x6265_6572, 0x0027_e0eb, 0x6367_7270];
    let kind = rustix::fs::fstatfs(dir).map(|s| s.f_type);
    kind.is_ok_and(|kind| u64::try_from(kind).is_ok_and(|kind| MAGICS.contains(&kind)))
}

/// Root directories of all processes.
fn roots() -> Vec<DirId> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let is_process = |entry: &fs::DirEntry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok())
    };
    let processes = entries.filter(is_process);
    processes
        .filter_map(|entry| DirId::at(&entry.path().join("root")).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::{Child, Command, Stdio};

    /// A process that has these open.
    struct Holding(Child);

    impl Holding {
        fn new(paths: &[&Path]) -> Self {
            let opens: String = (0..paths.len())
                .map(|n| format!("exec {}<\"${}\"; ", n + 3, n + 1))
                .collect();
            let mut child = Command::new("bash")
                .args(["-c", &format!("{opens} echo; read"), "bash"])
                .args(paths)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let said = io::Read::read(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
            assert_eq!(said, 1);
            Self(child)
        }

        fn dirs(&self) -> OpenDirs {
            OpenDirs::of_process(i32::try_from(self.0.id()).unwrap())
        }
    }

    impl Drop for Holding {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    fn one(dirs: OpenDirs) -> ImagesDir {
        match dirs {
            OpenDirs::One(dir) => dir,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_one_directory_and_its_parent() {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (temp.path().join("1"), temp.path().join("2"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        fs::write(temp.path().join("file"), "").unwrap();
        let before = one(Holding::new(&[&first]).dirs());
        assert_eq!(before.parent, None);
        for target in [Path::new("../1"), &first] {
            symlink(target, second.join("parent")).unwrap();
            // Twice the same, and others that CRIU has open too.
            let holding = Holding::new(&[
                Path::new("/proc"),
                &second,
                Path::new("/"),
                &temp.path().join("file"),
                &second,
            ]);
            let after = one(holding.dirs());
            assert_eq!(after.parent, Some(before.id), "{}", target.display());
            assert_ne!(after.id, before.id);
            fs::remove_file(second.join("parent")).unwrap();
        }
        assert!(!before.has_gone());
        fs::remove_dir(&first).unwrap();
        assert!(before.has_gone());
    }

    #[test]
    fn of_several_none_is_taken() {
        let temp = tempfile::tempdir().unwrap();
        let inner = temp.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let holding = Holding::new(&[temp.path(), &inner]);
        assert_eq!(holding.dirs(), OpenDirs::Several);
        assert_eq!(Holding::new(&[Path::new("/proc")]).dirs(), OpenDirs::None);
        assert_eq!(OpenDirs::of_process(-1), OpenDirs::None);
    }

    #[test]
    fn a_parent_that_is_no_directory_is_none() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("parent");
        let parent = || one(Holding::new(&[temp.path()]).dirs()).parent;
        for target in ["nowhere", "parent", "file"] {
            fs::write(temp.path().join("file"), "").unwrap();
            symlink(target, &link).unwrap();
            assert_eq!(parent(), None, "{target}");
            fs::remove_file(&link).unwrap();
        }
        fs::create_dir(&link).unwrap();
        assert_eq!(parent(), None, "a directory of that name is no link");
    }
}
