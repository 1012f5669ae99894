//! The rounds before a dump, by the links `parent` of CRIU's images directories.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{fstat, openat, Mode, OFlags};

use crate::criu::inventory::is_of_read_mode;
use crate::criu_io::images_dir;
use crate::image::ImageName;

/// More than a series ever has.
const MAX_ROUNDS: usize = 4096;

/// An inventory has some hundred bytes.
const MAX_INVENTORY_BYTES: u64 = 64 << 10;

/// A round that CRIU sent with wrong pages, if it went to a page server.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an earlier round of this dump ({}) was made with --pre-dump-mode read. CRIU sends wrong pages to a page \
     server in that mode, so this dump must not build on them. Begin again, without that option and without \
     --prev-images-dir",
    dir.display()
)]
pub struct ReadModeRound {
    dir: PathBuf,
}

/// Looks for such a round before the dump or pre-dump whose images directory this is. To be called
/// by a process that has CRIU's root directory and rights. Blocking.
///
/// # Errors
/// If there is one. A round whose inventory cannot be read counts as none.
pub fn check(dir: impl AsFd) -> Result<(), ReadModeRound> {
    let mut seen = HashSet::new();
    let mut round = parent(dir);
    for _ in 0..MAX_ROUNDS {
        let Ok(at) = round else { break };
        let is_new = fstat(&at).is_ok_and(|found| seen.insert((found.st_dev, found.st_ino)));
        if !is_new {
            break;
        }
        if inventory(&at).is_ok_and(|image| is_of_read_mode(&image)) {
            let dir = std::fs::read_link(format!("/proc/self/fd/{}", at.as_raw_fd()));
            let dir = dir.unwrap_or_else(|_| "parent".into());
            return Err(ReadModeRound { dir });
        }
        round = parent(&at);
    }
    Ok(())
}

fn parent(dir: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(dir, "parent", flags, Mode::empty())?)
}

fn inventory(dir: &OwnedFd) -> io::Result<Vec<u8>> {
    let name = ImageName::new("inventory.img").map_err(io::Error::other)?;
    let file: File =
        images_dir::open(dir, &name)?.ok_or_else(|| io::Error::other("it is no regular file"))?;
    let mut image = Vec::new();
    file.take(MAX_INVENTORY_BYTES).read_to_end(&mut image)?;
    Ok(image)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    const SPLICE: &[u8] = b"\x16\x31\x31\x58\x0b\0\0\0\x08\0\x40\xc0\xd4\xb4\x08\x48\x01\x62\0";
    const READ: &[u8] = b"\x16\x31\x31\x58\x0b\0\0\0\x08\0\x40\xc0\xd4\xb4\x08\x48\x02\x62\0";

    fn round(at: &Path, name: &str, parent: Option<&str>, inventory: &[u8]) {
        let dir = at.join(name);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("inventory.img"), inventory).unwrap();
        if let Some(parent) = parent {
            symlink(parent, dir.join("parent")).unwrap();
        }
    }

    #[test]
    fn a_round_in_read_mode_is_found_at_any_depth() {
        let temp = tempfile::tempdir().unwrap();
        let at = fs::canonicalize(temp.path()).unwrap();
        let absolute = at.join("2");
        round(&at, "1", None, READ);
        round(&at, "2", Some("../1"), SPLICE);
        round(&at, "3", absolute.to_str(), SPLICE);
        round(&at, "4", None, SPLICE);
        round(&at, "5", Some("../4"), READ);
        let check = |name: &str| check(File::open(at.join(name)).unwrap());
        let first = || Err(ReadModeRound { dir: at.join("1") });
        assert_eq!(check("2"), first());
        assert_eq!(check("3"), first());
        // A dump has the option in vain, and what it says of itself is no matter here.
        for good in ["1", "4", "5"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
    }

    #[test]
    fn what_is_no_chain_ends() {
        let temp = tempfile::tempdir().unwrap();
        let at = temp.path();
        round(at, "self", Some("../self"), SPLICE);
        round(at, "a", Some("../b"), b"");
        round(at, "b", Some("../a"), SPLICE);
        round(at, "gone", Some("../nowhere"), SPLICE);
        fs::create_dir(at.join("fifo")).unwrap();
        let fifo = at.join("fifo/inventory.img");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        round(at, "waits", Some("../fifo"), SPLICE);
        for name in ["self", "a", "gone", "waits"] {
            assert_eq!(check(File::open(at.join(name)).unwrap()), Ok(()), "{name}");
        }
    }
}
