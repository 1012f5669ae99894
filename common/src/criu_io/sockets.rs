//! The unix sockets in the images directories.
//!
//! CRIU resolves their names against directories of its own (`-D`, `-W`), so a daemon listens
//! in each directory it was given. A socket is bound under a temporary name and renamed: a
//! CRIU never finds one that does not accept, and a stale file is replaced in one step.
//!
//! Who talks to these sockets takes part in a process's memory. So a directory that others can
//! write is refused, whatever its sticky bit says: a name there can be taken before we come. The
//! directory is opened once, and all names are relative to that. Its ancestors matter as far as
//! somebody may put another directory in its place: not for us, who have it open, but CRIU would
//! look there. That is warned of and not refused, since it is CRIU's path, not ours.
//!
//! A name can vanish under a daemon: the directory is deleted, or moved, or a socket in it is. What the daemon holds could
//! not be had any more then. So it looks every second ([`keep`]), makes what is missing again, under the same rules as at its
//! start, and listens there.
//!
//! A directory is one daemon's: it holds a lock in it for its life.

use std::future::Future;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::net::SocketFlags;
use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::criu_io::allowed_uids::Peers;
use crate::criu_io::dir_lock::{DirLock, LockError};
use crate::image::SessionName;
use crate::tasks;

/// Connections not yet accepted: CRIU opens many images one after the other.
const BACKLOG: i32 = 4096;

/// How often it is looked whether all is where it should be.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum BindError {
    #[error("{0} is in use: another daemon listens there")]
    InUse(PathBuf),
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    #[error("cannot listen on {path}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Why a directory gets no sockets.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("it belongs to uid {owner}, who could put sockets of their own there; it must belong to root or to uid {ours}")]
    Owner { owner: u32, ours: u32 },
    #[error(
        "others can write there (mode {0:04o}) and could put sockets of their own; chmod go-w"
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
pub struct SocketDir(Arc<Dir>);

#[derive(Debug)]
struct Dir {
    path: PathBuf,
    peers: Arc<Peers>,
    place: Place,
    opened: Mutex<Arc<Opened>>,
    /// What must be there as long as it is.
    sockets: Mutex<Vec<Weak<Bound>>>,
    below: Mutex<Vec<Weak<Dir>>>,
    /// One at a time looks, from the top down; what was wrong the last time.
    look: Mutex<Option<String>>,
}

/// How the directory is found again.
#[derive(Debug)]
enum Place {
    /// By its path. With the program's name it is locked.
    Path(Option<&'static str>),
    Below {
        parent: SocketDir,
        name: String,
        kind: Kind,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Has a file that says whose it is.
    Marked,
    /// Is in one that has.
    Plain,
}

/// The directory that is at the path now, or was until it was deleted.
#[derive(Debug)]
struct Opened {
    fd: OwnedFd,
    id: Id,
    mode: u32,
    lock: Option<DirLock>,
}

/// The same in all of a file's names.
type Id = (u64, u64);

fn id_of(stat: &Stat) -> Id {
    // The widths differ between architectures.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    (stat.st_dev as u64, stat.st_ino as u64)
}

/// The directory in `DIR` that has those of the sessions, and its file that says that image-cache made it.
const SESSIONS: &str = "sessions";
const MARK: &str = ".image-cache";

/// A directory of a session, until it is dropped: then it goes, if it is empty but for sockets.
#[derive(Debug)]
pub struct SessionDir(SocketDir);

impl Opened {
    fn new(fd: OwnedFd, lock: Option<&str>) -> Result<Arc<Self>, DirError> {
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
    fn through_fd(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.fd.as_raw_fd()).into()
    }

    fn lstat(&self, name: &str) -> rustix::io::Result<Stat> {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }
}

const DIRECTORY: OFlags = OFlags::PATH
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW);

impl SocketDir {
    /// `path` is absolute and has no links in it. In its sockets `peers` are served.
    pub fn open(path: &Path, peers: &Arc<Peers>) -> Result<Self, DirError> {
        Self::at(path, peers, None)
    }

    /// The same, for the daemon `program` alone, as long as this lives.
    pub fn claim(path: &Path, peers: &Arc<Peers>, program: &'static str) -> Result<Self, DirError> {
        Self::at(path, peers, Some(program))
    }

    fn at(
        path: &Path,
        peers: &Arc<Peers>,
        program: Option<&'static str>,
    ) -> Result<Self, DirError> {
        let fd = rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(io::Error::from)?;
        let opened = Opened::new(fd, program)?;
        Ok(Self::new(
            path.to_owned(),
            peers,
            Place::Path(program),
            opened,
        ))
    }

    fn new(path: PathBuf, peers: &Arc<Peers>, place: Place, opened: Arc<Opened>) -> Self {
        Self(Arc::new(Dir {
            path,
            peers: peers.clone(),
            place,
            opened: Mutex::new(opened),
            sockets: Mutex::default(),
            below: Mutex::default(),
            look: Mutex::default(),
        }))
    }

    fn opened(&self) -> Arc<Opened> {
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
            // In a sticky directory nobody renames what is not theirs.
            stat.is_ok_and(|s| {
                !is_ours(&s)
                    || (writable_by_others(&s) && s.st_mode & Mode::SVTX.as_raw_mode() == 0)
            })
        };
        ancestors.filter(replaceable).map(Path::to_owned).collect()
    }

    /// Makes `sessions`, or finds the one that an earlier image-cache left: its mark is in it.
    pub fn sessions(&self) -> Result<Self, DirError> {
        let sessions = self.below(SESSIONS, Kind::Marked)?;
        sessions.sweep();
        Ok(sessions)
    }

    /// Makes the directory of a session in this one, which is `sessions`.
    pub fn session(&self, name: &SessionName) -> Result<SessionDir, DirError> {
        self.below(name.as_str(), Kind::Plain).map(SessionDir)
    }

    fn below(&self, name: &str, kind: Kind) -> Result<Self, DirError> {
        let opened = self.make(name, kind)?;
        let place = Place::Below {
            parent: self.clone(),
            name: name.to_owned(),
            kind,
        };
        let dir = Self::new(self.0.path.join(name), &self.0.peers, place, opened);
        let mut below = lock(&self.0.below);
        below.retain(|dir| dir.strong_count() > 0);
        below.push(Arc::downgrade(&dir.0));
        Ok(dir)
    }

    /// Makes a subdirectory, never following a link. Nobody else can look into it, but for those who are allowed to connect
    /// there. One that is there is taken only if we made it, and is not changed.
    fn make(&self, name: &str, kind: Kind) -> Result<Arc<Opened>, DirError> {
        let parent = self.opened();
        let new = match rustix::fs::mkdirat(&parent.fd, name, Mode::RWXU) {
            Ok(()) => true,
            Err(rustix::io::Errno::EXIST) => false,
            Err(e) => return Err(io::Error::from(e).into()),
        };
        let others = match self.0.peers.has_others() {
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
            if kind == Kind::Marked {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&opened.fd, MARK, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(io::Error::from)?;
            }
            return Ok(opened);
        }
        let is_file = |s: Stat| FileType::from_raw_mode(s.st_mode).is_file() && is_ours(&s);
        match kind {
            // An earlier run may have let other users in, or not.
            Kind::Marked if opened.lstat(MARK).is_ok_and(is_file) => {
                rustix::fs::chmod(opened.through_fd("."), mode).map_err(io::Error::from)?;
                Ok(opened)
            }
            Kind::Plain if opened.mode == mode.as_raw_mode() => Ok(opened),
            _ => Err(not_ours()),
        }
    }

    /// Removes what a daemon that was killed left in `sessions`: its lock is ours now.
    fn sweep(&self) {
        let opened = self.opened();
        for name in names_in(&opened) {
            if name != MARK {
                remove_sockets(&opened, &name);
                let _ = rustix::fs::unlinkat(&opened.fd, &name, AtFlags::REMOVEDIR);
            }
        }
    }

    /// Removes `sessions`, unless something is in it that is not ours.
    pub fn remove_sessions(&self) {
        let Place::Below { parent, name, kind } = &self.0.place else {
            return;
        };
        let opened = self.opened();
        if *kind == Kind::Marked && names_in(&opened) == [MARK] {
            let _ = rustix::fs::unlinkat(&opened.fd, MARK, AtFlags::empty());
            let _ = rustix::fs::unlinkat(&parent.opened().fd, name, AtFlags::REMOVEDIR);
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
        let mut trouble = lock(&self.0.look);
        let anew = match self.find_again() {
            Ok(anew) => anew,
            Err(e) => {
                let path = self.0.path.display();
                let text = crate::error_chain::chain(&e);
                if trouble.as_ref() != Some(&text) {
                    tracing::error!(
                        "{path} was deleted or moved, and with it the sockets by which this daemon is reached; it cannot be made again: {text}.                          The sets are kept. It is tried again every second"
                    );
                }
                *trouble = Some(text);
                return false;
            }
        };
        *trouble = None;
        if anew {
            tracing::error!(
                "{} was deleted, moved or replaced under this daemon; it listens in the directory that is there now",
                self.0.path.display()
            );
        }
        let sockets: Vec<_> = lock(&self.0.sockets).clone();
        for bound in sockets.iter().filter_map(Weak::upgrade) {
            bound.look();
        }
        let below: Vec<_> = lock(&self.0.below).clone();
        for dir in below.iter().filter_map(Weak::upgrade) {
            Self(dir).look();
        }
        anew
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
        // Of our own making, so nobody else can have put something else there but root. The umask is narrow.
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

fn names_in(opened: &Opened) -> Vec<String> {
    let names = std::fs::read_dir(opened.through_fd("."));
    let names = names.into_iter().flatten().filter_map(Result::ok);
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// The sockets that are in the directory of a session.
const OURS: [&str; 3] = [
    crate::criu::remote::CACHE_SOCKET,
    crate::criu::stream::SERVE_SOCKET,
    crate::control::CACHE_CONTROL_SOCKET,
];

/// Removes our sockets in a directory below, never following a link.
fn remove_sockets(above: &Opened, name: &str) {
    let Ok(fd) = rustix::fs::openat(&above.fd, name, DIRECTORY, Mode::empty()) else {
        return;
    };
    let Ok(opened) = Opened::new(fd, None) else {
        return;
    };
    for name in names_in(&opened) {
        let is_socket = |s: Stat| FileType::from_raw_mode(s.st_mode).is_socket();
        // Of those that a daemon makes, or was making; CRIU and operators have others.
        let ours = OURS.iter().any(|own| name == *own)
            || (name.starts_with('.') && OURS.iter().any(|own| name.contains(own)));
        if ours && opened.lstat(&name).is_ok_and(is_socket) {
            let _ = rustix::fs::unlinkat(&opened.fd, &name, AtFlags::empty());
        }
    }
}

impl Deref for SessionDir {
    type Target = SocketDir;

    fn deref(&self) -> &SocketDir {
        &self.0
    }
}

impl Drop for SessionDir {
    fn drop(&mut self) {
        let dir = &self.0 .0;
        if let Place::Below { parent, name, .. } = &dir.place {
            let (parent, own) = (parent.opened(), self.0.opened());
            if parent.lstat(name).is_ok_and(|s| id_of(&s) == own.id) {
                let _ = rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A listening socket that we made; its file goes when this is dropped.
#[derive(Debug)]
pub struct BoundSocket(Arc<Bound>);

/// A name in a directory, and what listens there.
#[derive(Debug)]
struct Bound {
    dir: SocketDir,
    name: String,
    now: watch::Sender<Arc<Listening>>,
    /// Those that listened before, until nobody waits there any more.
    retired: Mutex<Vec<Arc<Listening>>>,
    /// Its file is not looked after (any more).
    left_alone: AtomicBool,
    /// What was wrong at the last look.
    trouble: Mutex<Option<String>>,
}

#[derive(Debug)]
struct Listening {
    inner: UnixListener,
    /// Of our socket file, so that we remove no other one.
    file: Id,
    /// Where that is.
    dir: Arc<Opened>,
}

impl BoundSocket {
    /// Listens on `name` in `dir`, with mode 0600; 0666 if there are users who are allowed in
    /// besides us, since then it is their uid that decides.
    pub fn bind(dir: &SocketDir, name: &str) -> Result<(Self, Listener), BindError> {
        let listening = Listening::bind(dir, name)?;
        let bound = Arc::new(Bound {
            dir: dir.clone(),
            name: name.to_owned(),
            now: watch::Sender::new(Arc::new(listening)),
            retired: Mutex::default(),
            left_alone: AtomicBool::new(false),
            trouble: Mutex::default(),
        });
        let mut sockets = lock(&dir.0.sockets);
        sockets.retain(|bound| bound.strong_count() > 0);
        sockets.push(Arc::downgrade(&bound));
        drop(sockets);
        let listener = Listener {
            bound: bound.clone(),
            peers: dir.0.peers.clone(),
            path: dir.0.path.join(name),
        };
        Ok((Self(bound), listener))
    }
}

impl Listening {
    fn bind(dir: &SocketDir, name: &str) -> Result<Self, BindError> {
        let path = dir.0.path.join(name);
        let io_error = |source: io::Error| BindError::Io {
            path: path.clone(),
            source,
        };
        let opened = dir.opened();
        match opened.lstat(name) {
            Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(io_error(e.into())),
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(BindError::NotASocket(path));
            }
            Ok(_) => match somebody_listens(&opened.through_fd(name)) {
                Ok(true) => return Err(BindError::InUse(path)),
                Ok(false) => {} // the rename below replaces it
                Err(e) => return Err(io_error(e)),
            },
        }
        let temporary = format!(".{name}.{}", std::process::id());
        let _ = rustix::fs::unlinkat(&opened.fd, &temporary, AtFlags::empty());
        let bound = || -> io::Result<(Id, UnixListener)> {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // A bound file gets the mode of its socket: there is no moment with another one.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            socket.bind(&SockAddr::unix(opened.through_fd(&temporary))?)?;
            if dir.0.peers.has_others() {
                let all = Mode::from_raw_mode(0o666);
                rustix::fs::chmodat(&opened.fd, &temporary, all, AtFlags::empty())?;
            }
            socket.listen(BACKLOG)?;
            socket.set_nonblocking(true)?;
            let file = id_of(&opened.lstat(&temporary)?);
            rustix::fs::renameat(&opened.fd, &temporary, &opened.fd, name)?;
            let inner = UnixListener::from_std(StdListener::from(OwnedFd::from(socket)))?;
            Ok((file, inner))
        };
        let (file, inner) = bound().map_err(|e| {
            let _ = rustix::fs::unlinkat(&opened.fd, &temporary, AtFlags::empty());
            io_error(e)
        })?;
        Ok(Self {
            inner,
            file,
            dir: opened,
        })
    }
}

/// Whether there is more than the file of a socket. Does not wait for whoever listens.
fn somebody_listens(path: &Path) -> io::Result<bool> {
    let connected = || -> io::Result<()> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    match connected().map_err(|e| (e.kind(), e)) {
        Ok(()) => Ok(true),
        // It listens, and has not accepted those that are connected.
        Err((io::ErrorKind::WouldBlock, _)) => Ok(true),
        // Stale, or gone just now.
        Err((io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound, _)) => Ok(false),
        // Whether a daemon listens cannot be known.
        Err((_, e)) => Err(e),
    }
}

impl Bound {
    /// Whether the file is still the one that we made; if not, listens anew.
    fn look(&self) {
        if self.left_alone.load(Ordering::Acquire) {
            return;
        }
        let now = self.now.borrow().clone();
        let (there, path) = (self.dir.opened(), self.dir.0.path.join(&self.name));
        let is_ours = |stat: Stat| id_of(&stat) == now.file;
        if there.id == now.dir.id && there.lstat(&self.name).is_ok_and(is_ours) {
            return;
        }
        let mut trouble = lock(&self.trouble);
        match Listening::bind(&self.dir, &self.name) {
            Ok(listening) => {
                lock(&self.retired).push(now);
                self.now.send_replace(Arc::new(listening));
                *trouble = None;
                tracing::error!(
                    "{} was removed under this daemon; it listens there again",
                    path.display()
                );
            }
            Err(e) => {
                let text = crate::error_chain::chain(&e);
                if trouble.as_ref() != Some(&text) {
                    tracing::error!(
                        "{} was removed under this daemon, and cannot be made again: {text}. It is tried again every second",
                        path.display()
                    );
                }
                *trouble = Some(text);
            }
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let bound = &self.0;
        // A look that has begun must not make it again.
        let looks = lock(&bound.dir.0.look);
        bound.left_alone.store(true, Ordering::Release);
        drop(looks);
        let now = bound.now.borrow().clone();
        if now
            .dir
            .lstat(&bound.name)
            .is_ok_and(|s| id_of(&s) == now.file)
        {
            let _ = rustix::fs::unlinkat(&now.dir.fd, &bound.name, AtFlags::empty());
        }
    }
}

fn is_ours(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == geteuid().as_raw()
}

fn writable_by_others(stat: &Stat) -> bool {
    stat.st_mode & (Mode::WGRP | Mode::WOTH).as_raw_mode() != 0
}

/// Accepts from those who are allowed to connect; others are closed unheard, and logged.
#[derive(Debug)]
pub struct Listener {
    bound: Arc<Bound>,
    peers: Arc<Peers>,
    path: PathBuf,
}

impl Listener {
    /// Cancel safe.
    async fn accept(&self) -> io::Result<UnixStream> {
        let mut now = self.bound.now.subscribe();
        loop {
            // Whoever was connected when another one took its place.
            if let Some(stream) = self.accept_retired() {
                return Ok(stream);
            }
            let listening = now.borrow_and_update().clone();
            let (stream, _) = tokio::select! {
                accepted = listening.inner.accept() => accepted?,
                _ = now.changed() => continue,
            };
            if self.peers.admit(&stream, &self.path) {
                return Ok(stream);
            }
        }
    }

    fn accept_retired(&self) -> Option<UnixStream> {
        let mut retired = lock(&self.bound.retired);
        while let Some(listening) = retired.last() {
            match self.accept_waiting_at(listening) {
                Some(stream) => return Some(stream),
                None => drop(retired.pop()),
            }
        }
        None
    }

    /// A connection that waits already.
    fn accept_waiting(&self) -> Option<UnixStream> {
        let retired = self.accept_retired();
        retired.or_else(|| self.accept_waiting_at(&self.bound.now.borrow().clone()))
    }

    fn accept_waiting_at(&self, listening: &Listening) -> Option<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            let fd = rustix::net::accept_with(&listening.inner, flags).ok()?;
            let stream = UnixStream::from_std(fd.into()).ok()?;
            if self.peers.admit(&stream, &self.path) {
                return Some(stream);
            }
        }
    }

    /// From now on connect() says ECONNREFUSED, and the file stays; what is connected already can be accepted.
    pub fn refuse(&self) {
        self.bound.left_alone.store(true, Ordering::Release);
        let now = self.bound.now.borrow().clone();
        let _ = rustix::net::shutdown(&now.inner, rustix::net::Shutdown::Read);
    }

    /// Whether a connection waits to be accepted.
    pub fn has_backlog(&self) -> bool {
        let waits = |listening: &Listening| {
            let mut fds = [PollFd::new(&listening.inner, PollFlags::IN)];
            matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0)
        };
        waits(&self.bound.now.borrow()) || lock(&self.bound.retired).iter().any(|l| waits(l))
    }
}

impl Drop for Listener {
    /// Nobody accepts any more: nobody shall wait for that.
    fn drop(&mut self) {
        self.refuse();
    }
}

/// A failing accept (out of descriptors) is tried again after this.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Accepts until `stop`; connections outlive it, and each is served by a task of its own. `serve`
/// is called in the order of their arrival. A panic ends neither this nor another connection.
pub async fn accept<F, T>(listener: &Listener, stop: &CancellationToken, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    tasks::lasting("accepting connections", || {
        accept_until(listener, stop, serve)
    })
    .await;
}

async fn accept_until<F, T>(listener: &Listener, stop: &CancellationToken, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok(connection) => spawn(connection, serve),
            Err(e) => {
                listener.peers.cannot_accept(&listener.path, &e);
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves those who are connected already, and would be reset when the listener goes.
pub fn accept_waiting<F, T>(listener: &Listener, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    while let Some(connection) = listener.accept_waiting() {
        spawn(connection, serve);
    }
}

/// What is logged of a connection says whose it is.
fn spawn<F, T>(connection: UnixStream, serve: &F)
where
    F: Fn(UnixStream) -> T,
    T: Future<Output = ()> + Send + 'static,
{
    let peer = connection.peer_cred().ok();
    let pid = peer.as_ref().and_then(UCred::pid).unwrap_or(0);
    // At the level of errors, so that it is there whatever is logged.
    let span = tracing::error_span!("local", pid, uid = peer.map(|peer| peer.uid()));
    // Whoever it is about hears of a panic by the end of the connection, or by what the task holds.
    tasks::spawn("a connection", serve(connection).instrument(span), |_| {});
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn bind_refuse_replace_remove() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(150));
        std::fs::create_dir(&deep).unwrap();
        let dir = SocketDir::open(&deep, &Peers::new(&[])).unwrap();
        let path = deep.join("x.sock");

        let (bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(
            BoundSocket::bind(&dir, "x.sock"),
            Err(BindError::InUse(_))
        ));
        assert!(listener.has_backlog(), "the probe of the second bind");

        // A daemon that was killed leaves its file behind.
        std::mem::forget(bound);
        drop(listener);
        let (bound, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(bound);
        assert!(!path.exists());

        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(
            BoundSocket::bind(&dir, "x.sock"),
            Err(BindError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(
            std::fs::read_dir(&deep).unwrap().count(),
            1,
            "no temporary is left"
        );
    }

    #[tokio::test]
    async fn another_daemons_socket_is_not_removed() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let (first, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(listener);
        let (_second, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        drop(first);
        assert!(temp.path().join("x.sock").exists());
    }

    fn session(dir: &SocketDir, name: &str) -> Result<SessionDir, DirError> {
        dir.session(&name.parse().unwrap())
    }

    #[test]
    fn a_session_directory_is_never_a_link() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let sessions = dir.sessions().unwrap();
        std::os::unix::fs::symlink("/tmp", sessions.path().join("planted")).unwrap();
        let refused = session(&sessions, "planted").unwrap_err();
        assert!(matches!(refused, DirError::NotOurs(_)), "{refused}");
        let web = session(&sessions, "web").unwrap();
        assert!(web.path().is_dir() && web.path().ends_with("sessions/web"));
        drop(web);
        assert!(!sessions.path().join("web").exists());
        std::fs::remove_file(sessions.path().join("planted")).unwrap();
        sessions.remove_sessions();
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    /// What was there before keeps its mode, its owner and its content, whatever it is called.
    #[test]
    fn what_was_there_before_is_not_touched() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let theirs = temp.path().join("sessions");
        for mode in [0o755, 0o700] {
            std::fs::create_dir(&theirs).unwrap();
            chmod(&theirs, mode);
            let refused = dir.sessions().unwrap_err();
            assert!(matches!(refused, DirError::NotOurs(_)), "{refused}");
            assert_eq!(mode_of(&theirs), mode);
            assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0);
            std::fs::remove_dir(&theirs).unwrap();
        }
        std::fs::write(&theirs, "a file").unwrap();
        assert!(matches!(dir.sessions(), Err(DirError::NotOurs(_))));
        std::fs::remove_file(&theirs).unwrap();

        let sessions = dir.sessions().unwrap();
        let others = sessions.path().join("others");
        std::fs::create_dir(&others).unwrap();
        chmod(&others, 0o755);
        std::fs::write(others.join("file"), "theirs").unwrap();
        assert!(matches!(
            session(&sessions, "others"),
            Err(DirError::NotOurs(_))
        ));
        assert_eq!(mode_of(&others), 0o755);
        assert_eq!(std::fs::read_dir(&others).unwrap().count(), 1);
        sessions.remove_sessions();
        assert!(others.join("file").exists(), "nor is it removed");
    }

    /// A daemon that was killed leaves directories with sockets; the next one has the lock, and begins with none.
    #[tokio::test]
    async fn what_a_killed_daemon_left_goes() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let sessions = dir.sessions().unwrap();
        let web = session(&sessions, "web").unwrap();
        let (bound, _listener) = BoundSocket::bind(&web, OURS[1]).unwrap();
        std::mem::forget((bound, web));
        let kept = session(&sessions, "kept").unwrap();
        std::fs::write(kept.path().join("restore.log"), "CRIU's").unwrap();
        let (theirs, _listener) = BoundSocket::bind(&kept, "lazy-pages.socket").unwrap();
        std::mem::forget(theirs);
        std::mem::forget(kept);
        let sessions = dir.sessions().unwrap();
        assert!(!sessions.path().join("web").exists());
        for theirs in ["restore.log", "lazy-pages.socket"] {
            assert!(sessions.path().join("kept").join(theirs).exists());
        }
        session(&sessions, "kept").unwrap();
    }

    async fn accepts(path: &Path, listener: &Listener) -> bool {
        let connected = UnixStream::connect(path).await.is_ok();
        let accepted = tokio::time::timeout(Duration::from_secs(20), listener.accept());
        connected && accepted.await.is_ok_and(|accepted| accepted.is_ok())
    }

    #[tokio::test]
    async fn a_directory_that_was_deleted_comes_back_with_its_sockets() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("run/migrate");
        std::fs::create_dir_all(&path).unwrap();
        chmod(&path, 0o711);
        let dir = SocketDir::claim(&path, &Peers::new(&[]), "image-cache").unwrap();
        let (_bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let sessions = dir.sessions().unwrap();
        let web = session(&sessions, "web").unwrap();
        let (_other, of_web) = BoundSocket::bind(&web, "y.sock").unwrap();
        assert!(!dir.look(), "all is well");

        // Whoever was connected by then is served.
        let waiting = UnixStream::connect(path.join("x.sock")).await.unwrap();
        std::fs::remove_dir_all(above.path().join("run")).unwrap();
        assert!(dir.look());
        assert_eq!(mode_of(&path), 0o711);
        let first = listener.accept().await.unwrap();
        drop((waiting, first));
        assert!(accepts(&path.join("x.sock"), &listener).await);
        assert!(accepts(&path.join("sessions/web/y.sock"), &of_web).await);
        assert!(
            SocketDir::claim(&path, &Peers::new(&[]), "image-cache").is_err(),
            "it has the lock"
        );

        // Moved away, and another one in its place that others can write: not taken, until it is fit.
        std::fs::rename(&path, above.path().join("away")).unwrap();
        std::fs::create_dir(&path).unwrap();
        chmod(&path, 0o777);
        assert!(!dir.look());
        assert!(!path.join("x.sock").exists());
        chmod(&path, 0o755);
        assert!(dir.look());
        assert!(accepts(&path.join("x.sock"), &listener).await);
        assert!(accepts(&path.join("sessions/web/y.sock"), &of_web).await);
    }

    #[tokio::test]
    async fn a_socket_that_was_removed_or_replaced_comes_back() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let path = temp.path().join("x.sock");
        let (bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        std::fs::remove_file(&path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        // A stale one, over ours.
        drop(StdListener::bind(temp.path().join("stale")).unwrap());
        std::fs::rename(temp.path().join("stale"), &path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        // What somebody else put there is theirs.
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        dir.look();
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
        dir.look();
        assert!(accepts(&path, &listener).await);
        drop(bound);
        dir.look();
        assert!(!path.exists(), "one that was closed stays away");
    }

    #[tokio::test]
    async fn a_panic_ends_one_connection_alone() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let (_bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let path = temp.path().join("x.sock");
        let (served, mut serves) = tokio::sync::mpsc::channel(4);
        let count = std::sync::atomic::AtomicUsize::new(0);
        let serve = move |_: UnixStream| {
            let nth = count.fetch_add(1, Ordering::Relaxed);
            assert_ne!(nth, 0, "on purpose, in the loop");
            let served = served.clone();
            async move {
                assert_ne!(nth, 1, "on purpose, in the task");
                served.send(nth).await.unwrap();
            }
        };
        let stop = CancellationToken::new();
        let accepting = accept(&listener, &stop, &serve);
        let connecting = async {
            for _ in 0..3 {
                let _ = UnixStream::connect(&path).await.unwrap();
            }
            serves.recv().await
        };
        tokio::select! {
            () = accepting => panic!("it accepts no more"),
            nth = connecting => assert_eq!(nth, Some(2)),
        }
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let open = || SocketDir::open(temp.path(), &Peers::new(&[]));
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
        let refused = SocketDir::open(&link, &Peers::new(&[]));
        assert!(matches!(refused, Err(DirError::Io(_))), "{refused:?}");
    }

    #[test]
    fn ancestors_in_which_it_can_be_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let of = || SocketDir::open(&deep, &Peers::new(&[])).unwrap();
        let a = temp.path().join("a");
        assert!(!of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o777);
        assert!(of().unsafe_ancestors().contains(&a));
        chmod(&a, 0o1777);
        assert!(!of().unsafe_ancestors().contains(&a));
    }

    #[tokio::test]
    async fn modes_with_and_without_other_users() {
        for (allowed, socket_mode, dir_mode) in [(&[][..], 0o600, 0o700), (&[12345], 0o666, 0o711)]
        {
            let temp = tempfile::tempdir().unwrap();
            let dir = SocketDir::open(temp.path(), &Peers::new(allowed)).unwrap();
            let sessions = dir.sessions().unwrap();
            let subdir = session(&sessions, "web").unwrap();
            let (_bound, _listener) = BoundSocket::bind(&subdir, "x.sock").unwrap();
            assert_eq!(mode_of(sessions.path()), dir_mode);
            assert_eq!(mode_of(subdir.path()), dir_mode);
            assert_eq!(mode_of(&subdir.path().join("x.sock")), socket_mode);
        }
    }

    /// A link at the temporary name must not lead the socket elsewhere, nor at its own.
    #[tokio::test]
    async fn planted_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &Peers::new(&[])).unwrap();
        let temporary = format!(".x.sock.{}", std::process::id());
        let target = elsewhere.path().join("planted");
        std::os::unix::fs::symlink(&target, temp.path().join(temporary)).unwrap();
        let (_bound, _listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        std::os::unix::fs::symlink(&target, temp.path().join("y.sock")).unwrap();
        let refused = BoundSocket::bind(&dir, "y.sock");
        assert!(
            matches!(refused, Err(BindError::NotASocket(_))),
            "{refused:?}"
        );
        assert!(!target.exists());
    }
}
