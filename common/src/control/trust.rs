//! Whether the daemon that answers on a control socket is one whose word counts.
//!
//! The action script lets CRIU kill a process because the daemon says so, and it finds that daemon by a file name in
//! CRIU's images or work directory, where other users may be able to put a socket. So it looks which user answers, and not
//! only where: the kernel tells which user listens at the other end of the connection (SO_PEERCRED), and the directories
//! above the socket tell who could have put it there. The same holds for what an operator asks as root.
//!
//! - Root, and the user who asks: trusted.
//! - Another user, at a path that was named (`IMAGE_PROXY_CONTROL`, `IMAGE_CACHE_CONTROL`, `--control`): trusted if only
//!   root, the user who asks and that user can write any directory from the root down to the socket.
//! - Another user, at a socket that was only found: trusted if it is the account of a service, which owns that one
//!   directory and has it from root: `User=` or `DynamicUser=` with `RuntimeDirectory=`, as in `dist/*.service`.
//! - A user whom the kernel cannot name in this user namespace: never.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use clap::Args;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::fs::{fstat, open, openat, Mode, OFlags};
use rustix::process::geteuid;

use crate::units::parse_some;

/// `--control`, as every command has it.
#[derive(Debug, Clone, Args)]
pub struct ControlArgs {
    /// The daemon's control socket [default: the one in this directory]
    #[arg(long, value_name = "PATH", value_parser = parse_some::<PathBuf>)]
    pub control: Option<PathBuf>,
}

impl ControlArgs {
    /// `name`: of the socket in the current directory.
    pub fn socket(&self, name: &str) -> ControlSocket {
        match &self.control {
            Some(path) => ControlSocket::named(path.clone()),
            None => ControlSocket::found(name.into()),
        }
    }
}

/// Where a daemon's control socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlSocket {
    pub path: PathBuf,
    /// The caller named this path explicitly.
    named: bool,
}

impl ControlSocket {
    /// The socket at a path that the user gave.
    pub fn named(path: PathBuf) -> Self {
        Self { path, named: true }
    }

    /// The socket at a path where a daemon of this project makes it.
    pub fn found(path: PathBuf) -> Self {
        Self { path, named: false }
    }

    /// Whether the daemon at the other end of this connection to it is one to believe.
    pub fn check(&self, stream: &UnixStream) -> Result<(), Untrusted> {
        let asker = geteuid().as_raw();
        let peer = peer_uid(stream).map_err(Untrusted::Unseen)?;
        if peer == 0 || peer == asker {
            return Ok(());
        }
        let untrusted = |why| Untrusted::Stranger { peer, asker, why };
        if peer == unknown_user() {
            return Err(untrusted(Why::Unknown));
        }
        // After the connection: what an owner of one of these directories changes now is theirs, and so was the peer.
        let above = directories_above(&self.path).map_err(|e| untrusted(Why::Directories(e)))?;
        judge(peer, asker, self.named, &above).map_err(untrusted)
    }
}

/// The user at the other end, as the kernel tells.
pub fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    // Not rustix's: its pid is never 0, as that of a daemon in another pid namespace is.
    let credentials = nix::sys::socket::getsockopt(stream, PeerCredentials)?;
    Ok(credentials.uid())
}

/// No daemon whose word counts.
#[derive(Debug, thiserror::Error)]
pub enum Untrusted {
    #[error("the kernel does not tell which user listens there")]
    Unseen(#[source] io::Error),
    #[error("it is not believed: it runs as uid {peer}, which is neither root nor uid {asker}, and {why}")]
    Stranger { peer: u32, asker: u32, why: Why },
}

/// Why another user's daemon is not believed.
#[derive(Debug)]
pub enum Why {
    Unknown,
    Directories(io::Error),
    Writable(PathBuf),
    Owner(PathBuf, u32),
    NotAService,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => write!(
                f,
                "that is what the kernel says of a user whom this user namespace does not know"
            ),
            Self::Directories(e) => write!(f, "the directories above the socket cannot be looked at: {e}"),
            Self::Writable(dir) => write!(
                f,
                "others can write the directory {}, so any user could have put it there",
                dir.display()
            ),
            Self::Owner(dir, owner) => write!(
                f,
                "the directory {} belongs to uid {owner}, which could have put it there",
                dir.display()
            ),
            Self::NotAService => write!(
                f,
                "a socket that is only found counts from a service's account alone. If it is the daemon that you mean, name \
                 the path of the socket (IMAGE_PROXY_CONTROL, IMAGE_CACHE_CONTROL or --control)"
            ),
        }
    }
}

/// A directory, as far as it says which users can put files there.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    path: PathBuf,
    owner: u32,
    group: u32,
    mode: u32,
}

fn judge(peer: u32, asker: u32, named: bool, above: &[Directory]) -> Result<(), Why> {
    if !named && !is_service(peer) {
        return Err(Why::NotAService);
    }
    for (level, dir) in above.iter().enumerate() {
        let theirs = dir.owner == peer && (level == 0 || named);
        if dir.owner != 0 && dir.owner != asker && !theirs {
            return Err(Why::Owner(dir.path.clone(), dir.owner));
        }
        // In a sticky directory no user moves another's files, but any user can be the first to make a name.
        let group = dir.mode & 0o020 != 0 && dir.group != 0;
        if group || dir.mode & 0o002 != 0 {
            return Err(Why::Writable(dir.path.clone()));
        }
    }
    Ok(())
}

/// Accounts that people do not have: of the system (`SYS_UID_MAX` of login.defs), and those that systemd makes up for a
/// unit (`DynamicUser=`, systemd's `uid-range.h`).
fn is_service(uid: u32) -> bool {
    matches!(uid, 1..=999 | 61_184..=65_519)
}

/// What the kernel says of a user who has no number in this user namespace.
fn unknown_user() -> u32 {
    let text = std::fs::read_to_string("/proc/sys/fs/overflowuid");
    let said = text.ok().and_then(|text| text.trim().parse().ok());
    said.unwrap_or(65_534)
}

/// The directory of `path`, and all above it. By descriptors: no name is looked up twice.
fn directories_above(path: &Path) -> io::Result<Vec<Directory>> {
    /// PATH_MAX is 4,096 bytes, of two for each.
    const DEEPEST: usize = 2_048;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut dir = open(parent, flags, Mode::empty())?;
    let mut stat = fstat(&dir)?;
    let mut found = Vec::new();
    while found.len() < DEEPEST {
        let name = std::os::fd::AsRawFd::as_raw_fd(&dir.as_fd());
        let name = std::fs::read_link(format!("/proc/self/fd/{name}"));
        found.push(Directory {
            path: name.unwrap_or_else(|_| parent.to_owned()),
            owner: stat.st_uid,
            group: stat.st_gid,
            mode: stat.st_mode,
        });
        let above = openat(&dir, "..", flags, Mode::empty())?;
        let of_above = fstat(&above)?;
        if (of_above.st_dev, of_above.st_ino) == (stat.st_dev, stat.st_ino) {
            return Ok(found);
        }
        (dir, stat) = (above, of_above);
    }
    Err(io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u32 = 1_000;
    const SERVICE: u32 = 61_500;
    const USER: u32 = 1_500;

    /// The directories of a path, the nearest first: owner and mode.
    fn above(dirs: &[(u32, u32)]) -> Vec<Directory> {
        let dirs = dirs.iter().enumerate();
        dirs.map(|(n, &(owner, mode))| Directory {
            path: format!("/{n}").into(),
            owner,
            group: owner,
            mode: 0o40_000 | mode,
        })
        .collect()
    }

    #[test]
    fn whose_word_counts() {
        const ROOT: (u32, u32) = (0, 0o755);
        // /run/image-proxy of a unit; a user's home; in /tmp; below another user's.
        let unit = |uid| above(&[(uid, 0o711), ROOT, ROOT]);
        let deeper = |uid| above(&[(uid, 0o755), (uid, 0o755), ROOT, ROOT]);
        let sticky = |uid| above(&[(uid, 0o755), (0, 0o1777), ROOT]);
        let open = |uid| above(&[(uid, 0o777), ROOT]);
        let group = |uid| above(&[(uid, 0o775), ROOT]);
        let strange = |uid| above(&[(uid, 0o755), (USER + 1, 0o755), ROOT]);
        for (peer, named, dirs, believed) in [
            (SERVICE, false, unit(SERVICE), true),
            (999, false, unit(999), true),
            (SERVICE, true, unit(SERVICE), true),
            (USER, true, unit(USER), true),
            (USER, true, deeper(USER), true),
            (SERVICE, false, unit(0), true),
            // Only found.
            (USER, false, unit(USER), false),
            (SERVICE, false, deeper(SERVICE), false),
            // Put there by any user.
            (SERVICE, false, sticky(SERVICE), false),
            (USER, true, sticky(USER), false),
            (USER, true, open(USER), false),
            (USER, true, group(USER), false),
            (USER, true, strange(USER), false),
            // Another one's directory.
            (SERVICE, false, unit(SERVICE + 1), false),
            (USER, true, unit(USER + 1), false),
            // The user who asks owns it, and has let another one in.
            (SERVICE, false, unit(OWN), true),
        ] {
            let judged = judge(peer, OWN, named, &dirs);
            assert_eq!(
                judged.is_ok(),
                believed,
                "{peer} {named} {dirs:?}: {judged:?}"
            );
        }
    }

    #[test]
    fn the_directories_of_a_path() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b");
        std::fs::create_dir_all(&deep).unwrap();
        let found = directories_above(&deep.join("x.sock")).unwrap();
        let paths: Vec<_> = found.iter().map(|d| d.path.clone()).collect();
        let expected: Vec<_> = deep.ancestors().map(Path::to_owned).collect();
        assert_eq!(paths, expected);
        assert!(directories_above(Path::new("x.sock")).unwrap().len() > 1);
        assert!(directories_above(&temp.path().join("none/x.sock")).is_err());
    }

    #[test]
    fn our_own_daemon_is_believed() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let found = ControlSocket::found("/nowhere/x.sock".into());
        found.check(&stream).unwrap();
    }
}
