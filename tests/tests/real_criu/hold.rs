//! A restore stands on the target before the source kills: what the guarantee rests on, with CRIU itself.

use std::os::unix::fs::PermissionsExt;

use anyhow::{ensure, Context};
use e2e_tests::real::{between_two_hosts, wait_until, Dump, Program, Restore, IMAGES, SOON};

/// A restore waits for the dump, and holds it until the process is dead on the source.
#[test]
fn a_restore_that_waits_stands_before_the_source_kills() {
    between_two_hosts(|pair| {
        let (cache, proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        let restore = Restore::spawn(&pair.target, IMAGES)?;
        restore.wait_until_it_waits()?;
        Dump::ok(&pair.source, IMAGES, program.pid)?;
        restore.wait()?.ok()?;
        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "its memory changed"
        );
        let said = cache.log()?;
        for line in [
            "in trial: every image is here",
            "restored and held",
            "the restore goes on",
            "restored; released",
        ] {
            ensure!(said.contains(line), "no {line:?} in\n{said}");
        }
        ensure!(proxy.log()?.contains("dump sent"));
        Ok(())
    });
}

/// A restore that can never succeed costs nothing: the process goes on, and its operator reads why.
#[test]
fn a_restore_that_fails_leaves_the_process_where_it_is() {
    between_two_hosts(|pair| {
        let (cache, proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 16, 2)?;
        // Its number is taken there.
        let taken = pair.target.sh(&format!(
            "echo {} > /proc/sys/kernel/ns_last_pid; sleep 1000 >/dev/null 2>&1 & echo $!",
            program.pid - 1
        ))?;
        ensure!(taken.trim() == program.pid.to_string(), "{taken}");
        let restore = Restore::spawn(&pair.target, IMAGES)?;
        restore.wait_until_it_waits()?;
        let dump = Dump::fails(&pair.source, IMAGES, program.pid)?;
        restore.wait()?.expect_failure()?;
        pair.target.sh(&format!("kill -9 {}", program.pid))?;
        wait_until("the number being free", SOON, || {
            Ok(!pair.target.is_alive(program.pid)?)
        })?;
        pair.unharmed_on_source(&program)?;
        let said = format!("{}{}", dump.log, proxy.log()?);
        for words in [
            "the restore on the target failed",
            "File exists",
            &program.pid.to_string(),
            "--commit-on held",
        ] {
            ensure!(said.contains(words), "no {words:?} in\n{said}");
        }
        wait_until("the set is given up", SOON, || {
            Ok(cache.log()?.contains("the source gave the set up"))
        })?;
        Dump::ok(&pair.source, IMAGES, program.pid).context("once more")?;
        Restore::ok(&pair.target, IMAGES, program.pid)?;
        program.runs_on()
    });
}

/// A failure behind the hold: the process is dead on the source, and what was restored is killed by CRIU. The set is there
/// still, and the next restore gets it.
#[test]
fn a_restore_that_fails_behind_the_hold_finds_the_set_kept() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 16, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        // CRIU runs the script that was named last first.
        let fails = pair.target.path("/run/fails");
        std::fs::write(
            &fails,
            "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-restore ]\n",
        )?;
        std::fs::set_permissions(&fails, PermissionsExt::from_mode(0o755))?;
        let scripts = [
            "--action-script",
            "/run/fails",
            "--action-script",
            "/opt/image-cache",
        ];
        let restore = Restore::spawn_with(&pair.target, IMAGES, &scripts)?;
        restore.wait_until_it_waits()?;
        Dump::ok(&pair.source, IMAGES, program.pid)?;
        restore.wait()?.expect_failure()?;
        let said = cache.log()?;
        ensure!(said.contains("the restore goes on"), "{said}");
        ensure!(!pair.target.is_alive(program.pid)?);
        Restore::ok(&pair.target, IMAGES, program.pid)?;
        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "its memory changed"
        );
        Ok(())
    });
}
