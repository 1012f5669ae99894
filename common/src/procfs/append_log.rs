//! The file to which a process appends its log.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Descriptors that are looked at. A CRIU that has begun to restore has some twenty.
const MOST_DESCRIPTORS: usize = 256;

/// `O_WRONLY | O_APPEND`, as in the octal flags of `/proc/PID/fdinfo/N`.
const APPENDS: u32 = 0o2001;
/// The access mode and `O_APPEND`.
const MODE: u32 = 0o2003;

/// The regular file that process `pid` has open for appending alone, opened for reading. `None`: there is none, there are
/// several, or the process may not be looked at.
pub fn of_process(pid: i32) -> Option<File> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut found: Option<(u64, u64, PathBuf)> = None;
    for fd in fds.flatten().take(MOST_DESCRIPTORS) {
        let Ok(file) = fs::metadata(fd.path()) else {
            continue;
        };
        if !file.is_file() || !appends(pid, &fd.file_name()) {
            continue;
        }
        let (dev, ino) = (file.dev(), file.ino());
        match &found {
            Some((d, i, _)) if (*d, *i) != (dev, ino) => return None,
            Some(_) => {}
            None => found = Some((dev, ino, fd.path())),
        }
    }
    File::open(found?.2).ok()
}

fn appends(pid: i32, fd: &std::ffi::OsStr) -> bool {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.to_string_lossy()));
    let info = info.unwrap_or_default();
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|octal| u32::from_str_radix(octal.trim(), 8).ok());
    flags.is_some_and(|flags| flags & MODE == APPENDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    #[test]
    fn the_file_that_a_process_appends_to() {
        let temp = tempfile::tempdir().unwrap();
        let append = |name: &str| {
            let mut options = File::options();
            options.append(true).create(true);
            options.open(temp.path().join(name)).unwrap()
        };
        let written = File::create(temp.path().join("written")).unwrap();
        append("log").write_all(b"Error (x): y").unwrap();
        let run = |stdout: Stdio, stderr: Stdio| {
            let mut sleep = Command::new("sleep");
            sleep.arg("1000").stdin(Stdio::null());
            sleep.stdout(stdout).stderr(stderr).spawn().unwrap()
        };
        let seen = |mut child: std::process::Child| {
            let file = of_process(i32::try_from(child.id()).unwrap());
            child.kill().unwrap();
            child.wait().unwrap();
            file.map(|mut file| {
                let mut text = String::new();
                file.read_to_string(&mut text).unwrap();
                text
            })
        };
        let log = seen(run(written.into(), append("log").into()));
        assert_eq!(log.as_deref(), Some("Error (x): y"));
        let both = seen(run(append("log").into(), append("log").into()));
        assert_eq!(both.as_deref(), Some("Error (x): y"), "the same file twice");
        assert_eq!(
            seen(run(append("log").into(), append("other").into())),
            None
        );
        assert_eq!(seen(run(Stdio::null(), Stdio::null())), None);
    }
}
