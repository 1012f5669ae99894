//! Which rounds of the page server belong together.
//!
//! A connection to the page server carries nothing but pagemap ids: pids as the dumped tasks
//! see them, of which every container has a 1. So two CRIUs can send the same ids at the same
//! addresses, and a round that joined the wrong series would be told of a parent, leave out
//! what it takes for unchanged, and become a mix of two processes' memory.
//!
//! What belongs together is what CRIU itself takes for its chain: the images directories. The
//! process behind a connection is found by its addresses, and that CRIU has its images
//! directory open, with the link `parent` to the one of the round before. A round continues
//! the series whose last round was in that directory, or begins a new one, in which it is told
//! of no parent and is full: that is always right.

use std::net::IpAddr;
use std::os::fd::OwnedFd;

use image_common::procfs::open_dirs::{ImagesDir, OpenDirs};
use image_common::procfs::tcp_peer::can_be_found;

/// What tells the rounds of one series from those of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lineage {
    /// The images directory of its last round.
    Images(ImagesDir),
    /// CRIU can be seen, and which of several directories is that of its images cannot. Its
    /// round belongs to no other.
    Unclear,
    /// Nothing but an address, if that: CRIU is in another network or pid namespace, or on
    /// another host, or has no directory open. Rounds from there are taken for one series.
    Unseen(Option<IpAddr>),
}

impl Lineage {
    /// Of the CRIU whose script announces a dump: its pid if the kernel told it, and its
    /// images directory if the script handed that over.
    pub async fn of_script(pid: Option<i32>, dir: Option<OwnedFd>) -> Self {
        let look = move || {
            // If its connections cannot be found, its earlier rounds are none of a directory.
            let pid = pid.filter(|&pid| can_be_found(pid))?;
            let dirs = match dir {
                Some(dir) => ImagesDir::of(&dir, pid).map_or(OpenDirs::None, OpenDirs::One),
                None => OpenDirs::of_process(pid),
            };
            Some(match dirs {
                OpenDirs::One(dir) => Self::Images(dir),
                OpenDirs::Several | OpenDirs::None => Self::Unclear,
            })
        };
        let seen = tokio::task::spawn_blocking(look).await.ok().flatten();
        seen.unwrap_or(Self::Unseen(None))
    }

    /// Whether a round from here continues a series whose last round was from `last`.
    pub fn continues(&self, last: &Self) -> bool {
        match (self, last) {
            (Self::Images(dir), Self::Images(last)) => dir.parent == Some(last.id),
            (Self::Unseen(None), Self::Unseen(_)) => true,
            (Self::Unseen(address), Self::Unseen(last)) => last.is_none() || address == last,
            _ => false,
        }
    }

    /// Whether a round from here overwrites the images of `last`, which then is no parent.
    pub fn overwrites(&self, last: &Self) -> bool {
        matches!((self, last), (Self::Images(dir), Self::Images(last)) if dir.id == last.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_directory_of_the_last_round_is_the_parent() {
        let temp = tempfile::tempdir().unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let dir = |name: &str, parent: Option<&str>| {
            let path = temp.path().join(name);
            std::fs::create_dir(&path).unwrap();
            if let Some(parent) = parent {
                symlink(parent, path.join("parent")).unwrap();
            }
            let opened = std::fs::File::open(&path).unwrap().into();
            Lineage::Images(ImagesDir::of(&opened, me).unwrap())
        };
        let first = dir("1", None);
        let second = dir("2", Some("../1"));
        let other = dir("3", None);
        assert!(second.continues(&first) && !first.continues(&second));
        assert!(!second.continues(&other) && !other.continues(&first));
        assert!(first.overwrites(&first) && !second.overwrites(&first));
        for unknown in [Lineage::Unclear, Lineage::Unseen(None)] {
            assert!(!second.continues(&unknown) && !unknown.continues(&first));
            assert!(!unknown.overwrites(&unknown));
        }
        assert!(!Lineage::Unclear.continues(&Lineage::Unclear));
    }

    #[test]
    fn what_cannot_be_seen_is_known_by_its_address() {
        let from = |text: &str| Lineage::Unseen(Some(text.parse().unwrap()));
        assert!(from("10.0.0.1").continues(&from("10.0.0.1")));
        assert!(!from("10.0.0.1").continues(&from("10.0.0.2")));
        // The script does not know from where its CRIU will connect.
        assert!(from("10.0.0.1").continues(&Lineage::Unseen(None)));
        assert!(Lineage::Unseen(None).continues(&from("10.0.0.1")));
    }
}
