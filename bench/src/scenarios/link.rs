//! What the link's guards cost: being able to go on after a break, checksums, TLS.

use std::time::Duration;

use anyhow::Result;

use super::connections::dump_and_restore;
use super::{gib_per_second, IMAGE};
use crate::runner::{Context, Scenario};
use crate::table::{Group, RowSpec, Samples, Unit};
use e2e_tests::authority::Authority;
use e2e_tests::daemons::{Options, Pair};
use e2e_tests::memory::GIB;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Guard {
    /// `--link-timeout 0`: a dump fails with its link.
    None,
    /// As it is without options.
    Resume,
    Checksum,
    Tls,
}

const ALL: [Guard; 4] = [Guard::None, Guard::Resume, Guard::Checksum, Guard::Tls];

impl Guard {
    fn key(self) -> &'static str {
        match self {
            Guard::None => "link.none",
            Guard::Resume => "link.resume",
            Guard::Checksum => "link.checksum",
            Guard::Tls => "link.tls",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Guard::None => "--link-timeout 0, 1 GiB",
            Guard::Resume => "the default: a break is survived",
            Guard::Checksum => "--checksum",
            Guard::Tls => "--tls",
        }
    }

    pub(super) fn place(self, ca: &Authority) -> Options {
        match self {
            Guard::None => Options::as_installed().proxy(&["--link-timeout", "0"]),
            Guard::Resume => Options::as_installed(),
            Guard::Checksum => Options::as_installed().proxy(&["--checksum"]),
            Guard::Tls => Options::as_installed()
                .cache(&ca.of("127.0.0.1"))
                .proxy(&ca.of("source")),
        }
    }
}

/// The names of the certificates for [`Guard::Tls`].
pub(super) const NAMES: [&str; 2] = ["127.0.0.1", "source"];

#[derive(Default)]
pub struct Link(Vec<(Guard, Pair)>);

impl Scenario for Link {
    fn name(&self) -> String {
        "link".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let mut rows: Vec<_> = ALL
            .iter()
            .map(|guard| {
                let unit = Unit::GibPerSecond;
                let row = RowSpec::new(Group::Link, guard.key(), guard.title(), unit);
                match guard {
                    Guard::None => row,
                    _ => row.beside(Guard::None.key(), "--link-timeout 0"),
                }
            })
            .collect();
        for guard in ALL {
            for (what, who) in [("proxy", "image-proxy"), ("cache", "image-cache")] {
                let key = format!("{}.{what}.cpu", guard.key());
                let title = format!("{who}, {}", guard.title());
                let row = RowSpec::new(Group::Link, key, title, Unit::CpuSecondsPerGib);
                rows.push(match guard {
                    Guard::None => row,
                    _ => row.beside(format!("link.none.{what}.cpu"), "--link-timeout 0"),
                });
            }
        }
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let ca = Authority::below(&context.dir, &NAMES)?;
        for guard in ALL {
            let pair = context.start_pair_at(guard.key(), guard.place(&ca))?;
            self.0.push((guard, pair));
        }
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        for (guard, pair) in &self.0 {
            let took = dump_and_restore(pair, context, IMAGE)?;
            let key = guard.key();
            let per_gib = |cpu: Duration| cpu.as_secs_f64() * GIB as f64 / IMAGE as f64;
            out.push(format!("{key}.proxy.cpu"), per_gib(took.proxy_cpu));
            out.push(format!("{key}.cache.cpu"), per_gib(took.cache_cpu));
            out.push(key, gib_per_second(IMAGE, took.wall));
        }
        // Whoever comes first in a round finds memory that the machine has to make ready anew.
        self.0.rotate_left(1);
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.0.drain(..).try_for_each(|(_, pair)| pair.stop())
    }
}
