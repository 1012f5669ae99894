//! Who can be the page server of a series of rounds: image-proxy with image-cache behind it, and
//! `criu page-server`.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::criu::CriuRoot;
use crate::sink::Sink;
use e2e_tests::daemons::{Options, PagesAt, Pair};
use e2e_tests::fake::fast::rounds::{check_flat, send, Series};
use e2e_tests::fake::fast::space::{Entry, Space};
use e2e_tests::fake::fast::{expect_end, read_exactly, Dialect, Restore};
use e2e_tests::memory::{compare, PAGE};

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

pub struct Ours {
    pub pair: Pair,
    series: Series,
}

impl Ours {
    pub fn start(dir: &Path, at: PagesAt) -> Result<Self> {
        let pair = Options::as_installed().page_server(at).start_in(dir)?;
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
        let mut criu = Restore::begin(Dialect::Stream, &pair.target, "")?;
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
