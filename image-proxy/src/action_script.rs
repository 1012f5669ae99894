//! image-proxy as CRIU's action script: the part that a dump's success depends on.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use image_common::control::script::{criu_pid, is_absent, root_pid, Daemon, NoDaemon};
use image_common::control::{self, Request, ScriptRun, PROXY_CONTROL_SOCKET};
use image_common::criu::options::Seen;
use image_common::criu_io::options;
use image_common::criu_io::parents;
use image_common::error_chain::chain;
use image_common::procfs::tree_memory::bytes_to_dump;

use crate::failure::Failure;

const DAEMON: Daemon = Daemon {
    program: "image-proxy",
    socket: PROXY_CONTROL_SOCKET,
    variable: "IMAGE_PROXY_CONTROL",
};

/// `pre-dump` asks if image-proxy and image-cache answer, `post-dump` if the set is complete. Other actions
/// succeed.
pub fn run(action: &str) -> ExitCode {
    let dir = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    // A link to CRIU's descriptor, to be followed while CRIU has it; and its name, for people.
    let opened = dir.as_ref().map(File::open);
    let closed = opened.as_ref().and_then(not_opened);
    let opened = opened.and_then(Result::ok);
    let name = dir.map(|dir| std::fs::read_link(&dir).unwrap_or(dir));
    let run = ScriptRun {
        criu_pid: criu_pid(),
        images_dir: opened
            .as_ref()
            .and(name)
            .map(|n| n.to_string_lossy().into_owned()),
        root_pid: root_pid(),
        // Before the tasks are frozen, and only then, it is of use.
        expected_bytes: (action == "pre-dump")
            .then(root_pid)
            .flatten()
            .and_then(bytes_to_dump),
    };
    let (request, otherwise) = match action {
        "pre-dump" => (
            Request::Announce(run),
            "the dump does not begin, and the process goes on",
        ),
        "post-dump" => (
            Request::Commit(run),
            "CRIU is told to fail the dump, and the process goes on on this host",
        ),
        _ => return ExitCode::SUCCESS,
    };
    if let Err(reason) = may_begin(action, opened.as_ref()) {
        return refuse(action, &reason.text(), otherwise);
    }
    let fd = opened.as_ref().map(AsFd::as_fd);
    let hinted = |reason: String| match &closed {
        Some(closed) => format!("{reason} ({closed})"),
        None => reason,
    };
    let outcome = match DAEMON.control_socket() {
        Ok(socket) => {
            let asked = control::ask_with(&socket, &request, fd);
            asked.map_err(|e| hinted(chain(&e)))
        }
        // It says already that CRIU's directory is closed to the script.
        Err(e @ NoDaemon::Closed { .. }) => Err(chain(&e)),
        Err(e) => Err(hinted(chain(&e))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => refuse(action, &reason, otherwise),
    }
}

fn refuse(action: &str, reason: &str, otherwise: &str) -> ExitCode {
    image_common::log::say(&format!("image-proxy: {action}: {reason}; {otherwise}"));
    ExitCode::FAILURE
}

/// What only CRIU's child sees for certain: its options, and the rounds before.
fn may_begin(action: &str, images_dir: Option<&File>) -> Result<(), Failure> {
    if action == "pre-dump" {
        if let Some(unserved) = options::of_starter().unserved() {
            return Err(Failure::criu(unserved.to_string()));
        }
    }
    match images_dir.map_or(Ok(()), parents::check) {
        // Without a page server no page of an earlier round is taken for one of this dump.
        Err(_) if options::of_starter().page_server == Seen::No => Ok(()),
        checked => checked.map_err(|e| Failure::criu(chain(&e))),
    }
}

/// That CRIU's images directory is there and cannot be opened, if so: a dump with `--page-server` needs it.
fn not_opened(opened: &io::Result<File>) -> Option<String> {
    let e = opened.as_ref().err().filter(|e| !is_absent(e))?;
    Some(format!(
        "besides, this script cannot open CRIU's images directory, which a dump with --page-server needs: {e}"
    ))
}
