//! Images that CRIU wrote as files: with `--page-server`, all but the pages are in its images
//! directory. At post-dump the action script hands us the directory, and every image file in
//! it is sent like one that came through a socket.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use image_common::image::ImageName;
use rustix::fs::{Dir, FileType, Mode, OFlags};

use crate::run::Run;
use crate::sender::send_image;
use crate::session::Session;
use crate::source::Source;

const O_WRONLY: u32 = 1;

/// What was sent.
#[derive(Debug, Default)]
pub struct Shipped {
    pub images: u32,
    pub pagemaps: u32,
}

/// Sends every image file of `dir`. Sockets, logs, links and subdirectories are left alone.
pub async fn ship(session: &Arc<Session>, run: &Arc<Run>, dir: &OwnedFd) -> io::Result<Shipped> {
    let mut shipped = Shipped::default();
    for name in image_files(dir)? {
        // O_NOFOLLOW and O_NONBLOCK: a link or a FIFO that is put there now is not opened, or
        // does not hang us, and the check below is of what was opened.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(dir, name.as_str(), flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode) != FileType::RegularFile {
            continue;
        }
        let source = Source::from_file(File::from(fd))?;
        let turn = run.image_begins(&name);
        shipped.images += 1;
        shipped.pagemaps += u32::from(name.is_pagemap());
        send_image(session.clone(), run.clone(), name, O_WRONLY, source, turn).await;
    }
    Ok(shipped)
}

fn image_files(dir: impl AsFd) -> io::Result<Vec<ImageName>> {
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
    // The inventory last, as CRIU has it: it seals the set.
    names.sort_by_key(|n| (n.is_inventory(), n.as_str().to_owned()));
    Ok(names)
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
        let dir = File::open(temp.path()).unwrap();
        let found = image_files(&dir).unwrap();
        let found: Vec<&str> = found.iter().map(ImageName::as_str).collect();
        assert_eq!(found, ["core-1.img", "tmpfs-2.tar.gz", "inventory.img"]);
    }
}
