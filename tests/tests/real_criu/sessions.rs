//! Several migrations through one cache, and how long a set stays.

use anyhow::ensure;
use e2e_tests::real::{
    between_two_hosts, wait_until, Cache, Dump, Program, Proxy, Restore, IMAGES, SOON,
};
use rustix::process::{pidfd_send_signal, Signal};

const MIB: u64 = 1 << 20;

#[test]
fn two_migrations_at_once_through_one_cache() {
    between_two_hosts(|pair| {
        let _cache = pair.cache(&[])?;
        pair.source.sh("mkdir /run/red /run/blue")?;
        let start = |name: &str| {
            let directory = format!("/run/{name}");
            let options = ["--session", name];
            Proxy::start_in(&pair.source, pair.cache_address(), &directory, &options)
        };
        let _red = start("red")?;
        let _blue = start("blue")?;
        // Of different size, so that mixed up sets could not go unnoticed.
        let first = Program::memory(&pair.source, 160, 2)?;
        let second = Program::memory(&pair.source, 96, 3)?;
        let first_hash = first.ask(&pair.source, "hash")?;
        let second_hash = second.ask(&pair.source, "hash")?;
        ensure!(first_hash != second_hash);

        let first_dump = Dump::spawn(&pair.source, "/run/red", first.pid)?;
        let second_dump = Dump::spawn(&pair.source, "/run/blue", second.pid)?;
        first_dump.wait()?.ok()?;
        second_dump.wait()?.ok()?;
        ensure!(!pair.source.is_alive(first.pid)? && !pair.source.is_alive(second.pid)?);

        let red = format!("{IMAGES}/sessions/red");
        let blue = format!("{IMAGES}/sessions/blue");
        // Both at once here as well. Not in the order of the dumps, the names say which is which.
        let second_restore = Restore::spawn(&pair.target, &blue)?;
        let first_restore = Restore::spawn(&pair.target, &red)?;
        first_restore.wait()?.ok()?;
        second_restore.wait()?.ok()?;

        for (program, hash) in [(first, first_hash), (second, second_hash)] {
            program.runs_on()?;
            ensure!(
                program.ask(&pair.target, "hash")? == hash,
                "process {} has another's memory, or a damaged one",
                program.pid
            );
        }
        ensure!(pair.source.image_files()?.is_empty());
        ensure!(pair.target.image_files()?.is_empty());
        Ok(())
    });
}

#[test]
fn a_restore_that_starts_before_the_dump_waits() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let program = Program::memory(&pair.source, 32, 2)?;
        let hash = program.ask(&pair.source, "hash")?;

        let mut restore = Restore::spawn(&pair.target, IMAGES)?;
        restore.wait_until_it_waits()?;
        program.runs_on()?;
        ensure!(restore.is_running()?, "the early restore gave up");
        Dump::ok(&pair.source, IMAGES, program.pid)?;

        restore.wait()?.ok()?;
        ensure!(pair.target.is_alive(program.pid)?);
        program.runs_on()?;
        ensure!(program.ask(&pair.target, "hash")? == hash);
        Ok(())
    });
}

#[test]
fn a_restored_set_is_gone_and_its_memory_with_it() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&[])?;
        let proxy = pair.proxy(&["--session", "once"])?;
        let idle = cache.memory()?;
        let program = Program::memory(&pair.source, 256, 2)?;
        let hash = program.ask(&pair.source, "hash")?;

        Dump::ok(&pair.source, IMAGES, program.pid)?;
        let held = cache.memory()?;
        ensure!(
            held > idle + 256 * MIB,
            "the cache cannot hold 256 MiB in {held} bytes"
        );
        let proxy_peak = proxy.peak_memory()?;
        ensure!(
            proxy_peak < 64 * MIB,
            "the proxy took {proxy_peak} bytes, so it keeps images"
        );
        let by_name = format!("{IMAGES}/sessions/once");
        Restore::ok(&pair.target, &by_name, program.pid)?;
        program.runs_on()?;
        ensure!(program.ask(&pair.target, "hash")? == hash);

        cache.wait_for_memory_below(idle + 16 * MIB)?;
        wait_until("the session's directory going", SOON, || {
            Ok(!pair.target.path(&by_name).exists())
        })?;
        program.kill(&pair.target)?;
        Restore::spawn(&pair.target, &by_name)?
            .wait()?
            .expect_failure()?;
        ensure!(!pair.target.is_alive(program.pid)?, "restored twice");
        Ok(())
    });
}

/// What users type who do not know of the script: the cache must find out by itself.
#[test]
fn a_restore_without_script_is_recognised() {
    between_two_hosts(|pair| {
        let _cache = pair.cache(&[])?;
        let _proxy = pair.proxy(&["--session", "plain"])?;
        let counter = Program::counter(&pair.source)?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        let by_name = format!("{IMAGES}/sessions/plain");
        Restore::spawn_with(&pair.target, &by_name, &[])?
            .wait()?
            .ok()?;
        counter.runs_on()?;
        wait_until("the session's directory going", SOON, || {
            Ok(!pair.target.path(&by_name).exists())
        })
    });
}

/// The unforgivable: a restore that fails at its very end, when everything has been read, must
/// not take the only copy of the process with it.
#[test]
fn a_restore_that_fails_late_can_be_repeated() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let counter = Program::counter(&pair.source)?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        pair.target.sh(
            "printf '#!/bin/sh\\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ]\\n' > /run/fails
             chmod 755 /run/fails",
        )?;
        for _ in 0..2 {
            Restore::spawn_with(&pair.target, IMAGES, &["--action-script", "/run/fails"])?
                .wait()?
                .expect_failure()?;
            // What it kills may die a little after it.
            wait_until("CRIU killing what failed", SOON, || {
                Ok(!pair.target.is_alive(counter.pid)?)
            })?;
        }
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

/// A CRIU that is killed when its tasks are all but finished leaves them behind: they live, wait for it for ever, and
/// are not the process.
#[test]
fn a_restore_that_is_killed_late_can_be_repeated() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = Program::counter(&pair.source)?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;
        pair.target.sh(
            "printf '#!/bin/sh\\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ] || { : >/run/late; exec sleep 60; }\\n' > /run/waits
             chmod 755 /run/waits",
        )?;

        let options = ["--action-script", "/run/waits"];
        let restore = Restore::spawn_with(&pair.target, IMAGES, &options)?;
        wait_until("the script of the restore", SOON, || {
            Ok(pair.target.path("/run/late").exists())
        })?;
        pidfd_send_signal(restore.handle()?, Signal::KILL)?;
        restore.wait()?;
        ensure!(pair.target.is_alive(counter.pid)?, "nothing is left of it");
        wait_until("the verdict on the restore", SOON, || {
            let log = cache.log()?;
            ensure!(!log.contains("restored; released"), "the only copy is gone");
            Ok(log.contains("so the set is kept"))
        })?;

        counter.kill(&pair.target)?;
        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

/// CRIU has closed the images dir when it runs the script for the last time (`post-resume`), so
/// that `CRTOOLS_IMAGE_DIR` leads nowhere then; and `-W` need not hold any socket.
#[test]
fn the_restore_script_finds_its_daemon() {
    between_two_hosts(|pair| {
        let _daemons = pair.daemons()?;
        let counter = Program::counter(&pair.source)?;
        Dump::ok(&pair.source, IMAGES, counter.pid)?;

        let outcome = Restore::spawn(&pair.target, IMAGES)?.wait()?;

        let said = format!("{}{}", outcome.output.stderr, outcome.log);
        let complaint = said.lines().find(|line| line.contains("image-cache:"));
        ensure!(complaint.is_none(), "the script says {complaint:?}");
        outcome.ok()?;
        counter.runs_on()
    });
}

#[test]
fn a_kept_set_is_restored_again_after_the_first_copy_ended() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&["--keep"])?;
        let _proxy = pair.proxy(&[])?;
        let idle = cache.memory()?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        Dump::ok(&pair.source, IMAGES, program.pid)?;
        let mark = program.mark()?;

        for _copy in 0..2 {
            Restore::ok(&pair.target, IMAGES, program.pid)?;
            program.runs_on()?;
            ensure!(program.ask(&pair.target, "hash")? == hash);
            program.kill(&pair.target)?;
            program.rewind_to(mark)?;
            ensure!(cache.memory()? > idle + 64 * MIB, "the set was not kept");
        }
        Ok(())
    });
}

#[test]
fn a_kept_set_is_restored_on_two_hosts_in_turn() {
    const SHARED: &str = "/mnt/sockets";
    between_two_hosts(|pair| {
        // The hosts share the directory of the cache's sockets, as containers of one machine do.
        pair.target.sh(&format!("mkdir {SHARED}"))?;
        let _cache = Cache::start_in(&pair.target, SHARED, &["--keep"])?;
        let _proxy = pair.proxy(&[])?;
        let first = pair.lab.host("first")?;
        let second = pair.lab.host("second")?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        Dump::ok(&pair.source, IMAGES, program.pid)?;
        let mark = program.mark()?;

        for host in [&first, &second] {
            Restore::ok(host, SHARED, program.pid)?;
            program.runs_on()?;
            ensure!(program.ask(host, "hash")? == hash, "on {}", host.name);
            // Two copies would write to one log.
            program.kill(host)?;
            program.rewind_to(mark)?;
        }
        Ok(())
    });
}

#[test]
fn a_session_follows_the_other_without_restarting_anything() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let idle = cache.memory()?;
        for _round in 0..3 {
            let program = Program::memory(&pair.source, 64, 2)?;
            let hash = program.ask(&pair.source, "hash")?;
            Dump::ok(&pair.source, IMAGES, program.pid)?;
            Restore::ok(&pair.target, IMAGES, program.pid)?;
            program.runs_on()?;
            ensure!(program.ask(&pair.target, "hash")? == hash);
            program.kill(&pair.target)?;
        }
        cache.wait_for_memory_below(idle + 16 * MIB)
    });
}
