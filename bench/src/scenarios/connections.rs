//! One large image over several connections (`image-proxy --connections`): on loopback, where
//! they shall cost nothing, and over a link that limits each of them, where they shall add up.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{gib_per_second, measure, peak_rows, record_peaks, Took, IMAGE};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::fake::fast::set::OneTask;
use e2e_tests::fake::fast::{Dialect, Dump, Restore};
use e2e_tests::hosts::Hosts;
use e2e_tests::memory::{Body, GIB, MIB};

const COUNTS: [u16; 3] = [1, 2, 4];

/// Of the limited link: per connection, 47.7 MiB/s.
const BITS: u64 = 400_000_000;
/// The image that goes over it; 0.7 s over four connections.
const LIMITED_IMAGE: u64 = 128 * MIB;
/// What a plain connection carries to find out what the limit really is.
const LIMITED_RAW: u64 = 32 * MIB;

pub(super) fn dump_and_restore(pair: &Pair, context: &mut Context, bytes: u64) -> Result<Took> {
    let id = format!("/bench/{}", context.next_stamp());
    let task = OneTask {
        body: Body::new(context.src.bytes(), bytes),
    };
    let mut criu = Dump::begin(Dialect::Stream, &pair.source, &id)?;
    pair.announce(bytes)?;
    let took = measure(pair, || {
        task.dump(&mut criu)?;
        pair.script("post-dump")?;
        Ok(())
    })
    .context("dump")?;
    criu.finish().context("the end of the dump")?;

    let mut criu = Restore::begin(Dialect::Stream, &pair.target, &id)?;
    let into = &mut context.dst.bytes_mut()[..usize::try_from(bytes)?];
    task.restore(&mut criu, into).context("restore")?;
    criu.finish().context("the end of the restore")?;
    task.check_last(into)?;
    pair.wait_released(bytes)?;
    Ok(took)
}

fn title(count: u16) -> String {
    match count {
        1 => "1 connection".to_owned(),
        n => format!("{n} connections"),
    }
}

/// On loopback.
#[derive(Default)]
pub struct Loopback(Vec<(u16, Pair)>);

impl Scenario for Loopback {
    fn name(&self) -> String {
        "connections".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let row = |count| {
            let key = format!("connections.{count}");
            let title = format!("{}, 1 GiB on loopback", title(count));
            let row = RowSpec::new(Group::Connections, key, title, Unit::GibPerSecond);
            match count {
                1 => row,
                _ => row
                    .beside("connections.1", "1 connection")
                    .target(Reach::RatioAtLeast(1.0), false),
            }
        };
        let mut rows: Vec<_> = COUNTS.map(row).into();
        for (what, who) in [("proxy", "image-proxy"), ("cache", "image-cache")] {
            let key = format!("connections.4.{what}.cpu");
            let title = format!("{who}, dump 1 GiB, 4 connections");
            let unit = Unit::CpuSecondsPerGib;
            rows.push(RowSpec::new(Group::Cpu, key, title, unit));
        }
        rows.extend(peak_rows("connections-4", "sets of 1 GiB, 4 connections"));
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        for count in COUNTS {
            let place = Options::as_installed().proxy(&["--connections", &count.to_string()]);
            let name = format!("connections-{count}");
            self.0.push((count, context.start_pair_at(&name, place)?));
        }
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        for (count, pair) in &self.0 {
            let took = dump_and_restore(pair, context, IMAGE)?;
            let key = format!("connections.{count}");
            let per_gib = |cpu: Duration| cpu.as_secs_f64() * GIB as f64 / IMAGE as f64;
            out.push(format!("{key}.proxy.cpu"), per_gib(took.proxy_cpu));
            out.push(format!("{key}.cache.cpu"), per_gib(took.cache_cpu));
            out.push(key, gib_per_second(IMAGE, took.wall));
        }
        // Whoever comes first in a round finds memory that the machine has to make ready anew.
        self.0.rotate_left(1);
        Ok(())
    }

    fn finish(&mut self, out: &mut Samples) -> Result<()> {
        for (count, pair) in &self.0 {
            record_peaks(&format!("connections-{count}"), pair, IMAGE, out)?;
        }
        self.0.drain(..).try_for_each(|(_, pair)| pair.stop())
    }
}

/// Over a link that limits each connection.
#[derive(Default)]
pub struct Limited {
    pairs: Vec<(u16, Pair)>,
    // Last: the daemons are gone before their hosts.
    hosts: Option<Hosts>,
    missing: Option<String>,
}

impl Scenario for Limited {
    fn name(&self) -> String {
        "limited".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let unit = Unit::GibPerSecond;
        let raw = RowSpec::new(
            Group::Connections,
            "limited.raw.4",
            "4 plain connections, link with a limit R each",
            unit,
        );
        let mut rows = vec![raw.beside("limited.limit.4", "4 x R")];
        rows.extend(COUNTS.map(|count| {
            let key = format!("limited.{count}");
            let title = format!("{}, 128 MiB, the same link", title(count));
            let name = match count {
                1 => "R, of a plain connection",
                2 => "2 x R",
                _ => "4 x R",
            };
            RowSpec::new(Group::Connections, key, title, unit)
                .beside(format!("limited.limit.{count}"), name)
                .target(Reach::RatioAtLeast(0.9), false)
        }));
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let hosts = match Hosts::start(BITS) {
            Ok(hosts) => hosts,
            Err(error) => {
                self.missing = Some(format!("{error:#}"));
                return Ok(());
            }
        };
        for count in COUNTS {
            let place = Options::as_installed()
                .proxy(&["--connections", &count.to_string()])
                .on(&hosts);
            let name = format!("limited-{count}");
            self.pairs
                .push((count, context.start_pair_at(&name, place)?));
        }
        self.hosts = Some(hosts);
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let Some(hosts) = &self.hosts else {
            let why = self.missing.clone().unwrap_or_default();
            for count in COUNTS {
                out.note(format!("limited.{count}"), why.clone());
            }
            out.note("limited.raw.4", why);
            return Ok(());
        };
        let src = &context.src.bytes()[..usize::try_from(LIMITED_RAW)?];
        let gib = |rate: f64| rate / GIB as f64;
        let one = gib(hosts.raw(1, src)?);
        out.push("limited.raw.4", gib(hosts.raw(4, src)?));
        for count in COUNTS {
            out.push(format!("limited.limit.{count}"), one * f64::from(count));
        }
        for (count, pair) in &self.pairs {
            let took = dump_and_restore(pair, context, LIMITED_IMAGE)?;
            let value = gib_per_second(LIMITED_IMAGE, took.wall);
            out.push(format!("limited.{count}"), value);
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        let pairs = self.pairs.drain(..);
        pairs.into_iter().try_for_each(|(_, pair)| pair.stop())
    }
}
