//! Dumps and restores whose options make them impossible: refused, and the process lives on unharmed.

use anyhow::{ensure, Result};
use e2e_tests::real::criu::{spawn, Outcome};
use e2e_tests::real::{between_two_hosts, Dump, Host, Program, Restore, IMAGES};

const LAZY: [&str; 6] = [
    "--stream",
    "--lazy-pages",
    "--address",
    "127.0.0.1",
    "--port",
    "4321",
];

const SCRIPT: [&str; 2] = ["--action-script", "/opt/image-proxy"];

fn lazy_dump(host: &Host, pid: i32, more: &[&str]) -> Result<Outcome> {
    let pid = pid.to_string();
    let options = [&LAZY[..], more, &["-t", &pid]].concat();
    spawn(host, "dump", IMAGES, &options)?
        .wait()?
        .expect_failure()
}

/// It stood still before, frozen, for as long as nobody came.
#[test]
fn a_lazy_dump_is_refused_before_the_freeze() {
    between_two_hosts(|pair| {
        let (_cache, _proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 16, 2)?;
        let hash = program.ask(&pair.source, "hash")?;

        let outcome = lazy_dump(&pair.source, program.pid, &SCRIPT)?;
        ensure!(!outcome.froze_tasks(), "the tasks were frozen");
        ensure!(
            outcome.log.contains("this CRIU has --lazy-pages"),
            "no reason"
        );
        pair.unharmed_on_source(&program)?;

        // Said in a file, as container engines do.
        std::fs::write(pair.source.path("/run/lazy.conf"), "lazy-pages # later\n")?;
        let by_file = [
            "--stream",
            "--config",
            "/run/lazy.conf",
            "-t",
            &program.pid.to_string(),
        ];
        let by_file = spawn(
            &pair.source,
            "dump",
            IMAGES,
            &[&by_file[..], &SCRIPT].concat(),
        )?;
        let outcome = by_file.wait()?.expect_failure()?;
        ensure!(!outcome.froze_tasks(), "the tasks were frozen");
        pair.unharmed_on_source(&program)?;

        Dump::ok(&pair.source, IMAGES, program.pid)?;
        Restore::ok(&pair.target, IMAGES, program.pid)?;
        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "the memory changed"
        );
        Ok(())
    });
}

#[test]
fn a_lazy_dump_without_script_fails() {
    between_two_hosts(|pair| {
        let (_cache, proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 16, 2)?;
        lazy_dump(&pair.source, program.pid, &[])?;
        ensure!(
            proxy.log()?.contains("this CRIU has --lazy-pages"),
            "no reason"
        );
        pair.unharmed_on_source(&program)
    });
}

/// It skipped pages without reading them, and took the next ones for those behind.
#[test]
fn a_lazy_restore_is_refused_and_its_set_stays() {
    between_two_hosts(|pair| {
        let (cache, _proxy) = pair.daemons()?;
        let program = Program::memory(&pair.source, 16, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        Dump::ok(&pair.source, IMAGES, program.pid)?;

        let lazy = Restore::spawn_with(&pair.target, IMAGES, &["--lazy-pages"])?;
        lazy.wait()?.expect_failure()?;
        ensure!(
            cache.log()?.contains("--lazy-pages and --stream"),
            "no reason"
        );

        Restore::ok(&pair.target, IMAGES, program.pid)?;
        program.runs_on()?;
        ensure!(
            program.ask(&pair.target, "hash")? == hash,
            "the memory changed"
        );
        Ok(())
    });
}
