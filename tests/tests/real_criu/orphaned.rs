//! A restore holds, its source was told that it may kill, and then something on the target is killed: image-cache, CRIU, or
//! the script that holds. The process is never lost and never twice.

use anyhow::{ensure, Context, Result};
use e2e_tests::real::criu::Running;
use e2e_tests::real::pair::TLS;
use e2e_tests::real::{
    between_two_hosts, wait_until, Daemon, Dump, Pair, Program, Proxy, Restore, IMAGES, SOON,
};
use rustix::process::{pidfd_send_signal, Signal};

/// A restore that holds, and a dump whose script has been told so and whose CRIU has not killed yet.
struct Held<'a> {
    cache: Daemon,
    proxy: Proxy,
    program: Program,
    hash: String,
    /// Before it was frozen.
    ticks: usize,
    restore: Running<'a>,
    dump: Running<'a>,
}

impl<'a> Held<'a> {
    fn begin(pair: &'a Pair) -> Result<Self> {
        Self::begin_with(pair, &[])
    }

    /// With these options of both daemons.
    fn begin_with(pair: &'a Pair, options: &[&str]) -> Result<Self> {
        let cache = pair.cache(options)?.into_daemon();
        Self::begin_by(pair, cache, pair.proxy(options)?)
    }

    fn begin_by(pair: &'a Pair, cache: Daemon, proxy: Proxy) -> Result<Self> {
        Self::begin_of(pair, cache, proxy, &["--action-script", "/opt/image-cache"])
    }

    /// With these scripts of the restore.
    fn begin_of(pair: &'a Pair, cache: Daemon, proxy: Proxy, scripts: &[&str]) -> Result<Self> {
        let program = Program::memory(&pair.source, 16, 2)?;
        let hash = program.ask(&pair.source, "hash")?;
        pair.source.sh(
            "printf '#!/bin/sh\\n[ $CRTOOLS_SCRIPT_ACTION != post-dump ] || \
             { touch /run/told; while [ ! -e /run/go ]; do sleep 0.01; done; }\\n' > /run/waits
             chmod 755 /run/waits",
        )?;
        let restore = Restore::spawn_with(&pair.target, IMAGES, scripts)?;
        restore.wait_until_it_waits()?;
        let dump = Dump::spawn_before(&pair.source, IMAGES, program.pid, "/run/waits")?;
        wait_until("the source being told", SOON, || {
            Ok(pair.source.path("/run/told").exists())
        })?;
        let said = cache.log()?;
        ensure!(said.contains("restored and held"), "{said}");
        ensure!(pair.source.is_alive(program.pid)? && pair.target.is_alive(program.pid)?);
        let ticks = program.ticks()?.len();
        Ok(Self {
            cache,
            proxy,
            program,
            hash,
            ticks,
            restore,
            dump,
        })
    }

    /// Nothing has run since it was frozen.
    fn stands(&self) -> Result<()> {
        let ticks = self.program.ticks()?.len();
        ensure!(ticks == self.ticks, "{} ticks", ticks - self.ticks);
        Ok(())
    }
}

/// CRIU kills on the source.
fn kills(pair: &Pair, program: &Program, dump: Running<'_>) -> Result<()> {
    pair.source.sh("touch /run/go")?;
    dump.wait()?.ok()?;
    ensure!(!pair.source.is_alive(program.pid)?);
    Ok(())
}

fn runs_on_target(pair: &Pair, program: &Program, hash: &str) -> Result<()> {
    program.runs_on()?;
    ensure!(pair.target.is_alive(program.pid)? && !pair.source.is_alive(program.pid)?);
    let after = program.ask(&pair.target, "hash")?;
    ensure!(after == hash, "the memory changed");
    Ok(())
}

fn says(restore: &Running<'_>, text: &str) -> Result<()> {
    wait_until(&format!("the script saying {text:?}"), SOON, || {
        Ok(restore.log_so_far().contains(text))
    })
}

fn operator(pair: &Pair, command: &str) -> Result<String> {
    pair.target
        .sh(&format!("cd {IMAGES}; /opt/image-cache {command}"))
}

fn wait_for_log(cache: &Daemon, text: &str) -> Result<()> {
    wait_until(&format!("image-cache saying {text:?}"), SOON, || {
        Ok(cache.log()?.contains(text))
    })
}

/// image-proxy brings the decision to the script.
#[test]
fn image_cache_killed_in_the_hold_costs_nothing() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        held.stands()?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "listens on")?;
        kills(pair, &program, dump)?;
        restore.wait()?.ok().context("the hold")?;
        runs_on_target(pair, &program, &hash)?;
        wait_until("no session being left at the source", SOON, || {
            let status = pair
                .source
                .sh(&format!("cd {IMAGES}; /opt/image-proxy status"))?;
            Ok(!status.contains("doubt"))
        })?;
        drop(proxy);
        Ok(())
    });
}

/// With TLS, whose files go with the service.
#[test]
fn with_tls_the_script_takes_the_decision_of_a_peer_with_a_certificate() {
    between_two_hosts(|pair| {
        pair.certify(pair.cache_address())?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = Held::begin_with(pair, &TLS)?;
        pair.target.sh("rm -r /run/tls")?;
        cache.kill()?;
        says(&restore, "listens on")?;
        kills(pair, &program, dump)?;
        restore.wait()?.ok().context("the hold")?;
        drop(proxy);
        runs_on_target(pair, &program, &hash)
    });
}

#[test]
fn image_cache_killed_and_started_again_in_the_hold_gives_the_decision() {
    started_again("off", "held by a restore here; its images were with");
}

/// The images are there, too: what holds is their restore, and no other one gets them.
#[test]
fn image_cache_that_keeps_its_sets_gives_the_decision_to_what_holds() {
    started_again("on", "in doubt");
}

fn started_again(keeps: &str, shows: &str) {
    let options = ["--keep-through-restart", keeps];
    between_two_hosts(|pair| {
        let cache = pair.cache(&options)?.into_daemon();
        let held = Held::begin_by(pair, cache, pair.proxy(&[])?)?;
        held.stands()?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "listens on")?;
        let cache = pair.cache(&options)?;
        wait_for_log(&cache, "a restore holds this set here")?;
        let status = operator(pair, "status")?;
        ensure!(status.contains(shows), "{status}");
        kills(pair, &program, dump)?;
        restore.wait()?.ok().context("the hold")?;
        runs_on_target(pair, &program, &hash)?;
        wait_until("the hold being over", SOON, || {
            Ok(operator(pair, "status")?.contains("no sessions"))
        })?;
        drop(proxy);
        Ok(())
    });
}

/// The account of a service: CRIU and its script are root's.
fn as_a_service(pair: &Pair) -> Result<Daemon> {
    pair.target
        .sh(&format!("chmod 755 /run; chown 990:990 {IMAGES}"))?;
    let caps = "+sys_ptrace,+dac_read_search,+kill";
    let (inherited, ambient) = (
        format!("--inh-caps={caps}"),
        format!("--ambient-caps={caps}"),
    );
    let user = ["setpriv", "--reuid=990", "--regid=990", "--clear-groups"];
    let cache = [
        "/opt/image-cache",
        "--port",
        "7000",
        "-D",
        IMAGES,
        "-v4",
        "--insecure-listen",
    ];
    let argv = [&user[..], &[&inherited, &ambient], &cache].concat();
    Daemon::start(&pair.target, &argv)
}

#[test]
fn image_cache_of_another_user_is_given_the_port_and_the_hold() {
    between_two_hosts(|pair| {
        let held = Held::begin_by(pair, as_a_service(pair)?, pair.proxy(&[])?)?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "listens on")?;
        let cache = as_a_service(pair)?;
        wait_for_log(&cache, "a restore holds this set here")?;
        kills(pair, &program, dump)?;
        restore.wait()?.ok().context("the hold")?;
        drop(proxy);
        runs_on_target(pair, &program, &hash)
    });
}

/// Neither daemon is left: an operator asks the script.
#[test]
fn an_operator_releases_a_hold_that_no_daemon_knows() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            ticks,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        proxy.into_daemon().kill()?;
        says(&restore, "image-cache is gone")?;
        kills(pair, &program, dump)?;
        ensure!(program.ticks()?.len() == ticks, "it ran in the hold");
        let status = operator(pair, "status")?;
        ensure!(status.contains("its image-cache is gone"), "{status}");
        let log = restore.log_so_far();
        let id = log
            .split("`image-cache release ")
            .nth(1)
            .and_then(|rest| rest.split('`').next());
        operator(pair, &format!("release {}", id.context("no advice")?))?;
        restore.wait()?.ok().context("the hold")?;
        runs_on_target(pair, &program, &hash)
    });
}

/// CRIU was told of the script twice, and runs it twice. When the first run lets the restore go on there is no image-cache that
/// the second one could ask, and the process is dead on the source.
#[test]
fn a_script_that_criu_runs_twice_lets_the_restore_go_on_twice() {
    between_two_hosts(|pair| {
        let (cache, proxy) = pair.daemons()?;
        let script = ["--action-script", "/opt/image-cache"];
        let twice = [script, script].concat();
        let held = Held::begin_of(pair, cache.into_daemon(), proxy, &twice)?;
        let Held {
            cache,
            proxy: _proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "listens on")?;
        kills(pair, &program, dump)?;
        let ended = restore.wait()?;
        let said = "an earlier run of this script was told";
        ensure!(ended.log.contains(said), "{}", ended.log);
        ended.ok().context("the hold")?;
        runs_on_target(pair, &program, &hash)?;
        let left = pair.target.sh(&format!("ls -A {IMAGES}"))?;
        ensure!(!left.contains(".went"), "{left}");
        Ok(())
    });
}

/// The same with an image-cache that was started again, and knows no restore of this CRIU when the second run asks it.
#[test]
fn a_script_that_criu_runs_twice_is_not_stopped_by_an_image_cache_that_came_later() {
    between_two_hosts(|pair| {
        let alone = ["--keep-through-restart", "off"];
        let (cache, proxy) = (pair.cache(&alone)?, pair.proxy(&[])?);
        let script = ["--action-script", "/opt/image-cache"];
        let twice = [script, script].concat();
        let held = Held::begin_of(pair, cache.into_daemon(), proxy, &twice)?;
        let Held {
            cache,
            proxy: _proxy,
            program,
            hash,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "listens on")?;
        let cache = pair.cache(&alone)?;
        wait_for_log(&cache, "a restore holds this set here")?;
        kills(pair, &program, dump)?;
        restore.wait()?.ok().context("the hold")?;
        runs_on_target(pair, &program, &hash)
    });
}

/// The dump fails behind the script, so the process lives on the source; its image-proxy cannot say so any more.
#[test]
fn an_operator_drops_a_hold_that_no_daemon_knows() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        let Held {
            cache,
            proxy,
            program,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        proxy.into_daemon().kill()?;
        says(&restore, "image-cache is gone")?;
        // Its script has been killed, too.
        pidfd_send_signal(&dump.handle()?, Signal::KILL)?;
        ensure!(!dump.wait()?.output.status.success());
        program.runs_on().context("on the source")?;
        let status = operator(pair, "status")?;
        let id = status
            .split("id ")
            .nth(1)
            .and_then(|rest| rest.split(',').next());
        operator(pair, &format!("drop {}", id.context("no id")?))?;
        restore.wait()?.expect_failure()?;
        wait_until("nothing being left on the target", SOON, || {
            Ok(!pair.target.is_alive(program.pid)?)
        })?;
        pair.unharmed_on_source(&program)
    });
}

/// What a dead CRIU has built never runs, and its script ends it. The set is there, and is restored again.
#[test]
fn criu_killed_in_the_hold_leaves_nothing_behind() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            ticks,
            restore,
            dump,
            ..
        } = held;
        let criu = restore.handle()?;
        pidfd_send_signal(&criu, Signal::KILL)?;
        wait_until("its tasks being ended", SOON, || {
            Ok(!pair.target.is_alive(program.pid)?)
        })?;
        says(&restore, "nothing of them has run")?;
        ensure!(!restore.wait()?.output.status.success());
        ensure!(program.ticks()?.len() == ticks, "it ran in the hold");
        wait_for_log(&cache, "what was restored and held is gone")?;
        kills(pair, &program, dump)?;
        Restore::ok(&pair.target, IMAGES, program.pid)?;
        drop(proxy);
        runs_on_target(pair, &program, &hash)
    });
}

/// And where image-cache is gone as well, the process lives only on the source, which its CRIU must not kill: that is for
/// the operator there to see. Nothing of it is left on the target.
#[test]
fn criu_killed_in_a_hold_without_image_cache_leaves_nothing_behind() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        let Held {
            cache,
            proxy,
            program,
            ticks,
            restore,
            dump,
            ..
        } = held;
        cache.kill()?;
        says(&restore, "image-cache is gone")?;
        pidfd_send_signal(&restore.handle()?, Signal::KILL)?;
        wait_until("its tasks being ended", SOON, || {
            Ok(!pair.target.is_alive(program.pid)?)
        })?;
        says(&restore, "nothing of them has run")?;
        ensure!(program.ticks()?.len() == ticks, "it ran in the hold");
        ensure!(operator(pair, "status").is_err(), "nothing holds any more");
        pidfd_send_signal(&dump.handle()?, Signal::KILL)?;
        drop((dump, proxy));
        pair.unharmed_on_source(&program)
    });
}

/// CRIU takes that for a script that has failed.
#[test]
fn a_script_killed_in_the_hold_fails_the_restore_and_keeps_the_set() {
    between_two_hosts(|pair| {
        let held = Held::begin(pair)?;
        let Held {
            cache,
            proxy,
            program,
            hash,
            ticks,
            restore,
            dump,
            ..
        } = held;
        pair.target.sh("kill -9 $(pgrep -xf /opt/image-cache)")?;
        restore.wait()?.expect_failure()?;
        ensure!(program.ticks()?.len() == ticks, "it ran in the hold");
        wait_until("its tasks being gone", SOON, || {
            Ok(!pair.target.is_alive(program.pid)?)
        })?;
        wait_for_log(&cache, "what was restored and held is gone")?;
        kills(pair, &program, dump)?;
        Restore::ok(&pair.target, IMAGES, program.pid)?;
        drop(proxy);
        runs_on_target(pair, &program, &hash)
    });
}
