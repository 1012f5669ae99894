//! Dumps whose pages come through a page server and whose other images are files: of CRIU's configuration file, and
//! straight to the target. Rounds need soft-dirty tracking, which only the virtual machine's kernel has
//! (`tests/vm_iterative.rs`); a dump alone does not.

use std::fs;

use anyhow::{ensure, Context, Result};
use e2e_tests::real::{
    between_two_hosts, wait_until, Host, Pair, Program, Restore, CRIU_LIMIT, IMAGES, SOON,
};

const CONTROL: &str = "/run/images/image-cache-control.sock";
const DUMP_DIR: &str = "/run/dump";

pub fn criu_dump(host: &Host, images_dir: &str, pid: i32, options: &[&str]) -> Result<()> {
    let pid = pid.to_string();
    let mut argv = vec!["criu", "dump", "-t", &pid, "-D", images_dir, "-v4"];
    argv.extend_from_slice(&[
        "-W",
        "/run/criu",
        "-o",
        "dump.log",
        "--manage-cgroups=ignore",
    ]);
    argv.extend_from_slice(options);
    let output = host.run(&argv, CRIU_LIMIT)?;
    let log = host.read("/run/criu/dump.log").unwrap_or_default();
    output.ok().context(log).map(drop)
}

/// All but the pages: what the user brings to the target by other means.
fn bring_the_files(pair: &Pair) -> Result<()> {
    fs::create_dir(pair.target.path(DUMP_DIR))?;
    for entry in fs::read_dir(pair.source.path(DUMP_DIR))? {
        let entry = entry?;
        let name = entry.file_name().into_string().unwrap_or_default();
        ensure!(!name.starts_with("pages-"), "pages became a file: {name}");
        let inside = format!("{DUMP_DIR}/{name}");
        fs::copy(entry.path(), pair.target.path(&inside))?;
    }
    Ok(())
}

pub fn restored(pair: &Pair, program: &Program, hash: &str) -> Result<()> {
    Restore::spawn(&pair.target, IMAGES)?.wait()?.ok()?;
    ensure!(!pair.source.is_alive(program.pid)?, "it runs twice");
    program.runs_on()?;
    ensure!(
        program.ask(&pair.target, "hash")? == hash,
        "the memory changed on its way"
    );
    Ok(())
}

/// As a container engine has it: nothing of us on CRIU's command line.
#[test]
fn by_criu_s_configuration_file() {
    between_two_hosts(|pair| {
        let _cache = pair.cache(&[])?;
        let _proxy = pair.proxy(&["--page-server", "27"])?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        let lines = "page-server\naddress 127.0.0.1\nport 27\naction-script /opt/image-proxy\n";
        fs::write(pair.source.path("/run/engine.conf"), lines)?;

        criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &["--config", "/run/engine.conf"],
        )?;

        restored(pair, &program, &hash)
    });
}

#[test]
fn pages_straight_to_the_target_and_the_files_imported() {
    between_two_hosts(|pair| {
        let pages = format!("{}:27", pair.cache_address());
        let _cache = pair.cache(&["--page-server", &pages])?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        pair.source.sh(&format!("mkdir {DUMP_DIR}"))?;

        let to = [
            "--page-server",
            "--address",
            pair.cache_address(),
            "--port",
            "27",
        ];
        criu_dump(&pair.source, DUMP_DIR, program.pid, &to)?;
        bring_the_files(pair)?;
        pair.target.sh(&format!(
            "/opt/image-cache import {DUMP_DIR} --control {CONTROL}"
        ))?;

        restored(pair, &program, &hash)
    });
}

#[test]
fn pages_straight_to_the_target_and_the_commit_by_image_proxy() {
    between_two_hosts(|pair| {
        let pages = format!("{}:27", pair.cache_address());
        let _cache = pair.cache(&["--page-server", &pages])?;
        let _proxy = pair.proxy(&[])?;
        let program = Program::memory(&pair.source, 64, 2)?;
        let hash = program.ask(&pair.source, "hash")?;

        let to = [
            "--page-server",
            "--address",
            pair.cache_address(),
            "--port",
            "27",
        ];
        let script = ["--action-script", "/opt/image-proxy"];
        criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &[&to[..], &script].concat(),
        )?;

        restored(pair, &program, &hash)
    });
}

/// Cases 01 and 02: CRIU removes nothing of a dump that it made there before, and reads nothing of it. Nor is it sent,
/// and the set is released when its own images were restored.
#[test]
fn into_a_directory_that_has_an_earlier_dump() {
    between_two_hosts(|pair| {
        let _cache = pair.cache(&[])?;
        let proxy = pair.proxy(&["--page-server", "27"])?;
        let old = Program::counter(&pair.source)?;
        let program = Program::memory(&pair.source, 16, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        criu_dump(&pair.source, IMAGES, old.pid, &[])?;

        let to = ["--page-server", "--address", "127.0.0.1", "--port", "27"];
        let script = ["--action-script", "/opt/image-proxy"];
        criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &[&to[..], &script].concat(),
        )?;
        let log = proxy.log()?;
        let left = format!("core-{}.img", old.pid);
        ensure!(
            log.contains("an earlier dump left them") && log.contains(&left),
            "{log}"
        );

        restored(pair, &program, &hash)?;
        wait_until("the release of the set", SOON, || {
            let status = format!("/opt/image-cache status --control {CONTROL}");
            Ok(pair.target.sh(&status)?.contains("no sessions"))
        })
    });
}

/// The pages went to a page server that nobody of ours knows: the commit is refused, and the process lives.
#[test]
fn pages_that_went_elsewhere_fail_the_dump() {
    between_two_hosts(|pair| {
        let _cache = pair.cache(&[])?;
        let _proxy = pair.proxy(&[])?;
        let program = Program::memory(&pair.source, 16, 2)?;
        pair.source.sh("mkdir /run/elsewhere")?;
        let server = [
            "criu",
            "page-server",
            "--address",
            "127.0.0.1",
            "--port",
            "28",
        ];
        let more = ["-D", "/run/elsewhere", "--daemon", "-o", "page-server.log"];
        pair.source
            .run(&[&server[..], &more].concat(), CRIU_LIMIT)?
            .ok()?;

        let to = ["--page-server", "--address", "127.0.0.1", "--port", "28"];
        let script = ["--action-script", "/opt/image-proxy"];
        let outcome = criu_dump(
            &pair.source,
            IMAGES,
            program.pid,
            &[&to[..], &script].concat(),
        );

        ensure!(outcome.is_err(), "the dump succeeded without its pages");
        pair.unharmed_on_source(&program)
    });
}
