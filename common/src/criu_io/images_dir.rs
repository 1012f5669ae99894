//! CRIU's images directory: which of its files are images, opened without following anything
//! that another user planted there. The directory comes as a descriptor, so that no path is
//! walked.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Dir, FileType, Mode, OFlags};

use crate::criu_io::left_over::{self, Listing, PagesAre};
use crate::image::ImageName;

/// The image files of a directory, the inventory last, as CRIU writes them: it seals the set.
/// Sockets, logs, links and subdirectories are left alone.
pub fn images(dir: impl AsFd) -> io::Result<Vec<ImageName>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let regular = matches!(entry.file_type(), FileType::RegularFile | FileType::Unknown);
        let name = entry
            .file_name()
            .to_str()
            .ok()
            .and_then(|n| ImageName::new(n).ok());
        names.extend(name.filter(|n| regular && is_image(n.as_str())));
    }
    names.sort_by_key(|n| (n.is_inventory(), n.as_str().to_owned()));
    Ok(names)
}

/// The image files of a directory that is a dump's, and those that an earlier dump left in it.
pub fn of_dump(dir: &OwnedFd, pages: PagesAre) -> io::Result<Listing> {
    let read = |name: &str, max: usize| {
        let file = open(dir, &ImageName::new(name).ok()?).ok()??;
        let mut bytes = Vec::new();
        file.take(max as u64).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    Ok(left_over::sort(images(dir)?, pages, read))
}

/// Opens an image; `None` if it is no regular file any more.
pub fn open(dir: &OwnedFd, name: &ImageName) -> io::Result<Option<File>> {
    // O_NOFOLLOW and O_NONBLOCK: a link or a FIFO that is put there now is not opened, or does
    // not hang us, and the check below is of what was opened.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(dir, name.as_str(), flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode);
    Ok((kind == FileType::RegularFile).then(|| File::from(fd)))
}

/// `*.img` and the archives of tmpfs contents; not logs, statistics or pid files.
fn is_image(name: &str) -> bool {
    name.ends_with(".img") || (name.starts_with("tmpfs-") && name.ends_with(".tar.gz"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_image_files_and_the_inventory_last() {
        let temp = tempfile::tempdir().unwrap();
        let names = [
            "inventory.img",
            "core-1.img",
            "tmpfs-2.tar.gz",
            "dump.log",
            "stats-dump",
        ];
        for name in names {
            std::fs::write(temp.path().join(name), name).unwrap();
        }
        symlink("core-1.img", temp.path().join("planted.img")).unwrap();
        std::fs::create_dir(temp.path().join("dir.img")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(temp.path().join("x.img")).unwrap();
        let dir = OwnedFd::from(File::open(temp.path()).unwrap());
        let found = images(&dir).unwrap();
        let texts: Vec<&str> = found.iter().map(ImageName::as_str).collect();
        assert_eq!(texts, ["core-1.img", "tmpfs-2.tar.gz", "inventory.img"]);
        assert!(open(&dir, &found[0]).unwrap().is_some());
        let named = |name: &str| ImageName::new(name).unwrap();
        assert!(open(&dir, &named("planted.img")).is_err(), "a link");
        assert!(open(&dir, &named("dir.img")).unwrap().is_none());
    }
}
