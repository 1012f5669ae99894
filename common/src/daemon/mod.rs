//! How both daemons start: the options that CRIU has too, directories, log, background.

pub mod hardening;
pub mod heap;
pub mod oom;
pub mod shutdown;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use rustix::pipe::{pipe_with, PipeFlags};
use rustix::process::{Resource, Rlimit};
use rustix::thread::CapabilitySet;
use tracing::level_filters::LevelFilter;

use crate::criu_io::allowed_uids::AllowedUids;
use crate::criu_io::socket_dir::{keep, DirError, SocketDir};
use crate::daemon::hardening::{harden, HardenError};
use crate::daemon::shutdown::ignore_signals;
use crate::log::{self, Log};
use crate::tasks;
use crate::units::{parse_some, parse_time_or_never};

/// As Rust's own.
const EXIT_PANIC: u8 = 101;

/// Options that mean the same for both daemons, spelled as CRIU spells them.
#[derive(Debug, Clone, Args)]
pub struct DaemonArgs {
    /// Directory in which CRIU looks for the sockets (its own -D); may be given several times
    #[arg(
        short = 'D',
        long = "images-dir",
        value_name = "DIR",
        default_value = ".",
        value_parser = parse_some::<PathBuf>
    )]
    pub images_dir: Vec<PathBuf>,

    /// Directory to change to, for the log and pid files; the sockets are in it too [default:
    /// the first images directory]
    #[arg(short = 'W', long, value_name = "DIR", value_parser = parse_some::<PathBuf>)]
    pub work_dir: Option<PathBuf>,

    /// Append the log to FILE (in the work directory) instead of standard error; SIGHUP opens it
    /// again
    #[arg(short = 'o', long, value_name = "FILE", value_parser = parse_some::<PathBuf>)]
    pub log_file: Option<PathBuf>,

    /// Verbosity: -v0 nothing, -v1 errors, -v2 warnings (default), -v3 sessions and sets,
    /// -v4 every image; each further v adds one
    #[arg(
        short = 'v',
        long = "verbosity",
        value_name = "NUM",
        num_args = 0..=1,
        default_missing_value = "",
        action = clap::ArgAction::Append
    )]
    pub verbosity: Vec<String>,

    /// Go to the background once every socket accepts
    #[arg(short = 'd', long)]
    pub daemon: bool,

    /// Write the daemon's pid to FILE (in the work directory)
    #[arg(long, value_name = "FILE", value_parser = parse_some::<PathBuf>)]
    pub pidfile: Option<PathBuf>,

    /// Write one zero byte to descriptor FD, and close it, once every socket accepts
    #[arg(long, value_name = "FD")]
    pub status_fd: Option<RawFd>,

    /// Also serve user UID (a number) on the unix sockets, and without TLS on ports on loopback,
    /// besides root and the daemon's own user; may be given several times. The sockets then have
    /// mode 0666 and their peers are checked
    #[arg(long, value_name = "UID")]
    pub allow_uid: Vec<u32>,

    /// Lock all memory: nothing of an image is swapped out. Wants CAP_IPC_LOCK or a large enough
    /// limit (ulimit -l)
    #[arg(long)]
    pub mlock: bool,

    /// On SIGTERM, SIGINT or SIGQUIT, how long running sessions may take to finish. 0: as long as
    /// they like, until a second signal
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_time_or_never)]
    pub grace_period: Duration,
}

/// So much of a `sun_path` (108 bytes) is left beside `/streamer-capture.sock`. CRIU cuts the name of the socket without a
/// word where its own -D is longer, and finds no daemon.
pub const MAX_DIR_BYTES: usize = 85;

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "the directory {0} has {1} characters: no CRIU can connect to sockets there, as it cuts what is longer than {MAX_DIR_BYTES}; \
         take a shorter one, or a relative one from a directory near it"
    )]
    TooLong(PathBuf, usize),
    #[error("cannot put sockets into the directory {path}")]
    Directory {
        path: PathBuf,
        #[source]
        source: DirError,
    },
    #[error("cannot write {path}")]
    File {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("verbosity `{0}` is neither a number nor a run of `v`")]
    Verbosity(String),
    #[error("status descriptor {0} is not open")]
    StatusFd(RawFd),
    #[error("cannot go to the background")]
    Fork(#[source] io::Error),
    #[error("cannot set how signals are treated")]
    Signals(#[source] io::Error),
    #[error("cannot start the thread that writes the log")]
    Log(#[source] io::Error),
    #[error(transparent)]
    Harden(#[from] HardenError),
}

/// A started process that has not said yet that it is ready.
pub struct Starting {
    /// Every directory that gets sockets, each once.
    pub dirs: Vec<SocketDir>,
    /// The users that may connect to them.
    pub allowed_uids: Arc<AllowedUids>,
    claims: Claims,
    /// The work directory, for what is opened in it later.
    work_dir: Option<PathBuf>,
    status: Option<File>,
    pidfile: Option<PathBuf>,
    /// The parent of a background daemon waits for a byte here.
    parent: Option<File>,
}

/// Removes the pid file, and the files of the locks, when the daemon ends.
pub struct PidFile {
    path: Option<PathBuf>,
    _claims: Claims,
}

struct Claims(Vec<SocketDir>);

impl Drop for Claims {
    fn drop(&mut self) {
        self.0.iter().for_each(SocketDir::release);
    }
}

/// Runs what `main` is for, and gives what it gives back: on an error one line on standard error with the whole chain,
/// and 1. The log is written out then. Nothing of it needs a standard error or output that can be written.
pub fn run_main<E>(program: &str, main: impl FnOnce() -> Result<u8, E>) -> std::process::ExitCode
where
    E: AsRef<dyn std::error::Error + Send + Sync>,
{
    log::hook_panics();
    // What `main` has is dropped by its panic, and nothing of it is looked at again.
    let outcome = catch_unwind(AssertUnwindSafe(main));
    let code = match outcome {
        Ok(Ok(code)) => code,
        Ok(Err(e)) => {
            let text = crate::error_chain::chain(e.as_ref());
            if log::is_file() {
                tracing::error!("{text}");
            }
            log::flush();
            log::say(&format!("{program}: {text}"));
            1
        }
        // The hook has said it.
        Err(_) => EXIT_PANIC,
    };
    log::flush();
    code.into()
}

impl DaemonArgs {
    fn level(&self) -> Result<LevelFilter, StartError> {
        let mut level = 2;
        for value in &self.verbosity {
            level = match value.as_str() {
                v if v.bytes().all(|b| b == b'v') => level + 1 + v.len(),
                number => number
                    .parse()
                    .map_err(|_| StartError::Verbosity(number.into()))?,
            };
        }
        Ok(match level {
            0 => LevelFilter::OFF,
            1 => LevelFilter::ERROR,
            2 => LevelFilter::WARN,
            3 => LevelFilter::INFO,
            4 => LevelFilter::DEBUG,
            _ => LevelFilter::TRACE,
        })
    }

    /// Everything that can fail before a socket opens: directories, log, descriptors, rights; goes
    /// to the background with `-d`. Call it before any thread exists. `ports`: on which the
    /// daemon will listen. `besides`: capabilities that this daemon needs and the other does not.
    pub fn start(
        &self,
        program: &'static str,
        ports: &[u16],
        besides: CapabilitySet,
    ) -> Result<Starting, StartError> {
        ignore_signals().map_err(StartError::Signals)?;
        let level = self.level()?;
        let status = self.status_fd.map(take_status_fd).transpose()?;
        // Opened before the chdir: relative directories are relative to where we were started.
        let allowed_uids = AllowedUids::new(&self.allow_uid);
        let mut dirs: Vec<SocketDir> = Vec::new();
        let work_dir = self.work_dir.as_ref().unwrap_or(&self.images_dir[0]);
        for path in self.images_dir.iter().chain([work_dir]) {
            let error = |source: DirError| StartError::Directory {
                path: path.clone(),
                source,
            };
            // As it was given, since CRIU is given the same: a relative -D reaches further.
            let length = path.as_os_str().len();
            if length > MAX_DIR_BYTES {
                return Err(StartError::TooLong(path.clone(), length));
            }
            let absolute = path.canonicalize().map_err(|e| error(e.into()))?;
            if !dirs.iter().any(|d| d.same(&absolute)) {
                dirs.push(SocketDir::claim(&absolute, &allowed_uids, program).map_err(error)?);
            }
        }
        std::env::set_current_dir(work_dir).map_err(|source| StartError::Directory {
            path: work_dir.clone(),
            source: source.into(),
        })?;
        // Memory of frozen processes is what goes through here: nothing we make is for others.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
        raise_descriptor_limit();
        let log = Log::open(self.log_file.as_deref()).map_err(|source| StartError::File {
            path: self.log_file.clone().unwrap_or_default(),
            source,
        })?;
        let parent = if self.daemon {
            Some(fork_to_background()?)
        } else {
            None
        };
        dirs.iter().for_each(SocketDir::names_holder);
        log::install(level, log);
        // Behind the fork, whose child does not inherit locked memory.
        harden(self.mlock, ports.iter().copied(), besides)?;
        // And behind that, as rights are a thread's own.
        log::start().map_err(StartError::Log)?;
        for dir in &dirs {
            let path = dir.path();
            if path.as_os_str().len() > MAX_DIR_BYTES {
                tracing::warn!(
                    "{} has more than {MAX_DIR_BYTES} characters: CRIU can only connect to the sockets there with a shorter, relative -D",
                    path.display()
                );
            }
            for ancestor in dir.unsafe_ancestors() {
                tracing::warn!(
                    "{}: other users can put another directory in its place, because {} belongs to another user or others can write there; \
                     CRIU would then use that directory",
                    dir.path().display(), ancestor.display()
                );
            }
        }
        Ok(Starting {
            claims: Claims(dirs.clone()),
            work_dir: std::env::current_dir().ok(),
            dirs,
            allowed_uids,
            status,
            pidfile: self.pidfile.clone(),
            parent,
        })
    }
}

impl Starting {
    /// Looks after the directories from here on: what is deleted is made again.
    pub fn keep_dirs(&self) {
        let (dirs, work_dir) = (self.dirs.clone(), self.work_dir.clone());
        let pidfile = self.pidfile.clone();
        tasks::spawn_lasting("looking after the directories", move || {
            let (work_dir, pidfile) = (work_dir.clone(), pidfile.clone());
            keep(dirs.clone(), move |dir| {
                if work_dir.as_deref() != Some(dir.path()) {
                    return;
                }
                let moved = std::env::set_current_dir(dir.path());
                let written = moved.and_then(|()| pidfile.as_deref().map_or(Ok(()), write_pid));
                if let Err(e) = written {
                    tracing::error!("{}, the work directory: {e}", dir.path().display());
                }
                log::reopen();
            })
        });
    }

    /// Every socket accepts: tells the process that waits for that.
    pub fn ready(self) -> Result<PidFile, StartError> {
        let pidfile = PidFile {
            path: self.pidfile,
            _claims: self.claims,
        };
        if let Some(path) = &pidfile.path {
            write_pid(path).map_err(|source| StartError::File {
                path: path.clone(),
                source,
            })?;
        }
        // A unit with Type=notify; without NOTIFY_SOCKET it does nothing, and systemd itself says
        // what it missed.
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
        if let Some(mut status) = self.status {
            // The process that asked may be gone. The daemon serves all the same.
            let _ = status.write_all(&[0]);
        }
        if let Some(mut parent) = self.parent {
            log::detach();
            detach_stdio().map_err(StartError::Fork)?;
            let _ = parent.write_all(&[0]);
        }
        Ok(pidfile)
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn write_pid(path: &Path) -> io::Result<()> {
    std::fs::write(path, std::process::id().to_string())
}

fn take_status_fd(fd: RawFd) -> Result<File, StartError> {
    if fd < 0 || !Path::new(&format!("/proc/self/fd/{fd}")).exists() {
        return Err(StartError::StatusFd(fd));
    }
    let duplicate = |fd: BorrowedFd<'_>| {
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 3);
        copy.map(File::from)
            .map_err(|_| StartError::StatusFd(fd.as_raw_fd()))
    };
    match fd {
        0 => duplicate(rustix::stdio::stdin()),
        1 => duplicate(rustix::stdio::stdout()),
        2 => duplicate(rustix::stdio::stderr()),
        fd => {
            // SAFETY: the descriptor is open (just checked, and no other thread exists yet),
            // it was given to this process by its parent for this purpose, and nothing else
            // here owns it.
            let owned = unsafe { OwnedFd::from_raw_fd(fd) };
            // Its reader may wait for the end of file too: for no child of ours.
            let _ = rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC);
            Ok(owned.into())
        }
    }
}

/// Forks; the parent waits for the child's word and exits with its verdict, the child gets
/// the pipe to say it on. Until then the child's errors still reach the terminal.
fn fork_to_background() -> Result<File, StartError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| StartError::Fork(e.into()))?;
    let (mut reader, writer) = (File::from(reader), File::from(writer));
    // SAFETY: no thread exists yet (the runtime starts after this), so the child may do
    // everything that the parent could.
    match unsafe { nix::unistd::fork() } {
        Err(e) => Err(StartError::Fork(e.into())),
        Ok(nix::unistd::ForkResult::Parent { .. }) => {
            drop(writer);
            let ready = matches!(reader.read(&mut [0]), Ok(1));
            std::process::exit(i32::from(!ready));
        }
        Ok(nix::unistd::ForkResult::Child) => {
            drop(reader);
            nix::unistd::setsid().map_err(|e| StartError::Fork(e.into()))?;
            Ok(writer)
        }
    }
}

/// A background daemon must not hold its starter's terminal or pipes open.
fn detach_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// A restore holds a pipe per image it reads, a dump one per image it writes: take what the
/// hard limit gives.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let _ = rustix::process::setrlimit(Resource::Nofile, raised);
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        daemon: DaemonArgs,
    }

    fn level(args: &[&str]) -> LevelFilter {
        let all = ["x"].iter().chain(args);
        Cli::try_parse_from(all).unwrap().daemon.level().unwrap()
    }

    #[test]
    fn verbosity_as_criu_has_it() {
        assert_eq!(level(&[]), LevelFilter::WARN);
        assert_eq!(level(&["-v"]), LevelFilter::INFO);
        assert_eq!(level(&["-vv"]), LevelFilter::DEBUG);
        assert_eq!(level(&["-v", "-v"]), LevelFilter::DEBUG);
        assert_eq!(level(&["-v1"]), LevelFilter::ERROR);
        assert_eq!(level(&["-v4", "-D", "/"]), LevelFilter::DEBUG);
        assert_eq!(level(&["--verbosity=0"]), LevelFilter::OFF);
        let odd = Cli::try_parse_from(["x", "-vx"]).unwrap().daemon.level();
        assert!(matches!(odd, Err(StartError::Verbosity(_))));
    }
}
