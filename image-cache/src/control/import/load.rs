//! One image file of a directory, read into a set.

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use image_common::criu_io::images_dir;
use image_common::image::ImageName;

use crate::store::image::WriteError;
use crate::store::set::{OpenError, Set};
use crate::store::Store;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("reading {0}")]
    Read(String, #[source] io::Error),
    #[error("storing {0}")]
    Write(String, #[source] WriteError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// Reads one image of a directory into a set.
pub fn load(store: &Store, set: &Set, dir: &OwnedFd, name: &ImageName) -> Result<(), LoadError> {
    let read = |e| LoadError::Read(name.to_string(), e);
    let Some(mut file) = images_dir::open(dir, name).map_err(read)? else {
        return Ok(());
    };
    let write = |e| LoadError::Write(name.to_string(), e);
    let mut writer = set.open_image(name, None, false, &store.budget)?;
    let mut buffer = vec![0; 256 << 10];
    let copied = loop {
        match file.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(n) => {
                if let Err(e) = writer.put(&buffer[..n]) {
                    break Err(write(e));
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => break Err(read(e)),
        }
    };
    if let Err(e) = copied {
        set.drop_image(writer);
        return Err(e);
    }
    let total = writer.received();
    set.finish_image(writer, total).map_err(write)
}
