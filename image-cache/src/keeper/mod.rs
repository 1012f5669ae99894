//! Where the memory of images stays when this process ends (`--keep-through-restart`): systemd's descriptor store, or a keeper
//! process ([`process`]).

pub mod backing;
mod fds;
pub mod process;
mod systemd;

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use image_common::control::trust::peer_uid;
use image_common::error_chain::chain;
use rustix::fs::{AtFlags, Mode, OFlags};

use crate::cli::KeepThroughRestart;
use crate::keeper::fds::Descriptors;
use crate::store::journal::{BadJournal, Journal, Kept};
use crate::store::memory::arena::Arena;

/// The hidden subcommand of the keeper process.
pub const COMMAND: &str = "keeper";

/// A keeper answers at once.
const WITHIN: Duration = Duration::from_secs(5);

/// How often it is looked whether its socket is there.
const LOOK: Duration = Duration::from_secs(1);

/// What has to be done as long as this process has all its rights, and one thread.
pub struct Prepared {
    mode: KeepThroughRestart,
    /// `Err`: small pages alone.
    file: Result<File, String>,
    /// What systemd has kept.
    stored: Option<Descriptors>,
}

/// The memory of images, of which another process holds the descriptors.
pub struct Held {
    pub arena: Arc<Arena>,
    pub journal: Arc<Journal>,
    /// What an earlier image-cache has left.
    pub kept: Kept,
    pub holder: Holder,
}

/// Which other process.
pub enum Holder {
    /// `stored`: it has them from an image-cache before.
    Systemd {
        stored: bool,
    },
    Keeper(Arc<Keeping>),
}

/// A keeper process, and the connection to it.
pub struct Keeping {
    /// In which its socket is. The directory may be made again.
    dir: PathBuf,
    arena: Arc<Arena>,
    journal: Arc<Journal>,
    connection: Mutex<UnixStream>,
    ends: AtomicBool,
}

/// Why nothing is kept.
#[derive(Debug, thiserror::Error)]
enum NotKept {
    #[error("no memory can be had that outlives this process")]
    Memory(#[source] io::Error),
    #[error("the keeper process in {dir} does not answer as one. If it is stopped (SIGSTOP), continue it and start image-cache again: it may hold sets of the image-cache before")]
    Keeper {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the keeper process cannot be started in {dir}")]
    Start {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the journal of the image-cache before cannot be read. What it kept stays where it is: the version of image-cache that wrote it can take it over")]
    Journal(#[from] BadJournal),
}

/// To be called before [`image_common::daemon::DaemonArgs::start`].
pub fn prepare(mode: KeepThroughRestart) -> Prepared {
    let file = match mode {
        KeepThroughRestart::Off => Err(String::new()),
        KeepThroughRestart::Auto | KeepThroughRestart::On => {
            backing::with_huge_pages().map_err(|e| chain(&e))
        }
    };
    Prepared {
        mode,
        file,
        stored: systemd::stored(),
    }
}

impl Prepared {
    /// Takes over what an earlier image-cache on `dir` has left, or begins anew. `None`: nothing is kept, and the log says why.
    pub fn open(self, dir: &Path) -> Option<Held> {
        if self.mode == KeepThroughRestart::Off {
            self.leave_alone(dir);
            return None;
        }
        match self.held(dir) {
            Ok(held) => held,
            Err(e) => {
                tracing::error!("--keep-through-restart is off: {}", chain(&e));
                None
            }
        }
    }

    fn leave_alone(self, dir: &Path) {
        let keeper = Directory::open(dir).and_then(|dir| dir.connect());
        if self.stored.is_some() || matches!(keeper, Ok(Some(_))) {
            tracing::error!(
                "sets of an image-cache before may be kept here, and --keep-through-restart is off: they stay where they are. \
                 Start image-cache without that option to have them"
            );
        }
    }

    fn held(self, dir: &Path) -> Result<Option<Held>, NotKept> {
        let keeper = |source| NotKept::Keeper {
            dir: dir.to_owned(),
            source,
        };
        if let Some(stored) = self.stored {
            let (arena, journal, kept) = take_over(stored)?;
            let held = Held {
                arena,
                journal,
                kept,
                holder: Holder::Systemd { stored: true },
            };
            return Ok(Some(held));
        }
        let open = Directory::open(dir).map_err(keeper)?;
        if let Some((connection, stored)) = open.take().map_err(keeper)? {
            if let Some(stored) = stored {
                let (arena, journal, kept) = take_over(stored)?;
                let keeping = Keeping::new(dir, arena.clone(), journal.clone(), connection);
                keeping.watch(None);
                let held = Held {
                    arena,
                    journal,
                    kept,
                    holder: Holder::Keeper(keeping),
                };
                return Ok(Some(held));
            }
            // It has nothing, and ends.
            let _ = ask(&connection, process::END, &[]);
        }
        let file = match (self.file, self.mode) {
            (Ok(file), _) => file,
            (Err(why), KeepThroughRestart::On) => {
                tracing::warn!("--keep-through-restart: memory comes in small pages, which costs about half a second per GiB: {why}");
                Arena::memfd().map_err(NotKept::Memory)?
            }
            (Err(why), _) => {
                tracing::warn!(
                    "--keep-through-restart is off, as it would cost about half a second per GiB: {why}. \
                     A set is lost if image-cache ends before it is restored; --keep-through-restart on keeps it all the same"
                );
                return Ok(None);
            }
        };
        let arena = Arena::new(file).map_err(NotKept::Memory)?;
        let journal = Arena::memfd().and_then(Journal::new);
        let journal = Arc::new(journal.map_err(NotKept::Memory)?);
        let holder = match systemd::is_there() {
            true => Holder::Systemd { stored: false },
            false => {
                let begun = Keeping::begin(dir, &arena, &journal);
                Holder::Keeper(begun.map_err(|source| NotKept::Start {
                    dir: dir.to_owned(),
                    source,
                })?)
            }
        };
        Ok(Some(Held {
            arena,
            journal,
            kept: Kept::default(),
            holder,
        }))
    }
}

fn take_over(stored: Descriptors) -> Result<(Arc<Arena>, Arc<Journal>, Kept), NotKept> {
    let end = Arena::end_of_data(&stored.arena).map_err(NotKept::Memory)?;
    let (journal, kept) = Journal::from(stored.journal)?;
    let arena = Arena::from(stored.arena, end).map_err(NotKept::Memory)?;
    Ok((arena, Arc::new(journal), kept))
}

impl Holder {
    /// Hands them over, if that was not done yet: systemd hears first that the service is ready.
    pub fn store(&self, arena: &Arena, journal: &Journal) {
        let stored = match self {
            Self::Systemd { stored: false } => systemd::store(arena, journal),
            Self::Systemd { stored: true } | Self::Keeper(_) => Ok(()),
        };
        if let Err(e) = stored {
            tracing::error!("systemd does not take the descriptors, so the sets here are lost if image-cache ends: {e}");
        }
    }

    /// For the log.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Systemd { .. } => "systemd's descriptor store",
            Self::Keeper(_) => "a keeper process",
        }
    }

    /// Nothing is to be kept any more.
    pub fn end(&self) {
        match self {
            Self::Systemd { .. } => systemd::forget(),
            Self::Keeper(keeping) => keeping.end(),
        }
    }
}

impl Keeping {
    fn new(
        dir: &Path,
        arena: Arc<Arena>,
        journal: Arc<Journal>,
        connection: UnixStream,
    ) -> Arc<Self> {
        Arc::new(Self {
            dir: dir.to_owned(),
            arena,
            journal,
            connection: Mutex::new(connection),
            ends: AtomicBool::new(false),
        })
    }

    fn begin(dir: &Path, arena: &Arc<Arena>, journal: &Arc<Journal>) -> io::Result<Arc<Self>> {
        let (connection, child) = Directory::open(dir)?.start_keeper()?;
        hand_over(&connection, arena, journal)?;
        let keeping = Self::new(dir, arena.clone(), journal.clone(), connection);
        keeping.watch(Some(child));
        Ok(keeping)
    }

    fn connection(&self) -> io::Result<UnixStream> {
        let connection = self.connection.lock();
        connection
            .unwrap_or_else(PoisonError::into_inner)
            .try_clone()
    }

    /// Looks after the keeper from a thread of its own: one that ends is replaced.
    fn watch(self: &Arc<Self>, child: Option<Child>) {
        let keeping = self.clone();
        let thread = std::thread::Builder::new().name("keeper".to_owned());
        let started = thread.spawn(move || keeping.replace(child));
        if let Err(e) = started {
            tracing::warn!(
                "cannot watch the keeper process, so one that is killed is not replaced: {e}"
            );
        }
    }

    fn replace(&self, mut child: Option<Child>) {
        let mut said = None;
        loop {
            let wrong = self.look();
            if self.ends.load(Ordering::Acquire) {
                return;
            }
            let Some(wrong) = wrong else {
                continue;
            };
            if said != Some(wrong) {
                tracing::error!("{wrong}: the sets here would be lost with image-cache. Another keeper process is started");
            }
            let begun = self.start();
            match begun {
                Ok((connection, new)) => {
                    // One that nothing reaches ends by itself, and is waited for.
                    if let Some(mut old) = child.replace(new) {
                        let _ = old.kill();
                        let _ = old.wait();
                    }
                    *self
                        .connection
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner) = connection;
                    said = None;
                    tracing::warn!("a new keeper process holds what is to be kept");
                }
                Err(e) => {
                    if said != Some(wrong) {
                        tracing::error!("no keeper process can be started yet: {e}");
                    }
                    said = Some(wrong);
                    #[allow(clippy::disallowed_methods, reason = "the thread is for this alone")]
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    fn start(&self) -> io::Result<(UnixStream, Child)> {
        let (connection, mut child) = Directory::open(&self.dir)?.start_keeper()?;
        match hand_over(&connection, &self.arena, &self.journal) {
            Ok(()) => Ok((connection, child)),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    /// Waits until something is wrong with the keeper, or for a moment.
    fn look(&self) -> Option<&'static str> {
        const ENDED: &str = "the keeper process has ended";
        let Ok(connection) = self.connection() else {
            return Some(ENDED);
        };
        let _ = connection.set_read_timeout(Some(LOOK));
        // It says nothing of itself.
        let flags = rustix::net::RecvFlags::PEEK;
        match rustix::net::recv(&connection, &mut [0][..], flags) {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                let socket = self.dir.join(process::SOCKET);
                let gone = rustix::fs::lstat(socket).err() == Some(rustix::io::Errno::NOENT);
                gone.then_some("the socket of the keeper process is gone")
            }
            _ => Some(ENDED),
        }
    }

    fn end(&self) {
        self.ends.store(true, Ordering::Release);
        let ended = self.connection().and_then(|connection| {
            connection.set_read_timeout(Some(WITHIN))?;
            fds::send(&connection, process::END, &[])?;
            // The answer, and the end of the connection with the process.
            while fds::receive(&connection, true)?.is_some() {}
            Ok(())
        });
        if let Err(e) = ended {
            tracing::warn!(
                "the keeper process, which has nothing to keep, may not have ended: {e}"
            );
        }
    }
}

/// The directory that the keeper's socket is in. Its path may be longer than a socket's may be.
struct Directory(OwnedFd);

impl Directory {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }

    /// Whether a keeper is there.
    fn connect(&self) -> io::Result<Option<UnixStream>> {
        let connection = match UnixStream::connect(self.path().join(process::SOCKET)) {
            Ok(connection) => connection,
            Err(e) => {
                return match e.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Ok(None),
                    _ => Err(e),
                }
            }
        };
        // What a keeper gives is served as the memory of processes.
        let uid = peer_uid(&connection)?;
        if uid != 0 && uid != rustix::process::geteuid().as_raw() {
            return Err(io::Error::other(format!("user {uid} listens there")));
        }
        connection.set_read_timeout(Some(WITHIN))?;
        Ok(Some(connection))
    }

    /// The keeper that is there, and what it keeps.
    fn take(&self) -> io::Result<Option<(UnixStream, Option<Descriptors>)>> {
        let deadline = Instant::now() + WITHIN;
        loop {
            let Some(connection) = self.connect()? else {
                return Ok(None);
            };
            match take(&connection) {
                Ok(stored) => return Ok(Some((connection, stored))),
                // It may not have seen the end of the image-cache before, which is over: its directory is ours.
                Err(e) if Instant::now() < deadline && is_closed(&e) => {
                    #[allow(clippy::disallowed_methods, reason = "nothing is served yet")]
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(e) => return Err(e),
            }
        }
    }

    fn start_keeper(&self) -> io::Result<(UnixStream, Child)> {
        match rustix::fs::unlinkat(&self.0, process::SOCKET, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => {}
            Err(e) => return Err(e.into()),
        }
        let path = self.path().join(process::SOCKET);
        let listener = UnixListener::bind(&path)?;
        // As the other sockets. A peer that connected before has to be of the right user, too.
        rustix::fs::chmodat(
            &self.0,
            process::SOCKET,
            Mode::RUSR | Mode::WUSR,
            AtFlags::empty(),
        )?;
        // The first that it serves, whenever it comes to that.
        let connection = UnixStream::connect(&path)?;
        connection.set_read_timeout(Some(WITHIN))?;
        let child = Command::new("/proc/self/exe")
            .arg0("image-cache")
            .arg(COMMAND)
            .env_clear()
            .current_dir(self.path())
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok((connection, child))
    }
}

fn is_closed(e: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(
        e.kind(),
        K::UnexpectedEof | K::ConnectionReset | K::BrokenPipe
    )
}

fn ask(
    connection: &UnixStream,
    what: u8,
    fds: &[BorrowedFd<'_>],
) -> io::Result<(u8, Vec<OwnedFd>)> {
    fds::send(connection, what, fds)?;
    fds::receive(connection, true)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn hand_over(connection: &UnixStream, arena: &Arena, journal: &Journal) -> io::Result<()> {
    let both = [arena.descriptor(), journal.descriptor()];
    match ask(connection, process::KEEP, &both)?.0 {
        process::KEPT => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn take(connection: &UnixStream) -> io::Result<Option<Descriptors>> {
    let (answer, fds) = ask(connection, process::GIVE, &[])?;
    match (answer, <[OwnedFd; 2]>::try_from(fds)) {
        (process::GIVEN, Ok([arena, journal])) => Ok(Some(Descriptors {
            arena: arena.into(),
            journal: journal.into(),
        })),
        (process::NONE, Err(_)) => Ok(None),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
