//! What can be moved: the process must not notice, and must go on from exactly where it was.

use anyhow::{ensure, Result};
use e2e_tests::real::redis::Redis;
use e2e_tests::real::{between_two_hosts, Dump, Pair, Program, Restore, IMAGES};

/// From the source to the target.
fn migrate(pair: &Pair, pid: i32) -> Result<()> {
    Dump::ok(&pair.source, IMAGES, pid)?;
    Restore::ok(&pair.target, IMAGES, pid)?;
    Ok(())
}

#[test]
fn a_counter_goes_on_from_where_it_was() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let counter = Program::counter(&pair.source)?;

        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        let at_dump = counter.ticks()?.len();
        Restore::ok(&pair.target, IMAGES, counter.pid)?;

        // Checks each number: none is missing, none came twice.
        counter.runs_on()?;
        let count: usize = counter.ask(&pair.target, "count")?.parse()?;
        ensure!(
            count > at_dump,
            "it counts {count} and was at {at_dump} before"
        );
        ensure!(!pair.source.is_alive(counter.pid)?, "it runs twice");
        Ok(())
    });
}

#[test]
fn a_process_moves_there_and_back() {
    between_two_hosts(|pair| {
        let counter = Program::counter(&pair.source)?;
        let there = pair.daemons()?;
        migrate(pair, counter.pid)?;
        counter.runs_on()?;
        drop(there);

        // The same, the other way round: the old source takes the cache, in the same directories.
        let _cache = e2e_tests::real::Cache::start(&pair.source, &[])?;
        let _proxy = e2e_tests::real::Proxy::start(&pair.target, pair.source_address(), &[])?;
        Dump::ok(&pair.target, IMAGES, counter.pid)?;
        Restore::ok(&pair.source, IMAGES, counter.pid)?;
        counter.runs_on()?;
        counter.report(&pair.source)?;
        Ok(())
    });
}

#[test]
fn threads_and_memory_are_the_same_afterwards() {
    const THREADS: u32 = 4;
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let program = Program::memory(&pair.source, 256, THREADS)?;
        let hash = program.ask(&pair.source, "hash")?;

        migrate(pair, program.pid)?;

        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "the memory changed on its way"
        );
        // Every thread came along, and lives.
        let before = program.beats(&pair.target)?;
        program.runs_on()?;
        let after = program.beats(&pair.target)?;
        ensure!(before.len() == THREADS as usize && after.len() == before.len());
        ensure!(
            before.iter().zip(&after).all(|(b, a)| a > b),
            "a thread stands still: {before:?}, then {after:?}"
        );
        Ok(())
    });
}

#[test]
fn a_process_tree_finds_everything_as_it_was() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let tree = Program::tree(&pair.source)?;
        // Shows that the tree's own check works, before it is trusted with the migration.
        let first = tree.report(&pair.source)?;
        ensure!(first.starts_with("report round=1 ok"), "{first}");

        migrate(pair, tree.pid)?;

        let second = tree.report(&pair.target)?;
        ensure!(second.starts_with("report round=2 ok"), "{second}");
        // Armed anew on the target: the objects work there, they did not just look right.
        let third = tree.report(&pair.target)?;
        ensure!(third.starts_with("report round=3 ok"), "{third}");
        tree.runs_on()
    });
}

/// With `--release-on-read` no process may ask twice for pages: they would be gone.
#[test]
fn memory_that_goes_as_it_is_read_is_the_same() {
    between_two_hosts(|pair| {
        let _daemons = (pair.cache(&["--release-on-read"])?, pair.proxy(&[])?);
        let program = Program::memory(&pair.source, 256, 4)?;
        let hash = program.ask(&pair.source, "hash")?;
        migrate(pair, program.pid)?;
        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "the memory changed on its way"
        );
        Ok(())
    });
    between_two_hosts(|pair| {
        let _daemons = (pair.cache(&["--release-on-read"])?, pair.proxy(&[])?);
        let tree = Program::tree(&pair.source)?;
        tree.report(&pair.source)?;
        migrate(pair, tree.pid)?;
        let second = tree.report(&pair.target)?;
        ensure!(second.starts_with("report round=2 ok"), "{second}");
        tree.runs_on()
    });
}

#[test]
fn redis_serves_the_same_data() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let redis = Redis::start(&pair.source)?;
        redis.ask(&pair.source, &["debug", "populate", "100000", "key", "300"])?;
        redis.ask(&pair.source, &["rpush", "list", "one", "two", "three"])?;
        redis.ask(&pair.source, &["zadd", "set", "1", "low", "9", "high"])?;
        redis.ask(&pair.source, &["set", "visits", "41"])?;
        let digest = redis.ask(&pair.source, &["debug", "digest"])?;
        let size = redis.ask(&pair.source, &["dbsize"])?;
        let run = redis.info(&pair.source, "run_id")?;
        ensure!(digest.len() == 40 && size == "100003", "{digest}, {size}");

        redis.wait_for_clients_to_leave(&pair.source)?;
        migrate(pair, redis.pid)?;

        ensure!(redis.ask(&pair.target, &["dbsize"])? == size);
        ensure!(
            redis.ask(&pair.target, &["debug", "digest"])? == digest,
            "the data changed on its way"
        );
        ensure!(
            redis.info(&pair.target, "run_id")? == run,
            "it is another server"
        );
        ensure!(redis.ask(&pair.target, &["lrange", "list", "0", "-1"])? == "one\ntwo\nthree");
        ensure!(redis.ask(&pair.target, &["zscore", "set", "high"])? == "9");
        ensure!(redis.ask(&pair.target, &["incr", "visits"])? == "42");
        Ok(())
    });
}
