//! The fake CRIU as a process of its own, `fake-criu`: the side that starts it, and how both talk.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::Serialize;

use crate::process::Process;

const LIMIT: Duration = Duration::from_secs(60);

/// The first word of one that stands still.
const STANDS: &str = "half";

/// Where the job is, if the command line is that of a CRIU.
const JOB: &str = "FAKE_CRIU_JOB";

/// How a CRIU was started, as far as that can be seen of its process.
#[derive(Clone, Debug, Default)]
pub struct Started {
    /// Its command line, behind its name.
    pub words: Vec<String>,
    /// HOME, with `.criu/default.conf`.
    pub home: Option<PathBuf>,
}

impl Started {
    /// With this command line.
    pub fn with(words: &str) -> Self {
        Started {
            words: words.split(' ').map(str::to_owned).collect(),
            home: None,
        }
    }
}

/// A fake CRIU in its own process.
pub struct FakeCriu {
    process: Process,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl FakeCriu {
    /// `program` is the path of `fake-criu`; `kind` says what `job` is.
    pub(super) fn start(program: &str, kind: &str, job: &impl Serialize) -> Self {
        let mut command = Command::new(program);
        command.arg(tagged(kind, job));
        Self::start_by(command)
    }

    pub(super) fn start_as(
        program: &str,
        kind: &str,
        job: &impl Serialize,
        started: &Started,
    ) -> Self {
        let mut command = Command::new(program);
        command.arg0("criu").args(&started.words);
        command.env(JOB, tagged(kind, job));
        if let Some(home) = &started.home {
            command.env("HOME", home);
        }
        Self::start_by(command)
    }

    fn start_by(mut command: Command) -> Self {
        command.stdout(Stdio::piped());
        let process = Process::spawn_with("a fake CRIU", command, Stdio::piped());
        let mut process = process.expect("fake-criu starts");
        let (stdin, stdout) = process.take_pipes();
        FakeCriu {
            process,
            stdin,
            stdout: BufReader::new(stdout.expect("stdout is piped")),
        }
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Waits until the child stands in the middle of its image.
    ///
    /// # Panics
    /// If it does not.
    pub fn wait_half(&mut self) {
        self.ready().expect("it stands still");
    }

    /// The same without a panic.
    ///
    /// # Errors
    /// If it does something else.
    pub fn ready(&mut self) -> io::Result<()> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        match line.starts_with(STANDS) {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "a fake CRIU said {line:?} instead of standing still"
            ))),
        }
    }

    /// The same for one that may as well end.
    pub fn wait_half_or_end(&mut self) {
        // What it says instead shows when it is waited for.
        let _ = self.stdout.read_line(&mut String::new());
    }

    /// # Panics
    /// If it has ended.
    pub fn go_on(&mut self) {
        let stdin = self.stdin.as_mut().expect("stdin is piped");
        stdin.write_all(b"go\n").expect("fake-criu listens");
    }

    pub fn kill(self) {
        // By its drop.
    }

    /// Its exit status and what it said.
    ///
    /// # Panics
    /// If it hangs.
    pub fn wait(mut self) -> (ExitStatus, String) {
        drop(self.stdin.take());
        let status = self.process.wait_within(LIMIT).expect("it ends");
        let mut said = String::new();
        let read = self.stdout.read_to_string(&mut said);
        read.expect("fake-criu's output is readable");
        (status, said)
    }
}

fn tagged(kind: &str, job: &impl Serialize) -> String {
    serde_json::to_string(&HashMap::from([(kind, job)])).expect("a job is plain data")
}

/// What this process was told to do.
pub(super) fn job<T: DeserializeOwned>() -> T {
    let job = std::env::var(JOB).ok().or_else(|| std::env::args().nth(1));
    let job = job.expect("a job, as the argument or in the environment");
    serde_json::from_str(&job).expect("a job in JSON")
}

/// Says where it is, and waits to be told to go on (or for the end of stdin, or to be killed).
pub(super) fn stand_still(at: &str) {
    println!("{STANDS} {at}");
    let mut line = String::new();
    let told = io::stdin().lock().read_line(&mut line);
    told.expect("stdin is a pipe");
}
