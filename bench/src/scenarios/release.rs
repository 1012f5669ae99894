//! `--release-on-read`: how much memory the cache and the restored process take together while
//! the one gives to the other.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::IMAGE;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::fast::set::OneTask;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::memory::{Body, Warm};
use e2e_tests::process::parse_vm;

const PEAK: &str = "release.peak";
const BYTES: &str = "release.bytes";

/// Short against the time in which a segment of the cache is read.
const SAMPLE: Duration = Duration::from_micros(500);

#[derive(Default)]
pub struct Release {
    pair: Option<Pair>,
}

impl Scenario for Release {
    fn name(&self) -> String {
        "release".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        // All of the row's bytes are the largest sum of one moment.
        let title = "image-cache and restored process, --release-on-read";
        let most = Reach::ValueAtMost(IMAGE as f64 * 1.1);
        vec![RowSpec::new(Group::Memory, PEAK, title, Unit::Bytes)
            .beside(BYTES, "of images")
            .target(most, true)]
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let pair = context.start_pair_at(
            "release",
            Options::as_installed().cache(&["--release-on-read"]),
        )?;
        self.pair = Some(pair);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.pair.as_ref().context("not started")?;
        context.next_stamp();
        let task = OneTask {
            body: Body::new(context.src.bytes(), IMAGE),
        };
        let mut criu = Dump::begin(Dialect::Stream, &pair.source, "")?;
        pair.announce(IMAGE)?;
        task.dump(&mut criu).context("dump")?;
        pair.script("post-dump")?;
        criu.finish()?;

        // A restored process gets its pages as it is read into.
        let mut into = Warm::cold(usize::try_from(IMAGE)?)?;
        let before = own_rss()?;
        let over = AtomicBool::new(false);
        let peak = std::thread::scope(|scope| {
            let watch = scope.spawn(|| -> Result<u64> {
                let mut peak = 0;
                while !over.load(Ordering::Relaxed) {
                    // The cache first: what moves in between is counted twice, not missed.
                    let cache = pair.cache.vm("VmRSS")?;
                    peak = peak.max(cache + own_rss()?.saturating_sub(before));
                    std::thread::sleep(SAMPLE);
                }
                Ok(peak)
            });
            let restored =
                Restore::begin(Dialect::Stream, &pair.target, "").and_then(|mut criu| {
                    task.restore(&mut criu, into.bytes_mut())?;
                    criu.finish()
                });
            over.store(true, Ordering::Relaxed);
            let peak = watch.join().expect("the sampling thread does not panic");
            restored.context("restore").and(peak)
        })?;
        task.check_last(into.bytes())?;
        drop(into);
        pair.wait_released(IMAGE)?;
        out.push(PEAK, peak as f64);
        out.push(BYTES, IMAGE as f64);
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.pair.take().context("not started")?.stop()
    }
}

fn own_rss() -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    parse_vm(&status, "VmRSS").context("VmRSS of this process")
}
