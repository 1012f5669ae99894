//! The directories of the sessions, below `sessions` in a directory of image-cache: a restore of one session is given one.

use std::ops::Deref;

use rustix::fs::{AtFlags, FileType, Mode, Stat};

use crate::criu_io::socket_dir::{
    id_of, names_in, DirError, Kind, Opened, Place, SocketDir, DIRECTORY,
};
use crate::image::SessionName;

/// The directory in `DIR` that has those of the sessions, and its file that says that image-cache made it.
const SESSIONS: &str = "sessions";
const MARK: &str = ".image-cache";

/// A directory of a session, until it is dropped: then it goes, if it is empty but for sockets.
#[derive(Debug)]
pub struct SessionDir(SocketDir);

impl SocketDir {
    /// Makes `sessions`, or finds the one that an earlier image-cache left: its mark is in it. Of what that one left in
    /// the sessions' directories the sockets of these names are removed.
    pub fn sessions(&self, sockets: &[&str]) -> Result<Self, DirError> {
        let sessions = self.below(SESSIONS, Kind::Marked(MARK))?;
        sessions.sweep(sockets);
        Ok(sessions)
    }

    /// Makes the directory of a session in this one, which is `sessions`.
    pub fn session(&self, name: &SessionName) -> Result<SessionDir, DirError> {
        self.below(name.as_str(), Kind::Plain).map(SessionDir)
    }

    /// Removes what a daemon that was killed left in `sessions`: its lock is ours now.
    fn sweep(&self, sockets: &[&str]) {
        let opened = self.opened();
        for name in names_in(&opened) {
            if name != MARK {
                remove_sockets(&opened, &name, sockets);
                let _ = rustix::fs::unlinkat(&opened.fd, &name, AtFlags::REMOVEDIR);
            }
        }
    }

    /// Removes `sessions`, unless something is in it that is not ours.
    pub fn remove_sessions(&self) {
        let Place::Below { parent, name, kind } = &self.0.place else {
            return;
        };
        self.leave_alone();
        let opened = self.opened();
        if matches!(kind, Kind::Marked(_)) && names_in(&opened) == [MARK] {
            let _ = rustix::fs::unlinkat(&opened.fd, MARK, AtFlags::empty());
            let _ = rustix::fs::unlinkat(&parent.opened().fd, name, AtFlags::REMOVEDIR);
        }
    }
}

/// Removes our sockets in a directory below, never following a link.
fn remove_sockets(above: &Opened, name: &str, ours: &[&str]) {
    let Ok(fd) = rustix::fs::openat(&above.fd, name, DIRECTORY, Mode::empty()) else {
        return;
    };
    let Ok(opened) = Opened::new(fd, None) else {
        return;
    };
    for name in names_in(&opened) {
        let is_socket = |s: Stat| FileType::from_raw_mode(s.st_mode).is_socket();
        // Of those that a daemon makes, or was making; CRIU and operators have others.
        let is_ours = ours.iter().any(|own| name == *own)
            || (name.starts_with('.') && ours.iter().any(|own| name.contains(own)));
        if is_ours && opened.lstat(&name).is_ok_and(is_socket) {
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
        self.leave_alone();
        let dir = &self.0 .0;
        if let Place::Below { parent, name, .. } = &dir.place {
            let (parent, own) = (parent.opened(), self.0.opened());
            if parent.lstat(name).is_ok_and(|s| id_of(&s) == own.id) {
                let _ = rustix::fs::unlinkat(&parent.fd, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::time::Duration;

    use tokio::net::UnixStream;

    use crate::criu_io::allowed_uids::AllowedUids;
    use crate::criu_io::sockets::{BoundSocket, Listener};

    const OURS: [&str; 2] = ["first.sock", "second.sock"];

    fn session(dir: &SocketDir, name: &str) -> Result<SessionDir, DirError> {
        dir.session(&name.parse().unwrap())
    }

    async fn accepts(path: &Path, listener: &Listener) -> bool {
        let connected = UnixStream::connect(path).await.is_ok();
        let accepted = tokio::time::timeout(Duration::from_secs(20), listener.accept());
        connected && accepted.await.is_ok_and(|accepted| accepted.is_ok())
    }

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn mode_of(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_session_directory_is_never_a_link() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let sessions = dir.sessions(&OURS).unwrap();
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
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let theirs = temp.path().join("sessions");
        for mode in [0o755, 0o700] {
            std::fs::create_dir(&theirs).unwrap();
            chmod(&theirs, mode);
            let refused = dir.sessions(&OURS).unwrap_err();
            assert!(matches!(refused, DirError::NotOurs(_)), "{refused}");
            assert_eq!(mode_of(&theirs), mode);
            assert_eq!(std::fs::read_dir(&theirs).unwrap().count(), 0);
            std::fs::remove_dir(&theirs).unwrap();
        }
        std::fs::write(&theirs, "a file").unwrap();
        assert!(matches!(dir.sessions(&OURS), Err(DirError::NotOurs(_))));
        std::fs::remove_file(&theirs).unwrap();

        let sessions = dir.sessions(&OURS).unwrap();
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
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let sessions = dir.sessions(&OURS).unwrap();
        let web = session(&sessions, "web").unwrap();
        let (bound, _listener) = BoundSocket::bind(&web, OURS[1]).unwrap();
        std::mem::forget((bound, web));
        let kept = session(&sessions, "kept").unwrap();
        std::fs::write(kept.path().join("restore.log"), "CRIU's").unwrap();
        let (theirs, _listener) = BoundSocket::bind(&kept, "lazy-pages.socket").unwrap();
        std::mem::forget(theirs);
        std::mem::forget(kept);
        let sessions = dir.sessions(&OURS).unwrap();
        assert!(!sessions.path().join("web").exists());
        for theirs in ["restore.log", "lazy-pages.socket"] {
            assert!(sessions.path().join("kept").join(theirs).exists());
        }
        session(&sessions, "kept").unwrap();
    }

    #[tokio::test]
    async fn a_directory_that_was_deleted_comes_back_with_its_sockets() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("run/migrate");
        std::fs::create_dir_all(&path).unwrap();
        chmod(&path, 0o711);
        let dir = SocketDir::claim(&path, &AllowedUids::new(&[]), "image-cache").unwrap();
        let (_bound, listener) = BoundSocket::bind(&dir, "x.sock").unwrap();
        let sessions = dir.sessions(&OURS).unwrap();
        let web = session(&sessions, "web").unwrap();
        let (_other, of_web) = BoundSocket::bind(&web, "y.sock").unwrap();
        assert!(!dir.look(), "all is well");

        // A client that had connected by then is served.
        let waiting = UnixStream::connect(path.join("x.sock")).await.unwrap();
        std::fs::remove_dir_all(above.path().join("run")).unwrap();
        assert!(dir.look());
        assert_eq!(mode_of(&path), 0o711);
        let first = listener.accept().await.unwrap();
        drop((waiting, first));
        assert!(accepts(&path.join("x.sock"), &listener).await);
        assert!(accepts(&path.join("sessions/web/y.sock"), &of_web).await);
        assert!(
            SocketDir::claim(&path, &AllowedUids::new(&[]), "image-cache").is_err(),
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

    /// Tasks have the directory for a moment after its session: it is not made again, and a new session's is not taken for it.
    #[tokio::test]
    async fn a_directory_that_the_daemon_removed_is_not_made_again() {
        let temp = tempfile::tempdir().unwrap();
        let dir = SocketDir::open(temp.path(), &AllowedUids::new(&[])).unwrap();
        let sessions = dir.sessions(&OURS).unwrap();
        let web = session(&sessions, "web").unwrap();
        let (bound, of_a_task) = BoundSocket::bind(&web, OURS[0]).unwrap();
        let path = web.path().to_owned();
        let had = SocketDir::clone(&web);
        drop((bound, web));
        assert!(!sessions.look() && !had.look(), "nothing was lost");
        assert!(!path.exists());

        let new = session(&sessions, "web").unwrap();
        assert!(!sessions.look() && !had.look(), "nothing was lost");
        assert!(
            !had.same(&path) && new.same(&path),
            "it has not become the new one"
        );
        drop((of_a_task, had, new));

        sessions.remove_sessions();
        assert!(!dir.look() && !sessions.look(), "nothing was lost");
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn modes_with_and_without_other_users() {
        for (allowed, socket_mode, dir_mode) in [(&[][..], 0o600, 0o700), (&[12345], 0o666, 0o711)]
        {
            let temp = tempfile::tempdir().unwrap();
            let dir = SocketDir::open(temp.path(), &AllowedUids::new(allowed)).unwrap();
            let sessions = dir.sessions(&OURS).unwrap();
            let subdir = session(&sessions, "web").unwrap();
            let (_bound, _listener) = BoundSocket::bind(&subdir, "x.sock").unwrap();
            assert_eq!(mode_of(sessions.path()), dir_mode);
            assert_eq!(mode_of(subdir.path()), dir_mode);
            assert_eq!(mode_of(&subdir.path().join("x.sock")), socket_mode);
        }
    }
}
