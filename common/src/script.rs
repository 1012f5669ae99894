//! Being CRIU's action script. CRIU executes it with its path as the only argument and says
//! the rest in the environment (`criu/action-scripts.c`).

use std::path::PathBuf;

/// The action, if this process is an action script: started without arguments and with
/// `CRTOOLS_SCRIPT_ACTION` set.
pub fn action() -> Option<String> {
    if std::env::args_os().len() > 1 {
        return None;
    }
    let action = std::env::var_os("CRTOOLS_SCRIPT_ACTION")?;
    Some(action.to_string_lossy().into_owned())
}

/// Where the daemon's control socket is: the environment `variable` if it is set, else
/// `socket` in the images directory, else in the current directory (CRIU's work directory).
/// `None` if there is no such file in either.
pub fn control_path(variable: &str, socket: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Some(path.into());
    }
    let images = std::env::var_os("CRTOOLS_IMAGE_DIR").map(|dir| PathBuf::from(dir).join(socket));
    let here = PathBuf::from(socket);
    // Only existence: that it is a socket, and one that answers, shows when it is used.
    images
        .into_iter()
        .chain([here])
        .find(|p| p.symlink_metadata().is_ok())
}

/// CRIU's pid: it is this process's parent.
pub fn criu_pid() -> i32 {
    rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get())
}

/// The root of the tree that CRIU dumps, where CRIU tells (`criu/action-scripts.c`).
pub fn root_pid() -> Option<i32> {
    std::env::var("CRTOOLS_INIT_PID").ok()?.parse().ok()
}
