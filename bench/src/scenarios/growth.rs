//! How the CPU time of both daemons grows: with the bytes of an image, the images of a set, and
//! the sessions at once.
//!
//! Everything counts that a daemon does for a set, from before CRIU connects: the session's
//! connection, announcement, commit, restore, and giving the memory back. Small sizes are repeated
//! until there is enough to measure. What a set costs without its images has a row of its own.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{ensure, Context as _, Result};

use super::gib_per_second;
use crate::raw;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::Pair;
use e2e_tests::fake::fast::set::{ManySmall, OneTask};
use e2e_tests::fake::fast::work::now;
use e2e_tests::fake::fast::{Dialect, Done, Dump, Restore, Work};
use e2e_tests::fake::FakeCriu;
use e2e_tests::machine::meminfo;
use e2e_tests::memory::{compare, Body, Warm, GIB, MIB, PAGE};

/// Largest by smallest cost.
const FLAT: Reach = Reach::RatioAtMost(1.1);

/// CPU time of the daemons, by what they did.
#[derive(Clone, Copy, Default)]
struct Cost([Duration; WHO.len()]);

/// Keys and titles of the parts of [`Cost`].
const WHO: [(&str, &str); 3] = [
    ("proxy", "image-proxy"),
    ("cache-dump", "image-cache, dump"),
    ("cache-restore", "image-cache, restore"),
];

impl Cost {
    /// `dump` and `restore` are each over when the daemons have nothing more to do for them, but for the end
    /// of a session: that falls into the restore, or the next dump.
    fn of(
        pair: &Pair,
        dump: impl FnOnce() -> Result<()>,
        restore: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        let (proxy, cache) = (pair.proxy.clock()?, pair.cache.clock()?);
        dump().context("dump")?;
        let dumped = pair.cache.clock()?;
        restore().context("restore")?;
        Ok(Self([
            pair.proxy.clock()? - proxy,
            dumped - cache,
            pair.cache.clock()? - dumped,
        ]))
    }

    fn add(&mut self, other: Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }

    fn push(&self, name: &str, size: &str, factor: f64, out: &mut Samples) {
        for ((who, _), cpu) in WHO.iter().zip(self.0) {
            out.push(format!("{name}.{who}.{size}"), cpu.as_secs_f64() * factor);
        }
    }
}

/// Sizes come one after the other in a sample, so each must find memory that is as warm as the
/// first one does (see [`Warm::refresh`]): without this the order of sizes is what is measured.
fn make_ready(bytes: u64) -> Result<()> {
    Warm::refresh(usize::try_from(bytes.max(GIB) + GIB / 4)?)?;
    Ok(())
}

/// Rows for both daemons: see [`flat_rows`].
fn rows(
    name: &str,
    of: &str,
    unit: Unit,
    sizes: &[(String, String)],
    target: bool,
) -> Vec<RowSpec> {
    let of_each = WHO.map(|(who, title)| flat_rows(name, (who, title), of, unit, sizes, target));
    of_each.into_iter().flatten().collect()
}

/// A row for each size, and one that says how flat they are. `of`: what is counted.
fn flat_rows(
    name: &str,
    (who, title): (&str, &str),
    of: &str,
    unit: Unit,
    sizes: &[(String, String)],
    target: bool,
) -> Vec<RowSpec> {
    let of_size = |(size, what): &(String, String)| {
        let key = format!("{name}.{who}.{size}");
        RowSpec::new(Group::Growth, key, format!("{title}: {what}, {of}"), unit)
    };
    let mut rows: Vec<_> = sizes.iter().map(of_size).collect();
    let key = format!("{name}.{who}.most");
    let row = RowSpec::new(
        Group::Growth,
        key,
        format!("{title}: the most of these"),
        unit,
    );
    let row = row.beside(format!("{name}.{who}.least"), "the least");
    rows.push(match target {
        true => row.target(FLAT, false),
        false => row,
    });
    rows
}

/// The values of the last rows of [`flat_rows`]: of the medians, so that noise does not add up.
fn record_flatness(
    name: &str,
    all: &[(&str, &str)],
    sizes: &[(String, String)],
    out: &mut Samples,
) {
    for (who, _) in all {
        let key = |what: &str| format!("{name}.{who}.{what}");
        let values: Vec<_> = sizes
            .iter()
            .filter_map(|(size, _)| out.median(&key(size)))
            .collect();
        if let (Some(least), Some(most)) = (
            values.iter().copied().reduce(f64::min),
            values.iter().copied().reduce(f64::max),
        ) {
            out.push(key("least"), least);
            out.push(key("most"), most);
        }
    }
}

/// One image of 64 MiB to 8 GiB.
pub struct Bytes {
    sizes: Vec<u64>,
    pair: Option<Pair>,
}

impl Bytes {
    pub fn new(quick: bool) -> Self {
        let mut sizes = vec![64 * MIB, 256 * MIB, GIB];
        if !quick {
            sizes.push(8 * GIB);
        }
        Self { sizes, pair: None }
    }

    /// Sets of this size in one sample.
    fn sets(bytes: u64) -> u64 {
        (GIB / bytes).max(1)
    }

    fn labels(&self) -> Vec<(String, String)> {
        let label = |&bytes: &u64| {
            let size = match bytes {
                GIB.. => format!("{} GiB", bytes / GIB),
                _ => format!("{} MiB", bytes / MIB),
            };
            let what = match Self::sets(bytes) {
                1 => size,
                sets => format!("{size} ({sets} sets)"),
            };
            (bytes.to_string(), what)
        };
        self.sizes.iter().map(label).collect()
    }
}

const BYTES: &str = "growth-bytes";

/// What the kernel's part of it costs, without any of us, in the same sample: how flat can it be?
const RAW: [(&str, &str); 2] = [
    ("raw-splice", "no daemons, splice into TCP"),
    ("raw-recv", "no daemons, recv into warm memory"),
];

impl Scenario for Bytes {
    fn name(&self) -> String {
        BYTES.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let unit = Unit::CpuSecondsPerGib;
        let labels = self.labels();
        let mut all = rows(BYTES, "session and commit too", unit, &labels, true);
        all.extend(
            RAW.iter()
                .flat_map(|&who| flat_rows(BYTES, who, "alone", unit, &labels, false)),
        );
        all
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.pair = Some(context.start_pair(BYTES, Dialect::Stream)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.pair.as_ref().context("not started")?;
        for (&bytes, (key, _)) in self.sizes.iter().zip(self.labels()) {
            let (needed, available) = (bytes + bytes / 8 + GIB / 2, meminfo("MemAvailable"));
            if available < needed {
                let why = format!("left out: needs {} MiB of memory", needed / MIB);
                for (who, _) in WHO {
                    out.note(format!("{BYTES}.{who}.{key}"), &why);
                }
                continue;
            }
            make_ready(bytes)?;
            let (mut cost, mut raw) = (Cost::default(), [Duration::ZERO; RAW.len()]);
            for _ in 0..Self::sets(bytes) {
                context.next_stamp();
                let task = OneTask {
                    body: Body::new(context.src.bytes(), bytes),
                };
                let into = context.dst.bytes_mut();
                cost.add(Cost::of(
                    pair,
                    || dump(pair, bytes, |criu| task.dump(criu)),
                    || restore(pair, bytes, |criu| task.restore(criu, into)),
                )?);
                task.check_last(into)?;
                let more = raw::splice_tcp_cost(&task.body, into)?;
                raw.iter_mut()
                    .zip(more)
                    .for_each(|(sum, more)| *sum += more);
            }
            let per_gib = GIB as f64 / (bytes * Self::sets(bytes)) as f64;
            cost.push(BYTES, &key, per_gib, out);
            for ((who, _), cpu) in RAW.iter().zip(raw) {
                out.push(format!("{BYTES}.{who}.{key}"), cpu.as_secs_f64() * per_gib);
            }
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        record_flatness(BYTES, &WHO, &self.labels(), out);
        record_flatness(BYTES, &RAW, &self.labels(), out);
        self.pair.take().context("not started")?.stop()
    }
}

/// `bytes`: of pages.
fn dump(pair: &Pair, bytes: u64, write: impl FnOnce(&mut Dump) -> Result<()>) -> Result<()> {
    let mut criu = Dump::begin(Dialect::Stream, &pair.source, "")?;
    match bytes {
        0 => pair.script("pre-dump")?,
        bytes => pair.announce(bytes)?,
    };
    write(&mut criu)?;
    pair.script("post-dump")?;
    criu.finish()
}

fn restore(pair: &Pair, bytes: u64, read: impl FnOnce(&mut Restore) -> Result<()>) -> Result<()> {
    let mut criu = Restore::begin(Dialect::Stream, &pair.target, "")?;
    read(&mut criu)?;
    criu.finish()?;
    pair.wait_released(bytes)
}

/// Sets of 10 to 10,000 images.
#[derive(Default)]
pub struct Images(Option<Pair>);

/// How many images, and how many such sets in one sample. No images: what a set costs.
const SETS: [(usize, usize); 5] = [(0, 200), (10, 200), (100, 40), (1000, 6), (10_000, 2)];
/// Bytes of the largest of them. After each set the cache may keep what it may keep after this one:
/// what its heap has from a large set is still there after a small one.
const LARGEST: u64 = 10_000 * PAGE as u64;
/// Every set has an inventory and a pstree, which are images too.
const OTHERS: usize = 2;

const IMAGES: &str = "growth-images";

/// What it costs to take images, or give them, alone: a loop that does nothing else.
const HANDED_OVER: [(&str, &str); 2] = [
    ("raw-dump", "no daemons, taking pipes"),
    ("raw-restore", "no daemons, answering with pipes"),
];
const BEYOND: &str = "growth-images.beyond";

fn image_labels() -> Vec<(String, String)> {
    let label = |&(count, sets): &(usize, usize)| {
        let what = format!("{count} images ({sets} sets)");
        (count.to_string(), what)
    };
    SETS[1..].iter().map(label).collect()
}

impl Scenario for Images {
    fn name(&self) -> String {
        IMAGES.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let unit = Unit::CpuMicrosPerImage;
        let labels = image_labels();
        let mut all = rows(IMAGES, "session and commit too", unit, &labels, false);
        for (who, title) in WHO {
            let title = format!("{title}: session, commit and {OTHERS} images of a set alone");
            let key = format!("{IMAGES}.{who}.0");
            all.push(RowSpec::new(Group::Growth, key, title, Unit::Milliseconds));
        }
        all.extend(rows(BEYOND, "without those", unit, &labels, true));
        let raw = |&who| flat_rows(IMAGES, who, "alone", unit, &labels, false);
        all.extend(HANDED_OVER.iter().flat_map(raw));
        all
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.0 = Some(context.start_pair(IMAGES, Dialect::Stream)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.0.as_ref().context("not started")?;
        let mut alone = Cost::default();
        for (count, sets) in SETS {
            let dirty = vec![true; count];
            let (mut cost, mut raw) = (Cost::default(), [Duration::ZERO; HANDED_OVER.len()]);
            for _ in 0..sets {
                context.stamp_dirty(&dirty);
                let (src, dst) = (context.src.bytes(), context.dst.bytes_mut());
                raw[0] += raw::handover_dump(src, dst, count)?.cpu;
                raw[1] += raw::handover_restore(src, dst, count)?.cpu;
                let set = ManySmall {
                    count,
                    memory: context.src.bytes(),
                };
                cost.add(Cost::of(
                    pair,
                    || dump(pair, 0, |criu| set.dump(criu)),
                    || restore(pair, LARGEST, |criu| set.restore(criu)),
                )?);
            }
            let per_set = Cost(
                cost.0
                    .map(|cpu| cpu / u32::try_from(sets).unwrap_or(u32::MAX)),
            );
            let key = count.to_string();
            for ((who, _), cpu) in HANDED_OVER.iter().zip(raw).filter(|_| count > 0) {
                let per_image = cpu.as_secs_f64() * 1e6 / (count * sets) as f64;
                out.push(format!("{IMAGES}.{who}.{key}"), per_image);
            }
            if count == 0 {
                alone = per_set;
                per_set.push(IMAGES, &key, 1e3, out);
                continue;
            }
            per_set.push(IMAGES, &key, 1e6 / (count + OTHERS) as f64, out);
            let mut beyond = per_set;
            for (cpu, alone) in beyond.0.iter_mut().zip(alone.0) {
                *cpu = cpu.saturating_sub(alone);
            }
            beyond.push(BEYOND, &key, 1e6 / count as f64, out);
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        record_flatness(IMAGES, &WHO, &image_labels(), out);
        record_flatness(BEYOND, &WHO, &image_labels(), out);
        record_flatness(IMAGES, &HANDED_OVER, &image_labels(), out);
        self.0.take().context("not started")?.stop()
    }
}

/// 1 GiB by 1 to 64 sessions at once, through one image-proxy and one image-cache.
#[derive(Default)]
pub struct Sessions(Option<Pair>);

const SESSIONS: &str = "growth-sessions";
const AT_ONCE: [u64; 4] = [1, 4, 16, 64];

fn session_labels() -> Vec<(String, String)> {
    let label = |count: u64| {
        let what = format!("{count} x {} MiB at once", GIB / MIB / count);
        (count.to_string(), what)
    };
    AT_ONCE.map(label).into()
}

impl Scenario for Sessions {
    fn name(&self) -> String {
        SESSIONS.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let unit = Unit::CpuSecondsPerGib;
        let labels = session_labels();
        let mut all = rows(SESSIONS, "session and commit too", unit, &labels, true);
        for (what, until) in [
            ("written", "dump, until all is written"),
            ("committed", "dump, with their action scripts"),
            ("raw", "no daemons, vmsplice -> splice -> TCP -> recv"),
        ] {
            for (count, title) in &labels {
                let key = format!("{SESSIONS}.{what}.{count}");
                let row = RowSpec::new(
                    Group::Growth,
                    key,
                    format!("{until}: {title}"),
                    Unit::GibPerSecond,
                );
                let beside =
                    |row: RowSpec| row.beside(format!("{SESSIONS}.{what}.1"), "one of them");
                if what == "written" {
                    // As many without daemons, in the same sample.
                    let raw = format!("{SESSIONS}.raw.{count}");
                    all.push(row.clone().beside(raw, "no daemons"));
                }
                all.push(match (what, count.as_str()) {
                    ("written", "1") => continue, // its row is there
                    (_, "1") => row,
                    ("raw", _) => beside(row),
                    _ => beside(row).target(Reach::RatioAtLeast(1.0), false),
                });
            }
        }
        for (count, title) in &labels {
            let key = format!("{SESSIONS}.announce.{count}");
            let title = format!("{title}: until all are announced (before the freeze)");
            all.push(RowSpec::new(Group::Growth, key, title, Unit::Milliseconds));
        }
        all
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.0 = Some(context.start_pair(SESSIONS, Dialect::Stream)?);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let pair = self.0.as_ref().context("not started")?;
        for count in AT_ONCE {
            let bytes = GIB / count;
            make_ready(2 * GIB)?;
            let first = context.next_stamp() * 1000;
            let mut dumpers = Vec::new();
            for n in 0..count {
                dumpers.push(Work::dump(&pair.source, bytes, first + n).spawn());
            }
            // Their memory is ready.
            dumpers.iter_mut().try_for_each(FakeCriu::ready)?;
            let dump = || dump_at_once(dumpers, out);
            let restore = || {
                restore_each(pair, context, bytes, first..first + count)?;
                pair.wait_released(GIB)
            };
            let cost = Cost::of(pair, dump, restore)?;
            cost.push(SESSIONS, &count.to_string(), 1.0, out);
            let (src, dst) = (context.src.bytes(), context.dst.bytes_mut());
            let took = raw::pipes_splice_tcp(src, dst, usize::try_from(count)?)?;
            out.push(format!("{SESSIONS}.raw.{count}"), gib_per_second(GIB, took));
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        record_flatness(SESSIONS, &WHO, &session_labels(), out);
        self.0.take().context("not started")?.stop()
    }
}

fn dump_at_once(mut dumpers: Vec<FakeCriu>, out: &mut Samples) -> Result<()> {
    let count = dumpers.len();
    let begin = now();
    dumpers.iter_mut().for_each(FakeCriu::go_on);
    dumpers.iter_mut().try_for_each(FakeCriu::ready)?;
    let announced = now() - begin;
    dumpers.iter_mut().for_each(FakeCriu::go_on);
    let done: Vec<_> = dumpers.into_iter().map(Done::of).collect::<Result<_>>()?;
    let began = done.iter().map(|d| d.began).min().unwrap_or_default();
    let written = done.iter().map(|d| d.written).max().unwrap_or_default();
    let committed = done.iter().map(|d| d.committed).max().unwrap_or_default();
    let key = |what: &str| format!("{SESSIONS}.{what}.{count}");
    out.push(key("announce"), announced.as_secs_f64() * 1e3);
    out.push(key("written"), gib_per_second(GIB, written - began));
    out.push(key("committed"), gib_per_second(GIB, committed - began));
    Ok(())
}

/// Restores the sets one after the other, each from its own directory, and finds by their marks
/// which is whose.
fn restore_each(
    pair: &Pair,
    context: &mut Context,
    bytes: u64,
    seeds: std::ops::Range<u64>,
) -> Result<()> {
    let mut left: Vec<_> = seeds.collect();
    for dir in session_dirs(pair)? {
        let into = &mut context.dst.bytes_mut()[..usize::try_from(bytes)?];
        let mut criu = Restore::begin(Dialect::Stream, &dir, "")?;
        let seed = OneTask::restore_marked(&mut criu, into)?;
        criu.finish()?;
        let known = left.iter().position(|&s| s == seed);
        left.remove(known.with_context(|| format!("a set with the mark {seed} came again"))?);
        // Its pages differ from ours by their marks alone.
        let ours = context.src.bytes().chunks_exact(PAGE);
        for (n, (got, ours)) in into.chunks_exact(PAGE).zip(ours).enumerate() {
            let mark = [seed.to_ne_bytes(), (n as u64).to_ne_bytes()].concat();
            compare("a page's mark", &got[..16], &mark)?;
            compare("a page", &got[16..], &ours[16..])?;
        }
    }
    ensure!(left.is_empty(), "sets are missing: {left:?}");
    Ok(())
}

fn session_dirs(pair: &Pair) -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(pair.target.join("sessions"))? {
        let path = entry?.path();
        if path.join("streamer-serve.sock").exists() {
            dirs.push(path);
        }
    }
    Ok(dirs)
}
