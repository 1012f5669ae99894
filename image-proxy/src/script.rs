//! image-proxy as CRIU's action script: the part that a dump's success depends on.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use image_common::control::{self, chain, Request, Run, PROXY_CONTROL_SOCKET};
use image_common::criu::options::Seen;
use image_common::criu_options;
use image_common::parents;
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
    if let Err(reason) = may_begin(action, opened.as_ref()) {
        return refuse(action, &reason, otherwise);
    }
    let fd = opened.as_ref().map(AsFd::as_fd);
    let outcome = match control_path("IMAGE_PROXY_CONTROL", PROXY_CONTROL_SOCKET) {
        Some(path) => control::ask_with(&path, &request, fd).map_err(|e| chain(&e)),
        None => Err(format!(
            "no {PROXY_CONTROL_SOCKET} in CRIU's images or work directory: is image-proxy running with the same -D? (IMAGE_PROXY_CONTROL names another one)"
        )),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => refuse(action, &reason, otherwise),
    }
}

fn refuse(action: &str, reason: &str, otherwise: &str) -> ExitCode {
    eprintln!("image-proxy: {action}: {reason}; {otherwise}");
    ExitCode::FAILURE
}

/// What only CRIU's child sees for certain: its options, and the rounds before.
fn may_begin(action: &str, images_dir: Option<&File>) -> Result<(), String> {
    if action == "pre-dump" {
        if let Some(unserved) = criu_options::of_starter().unserved() {
            return Err(unserved.to_string());
        }
    }
    match images_dir.map_or(Ok(()), parents::check) {
        // Without a page server no page of an earlier round is taken for one of this dump.
        Err(_) if criu_options::of_starter().page_server == Seen::No => Ok(()),
        checked => checked.map_err(|e| e.to_string()),
    }
}
