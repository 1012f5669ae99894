//! What an operator sees of a point, and does about it.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};

use super::super::{wait_until, Host, Restore, IMAGES, SOON};
use super::stage::{lock, Stage, OTHER, PROXY_CONTROL, SESSION, SETTLED};
use super::Fault;

const CACHE_CONTROL: &str = "/run/images/image-cache-control.sock";

impl Stage<'_> {
    /// The states of the sessions in image-cache; if that does not run, of what restores hold without it. `None`: neither
    /// is there.
    pub fn sessions(&self) -> Option<Vec<(String, String)>> {
        let status = status(&self.pair.target, "image-cache", CACHE_CONTROL)?;
        let sessions = status["sessions"].as_array()?.iter();
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        sessions
            .map(|s| Some((text(&s["name"])?, text(&s["state"])?)))
            .collect()
    }

    pub fn cache_logged(&self, what: &str) -> bool {
        logs(&self.pair.target, "image-cache").contains(what)
    }

    pub fn proxy_logged(&self, what: &str) -> bool {
        logs(&self.pair.source, "image-proxy").contains(what)
    }

    /// `image-cache release` or `drop`.
    pub fn on_target(&self, verb: &str) -> Result<()> {
        let name = self.kept_session()?;
        let argv = ["/opt/image-cache", verb, &name, "--control", CACHE_CONTROL];
        self.pair.target.run(&argv, SOON)?.ok()?;
        self.note(format!("image-cache {verb} {name}"));
        Ok(())
    }

    /// The id of the session that is not the other one's.
    fn kept_session(&self) -> Result<String> {
        let status = status(&self.pair.target, "image-cache", CACHE_CONTROL);
        let status = status.context("no image-cache")?;
        let sessions = status["sessions"].as_array().context("no list")?;
        let mut kept = sessions
            .iter()
            .filter(|s| s["name"] != OTHER && s["state"] != "aborted");
        let id = kept.next().context("no session")?["id"].as_str();
        Ok(id.context("no id")?.to_owned())
    }

    /// `image-proxy abort`: whether it was done, and what it said.
    fn abort(&self) -> Result<(bool, String)> {
        self.abort_session(&self.kept_session()?)
    }

    /// When the operator ends the series of a pre-dump or dump that was killed when its round was there: it waits for the
    /// next one, and a restore waits for that.
    pub fn series_ends_at(&self) -> Option<Instant> {
        let waits = self.plan.rounds && matches!(self.plan.fault, Fault::KillDump);
        waits.then(|| Instant::now() + SETTLED / 3)
    }

    /// No round will follow those that have come.
    pub fn end_series_after(&self, at: &mut Option<Instant>) -> Result<()> {
        if at.is_some_and(|at| Instant::now() > at) {
            *at = None;
            if self.proxy_logged("pre-dump sent") {
                self.abort_session(SESSION)?;
            }
        }
        Ok(())
    }

    fn abort_session(&self, name: &str) -> Result<(bool, String)> {
        let argv = [
            "/opt/image-proxy",
            "abort",
            name,
            "--control",
            PROXY_CONTROL,
        ];
        let output = self.pair.source.run(&argv, Duration::from_secs(60))?;
        self.note(format!(
            "image-proxy abort: {}, {}",
            output.status,
            output.stderr.trim()
        ));
        Ok((output.status.success(), output.stderr))
    }

    /// An image-cache that was there says that it is in doubt.
    fn doubt_is_said(&self) -> Result<()> {
        ensure!(
            self.plan.fault.ends_cache() || self.cache_logged("in doubt: "),
            "image-cache does not say that it is in doubt"
        );
        Ok(())
    }

    /// The process lives here: the target is to forget its copy.
    pub fn forget_copy(&self) -> Result<()> {
        self.doubt_is_said()?;
        if self.plan.abort && lock(&self.proxy).is_some() {
            let (done, said) = self.abort()?;
            if done {
                return Ok(());
            }
            ensure!(
                said.contains("image-cache drop"),
                "it does not say what to do: {said}"
            );
        }
        self.on_target("drop")
    }

    /// Of a process that is dead here no command on the source forgets the copy.
    pub fn abort_is_refused(&self) -> Result<()> {
        self.doubt_is_said()?;
        if self.plan.abort && lock(&self.proxy).is_some() {
            let (done, said) = self.abort()?;
            ensure!(!done, "image-proxy abort took the only copy: {said}");
        }
        Ok(())
    }

    /// The link and the daemons are there again.
    pub fn mend(&self) -> Result<()> {
        self.link.bar(false);
        self.link.release();
        if lock(&self.proxy).is_none() {
            self.start_proxy()?;
        }
        if lock(&self.cache).is_none() {
            self.start_cache()?;
        }
        Ok(())
    }

    /// What filled the memory was not touched.
    pub fn other_is_there(&self) -> Result<()> {
        let Some(other) = &self.other else {
            return Ok(());
        };
        let by_name = format!("{IMAGES}/sessions/{OTHER}");
        Restore::ok(&self.pair.target, &by_name, other.pid)?;
        other.runs_on()
    }

    /// Nothing of it stays in image-cache.
    pub fn lets_go(&self) -> Result<()> {
        let mut last = None;
        wait_until("image-cache giving all memory back", SETTLED, || {
            std::thread::sleep(Duration::from_millis(10));
            last = status(&self.pair.target, "image-cache", CACHE_CONTROL);
            Ok(last
                .as_ref()
                .is_some_and(|s| s["memory"]["used_bytes"] == 0))
        })
        .with_context(|| format!("{last:#?}"))
    }
}

fn status(host: &Host, name: &str, control: &str) -> Option<serde_json::Value> {
    let program = format!("/opt/{name}");
    let argv = [&program, "status", "--json", "--control", control];
    let output = host.run(&argv, SOON).ok()?.ok().ok()?;
    serde_json::from_str(&output).ok()
}

/// The logs of all daemons of this name that the host has had, one after the other.
pub(super) fn logs(host: &Host, name: &str) -> String {
    let Ok(entries) = fs::read_dir(host.path("/run/log")) else {
        return String::new();
    };
    let own = |path: &PathBuf| {
        let file = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        file.starts_with(name)
    };
    let mut paths: Vec<_> = entries.flatten().map(|e| e.path()).filter(own).collect();
    paths.sort();
    let texts = paths.iter().map(|path| fs::read(path).unwrap_or_default());
    let bytes: Vec<u8> = texts.flatten().collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
