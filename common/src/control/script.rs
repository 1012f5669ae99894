//! Being CRIU's action script. CRIU executes it with its path as the only argument and says
//! the rest in the environment (`criu/action-scripts.c`).

use std::io;
use std::path::PathBuf;

use crate::control::trust::ControlSocket;

/// The action, if this process is an action script: started without arguments and with
/// `CRTOOLS_SCRIPT_ACTION` set.
pub fn action() -> Option<String> {
    if std::env::args_os().len() > 1 {
        return None;
    }
    let action = std::env::var_os("CRTOOLS_SCRIPT_ACTION")?;
    Some(action.to_string_lossy().into_owned())
}

/// No daemon is found.
#[derive(Debug, thiserror::Error)]
pub enum NoDaemon {
    #[error("no {socket} in CRIU's images or work directory: does {program} run with the same -D? ({variable} names another one)")]
    None {
        program: &'static str,
        socket: &'static str,
        variable: &'static str,
    },
    /// Not the same as not being there.
    #[error("CRIU's {which} directory ({dir}) cannot be looked at: {why}. If CRIU has file capabilities (setcap, criu --unprivileged), the kernel does not let this script (uid {uid}) look into CRIU's descriptors; set {variable} to the path of {socket}")]
    Closed {
        which: &'static str,
        dir: String,
        uid: u32,
        socket: &'static str,
        variable: &'static str,
        why: io::Error,
    },
}

/// The daemon that a script asks.
#[derive(Debug, Clone, Copy)]
pub struct Daemon {
    pub program: &'static str,
    pub socket: &'static str,
    /// Names the path of the socket, whatever CRIU's directories are.
    pub variable: &'static str,
}

impl Daemon {
    /// Where its control socket is: as the variable says if it is set, else in the images directory, else in the
    /// current directory (CRIU's work directory).
    pub fn control_socket(&self) -> Result<ControlSocket, NoDaemon> {
        if let Some(path) = std::env::var_os(self.variable) {
            return Ok(ControlSocket::named(path.into()));
        }
        let images = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
        self.found_in(images, PathBuf::new())
    }

    fn found_in(&self, images: Option<PathBuf>, work: PathBuf) -> Result<ControlSocket, NoDaemon> {
        let images = images.into_iter().map(|dir| ("images", dir));
        let mut closed = None;
        for (which, dir) in images.chain([("work", work)]) {
            let path = dir.join(self.socket);
            // Only existence: a connection shows which process listens there.
            match path.symlink_metadata() {
                Ok(_) => return Ok(ControlSocket::found(path)),
                Err(e) if is_absent(&e) => {}
                Err(e) => drop(closed.get_or_insert((which, dir, e))),
            }
        }
        let Self {
            program,
            socket,
            variable,
        } = *self;
        Err(match closed {
            None => NoDaemon::None {
                program,
                socket,
                variable,
            },
            Some((which, dir, why)) => NoDaemon::Closed {
                which,
                dir: dir.display().to_string(),
                uid: rustix::process::geteuid().as_raw(),
                socket,
                variable,
                why,
            },
        })
    }
}

/// Whether that says that there is no such file, and not that it cannot be looked at.
pub fn is_absent(e: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound};
    matches!(e.kind(), NotFound | NotADirectory)
}

/// CRIU's pid: it is this process's parent.
pub fn criu_pid() -> i32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get())
}

/// The root of the tree that CRIU dumps, where CRIU tells (`criu/action-scripts.c`).
pub fn root_pid() -> Option<i32> {
    std::env::var("CRTOOLS_INIT_PID").ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAEMON: Daemon = Daemon {
        program: "image-proxy",
        socket: "x.sock",
        variable: "IMAGE_X_CONTROL",
    };

    /// Case 05: what cannot be looked at is not "not there".
    #[test]
    fn a_directory_that_cannot_be_looked_at_is_not_an_empty_one() {
        let temp = tempfile::tempdir().unwrap();
        let dir = |name: &str| temp.path().join(name);
        for name in ["images", "work"] {
            std::fs::create_dir(dir(name)).unwrap();
        }
        let find = |images: &str| DAEMON.found_in(Some(dir(images)), dir("work"));
        assert!(matches!(find("images"), Err(NoDaemon::None { .. })));
        assert!(matches!(find("nowhere"), Err(NoDaemon::None { .. })));
        // Root may look anywhere, so it is another errno than EACCES.
        std::os::unix::fs::symlink("loop", dir("loop")).unwrap();
        let error = find("loop").unwrap_err().to_string();
        for word in [
            "images directory",
            "symbolic links",
            "IMAGE_X_CONTROL",
            "capabilities",
        ] {
            assert!(error.contains(word), "{error}");
        }
        std::fs::write(dir("work/x.sock"), "").unwrap();
        let work = ControlSocket::found(dir("work/x.sock"));
        assert_eq!(find("loop").unwrap(), work);
        assert_eq!(find("images").unwrap(), work);
        std::fs::write(dir("images/x.sock"), "").unwrap();
        assert_eq!(
            find("images").unwrap(),
            ControlSocket::found(dir("images/x.sock"))
        );
    }
}
