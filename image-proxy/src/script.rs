//! image-proxy as CRIU's action script: the part that a dump's success depends on.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use image_common::control::{self, chain, Request, Run, PROXY_CONTROL_SOCKET};
use image_common::script::{control_path, criu_pid, root_pid};
use image_common::tree::bytes_to_dump;

/// `pre-dump`: is anybody there? `post-dump`: is everything there? Any other action: fine.
pub fn run(action: &str) -> ExitCode {
    let dir = std::env::var_os("CRTOOLS_IMAGE_DIR").map(PathBuf::from);
    // A link to CRIU's descriptor, to be followed while CRIU has it; and its name, for people.
    let opened = dir.as_ref().and_then(|dir| File::open(dir).ok());
    let name = dir.map(|dir| std::fs::read_link(&dir).unwrap_or(dir));
    let run = Run {
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
        "pre-dump" => (Request::Announce(run), "the dump must not begin"),
        "post-dump" => (Request::Commit(run), "the process stays on this host"),
        _ => return ExitCode::SUCCESS,
    };
    let fd = opened.as_ref().map(AsFd::as_fd);
    let outcome = match control_path("IMAGE_PROXY_CONTROL", PROXY_CONTROL_SOCKET) {
        Some(path) => control::ask_with(&path, &request, fd).map_err(|e| chain(&e)),
        None => Err(format!(
            "no {PROXY_CONTROL_SOCKET} in CRIU's images or work directory: is image-proxy running with the same -D? (IMAGE_PROXY_CONTROL names another one)"
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            image_common::log::say(&format!("image-proxy: {action}: {reason}; {otherwise}"));
            ExitCode::FAILURE
        }
    }
}
