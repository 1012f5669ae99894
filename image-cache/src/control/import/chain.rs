//! A dump whose pages are in its parents: `--prev-images-dir` makes the link `parent` in CRIU's
//! images directory, and CRIU follows it from directory to directory. `criu restore --stream` does
//! not, so the import does, and makes one flat set.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::criu::dialect::Dialect;
use image_common::criu::image_file::ImageError;
use image_common::criu::pagemap;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::SetNumber;
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::control::import::load::{load, LoadError};
use crate::store::session::{Session, SessionError};
use crate::store::set::images::Bytes;
use crate::store::set::squash::SquashError;
use crate::store::set::Set;
use crate::store::Store;

/// CRIU's `CR_PARENT_LINK`.
const PARENT: &str = "parent";

/// No series of dumps is longer; each level is a set.
const MAX_PARENTS: u32 = 1000;

#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    #[error("{0}: these pages are in a parent, and the directory has no link `{PARENT}`")]
    NoLink(ImageName),
    #[error("{image}: these pages are in a parent, {link}, which cannot be opened")]
    Open {
        image: ImageName,
        link: String,
        #[source]
        source: io::Error,
    },
    #[error("the parent {0} is one of its own parents")]
    Loop(String),
    #[error("the parent {0} is of another user than the directory")]
    Owner(String),
    #[error("more than {MAX_PARENTS} parents")]
    TooMany,
    #[error("reading the directory")]
    Directory(#[from] io::Error),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error("its pages are in parents")]
    Squash(#[from] SquashError),
}

/// Makes what the pagemaps of `set` have in parents its own. The links are followed only as far as
/// pages are missed.
pub fn squash(
    store: &Store,
    session: &Session,
    set: &Arc<Set>,
    dir: &OwnedFd,
    images: &[ImageName],
) -> Result<(), ParentError> {
    let with_holes = |set: &Set, names: &[ImageName]| -> Vec<ImageName> {
        let names = names.iter().filter(|name| name.is_pagemap());
        names.filter(|name| has_holes(set, name)).cloned().collect()
    };
    let mut waiting = with_holes(set, images);
    let mut parents: Vec<Arc<Set>> = Vec::new();
    let mut level = dir.try_clone()?;
    let mut seen = HashSet::from([place(&level)?]);
    while let Some(first) = waiting.first() {
        let link = link_of(&level, first)?;
        level = follow(&level, first, &link)?;
        if !seen.insert(place(&level)?) {
            return Err(ParentError::Loop(link));
        }
        let number = 2 + u32::try_from(parents.len()).unwrap_or(MAX_PARENTS);
        if number > MAX_PARENTS {
            return Err(ParentError::TooMany);
        }
        let parent = open_set(session, number, &link)?;
        for name in &waiting {
            load_level(store, &parent, &level, name)?;
        }
        waiting = with_holes(&parent, &waiting);
        parents.push(parent);
    }
    if parents.is_empty() {
        return Ok(());
    }
    set.squash(&parents, &store.budget)?;
    for parent in parents {
        // Its memory is the dump's now, as far as that needs it.
        let _ = parent.abort("it is a part of the dump now");
    }
    Ok(())
}

fn has_holes(set: &Set, name: &ImageName) -> bool {
    let Some(image) = set.image(name.as_str()) else {
        return false;
    };
    let mut holes = false;
    let read = pagemap::walk(Bytes::of(&image).pieces(), |entry| {
        holes |= entry.is_hole();
        Ok::<_, ImageError>(())
    });
    // One that cannot be read is judged with the set.
    read.is_ok() && holes
}

fn open_set(session: &Session, number: u32, link: &str) -> Result<Arc<Set>, ParentError> {
    // For the status; the link is a path, and any text is a path.
    let text: String = link.chars().filter(|c| !c.is_control()).collect();
    let snapshot = SnapshotId::new(&text).or_else(|_| SnapshotId::new(PARENT));
    let snapshot = snapshot.map_err(|_| ParentError::TooMany)?;
    Ok(session.open_set(SetNumber(number), snapshot, None, true, Dialect::PageServer)?)
}

/// The pagemap `name` of a parent, and its pages. One without it ends the chain of this pagemap.
fn load_level(
    store: &Store,
    parent: &Set,
    dir: &OwnedFd,
    name: &ImageName,
) -> Result<(), ParentError> {
    match load(store, parent, dir, name) {
        Err(LoadError::Read(_, e)) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    }
    let Some(image) = parent.image(name.as_str()) else {
        return Ok(());
    };
    let pages = pagemap::pages_id(Bytes::of(&image).pieces())
        .ok()
        .and_then(|id| ImageName::new(&format!("pages-{id}.img")).ok());
    match pages {
        Some(pages) => Ok(load(store, parent, dir, &pages)?),
        None => Ok(()), // said by the squash
    }
}

fn link_of(dir: &OwnedFd, image: &ImageName) -> Result<String, ParentError> {
    match rustix::fs::readlinkat(dir, PARENT, Vec::new()) {
        Ok(link) => Ok(link.to_string_lossy().into_owned()),
        Err(rustix::io::Errno::NOENT) => Err(ParentError::NoLink(image.clone())),
        // A directory of that name, which CRIU would take as well.
        Err(rustix::io::Errno::INVAL) => Ok(PARENT.to_owned()),
        Err(e) => Err(ParentError::Directory(e.into())),
    }
}

/// Opens the parent of `dir`. Its link may lead anywhere, and the daemon may read more than the
/// user who made it: so that no user gets pages of another user's process, the
/// directories are of one user, unless the first is of root or of ours.
fn follow(dir: &OwnedFd, image: &ImageName, link: &str) -> Result<OwnedFd, ParentError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(dir, PARENT, flags, Mode::empty());
    let parent = opened.map_err(|e| ParentError::Open {
        image: image.clone(),
        link: link.to_owned(),
        source: e.into(),
    })?;
    let owner = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| s.st_uid);
    let from = owner(dir).map_err(io::Error::from)?;
    // The link itself may be another's than its directory, where that is open to all.
    let by = rustix::fs::statat(dir, PARENT, AtFlags::SYMLINK_NOFOLLOW);
    let by = by.map_err(io::Error::from)?.st_uid;
    let to = owner(&parent).map_err(io::Error::from)?;
    let trusted = |uid: u32| uid == 0 || uid == rustix::process::geteuid().as_raw() || uid == to;
    match trusted(from) && trusted(by) {
        true => Ok(parent),
        false => Err(ParentError::Owner(link.to_owned())),
    }
}

fn place(dir: &OwnedFd) -> Result<(u64, u64), io::Error> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}
