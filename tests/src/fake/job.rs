//! A whole dump as one value, so that the same dump can run in the test's process or in a child of its own
//! (`fake-criu`): a child can be killed, has the default SIGPIPE action, and is a CRIU run of its own to the daemon.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::child::{self, stand_still, FakeCriu, Started};
use super::content::ImageSet;
use super::fast::Work;
use super::pages::PageRound;
use super::remote::{Dialect, Remote, Spelling};
use super::run::{self, Event, Snapshot};
use super::script::{self, ScriptResult, Task};
use super::stream::{Capture, Serve};

/// Which of CRIU's two ways the images take.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Protocol {
    Stream,
    Remote {
        dialect: Dialect,
        spelling: Spelling,
        id: String,
    },
}

impl Protocol {
    pub fn remote(dialect: Dialect, spelling: Spelling) -> Self {
        Protocol::Remote {
            dialect,
            spelling,
            id: "/img/dump".into(),
        }
    }

    /// One of each kind.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Protocol::Stream];
        all.extend(super::DIALECTS.map(|(dialect, spelling)| Protocol::remote(dialect, spelling)));
        all
    }

    /// The restore that belongs to it.
    pub fn restore(&self, dir: &Path, set: &ImageSet) -> Result<(), String> {
        match self {
            Protocol::Stream => run::restore_stream(dir, set),
            Protocol::Remote {
                dialect,
                spelling,
                id,
            } => run::restore_remote(&Remote::restore(dir, *dialect, *spelling), id, set),
        }
    }
}

/// One dump.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DumpJob {
    pub protocol: Protocol,
    pub images_dir: PathBuf,
    pub work_dir: PathBuf,
    /// Which [`ImageSet::sample`] to dump.
    pub seed: u64,
    /// The action script, if the dump is gated.
    pub script: Option<PathBuf>,
    /// A child stops in the middle of this image, says so, and goes on when told.
    pub stop_in: Option<String>,
    /// What the list must be when it is read (`--remote`); without it, it must end with our own id.
    pub expect_list: Option<Vec<String>>,
    pub script_limit: Duration,
    /// `criu pre-dump`: memory only, no post-dump script, no FINISH.
    pub pre_dump: bool,
    /// What the process that is dumped has, as far as the script can see.
    pub memory_mib: u64,
}

/// Where a dump failed. In each case CRIU would let the tasks live on.
#[derive(Debug)]
pub enum DumpError {
    Connect(io::Error),
    PreDump(ScriptResult),
    Write(io::Error),
    PostDump(ScriptResult),
    /// The script itself hung or could not be started: never right.
    Script(io::Error),
}

impl DumpJob {
    /// An ungated dump with `-D dir -W dir`.
    pub fn new(protocol: &Protocol, dir: &Path, seed: u64) -> Self {
        DumpJob {
            protocol: protocol.clone(),
            images_dir: dir.into(),
            work_dir: dir.into(),
            seed,
            script: None,
            stop_in: None,
            expect_list: None,
            pre_dump: false,
            memory_mib: 0,
            script_limit: Duration::from_secs(40),
        }
    }

    /// With the action script.
    pub fn gated(mut self) -> Self {
        self.script = Some(crate::bins::bin("image-proxy"));
        self
    }

    pub fn stop_in(mut self, name: &str) -> Self {
        self.stop_in = Some(name.into());
        self
    }

    /// A pre-dump instead of a dump.
    pub fn pre_dump(mut self) -> Self {
        self.pre_dump = true;
        self
    }

    /// Of a process with so much memory.
    pub fn of_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    pub fn set(&self) -> ImageSet {
        if self.pre_dump {
            ImageSet::pre_dump(self.seed)
        } else {
            ImageSet::sample(self.seed)
        }
    }

    pub fn run(&self) -> Result<(), DumpError> {
        self.run_with(&self.set(), &mut |_| {})
    }

    /// The dump of this set; `watch` sees its events.
    pub fn run_with(&self, set: &ImageSet, watch: &mut dyn FnMut(Event)) -> Result<(), DumpError> {
        match &self.protocol {
            Protocol::Stream => {
                self.script("pre-stream").map_err(DumpError::Script)?;
                let connect = match self.script {
                    Some(_) => Capture::connect,
                    None => Capture::connect_alone,
                };
                let capture = connect(&self.images_dir).map_err(DumpError::Connect)?;
                let result = self.phases(|| run::dump(&capture, set, watch));
                if result.is_err() && self.script.is_none() {
                    capture.criu().ends_with(1);
                }
                result
            }
            Protocol::Remote {
                dialect,
                spelling,
                id,
            } => {
                let client = Remote::dump(&self.images_dir, *dialect, *spelling)
                    .with_work_dir(&self.work_dir);
                let client = match self.script {
                    Some(_) => client.gated(),
                    None => client,
                };
                client.push(id).map_err(DumpError::Connect)?;
                let result = self.phases(|| {
                    let list = client.list()?;
                    let right = match &self.expect_list {
                        Some(expected) => list == *expected,
                        None => list.last() == Some(id),
                    };
                    if !right {
                        let text = format!("the list is {list:?}, I am {id}");
                        return Err(super::wire::protocol(text));
                    }
                    run::dump(&Snapshot(&client, id), set, watch)
                });
                if result.is_err() {
                    client.fails();
                }
                // A failed dump sends it as well; whether anybody listens is not CRIU's business.
                if self.pre_dump {
                    return result;
                }
                let finish = client.dump_finish().map_err(DumpError::Write);
                result.and(finish)
            }
        }
    }

    fn phases(&self, images: impl FnOnce() -> io::Result<()>) -> Result<(), DumpError> {
        let pre = self.script("pre-dump").map_err(DumpError::Script)?;
        if let Some(result) = pre.filter(|result| !result.ok()) {
            return Err(DumpError::PreDump(result));
        }
        images().map_err(DumpError::Write)?;
        if self.pre_dump {
            return Ok(());
        }
        let post = self.script("post-dump").map_err(DumpError::Script)?;
        match post.filter(|result| !result.ok()) {
            Some(result) => Err(DumpError::PostDump(result)),
            None => Ok(()),
        }
    }

    fn script(&self, action: &str) -> io::Result<Option<ScriptResult>> {
        let Some(program) = &self.script else {
            return Ok(None);
        };
        let task = match self.memory_mib {
            0 => Task::start()?,
            mib => Task::with_memory(mib)?,
        };
        script::run_of(
            &task,
            program,
            action,
            &self.images_dir,
            &self.work_dir,
            self.script_limit,
        )
        .map(Some)
    }

    /// Starts this dump in a process of its own; `program` is the path of `fake-criu`.
    pub fn spawn(&self, program: &str) -> FakeCriu {
        FakeCriu::start(program, "Dump", self)
    }

    /// The same as a CRIU that was started so.
    pub fn spawn_as(&self, program: &str, started: &Started) -> FakeCriu {
        FakeCriu::start_as(program, "Dump", self, started)
    }
}

/// A whole restore, which stands still before it says that it is over (it closes its connection, or says FINISH), and
/// again after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RestoreJob {
    pub protocol: Protocol,
    pub dir: PathBuf,
    pub seed: u64,
}

impl RestoreJob {
    pub fn spawn(&self, program: &str) -> FakeCriu {
        FakeCriu::start(program, "Restore", self)
    }

    /// The same as a CRIU that was started so.
    pub fn spawn_as(&self, program: &str, started: &Started) -> FakeCriu {
        FakeCriu::start_as(program, "Restore", self, started)
    }

    fn run(&self) -> Result<(), String> {
        let set = ImageSet::sample(self.seed);
        match &self.protocol {
            Protocol::Stream => {
                let serve =
                    Serve::connect(&self.dir).map_err(|error| format!("connect: {error}"))?;
                run::restore(&serve, &set)?;
                stand_still("before the end");
            }
            Protocol::Remote {
                dialect,
                spelling,
                id,
            } => {
                let client = Remote::restore(&self.dir, *dialect, *spelling);
                client.list().map_err(|error| format!("list: {error}"))?;
                run::restore(&Snapshot(&client, id), &set)?;
                stand_still("before the end");
                let finished = client.restore_finish();
                finished.map_err(|error| format!("FINISH: {error}"))?;
            }
        }
        // The daemon must find the process alive behind the closed connection.
        stand_still("after the end");
        Ok(())
    }
}

/// What `fake-criu` is told to do.
#[derive(Deserialize)]
enum Job {
    Dump(DumpJob),
    Restore(RestoreJob),
    Pages(PageRound),
    Fast(Work),
}

/// `main` of `fake-criu`. The exit code says where the job failed.
pub fn main() -> i32 {
    match child::job() {
        Job::Dump(job) => dump_in_child(&job),
        Job::Pages(round) => match round.run() {
            Ok(had_parent) => {
                println!("parent: {had_parent}");
                0
            }
            Err(error) => {
                println!("{error:#}");
                30
            }
        },
        Job::Fast(work) => match work.run() {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("a CRIU: {error:#}");
                40
            }
        },
        Job::Restore(job) => match job.run() {
            Ok(()) => 0,
            Err(error) => {
                println!("{error}");
                20
            }
        },
    }
}

fn dump_in_child(job: &DumpJob) -> i32 {
    if let Protocol::Remote {
        dialect: Dialect::Socket,
        ..
    } = job.protocol
    {
        // Rust ignores SIGPIPE before `main`, and so does CRIU from May 2020 on. The CRIU that speaks the
        // socket dialect does not: a daemon that closes on it kills it.
        // SAFETY: sets a signal's default action; there is no handler that this could take from anybody.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    }
    let mut watch = |event: Event| {
        if let (Event::Half(name), Some(stop)) = (event, &job.stop_in) {
            if name == stop {
                stand_still(name);
            }
        }
    };
    match job.run_with(&job.set(), &mut watch) {
        Ok(()) => 0,
        Err(error) => {
            println!("{error:?}");
            match error {
                DumpError::Connect(_) => 10,
                DumpError::PreDump(_) => 11,
                DumpError::Write(_) => 12,
                DumpError::PostDump(_) => 13,
                DumpError::Script(_) => 14,
            }
        }
    }
}
