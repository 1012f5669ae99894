//! What has to be there in the end.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use rustix::process::Signal;

use super::super::pair::TLS;
use super::super::{wait_for, Host, Restore, IMAGES, SOON};
use super::plan::Way;
use super::stage::{lock, Attempt, Stage, MIB, OTHER, SESSION, SETTLED};
use super::{documented, Fault, Outcome, Phase};

/// The state of a set whose CRIU was killed, and has left tasks.
const LEFT: &str = "held by what a restore has left behind";

/// A copy of the process on one host.
#[derive(Debug, PartialEq, Eq)]
enum Copy {
    Gone,
    Unharmed,
    /// There, and not what it was.
    Harmed(String),
}

impl Stage<'_> {
    pub fn judge(&self, struck: Phase) -> Result<Outcome> {
        // What is away stays away until it has been noticed; then somebody mends it.
        let mut doubt = false;
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            ensure!(tries < 5, "no end of it");
            let state = self.settled()?;
            let source = self.look(&self.pair.source)?;
            let target = self.look(&self.pair.target)?;
            self.note(format!(
                "source {source:?}, target {target:?}, set {state:?}"
            ));
            match (source, target, state.as_deref()) {
                (Copy::Unharmed, Copy::Gone, state) => {
                    self.is_not_served()?;
                    let doubted = state == Some("in doubt");
                    if doubted {
                        self.forget_copy()?;
                        self.is_not_served()?;
                    }
                    break match doubted {
                        true => Outcome::DoubtLived,
                        false => Outcome::Lived,
                    };
                }
                (Copy::Gone, Copy::Unharmed, state) => {
                    if let Some(state) = state {
                        ensure!(
                            self.plan.fault == Fault::KillRestore
                                && matches!(state, "in doubt" | LEFT),
                            "it was restored, and its set is {state}"
                        );
                        self.on_target("drop")?;
                    }
                    break match doubt {
                        true => Outcome::DoubtMoved,
                        false => Outcome::Moved,
                    };
                }
                (Copy::Gone, Copy::Gone, state) if self.plan.fault == Fault::EndsItself => {
                    ensure!(
                        matches!(state, None | Some("in doubt")),
                        "it ended by itself, and its set is {state:?}"
                    );
                    self.is_not_served()?;
                    if state.is_some() {
                        self.on_target("drop")?;
                    }
                    break Outcome::Ended;
                }
                (Copy::Gone, Copy::Gone, Some("in doubt")) => {
                    doubt = true;
                    self.is_not_served()?;
                    self.abort_is_refused()?;
                    self.on_target("release")?;
                    self.restore_again()?;
                }
                (Copy::Gone, Copy::Gone, Some("to be restored")) => self.restore_again()?,
                (Copy::Gone, Copy::Gone, None) => break self.loss(struck)?,
                (Copy::Gone, Copy::Harmed(why), _) => {
                    ensure!(
                        matches!(self.plan.fault, Fault::KillRestore),
                        "what was restored is harmed: {why}"
                    );
                    self.note(format!("the killed restore left a torso: {why}"));
                    self.program.kill(&self.pair.target)?;
                    wait_for("image-cache seeing that nothing is left", SETTLED, || {
                        let left =
                            |s: Vec<(String, String)>| s.iter().any(|(_, state)| state == LEFT);
                        let left = self.sessions().is_some_and(left);
                        if left {
                            std::thread::sleep(Duration::from_millis(30));
                        }
                        Ok((!left).then_some(()))
                    })?;
                }
                (Copy::Harmed(why), Copy::Gone, state) => {
                    ensure!(
                        self.plan.fault == Fault::KillDump,
                        "the process on the source is harmed: {why}"
                    );
                    ensure!(
                        matches!(state, None | Some("in doubt")),
                        "it is there on the source, and its set is {state:?}"
                    );
                    self.is_not_served()?;
                    self.program.kill(&self.pair.source)?;
                    if state.is_none() {
                        break Outcome::Damaged;
                    }
                }
                (source, target, state) => {
                    bail!("source {source:?}, target {target:?}, set {state:?}")
                }
            }
        };
        let linked = self.proxy_logged(" connected session=");
        let documented = documented::outcomes(self.plan, struck, linked);
        ensure!(
            documented.contains(&outcome),
            "{} in phase {struck} must not end so: {outcome}",
            self.plan.fault
        );
        self.mend()?;
        self.other_is_there()?;
        if self.plan.retry && matches!(outcome, Outcome::Lived | Outcome::DoubtLived) {
            self.retry().context("the retry")?;
        }
        self.lets_go()?;
        Ok(outcome)
    }

    /// The process is nowhere.
    fn loss(&self, struck: Phase) -> Result<Outcome> {
        let restored = self.cache_logged("restored; released");
        match self.plan.fault {
            Fault::KillDump if struck < Phase::Dead => Ok(Outcome::Damaged),
            fault
                if fault.ends_cache()
                    && self.cache_logged("prepared: every image is here")
                    && !restored =>
            {
                // Told to stop it says so, if it knew that it had the only copy.
                Ok(Outcome::Lost)
            }
            fault => bail!("the process is lost, by: {fault}"),
        }
    }

    /// What becomes of the set when nothing is under way any more.
    fn settled(&self) -> Result<Option<String>> {
        if lock(&self.cache).is_none() {
            return Ok(None);
        }
        let mut last = Vec::new();
        let mut series_ends_at = self.series_ends_at();
        wait_for("image-cache coming to a decision", SETTLED, || {
            let sessions = self.sessions().context("no status of image-cache")?;
            let own: Vec<_> = sessions
                .into_iter()
                .filter(|(name, _)| name != OTHER)
                .collect();
            let decided =
                |state: &str| matches!(state, "in doubt" | "to be restored" | "aborted" | LEFT);
            last.clone_from(&own);
            if !own.iter().all(|(_, state)| decided(state)) {
                std::thread::sleep(Duration::from_millis(30));
                self.end_series_after(&mut series_ends_at)?;
                return Ok(None);
            }
            let mut kept = own.into_iter().filter(|(_, state)| state != "aborted");
            let one = kept.next().map(|(_, state)| state);
            ensure!(kept.next().is_none(), "two sets of one process");
            Ok(Some(one))
        })
        .with_context(|| format!("sessions: {last:?}"))
    }

    /// A process that stands still for so long, goes on no more. Where it should run, a slow machine gets more time.
    fn stands_still(&self) -> Duration {
        match self.plan.fault {
            Fault::KillDump | Fault::KillRestore => Duration::from_secs(6),
            _ => SOON,
        }
    }

    fn look(&self, host: &Host) -> Result<Copy> {
        let pid = self.program.pid;
        let alive = || host.is_alive(pid);
        if !alive()? {
            return Ok(Copy::Gone);
        }
        let before = self.program.ticks()?.len();
        let deadline = Instant::now() + self.stands_still();
        while self.program.ticks()?.len() < before + 20 {
            if !alive()? {
                return Ok(Copy::Gone);
            }
            if Instant::now() > deadline {
                let state = host.process_state(pid)?;
                let place = fs::read_to_string(host.path(&format!("/proc/{pid}/wchan")));
                return Ok(Copy::Harmed(format!(
                    "it stands still, state {state:?}, in {place:?}"
                )));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let report = self.program.report(host)?;
        let field = |name| {
            let words = report.split(' ');
            words
                .filter_map(|word| word.split_once('='))
                .find(|(n, _)| *n == name)
        };
        let (_, writes) = field("writes").context("no writes in the report")?;
        let (_, hash) = field("hash").context("no hash in the report")?;
        let expected = lock(&self.written).hash_after(writes.parse()?);
        Ok(match hash == expected {
            true => Copy::Unharmed,
            false => Copy::Harmed("its memory is not what it was".to_owned()),
        })
    }

    /// A restore does not succeed now.
    fn is_not_served(&self) -> Result<()> {
        if self.other.is_some() {
            // What `-D` itself serves is the other one; ours has no directory any more.
            let own = self
                .pair
                .target
                .path(&format!("{IMAGES}/sessions/{SESSION}"));
            ensure!(!own.exists(), "a set that was given up has its sockets");
            return Ok(());
        }
        let runs = lock(&self.cache).is_some();
        let attempt = match runs {
            true => self.end_restore(Restore::spawn(&self.pair.target, IMAGES)?)?,
            false => Attempt::Failed,
        };
        ensure!(
            attempt != Attempt::Restored,
            "a set was restored that must not be"
        );
        ensure!(
            !self.pair.target.is_alive(self.program.pid)?,
            "a restore that failed left something running"
        );
        Ok(())
    }

    fn restore_again(&self) -> Result<()> {
        let attempt = self.end_restore(Restore::spawn(&self.pair.target, IMAGES)?)?;
        ensure!(
            attempt == Attempt::Restored,
            "the restore once more: {attempt:?}"
        );
        Ok(())
    }

    /// What lived is migrated after all.
    fn retry(&self) -> Result<()> {
        if self.plan.fault == Fault::Memory
            && !(self.has_other() && self.plan.mib as u64 * MIB * 9 / 8 < self.memory_limit())
        {
            self.end_cache(Signal::TERM)?;
            let mut options = vec!["--link-timeout", "2"];
            if self.plan.way == Way::Tls {
                options.extend(TLS);
            }
            *lock(&self.cache) = Some(self.pair.cache(&options)?);
        }
        if let Some(group) = &self.group {
            group.set_limit(1 << 10);
        }
        if self.plan.fault.vetoes() {
            self.write_pause("/run/pause-after", Duration::ZERO, 0)?;
        }
        ensure!(self.dump()?, "the dump failed");
        self.restore_again()?;
        let copies = (self.look(&self.pair.source)?, self.look(&self.pair.target)?);
        ensure!(
            copies == (Copy::Gone, Copy::Unharmed),
            "source and target: {copies:?}"
        );
        self.note("migrated after all");
        Ok(())
    }
}
