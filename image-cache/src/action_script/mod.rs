//! `criu restore --action-script image-cache`: tells the daemon how far CRIU has come.
//!
//! A restore that the daemon cannot tell must not begin: nothing would tell what became of it. So
//! `pre-restore`, when CRIU has read what the tree is and built nothing, fails unless the daemon
//! knows this CRIU; and so does `post-restore`, behind which the tasks may come to run. CRIU obeys
//! that at both, and at neither of the later ones.
//!
//! At `post-restore` the daemon may have the script [`hold`] the restore: everything is built and asleep as long as the script
//! runs.

mod criu;
mod daemon;
mod hold;
mod link;
mod operator;
mod state;
mod went;

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::ExitCode;

use image_common::control::script;
use image_common::control::trust::ControlSocket;
use image_common::control::{
    Answer, ControlError, Conversation, Request, RestoreStep, Restoring, CACHE_CONTROL_SOCKET,
};
use image_common::error_chain::chain;
use image_common::log::say;
use image_common::procfs::pidfd;
use rustix::fs::{FileType, Mode, OFlags};

const DAEMON: script::Daemon = script::Daemon {
    program: "image-cache",
    socket: CACHE_CONTROL_SOCKET,
    variable: "IMAGE_CACHE_CONTROL",
};

pub fn run(action: &str) -> ExitCode {
    let step = match action {
        "pre-stream" => RestoreStep::PreStream,
        "pre-restore" => RestoreStep::PreRestore,
        "post-restore" => RestoreStep::PostRestore,
        "pre-resume" => RestoreStep::PreResume,
        "post-resume" => RestoreStep::PostResume,
        _ => return ExitCode::SUCCESS,
    };
    // A dump runs `pre-stream`, too, and what CRIU does itself tells of success as well.
    let optional = matches!(step, RestoreStep::PreStream | RestoreStep::PostResume);
    let failed = |reason: &str| {
        let then = match step {
            RestoreStep::PreRestore | RestoreStep::PostRestore => {
                "the restore fails, and its set is kept"
            }
            _ => "CRIU goes on, and image-cache judges the restore by what it sees",
        };
        say(&format!("image-cache: {action}: {reason}; {then}"));
        match optional {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        }
    };
    let socket = DAEMON.control_socket();
    let socket = socket.or_else(|e| socket_elsewhere().map(ControlSocket::found).ok_or(e));
    let socket = match socket {
        Ok(socket) => socket,
        Err(_) if optional => return ExitCode::SUCCESS,
        Err(_) if step == RestoreStep::PostRestore && went::is_left(None) => return went_on(),
        Err(e) => return failed(&chain(&e)),
    };
    // What is left of an earlier restore by the same CRIU says nothing of this one.
    if step != RestoreStep::PostRestore {
        went::remove(Some(&socket.path));
    }
    let parent = pidfd::of_parent();
    // Behind `post-restore` nothing can be held.
    let early = step <= RestoreStep::PostRestore;
    let holds = early && parent.is_some();
    let log = criu_log().filter(|_| holds);
    let restoring = Restoring {
        step,
        criu_pid: script::criu_pid(),
        pidfd: parent.is_some(),
        holds,
        log: log.is_some(),
    };
    let pidfd = parent.as_ref().map(|(_, pidfd)| pidfd);
    let fds: Vec<_> = pidfd.into_iter().chain(&log).map(AsFd::as_fd).collect();
    let begun = Conversation::begin(&socket, &Request::Restoring(restoring), &fds);
    let answered = begun.and_then(|mut conversation| {
        let answer = verdict(&mut conversation)?;
        Ok((conversation, answer))
    });
    drop(log);
    let near = Some(socket.path.clone());
    let went = || step == RestoreStep::PostRestore && went::is_left(near.as_deref());
    match (answered, parent) {
        (Ok((_, Answer::Done)), _) => ExitCode::SUCCESS,
        (Ok((conversation, Answer::Hold { hold })), Some(parent))
            if step == RestoreStep::PostRestore =>
        {
            let dir = hold.dir.clone();
            match hold::hold(*hold, conversation, socket.path, parent) {
                Ok(()) => {
                    if let Err(e) = went::leave(&dir) {
                        say(&format!("image-cache: {action}: cannot leave word in {} that the restore goes on: {e}", dir.display()));
                    }
                    ExitCode::SUCCESS
                }
                Err(reason) => {
                    say(&format!(
                        "image-cache: {action}: {reason}; the restore fails"
                    ));
                    ExitCode::FAILURE
                }
            }
        }
        // No image-cache answers any more, or one that was started since and knows nothing of this CRIU.
        (Ok((_, Answer::Failed { .. })) | Err(_), _) if went() => went_on(),
        (Ok((_, Answer::Failed { reason })), _) => failed(&reason),
        (Ok(_), _) => failed(&chain(&ControlError::Gone)),
        (Err(e), _) => failed(&chain(&e)),
    }
}

/// Another run of this script, for the same CRIU, was told that the restore may go on.
fn went_on() -> ExitCode {
    say("image-cache: post-restore: an earlier run of this script was told that the restore goes on, and no image-cache knows of it now: it goes on");
    ExitCode::SUCCESS
}

/// The answer behind those that only say that it takes time.
fn verdict(conversation: &mut Conversation) -> Result<Answer, ControlError> {
    loop {
        match conversation.answer()? {
            Answer::Accepted { .. } => {}
            answer => return Ok(answer),
        }
    }
}

/// CRIU's log, opened for reading: it has its scripts write there. `None`: that is no file, or may not be read.
fn criu_log() -> Option<OwnedFd> {
    let stat = rustix::fs::fstat(rustix::stdio::stderr()).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::open("/proc/self/fd/2", flags, Mode::empty()).ok()
}

/// The control socket of the daemon whose directory, or that of a session in it, is CRIU's. At `post-resume`
/// CRIU has closed it, and CRTOOLS_IMAGE_DIR leads nowhere: then its command line tells.
fn socket_elsewhere() -> Option<PathBuf> {
    let open = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    let open = open
        .into_iter()
        .flat_map(|dir| [dir.join("../.."), dir.join("..")]);
    let named = || images_dir_of(script::criu_pid());
    let named = std::iter::once_with(named).flatten();
    // The directory of a session (DIR/sessions/NAME) goes with its set.
    let named = named.flat_map(|dir| {
        dir.ancestors()
            .take(3)
            .map(PathBuf::from)
            .collect::<Vec<_>>()
    });
    open.chain(named)
        .map(|dir| dir.join(CACHE_CONTROL_SOCKET))
        .find(|socket| socket.symlink_metadata().is_ok())
}

/// The images directory on the command line of CRIU.
fn images_dir_of(criu: i32) -> Option<PathBuf> {
    images_dir_in(&std::fs::read(format!("/proc/{criu}/cmdline")).ok()?)
}

fn images_dir_in(command_line: &[u8]) -> Option<PathBuf> {
    let mut words = command_line.split(|&byte| byte == 0).skip(1);
    let mut dir = None;
    while let Some(word) = words.next() {
        let value = match word {
            b"-D" | b"--images-dir" => words.next(),
            _ => (word.strip_prefix(b"--images-dir=")).or_else(|| word.strip_prefix(b"-D")),
        };
        dir = value.or(dir);
    }
    // CRIU has changed its directory since.
    let dir = PathBuf::from(OsString::from_vec(dir?.to_vec()));
    dir.is_absolute().then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_directory_of_a_command_line() {
        for (line, dir) in [
            (&b"criu\0restore\0-D\0/run/a\0-d\0"[..], Some("/run/a")),
            (b"criu\0restore\0--images-dir=/run/b\0", Some("/run/b")),
            (b"criu\0restore\0--images-dir\0/run/c\0", Some("/run/c")),
            (b"criu\0restore\0-D/run/d", Some("/run/d")),
            (b"criu\0restore\0-D\0/a\0-D\0/b\0", Some("/b")),
            (b"criu\0restore\0-D\0images\0", None),
            (b"criu\0restore\0-D\0", None),
            (b"-D\0", None),
            (b"", None),
        ] {
            assert_eq!(images_dir_in(line), dir.map(PathBuf::from), "{line:?}");
        }
    }
}
