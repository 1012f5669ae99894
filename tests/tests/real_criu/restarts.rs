//! image-cache is killed between a dump and its restore, and started again.

use anyhow::{ensure, Result};
use e2e_tests::real::{
    between_two_hosts, wait_until, Cache, Dump, Pair, Program, Restore, IMAGES, SOON,
};

/// Also where the memory of this host comes in small pages.
const ON: [&str; 2] = ["--keep-through-restart", "on"];

fn wait_for_log(cache: &Cache, text: &str) -> Result<()> {
    let said = || Ok(cache.log()?.contains(text));
    wait_until(&format!("image-cache saying {text:?}"), SOON, said)
}

fn dumped(pair: &Pair, cache: &Cache) -> Result<Program> {
    let counter = Program::counter(&pair.source)?;
    Dump::ok(&pair.source, IMAGES, counter.pid)?;
    wait_for_log(cache, "ready to be restored")?;
    Ok(counter)
}

#[test]
fn a_process_survives_the_death_of_image_cache() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&ON)?;
        let _proxy = pair.proxy(&[])?;
        let counter = dumped(pair, &cache)?;
        cache.into_daemon().kill()?;
        let cache = pair.cache(&ON)?;
        ensure!(cache
            .log()?
            .contains("kept through the restart of image-cache: to be restored"));
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()?;
        wait_for_log(&cache, "restored; released")
    });
}

/// A restore that waits, and finds no image-cache any more, fails; the next one restores what is kept.
#[test]
fn a_restore_that_fails_with_image_cache_can_be_done_again() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&ON)?;
        let _proxy = pair.proxy(&[])?;
        let waits = Restore::spawn(&pair.target, IMAGES)?;
        waits.wait_until_it_waits()?;
        cache.into_daemon().kill()?;
        waits.wait()?.expect_failure()?;
        let cache = pair.cache(&ON)?;
        let counter = dumped(pair, &cache)?;
        cache.into_daemon().kill()?;
        let _cache = pair.cache(&ON)?;
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}
