//! The word of a script that has let its restore go on, for another run of it.
//!
//! A CRIU that was told of a script twice runs it twice at each action. Behind the first run at `post-restore` the tasks may
//! run, whatever becomes of image-cache. A second run that found no image-cache, and failed, would have CRIU kill what may be
//! the only copy of the process. So the first run leaves a file that names this CRIU, in the directory of the hold; the script
//! removes that at every other step.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use image_common::control::hold::SOCKET_PREFIX;
use image_common::control::script;
use rustix::process::geteuid;

/// What `CRTOOLS_IMAGE_DIR`, the images directory or that of a session in it, is to the directory of the hold.
const ABOVE: [&str; 3] = [".", "../..", ".."];

/// Leaves the word in `dir`.
pub fn leave(dir: &Path) -> io::Result<()> {
    let name = name_of(script::criu_pid())?;
    // A new one: no link that another user has put there is followed.
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    match options.open(dir.join(name)) {
        // By an earlier run for this CRIU.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        opened => opened.map(drop),
    }
}

/// Whether an earlier run has left it. `near`: the control socket that was looked for.
pub fn is_left(near: Option<&Path>) -> bool {
    let Ok(name) = name_of(script::criu_pid()) else {
        return false;
    };
    dirs(near).any(|dir| is_ours(&dir.join(&name)))
}

/// Removes it.
pub fn remove(near: Option<&Path>) {
    let Ok(name) = name_of(script::criu_pid()) else {
        return;
    };
    for file in dirs(near).map(|dir| dir.join(&name)) {
        if is_ours(&file) {
            // What stays names a CRIU that will be gone.
            let _ = fs::remove_file(file);
        }
    }
}

fn dirs(near: Option<&Path>) -> impl Iterator<Item = PathBuf> {
    let images = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    let of_socket = near.and_then(Path::parent).map(Path::to_owned);
    let both = images.into_iter().chain(of_socket);
    both.flat_map(|dir| ABOVE.map(|above| dir.join(above)))
}

/// A file that another user has put there says nothing.
fn is_ours(file: &Path) -> bool {
    let own = [0, geteuid().as_raw()];
    file.symlink_metadata()
        .is_ok_and(|file| file.is_file() && own.contains(&file.uid()))
}

/// A name that no other process ever has as long as the host runs: the number of this CRIU, and when it was started.
fn name_of(criu: i32) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{criu}/stat"))?;
    // Behind the name in parentheses, which may have any character.
    let fields = stat.rsplit_once(')').map(|(_, fields)| fields);
    let started = fields.and_then(|fields| fields.split_ascii_whitespace().nth(19));
    let started = started.ok_or(io::ErrorKind::InvalidData)?;
    Ok(format!("{SOCKET_PREFIX}{criu}-{started}.went"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This process has started none of its tests' scripts; its own parent is the CRIU here.
    #[test]
    fn the_word_of_an_earlier_run() {
        let temp = tempfile::tempdir().unwrap();
        let session = temp.path().join("sessions/web");
        fs::create_dir_all(&session).unwrap();
        let near = session.join("image-cache-control.sock");
        assert!(!is_left(Some(&near)));
        leave(temp.path()).unwrap();
        leave(temp.path()).unwrap();
        assert!(is_left(Some(&near)));
        assert!(is_left(Some(&temp.path().join("image-cache-control.sock"))));
        let elsewhere = tempfile::tempdir().unwrap();
        assert!(!is_left(Some(&elsewhere.path().join("x.sock"))));
        remove(Some(&near));
        assert!(!is_left(Some(&near)));
        // A link, of whatever user, is no word.
        let name = name_of(script::criu_pid()).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", temp.path().join(name)).unwrap();
        assert!(!is_left(Some(&near)));
    }

    #[test]
    fn a_name_is_of_one_process() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(name_of(own).unwrap(), name_of(own).unwrap());
        assert_ne!(name_of(own).unwrap(), name_of(1).unwrap());
        assert!(name_of(i32::MAX).is_err());
    }
}
