//! What is measured. A new row of the table is a new key in a scenario's sample and its `RowSpec`.

mod commit;
mod connections;
mod growth;
mod hostile;
mod large;
mod limits;
mod link;
mod memory;
pub mod page_servers;
mod peers;
pub mod real;
mod release;
mod rounds;
mod rounds_memory;
mod small;

use std::time::{Duration, Instant};

use anyhow::{bail, Result};

use self::rounds::{Rounds, Who};
use self::rounds_memory::RoundsMemory;
use crate::runner::Scenario;
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::{PagesAt, Pair};
use e2e_tests::fake::fast::Dialect;
use e2e_tests::memory::{GIB, MIB};

/// Bytes of "one large image".
pub const IMAGE: u64 = GIB;

/// Peak of image-proxy, whatever goes through it: it holds no images.
const PROXY_PEAK: Reach = Reach::ValueAtMost((16 * MIB) as f64);

/// All scenarios in the order of the table, or those whose name begins with one of `only`.
pub fn select(only: &[String], quick: bool) -> Result<Vec<Box<dyn Scenario>>> {
    let mut all: Vec<Box<dyn Scenario>> = vec![
        Box::new(limits::Limits::all()),
        Box::new(large::Large::new("stream", Dialect::Stream)),
        Box::new(large::Large::not_ahead()),
        Box::new(large::Large::new("remote-pipe", Dialect::RemotePipe)),
        Box::new(large::Large::new("remote-socket", Dialect::RemoteSocket)),
        Box::new(small::Small::new("small-stream", Dialect::Stream)),
        Box::new(small::Small::new("small-remote", Dialect::RemotePipe)),
        Box::new(commit::Commit::default()),
        Box::new(release::Release::default()),
        Box::new(memory::Memory::series(40, 64 * MIB)),
        Box::new(memory::Memory::one(64 * MIB)),
        Box::new(memory::Memory::one(GIB)),
    ];
    if !quick {
        all.push(Box::new(memory::Memory::one(8 * GIB)));
    }
    all.extend(page_server(if quick { 64 * MIB } else { 256 * MIB })?);
    all.push(Box::new(connections::Loopback::default()));
    if !quick || !only.is_empty() {
        all.push(Box::new(link::Link::default()));
        all.push(Box::new(hostile::Hostile::default()));
    }
    // Long by their nature: a limit of the link, and processes of 1 GiB.
    if !quick || !only.is_empty() {
        all.push(Box::new(connections::Limited::default()));
        all.push(Box::new(growth::Bytes::new(quick)));
        all.push(Box::new(growth::Images::default()));
        all.push(Box::new(growth::Sessions::default()));
        all.push(Box::new(real::Real::default()));
        all.push(Box::new(real::Hold::default()));
        for many in real::Many::all() {
            all.push(Box::new(many));
        }
    }
    all.push(Box::new(peers::Socat));
    all.push(Box::new(peers::Tmpfs));
    if only.is_empty() {
        return Ok(all);
    }
    if let Some(unknown) = only
        .iter()
        .find(|only| !all.iter().any(|s| s.name().starts_with(*only)))
    {
        let names: Vec<_> = all.iter().map(|scenario| scenario.name()).collect();
        bail!(
            "no scenario is called {unknown}; there are: {}",
            names.join(", ")
        );
    }
    all.retain(|scenario| only.iter().any(|only| scenario.name().starts_with(only)));
    if !all.iter().any(|scenario| scenario.name() == limits::NAME) {
        // Only those that a row stands beside.
        let rows: Vec<RowSpec> = all.iter().flat_map(|scenario| scenario.rows()).collect();
        let beside = |key: &str| {
            rows.iter()
                .any(|row| row.limit.as_ref().is_some_and(|(limit, _)| limit == key))
        };
        let limits = limits::Limits::only(beside);
        if !limits.rows().is_empty() {
            all.insert(0, Box::new(limits));
        }
    }
    Ok(all)
}

/// The page server in rounds of `bytes`, beside CRIU's own.
fn page_server(bytes: u64) -> Result<Vec<Box<dyn Scenario>>> {
    let who = [
        Who::Ours(PagesAt::Proxy),
        Who::Ours(PagesAt::Cache),
        Who::Criu { dedup: false },
        Who::Criu { dedup: true },
        Who::Raw,
    ];
    let mut all: Vec<Box<dyn Scenario>> = Vec::new();
    for who in who {
        all.push(Box::new(Rounds::new(who, bytes)?));
    }
    all.push(Box::new(RoundsMemory::all_replaced(bytes)?));
    all.push(Box::new(RoundsMemory::some_replaced(bytes)?));
    Ok(all)
}

fn gib_per_second(bytes: u64, took: Duration) -> f64 {
    bytes as f64 / GIB as f64 / took.as_secs_f64()
}

/// The memory rows of a pair that served the series `name`.
fn peak_rows(name: &str, title: &str) -> Vec<RowSpec> {
    let row = |daemon, unit_key: &str| {
        RowSpec::new(
            Group::Memory,
            format!("{name}.{unit_key}"),
            format!("{daemon}, {title}"),
            Unit::Bytes,
        )
    };
    vec![
        row("image-proxy", "proxy.hwm").target(PROXY_PEAK, true),
        row("image-cache", "cache.hwm")
            .beside(format!("{name}.bytes"), "1.03 x images + 32 MiB")
            .target(Reach::RatioAtMost(1.0), true),
    ]
}

/// What [`peak_rows`] shows.
fn record_peaks(name: &str, pair: &Pair, bytes: u64, out: &mut Samples) -> Result<()> {
    out.push(format!("{name}.proxy.hwm"), pair.proxy.vm("VmHWM")? as f64);
    out.push(format!("{name}.cache.hwm"), pair.cache.vm("VmHWM")? as f64);
    out.push(
        format!("{name}.bytes"),
        bytes as f64 * 1.03 + 32.0 * MIB as f64,
    );
    Ok(())
}

/// Runs `work` and returns how long it took and the CPU time of image-proxy and image-cache.
fn measure(pair: &Pair, work: impl FnOnce() -> Result<()>) -> Result<Took> {
    let (proxy, cache) = (pair.proxy.cpu()?, pair.cache.cpu()?);
    let begin = Instant::now();
    work()?;
    let wall = begin.elapsed();
    Ok(Took {
        wall,
        proxy_cpu: pair.proxy.cpu()? - proxy,
        cache_cpu: pair.cache.cpu()? - cache,
    })
}

struct Took {
    wall: Duration,
    proxy_cpu: Duration,
    cache_cpu: Duration,
}
