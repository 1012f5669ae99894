//! A CRIU in a process of its own that ends before it is done: what it has begun ends with it.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context as _, Result};

use super::sessions::{Way, LIMIT};
use crate::fake::fast::dumper::{bench, stand_still, Dumper};
use crate::fake::fast::set::OneTask;
use crate::fake::fast::{read_exactly, Dialect, Dump, Restore};
use crate::fake::script::Script;
use crate::memory::{Body, Warm, MIB};
use crate::pair::Binaries;

#[derive(clap::Args)]
pub struct Args {
    dir: PathBuf,
    #[arg(long)]
    way: Way,
    #[arg(long)]
    id: String,
    #[arg(long)]
    bytes: u64,
    #[arg(long)]
    restore: bool,
}

/// Starts one in `dir`, the sockets' directory. It stands still when its dump is announced, and in the middle of the
/// pages.
pub fn dump(dir: &Path, id: &str, bytes: u64) -> Result<Dumper> {
    start(dir, Way::Stream, id, bytes, false)
}

/// The same of a restore, which stands still in the middle of the pages.
pub fn restore(dir: &Path, way: Way, id: &str, bytes: u64) -> Result<Dumper> {
    start(dir, way, id, bytes, true)
}

fn start(dir: &Path, way: Way, id: &str, bytes: u64, restore: bool) -> Result<Dumper> {
    let way = clap::ValueEnum::to_possible_value(&way).context("all of them have names")?;
    Dumper::spawn(|command| {
        command.arg("soak-criu").arg(dir);
        command.args(["--way", way.get_name(), "--id", id]);
        command.args(["--bytes", &bytes.to_string()]);
        command.args(restore.then_some("--restore"));
    })
}

/// Is it. The bench ends it where it stands still.
pub fn run(args: &Args) -> Result<bool> {
    match args.restore {
        true => half_restore(args),
        false => half_dump(args),
    }?;
    bail!("nobody ended it")
}

fn half_dump(args: &Args) -> Result<()> {
    let memory = Warm::source(usize::try_from(args.bytes)?)?;
    let task = OneTask {
        body: Body::new(memory.bytes(), args.bytes),
    };
    let proxy = Binaries::find()?.proxy;
    let mut bench = bench()?;
    let mut criu = Dump::begin(Dialect::Stream, &args.dir, &args.id)?;
    Script::new(&proxy, "pre-dump", &args.dir, LIMIT)
        .run_beside(Some(std::process::id()))?
        .succeeded("pre-dump")?;
    stand_still(&mut bench)?;
    task.dump_with(&mut criu, || Ok(stand_still(&mut bench)?))
}

fn half_restore(args: &Args) -> Result<()> {
    let mut restore = Restore::begin(args.way.dialect(), &args.dir, &args.id)?;
    restore.small("inventory.img")?;
    restore.small("pstree.img")?;
    let mut pages = File::from(restore.open("pages-1.img")?);
    let mut buffer = vec![0; usize::try_from(MIB)?];
    let mut left = args.bytes / 2;
    while left > 0 {
        let n = left.min(MIB);
        read_exactly(&mut pages, &mut buffer[..usize::try_from(n)?])
            .context("half of the pages")?;
        left -= n;
    }
    Ok(stand_still(&mut bench()?)?)
}
