//! The raw limits, once per round.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::gib_per_second;
use super::small::IMAGES;
use crate::raw;
use crate::runner::{Context, Scenario};
use crate::table::{Group, RowSpec, Samples, Unit};
use e2e_tests::memory::{compare, Body, PAGE};

type Move = fn(&[u8], &mut [u8]) -> Result<Duration>;

enum Kind {
    /// Moves one large image.
    Bytes(Move),
    /// The CPU time of that: of who splices.
    Splice,
    /// Hands over many small ones.
    Images(fn(&[u8], &mut [u8], usize) -> Result<raw::Handover>),
}

pub const NAME: &str = "limits";

const ALL: &[(&str, &str, Kind)] = &[
    ("raw.memcpy", "memcpy", Kind::Bytes(raw::memcpy)),
    (
        "raw.pipe-write",
        "pipe: write -> read",
        Kind::Bytes(raw::pipe_write),
    ),
    (
        "raw.pipe-vmsplice",
        "pipe: vmsplice -> read",
        Kind::Bytes(raw::pipe_vmsplice),
    ),
    (
        "raw.pipe-vmsplice-huge",
        "pipe: vmsplice -> read, from huge pages",
        Kind::Bytes(raw::pipe_vmsplice_huge),
    ),
    (
        "raw.unix",
        "unix socket: write -> read",
        Kind::Bytes(raw::unix),
    ),
    (
        "raw.tcp",
        "loopback TCP: write -> recv",
        Kind::Bytes(raw::tcp),
    ),
    (
        "raw.pipe-splice-tcp",
        "pipe: vmsplice -> splice -> TCP -> recv",
        Kind::Bytes(raw::pipe_splice_tcp),
    ),
    (
        "raw.pipe-splice-tcp-fresh",
        "the same into new memory, made ready by a thread",
        Kind::Bytes(raw::pipe_splice_tcp_fresh),
    ),
    (
        "raw.splice.cpu",
        "pipe -> splice -> TCP: the splicing thread",
        Kind::Splice,
    ),
    (
        "raw.tmpfs-read",
        "a file on tmpfs: read",
        Kind::Bytes(raw::tmpfs_read),
    ),
    (
        "raw.handover-dump",
        "a pipe handed over per 4 KiB, dump",
        Kind::Images(raw::handover_dump),
    ),
    (
        "raw.handover-restore",
        "the same after an answer, restore",
        Kind::Images(raw::handover_restore),
    ),
];

pub struct Limits {
    chosen: Vec<&'static (&'static str, &'static str, Kind)>,
}

impl Limits {
    pub fn all() -> Self {
        Self::only(|_| true)
    }

    pub fn only(needed: impl Fn(&str) -> bool) -> Self {
        Self {
            chosen: ALL.iter().filter(|(key, ..)| needed(key)).collect(),
        }
    }
}

impl Scenario for Limits {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let unit = |kind: &Kind| match kind {
            Kind::Bytes(_) => Unit::GibPerSecond,
            Kind::Splice => Unit::CpuSecondsPerGib,
            Kind::Images(_) => Unit::PerSecond,
        };
        let touch = "first touch of memory, huge pages (before each sample)";
        let rows = self.chosen.iter();
        rows.map(|(key, title, kind)| RowSpec::new(Group::Limits, *key, *title, unit(kind)))
            .chain([RowSpec::new(
                Group::Limits,
                "raw.touch",
                touch,
                Unit::CpuSecondsPerGib,
            )])
            .collect()
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        for (key, title, kind) in &self.chosen {
            context.next_stamp();
            let (src, dst) = (context.src.bytes(), context.dst.bytes_mut());
            let (value, moved) = match kind {
                Kind::Bytes(run) => {
                    let took = run(src, dst).context(*title)?;
                    (gib_per_second(src.len() as u64, took), src.len())
                }
                Kind::Splice => {
                    let body = Body::new(src, src.len() as u64);
                    let [splice, _] = raw::splice_tcp_cost(&body, dst).context(*title)?;
                    (1.0 / gib_per_second(body.len, splice), src.len())
                }
                Kind::Images(run) => {
                    let took = run(src, dst, IMAGES).context(*title)?.wall;
                    (IMAGES as f64 / took.as_secs_f64(), IMAGES * PAGE)
                }
            };
            compare(title, &dst[..moved], &src[..moved])?;
            out.push(*key, value);
        }
        Ok(())
    }
}
