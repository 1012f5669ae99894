//! A CRIU in a process of its own, for several dumps at once: image-proxy tells them from each
//! other by their process, and each is the parent of its action script.
//!
//! It talks with the bench on its standard input, a socket: a byte when it is announced, one back
//! when all are, and [`Done`] when its dump is committed.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{ensure, Context, Result};
use rustix::time::{clock_gettime, ClockId};

use crate::fake::fast::set::OneTask;
use crate::fake::fast::{Dialect, Dump};
use crate::fake::script::Script;
use crate::memory::{Body, Warm};
use crate::pair::Binaries;
use crate::process::Process;

/// How long the bench waits for a word of it; the guard's limit is shorter than many of these.
const WORD: Duration = Duration::from_secs(60);

/// When it did what, by the clock that all processes share.
pub struct Done {
    /// Before it wrote its first image.
    pub began: Duration,
    /// Its last image was written.
    pub written: Duration,
    /// Its action script has exited: the dump is committed.
    pub committed: Duration,
}

pub fn now() -> Duration {
    time_of(ClockId::Monotonic)
}

/// Of a clock that counts from something in the past: never negative, and less than 10^9 nanoseconds.
pub fn time_of(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(
        time.tv_sec.try_into().unwrap_or(0),
        time.tv_nsec.try_into().unwrap_or(0),
    )
}

/// The bench, which has started this process.
pub fn bench() -> io::Result<UnixStream> {
    Ok(io::stdin().as_fd().try_clone_to_owned()?.into())
}

/// Tells the bench that it is where it waits, and waits.
pub fn stand_still(bench: &mut UnixStream) -> io::Result<()> {
    bench.write_all(&[0])?;
    bench.read_exact(&mut [0])
}

/// Is it: dumps one task of `bytes`, every page marked with `seed`, into the sockets in `dir`.
pub fn run(dir: &Path, bytes: u64, seed: u64) -> Result<()> {
    let mut bench = bench()?;
    let mut memory = Warm::source(usize::try_from(bytes)?)?;
    memory.stamp(seed);
    let task = OneTask {
        body: Body::new(memory.bytes(), bytes),
    };
    let proxy = Binaries::find()?.proxy;
    let script = |action: &str| {
        let script = Script::new(&proxy, action, dir, WORD);
        match action {
            // It is not killed itself.
            "post-dump" => script.run(),
            // Its memory is that of the process that is dumped.
            _ => script.run_beside(Some(std::process::id())),
        }?
        .succeeded(action)
    };
    stand_still(&mut bench)?;

    let mut criu = Dump::begin(Dialect::Stream, dir, "")?;
    script("pre-dump")?;
    stand_still(&mut bench)?;
    let began = now();
    task.dump(&mut criu)?;
    let written = now();
    script("post-dump")?;
    let committed = now();
    criu.finish()?;
    for time in [began, written, committed] {
        bench.write_all(&u64::try_from(time.as_nanos())?.to_le_bytes())?;
    }
    Ok(())
}

/// The bench's side of it.
pub struct Dumper {
    process: Process,
    socket: UnixStream,
}

impl Dumper {
    /// Starts it, and does not wait until its memory is ready.
    pub fn start(dir: &Path, bytes: u64, seed: u64) -> Result<Self> {
        Self::spawn(|command| {
            command.arg("--dump-into").arg(dir);
            command.args(["--bytes", &bytes.to_string(), "--seed", &seed.to_string()]);
        })
    }

    /// Starts this program as a CRIU of any kind.
    pub fn spawn(arguments: impl FnOnce(&mut Command)) -> Result<Self> {
        let (socket, theirs) = UnixStream::pair()?;
        socket.set_read_timeout(Some(WORD))?;
        let mut command = Command::new(std::env::current_exe()?);
        arguments(&mut command);
        let stdin = Stdio::from(std::os::fd::OwnedFd::from(theirs));
        let process = Process::spawn_with("a CRIU", command, stdin)?;
        Ok(Self { process, socket })
    }

    /// Waits until it is where it waits for us.
    pub fn ready(&mut self) -> Result<()> {
        let ready = self.socket.read_exact(&mut [0]);
        ready.context("a CRIU failed before it was where it waits")
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    pub fn go_on(&mut self) -> Result<()> {
        Ok(self.socket.write_all(&[0])?)
    }

    /// Waits for its end.
    pub fn done(mut self) -> Result<Done> {
        let mut times = [Duration::ZERO; 3];
        for time in &mut times {
            let mut nanos = [0; 8];
            let read = self.socket.read_exact(&mut nanos);
            read.context("a dumping CRIU failed")?;
            *time = Duration::from_nanos(u64::from_le_bytes(nanos));
        }
        let status = self.process.wait(WORD)?;
        ensure!(status.success(), "a dumping CRIU ended with {status}");
        let [began, written, committed] = times;
        Ok(Done {
            began,
            written,
            committed,
        })
    }
}
