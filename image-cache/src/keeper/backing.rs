//! The file that the memory of images is in, with huge pages where that can be had.
//!
//! What the kernel gives a memfd is said by `/sys/kernel/mm/transparent_hugepage/shmem_enabled`, whose default is `never`:
//! then each page of 4 KiB is one of its own, which costs half a second per GiB. A tmpfs has an option of its own for that. So a
//! tmpfs is made with `huge=advise`, attached to no directory, and an unnamed file in it. That takes
//! CAP_SYS_ADMIN, or else a user namespace, which a child process enters.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::thread::UnshareFlags;

use crate::keeper::fds;
use crate::store::memory::arena::{has_huge_pages, Arena};

/// Its hidden subcommand.
pub const COMMAND: &str = "arena-file";

const MADE: u8 = b'a';

/// For a process start and a few system calls.
const WITHIN: Duration = Duration::from_secs(5);

const SYSFS: &str = "/sys/kernel/mm/transparent_hugepage";

/// Why there are no huge pages.
#[derive(Debug, thiserror::Error)]
pub enum SmallPages {
    #[error("this kernel has no huge pages of 2 MiB")]
    Size,
    #[error("{SYSFS}/shmem_enabled denies them")]
    Denied,
    #[error("{SYSFS}/shmem_enabled is `never`, and no tmpfs can be made here ({as_root}; in a user namespace: {as_user})")]
    Never {
        as_root: io::Error,
        as_user: io::Error,
    },
}

/// An empty file in memory whose regions have huge pages.
pub fn with_huge_pages() -> Result<File, SmallPages> {
    let word = |file: &str| -> Option<String> {
        let text = std::fs::read_to_string(format!("{SYSFS}/{file}")).ok()?;
        let (_, rest) = text.split_once('[')?;
        Some(rest.split_once(']')?.0.to_owned())
    };
    if !has_huge_pages() {
        return Err(SmallPages::Size);
    }
    let all = word("shmem_enabled").unwrap_or_default();
    let of_size = word("hugepages-2048kB/shmem_enabled").unwrap_or("inherit".to_owned());
    let given = ["always", "within_size", "advise", "force"];
    match (all.as_str(), of_size.as_str()) {
        ("deny", _) | (_, "never") => return Err(SmallPages::Denied),
        (all, "inherit") if !given.contains(&all) => {}
        _ => {
            if let Ok(file) = Arena::memfd() {
                return Ok(file);
            }
        }
    }
    in_tmpfs().or_else(|as_root| {
        in_user_namespace().map_err(|as_user| SmallPages::Never { as_root, as_user })
    })
}

/// A file that no directory has, in a tmpfs that no path leads to. Both go with the last descriptor and mapping.
fn in_tmpfs() -> io::Result<File> {
    let tmpfs = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // 0: as much as the images may take. Else it is half of the host's memory.
    for (option, value) in [("huge", "advise"), ("size", "0"), ("mode", "0700")] {
        rustix::mount::fsconfig_set_string(&tmpfs, option, value)?;
    }
    rustix::mount::fsconfig_create(&tmpfs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root = rustix::mount::fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&root, ".", flags, Mode::RUSR | Mode::WUSR)?;
    Ok(file.into())
}

fn in_user_namespace() -> io::Result<File> {
    let (ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(WITHIN))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("image-cache")
        .arg(COMMAND)
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let received = fds::receive(&ours, true);
    if received.is_err() {
        let _ = child.kill();
    }
    let output = child.wait_with_output()?;
    match received? {
        Some((MADE, fds)) if fds.len() == 1 => {
            let file = fds.into_iter().next().map(File::from);
            file.ok_or_else(|| io::ErrorKind::InvalidData.into())
        }
        _ => {
            let why = String::from_utf8_lossy(&output.stderr);
            Err(io::Error::other(why.trim().to_owned()))
        }
    }
}

/// What [`COMMAND`] does: makes the file in a user namespace of its own, and hands it over on its standard input.
pub fn make_in_user_namespace() -> io::Result<u8> {
    let made = (|| {
        let (user, group) = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        // SAFETY: this process has one thread, and relies on no namespace that it leaves.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }?;
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{user} {user} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("{group} {group} 1"))?;
        in_tmpfs()
    })();
    match made {
        Ok(file) => {
            fds::send(rustix::stdio::stdin(), MADE, &[file.as_fd()])?;
            Ok(0)
        }
        Err(e) => {
            let _ = write!(io::stderr(), "{e}");
            Ok(1)
        }
    }
}
