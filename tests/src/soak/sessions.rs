//! One short session after the other: what CRIU does, and what goes wrong in between.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fake::content::Random;
use crate::fake::script::{Script, Task};
use anyhow::{bail, ensure, Context as _, Result};
use rustix::net::Shutdown;
use rustix::process::{pidfd_getfd, PidfdGetfdFlags};
use serde::Serialize;
use serde_json::json;

use super::watch::Watched;
use crate::bins::bin;
use crate::fake::fast::rounds::{check_flat, send, Series};
use crate::fake::fast::set::OneTask;
use crate::fake::fast::space::{Dirty, Space};
use crate::fake::fast::{expect_end, read_exactly, Dialect, Dump, Restore, Work};
use crate::memory::{compare, Body, Warm, MIB, PAGE};

/// A script waits for data in flight, at the most.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How the images travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum Way {
    Stream,
    RemotePipes,
    RemoteSockets,
    /// Two pre-dumps and a dump through image-proxy's page server, restored with `--stream`.
    Rounds,
}

impl Way {
    pub fn dialect(self) -> Dialect {
        match self {
            Self::Stream | Self::Rounds => Dialect::Stream,
            Self::RemotePipes => Dialect::RemotePipe,
            Self::RemoteSockets => Dialect::RemoteSocket,
        }
    }
}

/// What becomes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum End {
    Restored,
    /// Every TCP connection of the link was cut in the middle of the pages: resumed, restored.
    Cut,
    /// A first restore left in the middle, the set was kept, a second one had it.
    Twice,
    /// The same, and the operator dropped it.
    Dropped,
    /// The operator gave it up in the middle of the dump.
    Aborted,
    /// CRIU was killed in the middle of the dump.
    Killed,
}

impl End {
    /// What the logs say of it; nothing else may be there.
    pub const EXPECTED: [&'static str; 9] = [
        // Cut.
        "the peer has 38s to connect again",
        "trying for 30s to connect again",
        "connected again",
        // Dropped.
        "dropped by the operator",
        // Aborted, while CRIU goes on for some images.
        "aborted by the operator",
        "the source gave the set up",
        "refused: the dump is over",
        "image aborted by the source",
        // Killed.
        "CRIU ended",
    ];
}

#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub number: u64,
    pub way: Way,
    pub end: End,
    pub bytes: u64,
    /// By the other image-proxy, over several connections.
    pub wide: bool,
}

/// Bytes of the pages of a short session, but for the large ones.
const SMALL: u64 = 2 * MIB;
/// Pages of the process that is dumped in rounds.
const ROUND_PAGES: usize = 256;

impl Plan {
    pub fn new(number: u64, large: Option<u64>, random: &mut Random) -> Self {
        let mut percent = || random.between(0, 99);
        let way = match percent() {
            0..55 => Way::Stream,
            55..75 => Way::RemotePipes,
            75..88 => Way::RemoteSockets,
            _ => Way::Rounds,
        };
        let end = match percent() {
            0..80 => End::Restored,
            80..85 => End::Cut,
            85..90 => End::Twice,
            90..93 => End::Dropped,
            93..97 => End::Aborted,
            _ => End::Killed,
        };
        let wide = percent() < 10;
        let pages = random.between(1, SMALL / PAGE as u64);
        let mut plan = Self {
            number,
            way,
            end,
            bytes: pages * PAGE as u64,
            wide,
        };
        if let Some(bytes) = large {
            plan.bytes = bytes;
            // They are there for their bytes.
            if plan.way == Way::Rounds {
                plan.way = Way::Stream;
            }
            if matches!(plan.end, End::Aborted | End::Killed) {
                plan.end = End::Restored;
            }
        } else if plan.way == Way::Rounds {
            plan.bytes = (ROUND_PAGES * PAGE) as u64;
            plan.wide = false;
            if matches!(plan.end, End::Aborted | End::Killed) {
                plan.end = End::Restored;
            }
        } else if plan.end == End::Killed {
            // The CRIU that is killed can do nothing else.
            plan.way = Way::Stream;
        }
        plan
    }
}

/// A host that dumps.
pub struct Source<'a> {
    pub proxy: Watched<'a>,
    /// Of its sessions.
    pub session: &'static str,
    pub pages_port: u16,
}

/// The daemons' programs as action scripts.
pub struct Scripts {
    proxy: PathBuf,
    cache: PathBuf,
}

impl Scripts {
    pub fn new() -> Self {
        let [proxy, cache] = ["image-proxy", "image-cache"].map(bin);
        Self { proxy, cache }
    }
}

pub struct Driver<'a> {
    pub scripts: Scripts,
    pub source: Source<'a>,
    pub wide: Source<'a>,
    pub cache: Watched<'a>,
    pub cache_port: u16,
    pub series: Series,
    pub space: Space,
    pub src: Warm,
    pub dst: Warm,
}

pub fn space() -> Space {
    Space::new(ROUND_PAGES)
}

impl Driver<'_> {
    fn source(&self, plan: Plan) -> &Source<'_> {
        match plan.wide {
            true => &self.wide,
            false => &self.source,
        }
    }

    /// One session from its beginning until both daemons have forgotten it.
    pub fn run(&mut self, plan: Plan) -> Result<()> {
        let pages = usize::try_from(plan.bytes)? / PAGE;
        if plan.way == Way::Rounds {
            self.rounds(plan)?;
        } else {
            self.src.stamp_dirty(plan.number + 1, &vec![true; pages]);
            match plan.end {
                End::Killed => self.killed(plan)?,
                End::Aborted => self.aborted(plan)?,
                _ => self.dumped(plan)?,
            }
        }
        self.source(plan).proxy.wait_empty()?;
        self.cache.wait_empty()
    }

    /// So many sessions of one kind that image-proxy remembers no others: it keeps the last 16 runs, and what it
    /// knows of their CRIUs, for connections that come late.
    pub fn alike(&mut self, number: u64) -> Result<()> {
        for wide in [false, true] {
            for _ in 0..17 {
                self.run(Plan {
                    number,
                    way: Way::Stream,
                    end: End::Restored,
                    bytes: MIB,
                    wide,
                })?;
            }
        }
        Ok(())
    }

    fn script(
        source: &Source<'_>,
        proxy: &Path,
        action: &str,
        images: &Path,
        task: &Task,
    ) -> Result<()> {
        let control = source.proxy.dir.join("image-proxy-control.sock");
        let script = Script {
            control: Some(&control),
            ..Script::new(proxy, action, images, LIMIT)
        };
        script.run_of(task)?.succeeded(action).map(drop)
    }

    fn dumped(&mut self, plan: Plan) -> Result<()> {
        let source = match plan.wide {
            true => &self.wide,
            false => &self.source,
        };
        let (dir, proxy) = (source.proxy.dir, &self.scripts.proxy);
        let id = format!("s{}", plan.number);
        let body = Body::new(self.src.bytes(), plan.bytes);
        let dumped = OneTask { body };
        // The process that is dumped: it dies when the dump is committed.
        let task = Task::start()?;
        let mut dump = Dump::begin(plan.way.dialect(), dir, &id)?;
        Self::script(source, proxy, "pre-dump", dir, &task)?;
        dumped
            .dump_with(&mut dump, || match plan.end {
                End::Cut => self.cut(source),
                _ => Ok(()),
            })
            .context("the dump")?;
        Self::script(source, proxy, "post-dump", dir, &task)?;
        drop(task);
        dump.finish()?;

        let into = &mut self.dst.bytes_mut()[..usize::try_from(plan.bytes)?];
        // As the operator likes: the newest session, or this one by its name.
        let restored_from = match plan.number % 2 {
            0 => self.cache.dir.to_owned(),
            _ => self.cache.dir.join("sessions").join(source.session),
        };
        if matches!(plan.end, End::Twice | End::Dropped) {
            let mut first =
                Work::half_restore(&restored_from, plan.way.dialect(), &id, plan.bytes).spawn();
            first.ready()?;
            if plan.end == End::Dropped {
                // It outlives its set by a moment.
                return self.cache.drop_session(source.session);
            }
        }
        let mut restore =
            Restore::begin(plan.way.dialect(), &restored_from, &id).context("the restore")?;
        let read = dumped.restore(&mut restore, into);
        read.context("the restore")?;
        resumes(&self.scripts, self.cache.dir)?;
        restore.finish()?;
        dumped.check_last(into)
    }

    /// The link is gone from one moment to the next, as by a router that forgets: both ends see it closed.
    fn cut(&self, source: &Source<'_>) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(source.proxy.process.id().try_into()?);
        let pidfd = rustix::process::pidfd_open(
            pid.context("a pid")?,
            rustix::process::PidfdFlags::empty(),
        )?;
        let mut cut = 0;
        for entry in fs::read_dir(format!("/proc/{}/fd", source.proxy.process.id()))? {
            let entry = entry?;
            // One may have been closed since it was listed.
            let is_socket = fs::read_link(entry.path())
                .is_ok_and(|link| link.to_string_lossy().starts_with("socket:"));
            if !is_socket {
                continue;
            }
            let number = entry.file_name().to_string_lossy().parse()?;
            let Ok(socket) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else {
                continue;
            };
            if peer_of(&socket).is_some_and(|peer| peer.port() == self.cache_port) {
                rustix::net::shutdown(&socket, Shutdown::Both)?;
                cut += 1;
            }
        }
        ensure!(cut > 0, "image-proxy has no connection to cut");
        Ok(())
    }

    fn aborted(&mut self, plan: Plan) -> Result<()> {
        let source = self.source(plan);
        let (dir, proxy) = (source.proxy.dir, &self.scripts.proxy);
        let criu = OneTask {
            body: Body::new(self.src.bytes(), plan.bytes),
        };
        let task = Task::start()?;
        let mut dump = Dump::begin(plan.way.dialect(), dir, &format!("s{}", plan.number))?;
        Self::script(source, proxy, "pre-dump", dir, &task)?;
        // From here on CRIU may fail at any image, or at the end.
        let dumped = criu.dump_with(&mut dump, || {
            source
                .proxy
                .order(&json!({"request": "abort", "session": source.session}))
        });
        if Self::script(source, proxy, "post-dump", dir, &task).is_ok() {
            bail!("an aborted dump was committed: {dumped:?}");
        }
        // A failed dump says FINISH, too, and whether anybody hears that is not CRIU's business.
        let _ = dump.finish();
        Ok(())
    }

    fn killed(&self, plan: Plan) -> Result<()> {
        let dir = self.source(plan).proxy.dir;
        let mut criu = Work::half_dump(dir, &format!("s{}", plan.number), plan.bytes).spawn();
        criu.ready()?;
        if plan.number % 2 == 0 {
            criu.go_on();
            criu.ready()?;
        }
        // The kill.
        drop(criu);
        Ok(())
    }

    fn rounds(&mut self, plan: Plan) -> Result<()> {
        let source = &self.source;
        let proxy = &self.scripts.proxy;
        let task = Task::start()?;
        let rounds = [Dirty::All, Dirty::Scattered(10), Dirty::Runs(5)];
        for (n, dirty) in rounds.into_iter().enumerate() {
            let dirty = self.space.dirty(dirty, plan.number + n as u64);
            self.src.stamp_dirty(plan.number + 1, &dirty);
            let last = n + 1 == rounds.len();
            let images = self.series.images_of(n, last)?;
            let _open = File::open(&images)?;
            if last {
                if plan.end == End::Cut {
                    self.cut(source)?;
                }
                Self::script(source, proxy, "pre-dump", &images, &task)?;
            }
            let entries = self.space.entries(&dirty);
            send(source.pages_port, n, &entries, self.src.bytes())
                .with_context(|| format!("round {n}"))?;
            if last {
                Self::script(source, proxy, "post-dump", &images, &task)?;
            }
        }
        drop(task);
        let into = &mut self.dst.bytes_mut()[..ROUND_PAGES * PAGE];
        if matches!(plan.end, End::Twice | End::Dropped) {
            let mut first = Restore::begin(Dialect::Stream, self.cache.dir, "")?;
            check_flat(&mut first, &self.space)?;
            drop(first);
        }
        if plan.end == End::Dropped {
            return self.cache.drop_session(source.session);
        }
        let mut restore = Restore::begin(Dialect::Stream, self.cache.dir, "")?;
        let number = check_flat(&mut restore, &self.space)?;
        let mut pages = File::from(restore.open(&format!("pages-{number}.img"))?);
        read_exactly(&mut pages, into).context("the flat pages image")?;
        expect_end(&mut pages).context("the flat pages image")?;
        resumes(&self.scripts, self.cache.dir)?;
        restore.finish()?;
        compare(
            "the flat pages",
            into,
            &self.src.bytes()[..ROUND_PAGES * PAGE],
        )
    }
}

/// image-cache as the action script of the restore: it has succeeded.
fn resumes(scripts: &Scripts, dir: &Path) -> Result<()> {
    let control = dir.join("image-cache-control.sock");
    let script = Script {
        control: Some(&control),
        ..Script::new(&scripts.cache, "pre-resume", dir, LIMIT)
    };
    let result = script.run_beside(None)?;
    result.succeeded("pre-resume").map(drop)
}

fn peer_of(socket: &OwnedFd) -> Option<SocketAddr> {
    rustix::net::getpeername(socket).ok()??.try_into().ok()
}

/// `PathBuf` of a directory below the run's.
pub fn subdir(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::create_dir_all(&path)?;
    Ok(path)
}
