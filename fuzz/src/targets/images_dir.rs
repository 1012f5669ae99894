//! An images directory with any names in it, of files, links, directories and FIFOs: only regular files
//! with names of images are found, the inventory last, and opening one never follows a link, nor
//! leaves the directory.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::input::Input;
use image_common::criu_io::images_dir::{images, open};
use rustix::fs::{mkfifoat, Mode, CWD};

pub fn run(bytes: &[u8]) {
    let temp = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let temp = temp.expect("a directory");
    let dir = temp.path().join("images");
    std::fs::create_dir(&dir).expect("a directory");
    std::fs::write(temp.path().join("outside.img"), b"outside").expect("a file");
    let mut input = Input::new(bytes);
    for _ in 0..16 {
        let kind = input.u8();
        let name = input.short();
        let shaped = match kind >> 4 & 3 {
            0 => [name, b".img"].concat(),
            1 => b"inventory.img".to_vec(),
            2 => [b"tmpfs-", name, b".tar.gz"].concat(),
            _ => name.to_vec(),
        };
        // A name with a slash is no entry of a directory; nor are others that cannot be made.
        if shaped.contains(&b'/') || shaped.contains(&0) {
            continue;
        }
        let path = dir.join(Path::new(std::ffi::OsStr::from_bytes(&shaped)));
        let _ = match kind & 3 {
            0 => File::create_new(&path).and_then(|mut file| file.write_all(b"image")),
            1 => symlink("../outside.img", &path),
            2 => std::fs::create_dir(&path),
            _ => mkfifoat(CWD, &path, Mode::RUSR).map_err(Into::into),
        };
        if input.is_empty() {
            break;
        }
    }
    let fd = OwnedFd::from(File::open(&dir).expect("a directory"));
    let found = images(&fd).expect("a directory");
    for (n, name) in found.iter().enumerate() {
        assert!(
            n + 1 == found.len() || !name.is_inventory(),
            "the inventory is last"
        );
        // What is there may be another thing by the time that it is opened.
        let other = input.u8() > 200;
        if other {
            let path = dir.join(name.as_str());
            std::fs::remove_file(&path).expect("it is there");
            symlink("../outside.img", &path).expect("a link");
        }
        match open(&fd, name) {
            Ok(Some(mut file)) => {
                let mut content = Vec::new();
                file.read_to_end(&mut content).expect("a file");
                assert!(content == b"image" && !other, "{name}");
            }
            Ok(None) => panic!("{name} is no file"),
            Err(_) => assert!(other, "{name}"),
        }
    }
}
