//! The scripts of restores that hold, as an operator and an image-cache that starts reach them: each listens on a socket
//! in the directory of the image-cache that it holds for.

use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use image_common::control::hold::{SOCKET_PREFIX, SOCKET_SUFFIX};
use image_common::control::status::{Session, Status};
use image_common::control::trust::ControlSocket;
use image_common::control::{self, ControlError, Request};
use image_common::error_chain::chain;
use image_common::image::SessionName;
use image_common::link::session_id::{SessionId, Wanted};

/// More than a host restores at once.
const MOST: usize = 256;

/// Why no holding script was asked.
#[derive(Debug, thiserror::Error)]
pub enum NotAsked {
    #[error("no image-cache runs here, and no restore here holds {0}; nothing was done")]
    None(Wanted),
    #[error("no image-cache runs here, and {wanted} is not one restore that holds but several; nothing was done. Say which by its id:{list}")]
    Several { wanted: Wanted, list: String },
    #[error("{text:?}: {why}")]
    Bad { text: String, why: String },
    #[error("the script of the restore that holds, at {path}")]
    Script {
        path: PathBuf,
        #[source]
        source: ControlError,
    },
}

/// A script that holds, and what it says of itself.
struct Script {
    socket: PathBuf,
    session: Session,
}

impl Script {
    fn is_wanted(&self, wanted: &Wanted) -> bool {
        let Ok(name) = SessionName::new(&self.session.name) else {
            return false;
        };
        let id = self.session.id.as_deref().and_then(|id| id.parse().ok());
        let id: Option<SessionId> = match id {
            Some(Wanted::Id(id)) => Some(id),
            _ => None,
        };
        wanted.is_session(&name, id)
    }
}

/// The sockets of the scripts that hold, or have held, in this directory.
fn sockets_in(dir: &Path) -> Vec<PathBuf> {
    let is_hold = |name: &str| name.starts_with(SOCKET_PREFIX) && name.ends_with(SOCKET_SUFFIX);
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| is_hold(name)).take(MOST).collect();
    names.sort_unstable();
    names.into_iter().map(|name| dir.join(name)).collect()
}

/// The scripts that answer.
fn scripts_in(dir: &Path) -> Vec<Script> {
    let scripts = sockets_in(dir).into_iter().filter_map(|socket| {
        let status = control::status(&ControlSocket::found(socket.clone()));
        let session = status.ok()?.sessions.pop()?;
        Some(Script { socket, session })
    });
    scripts.collect()
}

/// Whether no image-cache is there, as far as this error of asking it tells.
pub fn is_absent(e: &ControlError) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound};
    let kind = match e {
        ControlError::Connect { source, .. } => source.kind(),
        _ => return false,
    };
    matches!(kind, ConnectionRefused | NotFound)
}

/// The directory of a control socket.
fn dir_of(socket: &ControlSocket) -> &Path {
    match socket.path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// Asks the one script that is meant, of those beside the socket of an image-cache that does not run. `None`: no restore
/// holds there.
pub fn decide(daemon: &ControlSocket, request: &Request) -> Option<Result<(), NotAsked>> {
    let (Request::Release { session: text, .. } | Request::Drop { session: text, .. }) = request
    else {
        return None;
    };
    let mut scripts = scripts_in(dir_of(daemon));
    if scripts.is_empty() {
        return None;
    }
    let wanted: Wanted = match text.parse() {
        Ok(wanted) => wanted,
        Err(e) => {
            let (text, why) = (text.clone(), format!("{e}"));
            return Some(Err(NotAsked::Bad { text, why }));
        }
    };
    scripts.retain(|script| script.is_wanted(&wanted));
    Some(match &scripts[..] {
        [] => Err(NotAsked::None(wanted)),
        [Script { socket, .. }] => {
            let asked = control::ask(&ControlSocket::found(socket.clone()), request);
            asked.map_err(|source| NotAsked::Script {
                path: socket.clone(),
                source,
            })
        }
        _ => {
            let mut list = String::new();
            for Script { session, .. } in &scripts {
                let id = session.id.as_deref().unwrap_or("?");
                let _ = write!(
                    list,
                    "\n  {id}  session {}: {}",
                    session.name, session.state
                );
            }
            Err(NotAsked::Several { wanted, list })
        }
    })
}

/// What restores hold beside the socket of an image-cache that does not run. `None`: there are none.
pub fn status(daemon: &ControlSocket) -> Option<Status> {
    let scripts = scripts_in(dir_of(daemon));
    let sessions: Vec<_> = scripts.into_iter().map(|script| script.session).collect();
    (!sessions.is_empty()).then(|| Status {
        program: "image-cache (not running)".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        sessions,
        ..Status::default()
    })
}

/// Asks the scripts that hold in these directories to let go of the port. Gives how many do. Blocking.
pub fn yield_port(dirs: &[PathBuf]) -> usize {
    let sockets = dirs.iter().flat_map(|dir| sockets_in(dir));
    let yielded = sockets.filter(|path| {
        let asked = control::ask(&ControlSocket::found(path.clone()), &Request::YieldPort);
        match &asked {
            Ok(()) => tracing::info!(
                "{}: the script of a restore that holds lets go of the port",
                path.display()
            ),
            // What an earlier script has left.
            Err(e) if is_absent(e) => {}
            Err(e) => tracing::warn!("{}: {}", path.display(), chain(e)),
        }
        asked.is_ok()
    });
    yielded.count()
}
