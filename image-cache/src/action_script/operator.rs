//! The socket of a hold: an operator decides there while no image-cache runs, and an image-cache that starts asks for the
//! link's port.

use std::collections::HashSet;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use image_common::control::hold::{socket_name, Held};
use image_common::control::status::{Session, Set, Status};
use image_common::control::{self, Answer, ControlError, Request};
use image_common::error_chain::chain;
use image_common::image::SessionName;
use image_common::link::codec::SetNumber;
use image_common::link::session_id::{SessionId, Wanted};
use image_common::log::say;
use image_common::procfs::process::Process;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Uid};
use rustix::process::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::action_script::state::{Decision, State};

/// Served at once; more wait to be accepted.
const MOST: usize = 8;

/// How often it is looked whether the socket is still there: the directory of a service goes with it.
const LOOK: Duration = Duration::from_millis(500);

/// How long one peer may take.
const WITHIN: Duration = Duration::from_secs(10);

/// What the socket is served with.
pub struct Operators {
    pub held: Held,
    pub dir: PathBuf,
    /// The user of the image-cache, which asks for the port.
    pub daemon_uid: u32,
    /// Users that are believed.
    pub believed: HashSet<u32>,
    pub began: Instant,
    /// Answers on their way.
    pub answering: TaskTracker,
}

/// A socket in the directory, and its file, which goes with this.
struct Listening {
    listener: UnixListener,
    dir: OwnedFd,
    name: String,
    file: (u64, u64),
}

impl Listening {
    /// Under a temporary name first: what has the name accepts. `owner`: the user that may connect besides root.
    fn bind(path: &Path, name: String, owner: u32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())?;
        let through = std::os::fd::AsRawFd::as_raw_fd(&dir);
        let temporary = format!(".{name}.{}", std::process::id());
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
        let bound = || -> io::Result<((u64, u64), UnixListener)> {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            // A bound file gets the mode of its socket.
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            let address = SockAddr::unix(format!("/proc/self/fd/{through}/{temporary}"))?;
            socket.bind(&address)?;
            socket.listen(64)?;
            socket.set_nonblocking(true)?;
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&dir, &temporary, flags, Mode::empty())?;
            let stat = rustix::fs::fstat(&file)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            if owner != geteuid().as_raw() && geteuid().is_root() {
                let owner = Some(Uid::from_raw(owner));
                rustix::fs::chownat(&file, "", owner, None, AtFlags::EMPTY_PATH)?;
            }
            rustix::fs::renameat(&dir, &temporary, &dir, &name)?;
            let listener = UnixListener::from_std(StdListener::from(OwnedFd::from(socket)))?;
            Ok(((stat.st_dev, stat.st_ino), listener))
        };
        let bound = bound().inspect_err(|_| {
            let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
        });
        let (file, listener) = bound?;
        Ok(Self {
            listener,
            dir,
            name,
            file,
        })
    }

    /// Whether the file by this path is the own one.
    fn is_at(&self, path: &Path) -> bool {
        let stat = rustix::fs::lstat(path.join(&self.name));
        stat.is_ok_and(|s| (s.st_dev, s.st_ino) == self.file)
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let stat = rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        if stat.is_ok_and(|s| (s.st_dev, s.st_ino) == self.file) {
            let _ = rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty());
        }
    }
}

/// Listens on the socket of the hold for as long as this future lives.
pub async fn serve(operators: Arc<Operators>, state: State) {
    let name = socket_name(&operators.held.id);
    let places = Arc::new(Semaphore::new(MOST));
    let mut said = None;
    loop {
        let listening = match Listening::bind(&operators.dir, name.clone(), operators.daemon_uid) {
            Ok(listening) => listening,
            Err(e) => {
                let text = format!(
                    "image-cache: post-restore: cannot listen on {}: {e}; no operator can decide there until that can be done",
                    operators.dir.join(&name).display()
                );
                if said.as_ref() != Some(&text) {
                    say(&text);
                    said = Some(text);
                }
                state.change(|hold| hold.socket = Some(false));
                tokio::time::sleep(LOOK).await;
                continue;
            }
        };
        said = None;
        state.change(|hold| hold.socket = Some(true));
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return;
            };
            let stream = tokio::select! {
                accepted = listening.listener.accept() => accepted.map(|(stream, _)| stream),
                () = tokio::time::sleep(LOOK) => match listening.is_at(&operators.dir) {
                    true => continue,
                    false => break,
                },
            };
            let Ok(stream) = stream else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            let (operators, state) = (operators.clone(), state.clone());
            tokio::spawn(async move {
                let served = operators.serve(stream, &state);
                let served = tokio::time::timeout(WITHIN, served).await;
                if let Ok(Err(e)) = served {
                    say(&format!(
                        "image-cache: post-restore: the socket of this hold: {}",
                        chain(&e)
                    ));
                }
                drop(place);
            });
        }
    }
}

impl Operators {
    async fn serve(&self, mut stream: UnixStream, state: &State) -> Result<(), ControlError> {
        let uid = stream.peer_cred()?.uid();
        if !self.believed.contains(&uid) {
            say(&format!("image-cache: post-restore: uid {uid} is not believed, and was refused at the socket of this hold"));
            return Ok(());
        }
        let request = match control::receive(&mut stream).await {
            Ok(request) => request,
            // It has only looked.
            Err(ControlError::Gone) => return Ok(()),
            Err(e) => return Err(e),
        };
        // What is decided now is told before the script ends.
        let answering = self.answering.token();
        let done = match request {
            Request::Status => {
                let status = Box::new(self.status(state));
                return control::reply(&mut stream, &Answer::Status { status }).await;
            }
            Request::YieldPort => {
                give_port_to(&stream, state).await;
                Ok(())
            }
            Request::Release { session, .. } => {
                self.decide(state, &session, Decision::GoOn("an operator"))
            }
            Request::Drop { session, .. } => self.decide(
                state,
                &session,
                Decision::GiveUp("an operator has dropped it".to_owned()),
            ),
            _ => Err(
                "this is the script of a restore that holds: it takes release, drop and status"
                    .to_owned(),
            ),
        };
        let answer = match done {
            Ok(()) => Answer::Done,
            Err(reason) => Answer::Failed { reason },
        };
        let replied = control::reply(&mut stream, &answer).await;
        drop(answering);
        replied
    }

    fn decide(&self, state: &State, session: &str, decision: Decision) -> Result<(), String> {
        let Held { id, set, .. } = &self.held;
        let wanted: Wanted = session.parse().map_err(|e| format!("{session:?}: {e}"))?;
        let name = SessionName::new(&self.held.session).map_err(|e| e.to_string())?;
        let own = Some(SessionId::of_key(self.held.key));
        if !wanted.includes(&name, own, SetNumber(*set)) {
            return Err(format!(
                "this restore holds set {set} of session {name} ({id}), and not {wanted}; nothing was done"
            ));
        }
        state.decide_if(decision, |hold| match hold.orphaned {
            true => Ok(()),
            false => Err(format!(
                "an image-cache runs that this restore holds for: ask that one (`image-cache release {id}` or `drop {id}`); nothing was done"
            )),
        })
    }

    fn status(&self, state: &State) -> Status {
        let Held {
            id,
            session,
            snapshot,
            peer,
            ..
        } = &self.held;
        let set = Set {
            snapshot: snapshot.clone(),
            protocol: "hold".to_owned(),
            state: state.now().as_str().to_owned(),
            gated: true,
            ..Set::default()
        };
        let session = Session {
            name: session.clone(),
            id: Some(id.clone()),
            peer: Some(peer.clone()),
            age_seconds: self.began.elapsed().as_secs_f64(),
            sets: vec![set],
            ..Session::default()
        };
        Status {
            program: "image-cache's script of a restore that holds,".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            sessions: vec![state.show(session)],
            ..Status::default()
        }
    }
}

/// Closes the link's port for an image-cache that starts, as long as that one runs.
async fn give_port_to(stream: &UnixStream, state: &State) {
    let daemon = Process::of_any_peer(stream);
    state.change(|hold| hold.yielded += 1);
    let watched = state.clone();
    tokio::spawn(async move {
        match daemon {
            Some(daemon) => daemon.exited().await,
            // The kernel tells no more than that it has come, and gone again.
            None => {
                watched.until(|hold| !hold.orphaned).await;
                watched.until(|hold| hold.orphaned).await;
            }
        }
        watched.change(|hold| hold.yielded -= 1);
    });
    state.until(|hold| !hold.port_open).await;
}
