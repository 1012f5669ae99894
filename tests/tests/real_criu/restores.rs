//! What becomes of a set when its restore fails late, is killed, or has not read all of it.

use anyhow::{ensure, Result};
use e2e_tests::real::{
    between_two_hosts, wait_until, Cache, Dump, Host, Pair, Program, Restore, IMAGES, SOON,
};
use rustix::process::{pidfd_send_signal, Signal};

/// Makes an action script that runs `command` at `action`.
fn script_at(host: &Host, path: &str, action: &str, command: &str) -> Result<()> {
    host.sh(&format!(
        "printf '#!/bin/sh\\n[ $CRTOOLS_SCRIPT_ACTION != {action} ] || {{ {command}; }}\\n' > {path}
         chmod 755 {path}"
    ))
    .map(drop)
}

fn dumped(pair: &Pair) -> Result<Program> {
    let counter = Program::counter(&pair.source)?;
    Dump::ok(&pair.source, IMAGES, counter.pid)?;
    Ok(counter)
}

/// The options of a restore with our script, behind which `other` runs.
fn scripts(other: &str) -> [&str; 4] {
    // CRIU runs the one first that was given last.
    [
        "--action-script",
        other,
        "--action-script",
        "/opt/image-cache",
    ]
}

fn wait_for_log(cache: &Cache, text: &str) -> Result<()> {
    wait_until(&format!("image-cache saying {text:?}"), SOON, || {
        let log = cache.log()?;
        ensure!(!log.contains("restored; released"), "the only copy is gone");
        Ok(log.contains(text))
    })
}

/// CRIU cannot detach from a task that is dead: it kills all the others, and exits with 1. It has run the script at
/// `pre-resume` before.
#[test]
fn a_task_killed_behind_pre_resume_does_not_cost_the_set() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = dumped(pair)?;
        let kill = "kill -9 $CRTOOLS_INIT_PID";
        script_at(&pair.target, "/run/kills", "pre-resume", kill)?;

        for _ in 0..3 {
            let restore = Restore::spawn_with(&pair.target, IMAGES, &scripts("/run/kills"))?;
            let outcome = restore.wait()?.expect_failure()?;
            ensure!(outcome.log.contains("Unable to detach"), "another failure");
            // Killed and not buried: a thread that dies slowly is there behind CRIU's end.
            // Its number is free for the next one when it is buried.
            let gone = || Ok(pair.target.process_state(counter.pid)?.is_none());
            wait_until("the end of what was restored", SOON, gone)?;
        }
        wait_for_log(&cache, "the restore failed, and nothing of it runs")?;

        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

/// The same without our script.
#[test]
fn without_the_script_such_a_failure_is_known_too() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = dumped(pair)?;
        let kill = "kill -9 $CRTOOLS_INIT_PID";
        script_at(&pair.target, "/run/kills", "pre-resume", kill)?;

        let options = ["--action-script", "/run/kills"];
        let restore = Restore::spawn_with(&pair.target, IMAGES, &options)?;
        restore.wait()?.expect_failure()?;
        wait_for_log(&cache, "the restore failed, and nothing of it runs")?;

        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

/// A CRIU that is killed behind `pre-resume` leaves tasks that run: the kernel lets them go. They are the process.
#[test]
fn tasks_that_run_when_criu_is_killed_are_the_process() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = dumped(pair)?;
        script_at(&pair.target, "/run/kills", "pre-resume", "kill -9 $PPID")?;

        let restore = Restore::spawn_with(&pair.target, IMAGES, &scripts("/run/kills"))?;
        let outcome = restore.wait()?;
        ensure!(!outcome.output.status.success());
        counter.runs_on()?;
        wait_until("the verdict", SOON, || {
            Ok(cache.log()?.contains("restored; released"))
        })
    });
}

/// What a killed CRIU has left waits for ever; the next restore waits, too, until that is ended.
#[test]
fn the_next_restore_waits_until_what_a_killed_one_left_is_ended() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = dumped(pair)?;
        let waits = ": >/run/late; exec sleep 60";
        script_at(&pair.target, "/run/waits", "post-restore", waits)?;

        let restore = Restore::spawn_with(&pair.target, IMAGES, &scripts("/run/waits"))?;
        wait_until("the script of the restore", SOON, || {
            Ok(pair.target.path("/run/late").exists())
        })?;
        pidfd_send_signal(restore.handle()?, Signal::KILL)?;
        restore.wait()?;
        wait_for_log(&cache, "tasks are left that wait for it for ever")?;

        let mut next = Restore::spawn(&pair.target, IMAGES)?;
        next.wait_until_it_waits()?;
        ensure!(next.is_running()?);
        counter.kill(&pair.target)?;
        next.wait()?.ok()?;
        counter.runs_on()
    });
}

/// The log does not advise what was done.
#[test]
fn a_restore_that_failed_with_the_script_is_not_told_to_use_it() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = dumped(pair)?;
        script_at(&pair.target, "/run/fails", "post-restore", "exit 1")?;

        let restore = Restore::spawn_with(&pair.target, IMAGES, &scripts("/run/fails"))?;
        restore.wait()?.expect_failure()?;
        wait_for_log(&cache, "The set is kept and can be restored again")?;
        ensure!(!cache.log()?.contains("--action-script"));

        Restore::ok(&pair.target, IMAGES, counter.pid)?;
        counter.runs_on()
    });
}

/// Images of an earlier dump in the directory are of no task of this one.
#[test]
fn a_set_with_images_that_nothing_reads_is_released() {
    between_two_hosts(|pair| {
        let cache = pair.cache(&[])?;
        let _proxy = pair.proxy(&["--page-server", "27"])?;
        let old = Program::counter(&pair.source)?;
        let counter = Program::counter(&pair.source)?;
        pair.source.sh("mkdir /run/d1")?;
        Dump::spawn_to_files(&pair.source, "/run/d1", old.pid)?
            .wait()?
            .ok()?;
        let control = "IMAGE_PROXY_CONTROL=/run/images/image-proxy-control.sock";
        let pid = counter.pid.to_string();
        let dump = [
            "--page-server",
            "--address",
            "127.0.0.1",
            "--port",
            "27",
            "--action-script",
            "/opt/image-proxy",
            "-t",
            &pid,
        ];
        let dump = e2e_tests::real::criu::spawn_by(
            &pair.source,
            &["env", control],
            "dump",
            "/run/d1",
            &dump,
        )?;
        dump.wait()?.ok()?;

        Restore::spawn(&pair.target, IMAGES)?.wait()?.ok()?;
        counter.runs_on()?;
        wait_until("the set being released", SOON, || {
            Ok(cache.log()?.contains("restored; released"))
        })
    });
}

/// A restore whose script finds no restore of its CRIU ends before anything is built.
#[test]
fn a_script_that_belongs_to_no_restore_fails_at_the_start() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let counter = Program::counter(&pair.target)?;
        pair.target.sh("mkdir /run/files")?;
        Dump::spawn_to_files(&pair.target, "/run/files", counter.pid)?
            .wait()?
            .ok()?;

        let control = "IMAGE_CACHE_CONTROL=/run/images/image-cache-control.sock";
        let options = ["-d", "--action-script", "/opt/image-cache"];
        let by = ["env", control];
        let restore =
            e2e_tests::real::criu::spawn_by(&pair.target, &by, "restore", "/run/files", &options)?;
        let outcome = restore.wait()?.expect_failure()?;
        ensure!(!outcome.log.contains("Forking task"), "it built tasks");
        ensure!(cache.log()?.contains("reads from here"));
        Ok(())
    });
}
