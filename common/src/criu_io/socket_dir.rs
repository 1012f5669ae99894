//! The directories that a daemon puts its sockets into.
//!
//! CRIU resolves the names of its sockets against directories of its own (`-D`, `-W`), so a daemon listens in each
//! directory it was given.
//!
//! A process that can put a socket there takes part in another process's memory. So a directory that others can write is
//! refused, whatever its sticky bit says: a name there can be taken before the daemon comes. The directory is opened once,
//! and all names are relative to that. Others may be able to put another directory in its place, through an ancestor. That
//! does not harm the daemon, which has the directory open, but CRIU would look in the other one. The daemon warns of that
//! and does not refuse it, since the path is CRIU's.
//!
//! A name can vanish under a daemon: the directory is deleted or moved, or a socket in it is. Then CRIU can no longer reach
//! what the daemon holds. So the daemon looks every second ([`keep`]), makes what is missing again under the same rules as at
//! its start, and listens there.
//!
//! One daemon has a directory at a time: it holds a lock in it for its life.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::process::geteuid;

use crate::criu_io::allowed_uids::AllowedUids;
use crate::criu_io::dir_lock::{DirLock, LockError};
use crate::error_chain::chain;

/// How often it is looked whether all is where it should be.
const LOOK: Duration = Duration::from_secs(1);

/// Why a directory gets no sockets.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it belongs to uid {owner}, which could put its own sockets there: it must belong to root or to uid {ours} (chown)")]
    Owner { owner: u32, ours: u32 },
    #[error(
        "others can write there (mode {0:04o}) and could put their own sockets there: chmod go-w"
    )]
    Writable(u32),
    #[error("{0} was there before and is not of this daemon's making; it is not touched: remove or rename it")]
    NotOurs(PathBuf),
    #[error(transparent)]
    Locked(#[from] LockError),
}

/// A directory that sockets are put into, opened once: renaming the directory or planting a
/// link in its path later changes nothing.
#[derive(Debug, Clone)]
pub struct SocketDir(pub(super) Arc<Dir>);

#[derive(Debug)]
pub(super) struct Dir {
    pub(super) path: PathBuf,
    pub(super) allowed: Arc<AllowedUids>,
    pub(super) place: Place,
    opened: Mutex<Arc<Opened>>,
    /// What must be there as long as it is.
    pub(super) sockets: Mutex<Vec<Weak<dyn Watched>>>,
    below: Mutex<Vec<Weak<Dir>>>,
    /// One at a time looks, from the top down.
    pub(super) look: Mutex<Look>,
}

#[derive(Debug, Default)]
pub(super) struct Look {
    /// What was wrong the last time.
    trouble: Option<String>,
    /// The daemon has removed the directory itself: another one of that name is not this one.
    left_alone: bool,
}

/// What must be there as long as its directory is.
pub(super) trait Watched: std::fmt::Debug + Send + Sync {
    /// Makes it again if it is gone.
    fn look(&self);
}

/// How the directory is found again.
#[derive(Debug)]
pub(super) enum Place {
    /// By its path. With the program's name it is locked.
    Path(Option<&'static str>),
    Below {
        parent: SocketDir,
        name: String,
        kind: Kind,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Has a file of this name that says whose it is.
    Marked(&'static str),
    /// Is in one that has.
    Plain,
}

/// The directory that is at the path now, or was until it was deleted.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) fd: OwnedFd,
    pub(super) id: Id,
    mode: u32,
    lock: Option<DirLock>,
}

/// The same in all of a file's names.
pub(super) type Id = (u64, u64);

pub(super) fn id_of(stat: &Stat) -> Id {
    // The widths differ between architectures.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    (stat.st_dev as u64, stat.st_ino as u64)
}

impl Opened {
    pub(super) fn new(fd: OwnedFd, lock: Option<&str>) -> Result<Arc<Self>, DirError> {
        let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
        if !is_ours(&stat) {
            let ours = geteuid().as_raw();
            return Err(DirError::Owner {
                owner: stat.st_uid,
                ours,
            });
        }
        if writable_by_others(&stat) {
            return Err(DirError::Writable(stat.st_mode & 0o7777));
        }
        let lock = lock
            .map(|program| DirLock::take(&fd, program))
            .transpose()?;
        Ok(Arc::new(Self {
            fd,
            id: id_of(&stat),
            mode: stat.st_mode & 0o7777,
            lock,
        }))
    }

    /// A path through our descriptor: as short as sun_path wants it, whatever the directory's
    /// own length.
    pub(super) fn through_fd(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()).into()
    }

    pub(super) fn lstat(&self, name: &str) -> rustix::io::Result<Stat> {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

pub(super) const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW);

impl SocketDir {
    /// `path` is absolute and has no links in it. In its sockets `allowed` are served.
    pub fn open(path: &Path, allowed: &Arc<AllowedUids>) -> Result<Self, DirError> {
        Self::at(path, allowed, None)
    }

    /// The same, for the daemon `program` alone, as long as this lives.
    pub fn claim(
        path: &Path,
        allowed: &Arc<AllowedUids>,
        program: &'static str,
    ) -> Result<Self, DirError> {
        Self::at(path, allowed, Some(program))
    }

    fn at(
        path: &Path,
        allowed: &Arc<AllowedUids>,
        program: Option<&'static str>,
    ) -> Result<Self, DirError> {
        let fd = rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
        let opened = Opened::new(fd, program)?;
        Ok(Self::new(
            path.to_owned(),
            allowed,
            Place::Path(program),
            opened,
        ))
    }

    fn new(path: PathBuf, allowed: &Arc<AllowedUids>, place: Place, opened: Arc<Opened>) -> Self {
        Self(Arc::new(Dir {
            path,
            allowed: allowed.clone(),
            place,
            opened: Mutex::new(opened),
            sockets: Mutex::default(),
            below: Mutex::default(),
            look: Mutex::default(),
        }))
    }

    pub(super) fn opened(&self) -> Arc<Opened> {
        lock(&self.0.opened).clone()
    }

    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The directories above in which others could put another one in its place.
    pub fn unsafe_ancestors(&self) -> Vec<PathBuf> {
        let ancestors = self.0.path.ancestors().skip(1);
        let replaceable = |dir: &&Path| {
            let stat = rustix::fs::stat(*dir);
            // In a sticky directory no user renames what is another's.
            stat.is_ok_and(|s| {
                !is_ours(&s)
                    || (writable_by_others(&s) && s.st_mode & Mode::SVTX.as_raw_mode() == 0)
            })
        };
        ancestors.filter(replaceable).map(Path::to_owned).collect()
    }

    pub(super) fn below(&self, name: &str, kind: Kind) -> Result<Self, DirError> {
        let opened = self.make(name, kind)?;
        let place = Place::Below {
            parent: self.clone(),
            name: name.to_owned(),
            kind,
        };
        let dir = Self::new(self.0.path.join(name), &self.0.allowed, place, opened);
        let mut below = lock(&self.0.below);
        below.retain(|dir| dir.strong_count() > 0);
        below.push(Arc::downgrade(&dir.0));
        Ok(dir)
    }

    /// Makes a subdirectory, never following a link. No other user can look into it, except those that are allowed to connect
    /// there. One that is there is taken only if we made it, and is not changed.
    fn make(&self, name: &str, kind: Kind) -> Result<Arc<Opened>, DirError> {
        let parent = self.opened();
        let new = match rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let others = match self.0.allowed.has_others() {
            true => Mode::XGRP | Mode::XOTH,
            false => Mode::empty(),
        };
        let mode = Mode::RWXU | others;
        let not_ours = || DirError::NotOurs(self.0.path.join(name));
        let opened = rustix::fs::openat(&parent.fd, name, DIRECTORY, Mode::empty());
        let fd = match opened {
            Ok(fd) => fd,
            Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => return Err(not_ours()),
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let opened = Opened::new(fd, None)?;
        if new {
            // Behind our own descriptor: what is at `name` by now does not matter.
            rustix::fs::chmod(opened.through_fd("."), mode).map_err(io::Error::from)?;
            if let Kind::Marked(mark) = kind {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&opened.fd, mark, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(io::Error::from)?;
            }
            return Ok(opened);
        }
        let is_file = |s: Stat| FileType::from_raw_mode(s.st_mode).is_file() && is_ours(&s);
        match kind {
            // An earlier run may have let other users in, or not.
            Kind::Marked(mark) if opened.lstat(mark).is_ok_and(is_file) => {
                rustix::fs::chmod(opened.through_fd("."), mode).map_err(io::Error::from)?;
                Ok(opened)
            }
            Kind::Plain if opened.mode == mode.as_raw_mode() => Ok(opened),
            _ => Err(not_ours()),
        }
    }

    /// For the message of a daemon that finds the directory taken: the process may have forked since.
    pub fn names_holder(&self) {
        if let Some(lock) = &self.opened().lock {
            lock.names_holder();
        }
    }

    /// At the end: the next daemon finds no file of the lock. It is held until the process ends.
    pub fn release(&self) {
        if let Some(lock) = &self.opened().lock {
            lock.remove_file();
        }
    }

    /// Same directory under another name?
    pub fn same(&self, path: &Path) -> bool {
        rustix::fs::stat(path).is_ok_and(|stat| id_of(&stat) == self.opened().id)
    }

    // --- what vanishes ----------------------------------------------------------------------

    /// Looks if the directory itself is not where it should be.
    pub fn look_if_gone(&self) {
        if self.there().map(|stat| id_of(&stat)) != Ok(self.opened().id) {
            self.look();
        }
    }

    fn there(&self) -> rustix::io::Result<Stat> {
        match &self.0.place {
            Place::Path(_) => rustix::fs::lstat(&self.0.path),
            Place::Below { parent, name, .. } => parent.opened().lstat(name),
        }
    }

    /// Looks whether the directory, its sockets and those below are where they should be; makes again what is not. `true`: the
    /// directory itself was made, or found, anew.
    pub fn look(&self) -> bool {
        let mut look = lock(&self.0.look);
        if look.left_alone {
            return false;
        }
        let anew = match self.find_again() {
            Ok(anew) => anew,
            Err(e) => {
                let path = self.0.path.display();
                let text = chain(&e);
                if look.trouble.as_ref() != Some(&text) {
                    tracing::error!(
                        "{path} was deleted or moved, and this daemon's sockets with it; it cannot be made again: {text}. The sets are kept, and the daemon tries again every second"
                    );
                }
                look.trouble = Some(text);
                return false;
            }
        };
        look.trouble = None;
        if anew {
            tracing::error!(
                "{} was deleted, moved or replaced while this daemon was running; the daemon listens in the directory that is there now",
                self.0.path.display()
            );
        }
        let sockets: Vec<_> = lock(&self.0.sockets).clone();
        for socket in sockets.iter().filter_map(Weak::upgrade) {
            socket.look();
        }
        let below: Vec<_> = lock(&self.0.below).clone();
        for dir in below.iter().filter_map(Weak::upgrade) {
            Self(dir).look();
        }
        anew
    }

    /// Before the daemon removes the directory: a look that has begun is over, and no later one makes it again. Tasks may have
    /// the directory for a while yet.
    pub(super) fn leave_alone(&self) {
        lock(&self.0.look).left_alone = true;
    }

    /// Opens the directory anew if another one, or none, is at its path. `false`: it is the same.
    fn find_again(&self) -> Result<bool, DirError> {
        let had = self.opened();
        let missing = match self.there() {
            Ok(stat) if id_of(&stat) == had.id => return Ok(false),
            Ok(_) => false,
            Err(rustix::io::Errno::NOENT) => true,
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let opened = match &self.0.place {
            Place::Below { parent, name, kind } => parent.make(name, *kind)?,
            Place::Path(program) => {
                if missing {
                    make_path(&self.0.path, had.mode)?;
                }
                let fd = rustix::fs::open(&self.0.path, DIRECTORY, Mode::empty())
                    .map_err(io::Error::from)?;
                Opened::new(fd, *program)?
            }
        };
        *lock(&self.0.opened) = opened;
        Ok(true)
    }
}

/// Makes a directory and those above it that are missing.
fn make_path(path: &Path, mode: u32) -> io::Result<()> {
    let make = |dir: &Path, mode: u32| match rustix::fs::mkdir(dir, Mode::RWXU) {
        // Just made by this daemon, so only root can have put something else there. The umask is narrow.
        Ok(()) => {
            let opened = rustix::fs::open(dir, DIRECTORY, Mode::empty())?;
            let through = format!("/proc/self/fd/{}/.", opened.as_raw_fd());
            Ok(rustix::fs::chmod(through, Mode::from_raw_mode(mode))?)
        }
        Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(e) => Err(io::Error::from(e)),
    };
    let missing = |dir: &&Path| rustix::fs::lstat(*dir).is_err();
    let above: Vec<_> = path.ancestors().skip(1).take_while(missing).collect();
    for dir in above.into_iter().rev() {
        make(dir, 0o755)?;
    }
    make(path, mode)
}

/// Looks at the directories every second, and calls `anew` with each that was lost and is there again.
pub async fn keep(dirs: Vec<SocketDir>, anew: impl Fn(&SocketDir)) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        for dir in &dirs {
            if dir.look() {
                anew(dir);
            }
        }
    }
}

pub(super) fn names_in(opened: &Opened) -> Vec<String> {
    let names = std::fs::read_dir(opened.through_fd("."));
    let names = names.into_iter().flatten().filter_map(Result::ok);
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == geteuid().as_raw()
}

fn writable_by_others(stat: &Stat) -> bool {
    stat.st_mode & (Mode::WGRP | Mode::WOTH).as_raw_mode() != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let open = || SocketDir::open(temp.path(), &AllowedUids::new(&[]));
        for mode in [0o700, 0o755, 0o1755] {
            chmod(temp.path(), mode);
            open().unwrap();
        }
        for mode in [0o720, 0o702, 0o777, 0o1777] {
            chmod(temp.path(), mode);
            let Err(DirError::Writable(found)) = open() else {
                panic!("{mode:o} was taken");
            };
            assert_eq!(found, mode);
        }
    }

    #[test]
    fn a_link_is_no_directory() {
        let temp = tempfile::tempdir().unwrap();
        let link = temp.path().join("link");
        std::os::unix::fs::symlink(temp.path(), &link).unwrap();
        let refused = SocketDir::open(&link, &AllowedUids::new(&[]));
        assert!(matches!(refused, Err(DirError::Io(_))), "{refused:?}");
    }

    #[test]
    fn ancestors_in_which_it_can_be_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let of = || SocketDir::open(&deep, &AllowedUids::new(&[])).unwrap();
        let a = temp.path().join("a");
        assert!(!of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o777);
        assert!(of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o1777);
        assert!(!of().unsafe_ancestors().contains(&a));
    }
}
