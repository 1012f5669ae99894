//! Whatever breaks before the commit: the dump fails, the process lives on where it was, unharmed,
//! and a retry succeeds.

use anyhow::{ensure, Context, Result};
use e2e_tests::real::criu::Running;
use e2e_tests::real::{between_two_hosts, Daemon, Dump, Pair, Program, Restore, IMAGES};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

/// A process whose dump takes a while, and the hash of its memory.
struct Victim {
    program: Program,
    hash: String,
}

impl Victim {
    fn start(pair: &Pair) -> Result<Self> {
        let program = Program::memory(&pair.source, 256, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        Ok(Self { program, hash })
    }

    /// Starts a dump and stops the cache when a part of the images has arrived: without the cache
    /// the dump cannot get any further than buffers reach, so it certainly is in its middle.
    fn dump_to_the_middle<'a>(&self, pair: &'a Pair, cache: &Daemon) -> Result<Running<'a>> {
        let before = pair.target.received_bytes()?;
        let mut dump = Dump::spawn(&pair.source, IMAGES, self.program.pid)?;
        pair.wait_for_traffic(before, 16 * MIB)?;
        cache.signal(Signal::STOP)?;
        let received = pair.target.received_bytes()? - before;
        ensure!(
            dump.is_running()? && received < 224 * MIB,
            "the dump was over before it was stopped ({received} bytes)"
        );
        Ok(dump)
    }

    fn lives_on_source(&self, pair: &Pair) -> Result<()> {
        pair.unharmed_on_source(&self.program)?;
        ensure!(
            self.program.ask(&pair.source, "hash")? == self.hash,
            "its memory changed"
        );
        ensure!(
            pair.source.image_files()?.is_empty(),
            "images on the source"
        );
        ensure!(
            pair.target.image_files()?.is_empty(),
            "images on the target"
        );
        Ok(())
    }

    fn retry_succeeds(&self, pair: &Pair) -> Result<()> {
        Dump::ok(&pair.source, IMAGES, self.program.pid).context("the retry")?;
        Restore::ok(&pair.target, IMAGES, self.program.pid).context("after the retry")?;
        self.program.runs_on()?;
        ensure!(
            self.program.ask(&pair.target, "hash")? == self.hash,
            "the memory changed on its way"
        );
        Ok(())
    }
}

#[test]
fn the_link_is_cut_in_mid_dump() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let victim = Victim::start(pair)?;

        let dump = victim.dump_to_the_middle(pair, &cache)?;
        pair.cut()?;
        cache.signal(Signal::CONT)?;
        dump.wait()?.expect_failure()?;

        victim.lives_on_source(pair)?;
        pair.mend()?;
        victim.retry_succeeds(pair)
    });
}

#[test]
fn the_cache_is_killed_in_mid_dump() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let victim = Victim::start(pair)?;

        let dump = victim.dump_to_the_middle(pair, &cache)?;
        cache.into_daemon().kill()?;
        dump.wait()?.expect_failure()?;

        victim.lives_on_source(pair)?;
        // It replaces the sockets that the killed one left behind; the proxy stays the same.
        let _cache = pair.cache(&[])?;
        victim.retry_succeeds(pair)
    });
}

#[test]
fn the_proxy_is_killed_in_mid_dump() {
    between_two_hosts(|pair| {
        // The cache cannot tell a dead proxy from a link that is away.
        let cache = pair.cache(&["--link-timeout", "1"])?;
        let proxy = pair.proxy(&[])?;
        let idle = cache.memory()?;
        let victim = Victim::start(pair)?;

        let dump = victim.dump_to_the_middle(pair, &cache)?;
        proxy.into_daemon().kill()?;
        cache.signal(Signal::CONT)?;
        dump.wait()?.expect_failure()?;

        victim.lives_on_source(pair)?;
        // What had arrived is of no use to anybody.
        cache.wait_for_memory_below(idle + 16 * MIB)?;
        let _proxy = pair.proxy(&[])?;
        victim.retry_succeeds(pair)
    });
}

#[test]
fn the_memory_limit_is_hit() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&["--memory-limit", "64M"])?;
        let _proxy = pair.proxy(&[])?;
        let idle = cache.memory()?;
        let victim = Victim::start(pair)?;

        Dump::fails(&pair.source, IMAGES, victim.program.pid)?;
        victim.lives_on_source(pair)?;
        cache.wait_for_memory_below(idle + 16 * MIB)?;

        // What fits below the limit still passes, so the failure gave its share back.
        let small = Program::memory(&pair.source, 32, 2)?;
        Dump::ok(&pair.source, IMAGES, small.pid)?;
        Restore::ok(&pair.target, IMAGES, small.pid)?;
        small.runs_on()?;

        ensure!(cache.into_daemon().terminate()?.success());
        let _cache = pair.cache(&["--memory-limit", "512M"])?;
        victim.retry_succeeds(pair)
    });
}

#[test]
fn criu_is_killed_in_mid_dump() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let idle = cache.memory()?;
        let victim = Victim::start(pair)?;

        let dump = victim.dump_to_the_middle(pair, &cache)?;
        // By its name within the host's own pid namespace, where only this one runs.
        pair.source.sh("kill -KILL $(pgrep -x criu)")?;
        cache.signal(Signal::CONT)?;
        let outcome = dump.wait()?;
        ensure!(!outcome.output.status.success());

        // CRIU had no chance to take its parasite out of the process, so this one may be lost; what
        // counts here is that the cache does not take the torso for a set, and lets go of it.
        cache.wait_for_memory_below(idle + 16 * MIB)?;
        let next = Program::memory(&pair.source, 32, 2)?;
        let hash = next.ask(&pair.source, "hash")?;
        Dump::ok(&pair.source, IMAGES, next.pid)?;
        Restore::ok(&pair.target, IMAGES, next.pid)?;
        next.runs_on()?;
        ensure!(next.ask(&pair.target, "hash")? == hash);
        Ok(())
    });
}

#[test]
fn no_daemon_runs() {
    between_two_hosts(|pair| {
        let counter = Program::counter(&pair.source)?;

        let outcome = Dump::fails(&pair.source, IMAGES, counter.pid)?;
        ensure!(!outcome.froze_tasks(), "the process was frozen for nothing");
        pair.unharmed_on_source(&counter)?;

        let _daemons = pair.daemons()?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

#[test]
fn the_proxy_runs_but_no_cache_answers() {
    between_two_hosts(|pair| {
        let _proxy = pair.proxy(&["--connect-timeout", "2"])?;
        let counter = Program::counter(&pair.source)?;

        // The script is asked before the freeze, and it asks the cache.
        let outcome = Dump::fails(&pair.source, IMAGES, counter.pid)?;
        ensure!(!outcome.froze_tasks(), "the process was frozen for nothing");
        pair.unharmed_on_source(&counter)?;

        let _cache = pair.cache(&[])?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}
