//! The options of a CRIU that runs: its command line, and its configuration files as that process
//! sees them.
//!
//! What is not to be seen (`/proc` of another user, a path of another time) makes the answer
//! "unknown", never a wrong one. Options that come by RPC are in its requests, so unknown.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::fs::{open, openat2, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::criu::options::{CommandLine, Options, Reading, Verb};
use crate::procfs::process::{parent_of, Process};

/// More than a command line, an environment or a configuration file ever has.
const MAX_BYTES: u64 = 1 << 20;

const DEFAULT_FILE: &str = "/etc/criu/default.conf";
/// Below $HOME.
const OWN_FILE: &str = "/.criu/default.conf";

/// Shells between a script and its CRIU, at most.
const GENERATIONS: usize = 5;

/// A configuration file may be on a file system that does not answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Of the process that connected. `None`, and all unknown: it cannot be seen.
pub async fn of_peer(pid: Option<i32>) -> Options {
    let Some(pid) = pid else {
        return Options::default();
    };
    // What was read is of this process: it had its pid before and after.
    let Some(process) = Process::open(pid) else {
        return Options::default();
    };
    let read = tokio::task::spawn_blocking(move || of_process(pid));
    match tokio::time::timeout(PATIENCE, read).await {
        Ok(Ok(options)) if !process.has_exited() => options,
        Ok(_) => Options::default(),
        Err(_) => {
            tracing::warn!(pid, "CRIU's configuration files were not read within {PATIENCE:?}: its options are not known");
            Options::default()
        }
    }
}

/// Of the CRIU that runs this process as its script, maybe by way of a shell. Blocking.
pub fn of_starter() -> Options {
    // In the numbers of the /proc that is here.
    let own = std::fs::read_link("/proc/self").ok();
    let own = own.and_then(|own| own.to_str()?.parse().ok());
    let ancestors = std::iter::successors(own.and_then(parent_of), |&pid| parent_of(pid));
    let mut ancestors = ancestors.filter(|&pid| pid > 0).take(GENERATIONS);
    let is_criu = |&pid: &i32| {
        let line = read_all(File::open(format!("/proc/{pid}/cmdline")));
        line.is_ok_and(|line| CommandLine::new(&line).verb() != Verb::Unknown)
    };
    ancestors
        .find(is_criu)
        .map_or_else(Options::default, of_process)
}

/// Of a process that has this pid from before to after. Blocking.
pub fn of_process(pid: i32) -> Options {
    let line = match read_all(File::open(format!("/proc/{pid}/cmdline"))) {
        Ok(line) => line,
        Err(e) => {
            tracing::info!(
                pid,
                "CRIU's command line cannot be read, so its options are not known: {e}"
            );
            return Options::default();
        }
    };
    let line = CommandLine::new(&line);
    if matches!(line.verb(), Verb::Rpc | Verb::Unknown) {
        return Reading::new(false).finish(&line);
    }
    let environment = match read_all(File::open(format!("/proc/{pid}/environ"))) {
        Ok(environment) => environment,
        Err(e) => {
            // Nor may its root directory be looked into.
            tracing::info!(
                pid,
                "CRIU's environment and configuration files cannot be read, only its command line counts: {e}"
            );
            let mut reading = Reading::new(false);
            reading.unreadable();
            return reading.finish(&line);
        }
    };
    let mut reading = Reading::new(variable(&environment, b"POSIXLY_CORRECT").is_some());
    let mut take = |path: &[u8]| match file_of(pid, path, &environment) {
        Ok(Some(text)) => reading.file(&text),
        Ok(None) => {}
        Err(e) => {
            let path = String::from_utf8_lossy(path);
            tracing::info!(
                pid,
                ?path,
                "a configuration file of CRIU cannot be read, so its options are not known: {e}"
            );
            reading.unreadable();
        }
    };
    let (defaults, named) = line.config();
    if defaults {
        take(DEFAULT_FILE.as_bytes());
        if let Some(home) = variable(&environment, b"HOME") {
            take(&[home, OWN_FILE.as_bytes()].concat());
        }
    }
    if let Some(path) = variable(&environment, b"CRIU_CONFIG_FILE") {
        take(path);
    }
    if let Some(path) = named {
        take(path);
    }
    reading.finish(&line)
}

/// `NAME=value` of `/proc/PID/environ`; of several the first, as `getenv` has it.
fn variable<'a>(environment: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let mut all = environment.split(|&byte| byte == 0);
    all.find_map(|entry| entry.strip_prefix(name)?.strip_prefix(b"="))
}

/// The text of a file, by the path that process `pid` has for it. `None`: there is no such file,
/// which CRIU takes for an empty one.
fn file_of(pid: i32, path: &[u8], environment: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = open(
        format!("/proc/{pid}/root"),
        flags | OFlags::DIRECTORY,
        Mode::empty(),
    )?;
    // Links of /proc lead elsewhere, and are refused: `--config /dev/fd/3`.
    let look = |path: &[u8]| openat2(&root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    let found = if path.starts_with(b"/") {
        match look(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            found => found,
        }
    } else {
        // CRIU has gone to its work directory. Where it was started, its shell has said; if there
        // is no such file there, it may have been elsewhere.
        let from = variable(environment, b"PWD").filter(|from| from.starts_with(b"/"));
        let unknown = || io::Error::other("its path is relative, to a directory that is not known");
        look(&[from.ok_or_else(unknown)?, b"/", path].concat())
    };
    read_all(reopened(&found?)).map(Some)
}

/// What can be read of a place. To open a FIFO or a device may wait, or do something.
fn reopened(place: &OwnedFd) -> io::Result<File> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(place)?.st_mode);
    if kind != FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    let path = format!("/proc/self/fd/{}", place.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(open(path, flags, Mode::empty())?))
}

fn read_all(file: io::Result<File>) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    file?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(io::Error::other(format!(
            "it has more than {MAX_BYTES} bytes"
        ))),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::os::unix::process::CommandExt;
    use std::path::PathBuf;
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::criu::options::{PreDumpMode, Seen};

    /// A directory that is the home of a CRIU, and where it is started.
    struct Home(tempfile::TempDir);

    /// A process with CRIU's command line.
    struct Criu(Child);

    impl Home {
        fn new() -> Self {
            let home = tempfile::tempdir().unwrap();
            fs::create_dir(home.path().join(".criu")).unwrap();
            Self(home)
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, text: &str) -> String {
            fs::write(self.path(name), text).unwrap();
            self.path(name).to_str().unwrap().to_owned()
        }

        /// To a shell the command is a script, and what follows is nothing to it.
        fn criu(&self, words: &[&str]) -> Command {
            self.write(words[0], "echo; read line");
            let mut command = Command::new("/bin/sh");
            command
                .arg0("criu")
                .args(words)
                .current_dir(self.0.path())
                .env_clear()
                .env("HOME", self.0.path())
                .env("PWD", self.0.path())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped());
            command
        }

        fn options(&self, words: &[&str]) -> Options {
            Criu::start(&mut self.criu(words)).options()
        }
    }

    impl Criu {
        fn start(command: &mut Command) -> Self {
            let mut child = command.spawn().unwrap();
            // Its command line is not to be seen in the first moment.
            let said = child.stdout.as_mut().unwrap().read(&mut [0]).unwrap();
            assert_eq!(said, 1);
            Self(child)
        }

        fn pid(&self) -> i32 {
            i32::try_from(self.0.id()).unwrap()
        }

        fn options(&self) -> Options {
            of_process(self.pid())
        }
    }

    impl Drop for Criu {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    #[test]
    fn of_its_command_line_and_of_its_home() {
        let home = Home::new();
        let options = home.options(&["dump", "--stream", "--lazy-pages", "-t", "1"]);
        assert_eq!(options.verb, Verb::Dump);
        assert_eq!((options.stream, options.lazy_pages), (Seen::Yes, Seen::Yes));

        let words = ["pre-dump", "--page-server"];
        assert_eq!(home.options(&words).pre_dump_mode, PreDumpMode::Splice);
        home.write(".criu/default.conf", "pre-dump-mode read\n");
        assert_eq!(home.options(&words).pre_dump_mode, PreDumpMode::Read);
        let without = ["pre-dump", "--page-server", "--no-default-config"];
        assert_eq!(home.options(&without).pre_dump_mode, PreDumpMode::Splice);
    }

    #[test]
    fn of_the_files_that_are_named() {
        let home = Home::new();
        let named = home.write("named.conf", "lazy-pages\n");
        for name in [&named, "named.conf"] {
            let options = home.options(&["dump", "--config", name]);
            assert_eq!(options.lazy_pages, Seen::Yes, "{name}");
            let mut command = home.criu(&["dump"]);
            command.env("CRIU_CONFIG_FILE", name);
            assert_eq!(Criu::start(&mut command).options().lazy_pages, Seen::Yes);
        }
        // CRIU ignores a file that is not there. If that was in another directory, it may be there.
        let absent = home.path("absent");
        let absent = home.options(&["dump", "--config", absent.to_str().unwrap()]);
        assert_eq!(absent.lazy_pages, Seen::No);
        let elsewhere = home.options(&["dump", "--config", "absent"]);
        assert_eq!(elsewhere.lazy_pages, Seen::Unknown);
    }

    #[test]
    fn what_is_no_file_is_not_opened() {
        let home = Home::new();
        let fifo = home.path("fifo");
        assert!(Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success());
        symlink("fifo", home.path("link")).unwrap();
        let big = home.write("big", &"# much\n".repeat(1 << 18));
        let at = |name: &str| home.path(name).to_str().unwrap().to_owned();
        for path in [
            at("fifo"),
            at("link"),
            at(".criu"),
            big,
            "/dev/zero".to_owned(),
            "/dev/fd/0".to_owned(),
        ] {
            let options = home.options(&["dump", "--config", &path, "--stream"]);
            assert_eq!(options.lazy_pages, Seen::Unknown, "{path}");
            assert_eq!(options.stream, Seen::Yes, "{path}");
        }
    }

    #[tokio::test]
    async fn of_a_process_that_is_gone_nothing_is_known() {
        let home = Home::new();
        let criu = Criu::start(&mut home.criu(&["dump", "--lazy-pages"]));
        let pid = criu.pid();
        assert_eq!(of_peer(Some(pid)).await.lazy_pages, Seen::Yes);
        drop(criu);
        assert_eq!(of_peer(Some(pid)).await, Options::default());
        assert_eq!(of_peer(None).await, Options::default());
        assert_eq!(of_process(-1), Options::default());
    }
}
