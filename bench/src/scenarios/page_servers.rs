//! Who can be the page server of a series of rounds: image-proxy with image-cache behind it, and
//! `criu page-server`.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};

use crate::criu::CriuRoot;
use crate::daemons::{Binaries, PagesAt, Pair, Place};
use crate::fake::pages::{PageClient, PID};
use crate::fake::space::{Entry, Space};
use crate::fake::{expect_end, pagemap, read_exactly, set, Dialect, Restore};
use crate::memory::{compare, PAGE};
use crate::sink::Sink;

/// What a daemon still does when it has answered (CPU time counts until then; `criu page-server`
/// until its end).
const SETTLE: Duration = Duration::from_millis(20);

/// One round.
pub struct Took {
    pub wall: Duration,
    /// by program
    pub cpu: Vec<(&'static str, Duration)>,
}

/// What came of the rounds.
pub struct ReadBack {
    pub read: Duration,
    /// the post-dump script, which makes the set
    pub commit: Option<Duration>,
    /// of who served it
    pub cpu: Option<Duration>,
}

pub trait PageServer {
    /// Round `n` of a series; `last`: it is the dump.
    fn round(&mut self, n: usize, last: bool, entries: &[Entry], memory: &[u8]) -> Result<Took>;

    /// Reads all pages of the space in their order after the last round, and forgets the series.
    fn read_back(&mut self, rounds: usize, space: &Space, into: &mut [u8]) -> Result<ReadBack>;

    /// Daemons must stop cleanly.
    fn stop(self: Box<Self>) -> Result<()>;
}

/// The client's side of a round.
pub fn send(port: u16, n: usize, entries: &[Entry], memory: &[u8]) -> Result<Duration> {
    let begin = Instant::now();
    let mut client = PageClient::connect(port)?;
    let parent = client.open()?;
    ensure!(
        parent == (n > 0),
        "round {n} is told that it has a parent: {parent}"
    );
    client.send(entries, memory)?;
    client.close()?;
    Ok(begin.elapsed())
}

/// CRIU's directories in a series of rounds.
pub struct Series {
    /// images directory of the dump, with all images but the pages
    pub images: PathBuf,
    /// those of the pre-dumps
    rounds: PathBuf,
}

impl Series {
    /// Below `dir`, for rounds of this process.
    pub fn new(dir: &Path) -> Result<Self> {
        let images = dir.join("images");
        fs::create_dir(&images)?;
        set::write_files(&images)?;
        let rounds = dir.join("rounds");
        // image-proxy looks for the process behind a connection, and at those of this name first.
        rustix::thread::set_name(c"criu")?;
        Ok(Self { images, rounds })
    }

    /// The images directory of round `n`, with the link to the one before, as CRIU makes it: a
    /// round is known by the directory that its CRIU has open.
    pub fn images_of(&self, n: usize, last: bool) -> Result<PathBuf> {
        if n == 0 && self.rounds.exists() {
            fs::remove_dir_all(&self.rounds)?;
        }
        fs::create_dir_all(&self.rounds)?;
        let dir = match last {
            true => self.images.clone(),
            false => self.rounds.join(n.to_string()),
        };
        if !last {
            fs::create_dir(&dir)?;
        }
        let parent = dir.join("parent");
        if parent.is_symlink() {
            fs::remove_file(&parent)?;
        }
        if n > 0 {
            symlink(self.rounds.join((n - 1).to_string()), parent)?;
        }
        Ok(dir)
    }
}

/// Reads all of a flat set but its pages, which must be right; gives the number of these.
pub fn check_flat(criu: &mut Restore, space: &Space) -> Result<u64> {
    set::check_files(criu)?;
    let map = criu.small(&format!("pagemap-{PID}.img"))?;
    let (pages_id, entries) = pagemap::parse(&map).context("the flat pagemap")?;
    let flat = space.regions.iter().map(|region| pagemap::Mapped {
        vaddr: region.vaddr,
        pages: region.pages as u64,
        flags: pagemap::PE_PRESENT,
    });
    ensure!(entries.into_iter().eq(flat), "the flat pagemap is wrong");
    Ok(pages_id)
}

pub struct Ours {
    pub pair: Pair,
    series: Series,
}

impl Ours {
    pub fn start(dir: &Path, at: PagesAt) -> Result<Self> {
        let pair = Pair::start_at(
            &Binaries::find()?,
            dir,
            Dialect::Stream,
            &Place::with_page_server(at),
        )?;
        let series = Series::new(dir)?;
        Ok(Self { pair, series })
    }
}

impl PageServer for Ours {
    fn round(&mut self, n: usize, last: bool, entries: &[Entry], memory: &[u8]) -> Result<Took> {
        let Pair { proxy, cache, .. } = &self.pair;
        let images = self.series.images_of(n, last)?;
        let _open = File::open(&images)?;
        if last {
            self.pair.script_of("pre-dump", &images)?;
        }
        let before = (proxy.fine_cpu()?, cache.fine_cpu()?);
        let wall = send(self.pair.pages_port, n, entries, memory)?;
        std::thread::sleep(SETTLE);
        let cpu = vec![
            ("proxy", proxy.fine_cpu()?.saturating_sub(before.0)),
            ("cache", cache.fine_cpu()?.saturating_sub(before.1)),
        ];
        Ok(Took { wall, cpu })
    }

    fn read_back(&mut self, _: usize, space: &Space, into: &mut [u8]) -> Result<ReadBack> {
        let pair = &self.pair;
        let commit = pair.script_of("post-dump", &self.series.images)?;
        let mut criu = Restore::begin(Dialect::Stream, &pair.dst, "")?;
        let pages_id = check_flat(&mut criu, space)?;

        std::thread::sleep(SETTLE);
        let before = pair.cache.fine_cpu()?;
        let begin = Instant::now();
        let mut pages = File::from(criu.open(&format!("pages-{pages_id}.img"))?);
        read_exactly(&mut pages, into).context("the flat pages image")?;
        expect_end(&mut pages).context("the flat pages image")?;
        let read = begin.elapsed();
        std::thread::sleep(SETTLE);
        let cpu = Some(pair.cache.fine_cpu()?.saturating_sub(before));
        criu.finish()?;
        pair.wait_released((space.pages * PAGE) as u64)?;
        Ok(ReadBack {
            read,
            commit: Some(commit),
            cpu,
        })
    }

    fn stop(self: Box<Self>) -> Result<()> {
        self.pair.stop()
    }
}

/// The limit.
pub struct Raw(pub Sink);

impl PageServer for Raw {
    fn round(&mut self, n: usize, _: bool, entries: &[Entry], memory: &[u8]) -> Result<Took> {
        let port = self.0.port()?;
        std::thread::scope(|scope| {
            let server = scope.spawn(|| self.0.serve(n > 0));
            // If this fails the server may wait for ever; the guard ends that.
            let wall = send(port, n, entries, memory)?;
            let cpu = server.join().expect("the sink does not panic")?;
            let cpu = vec![("sink", cpu)];
            Ok(Took { wall, cpu })
        })
    }

    fn read_back(&mut self, _: usize, _: &Space, into: &mut [u8]) -> Result<ReadBack> {
        let begin = Instant::now();
        into.copy_from_slice(self.0.memory());
        Ok(ReadBack {
            read: begin.elapsed(),
            commit: None,
            cpu: None,
        })
    }

    fn stop(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

pub struct Criu {
    pub root: CriuRoot,
    pub dedup: bool,
}

impl PageServer for Criu {
    fn round(&mut self, n: usize, _: bool, entries: &[Entry], memory: &[u8]) -> Result<Took> {
        let server = self.root.serve(n, self.dedup)?;
        let wall = send(server.port, n, entries, memory)?;
        let cpu = vec![("criu", server.finish()?)];
        Ok(Took { wall, cpu })
    }

    fn read_back(&mut self, rounds: usize, _: &Space, into: &mut [u8]) -> Result<ReadBack> {
        let read = self.root.read_back(rounds - 1, into)?;
        self.root.clear()?;
        Ok(ReadBack {
            read,
            commit: None,
            cpu: None,
        })
    }

    fn stop(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// The bytes that were read back must be those of the newest rounds, which `memory` still holds.
pub fn check(who: &str, into: &[u8], memory: &[u8]) -> Result<()> {
    compare(&format!("the pages of {who}"), into, memory)
}
