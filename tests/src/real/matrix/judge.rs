//! What has to be there in the end.

use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context, Result};
use rustix::process::Signal;

use super::super::pair::TLS;
use super::super::{wait_for, wait_until, Host, Restore, IMAGES, SOON};
use super::plan::{CommitOn, Way};
use super::stage::{lock, Attempt, Stage, DOUBT, MIB, OTHER, SESSION, SETTLED, TOLD, TRIAL};
use super::{documented, Fault, Outcome, Phase};

/// The state of a set whose CRIU was killed, and has left tasks.
const LEFT: &str = "held by what a restore has left behind";

/// A copy of the process on one host.
#[derive(Debug, PartialEq, Eq)]
enum Copy {
    Gone,
    Unharmed,
    /// It stands there, asleep: its restore waits for a decision.
    Held,
    /// There, and not what it was.
    Harmed(String),
}

impl Stage<'_> {
    pub fn judge(&self, struck: Phase) -> Result<Outcome> {
        if self.plan.fault.fails_restore() && self.plan.holds() {
            self.source_says_why()?;
        }
        self.put_right()?;
        if self.plan.keeper && lock(&self.cache).is_none() && lock(&self.held).is_none() {
            self.start_cache()?;
        }
        // What is away stays away until it has been noticed; then somebody mends it.
        let mut doubt = false;
        let mut tries = 0;
        let outcome = loop {
            tries += 1;
            ensure!(tries < 8, "no end of it");
            let state = self.settled()?;
            let source = self.look(&self.pair.source)?;
            let target = self.look(&self.pair.target)?;
            self.note(format!(
                "source {source:?}, target {target:?}, set {state:?}"
            ));
            match (source, target, state.as_deref()) {
                (Copy::Unharmed | Copy::Gone, Copy::Held | Copy::Gone, Some(DOUBT))
                    if self.link_decides()? => {}
                (Copy::Unharmed, Copy::Held, Some(DOUBT)) => {
                    doubt = true;
                    self.is_not_served()?;
                    self.forget_copy()?;
                    self.held_ends(Attempt::Failed)?;
                }
                (Copy::Gone, Copy::Held, Some(DOUBT)) if self.plan.fault == Fault::EndsItself => {
                    self.is_not_served()?;
                    self.on_target("drop")?;
                    self.held_ends(Attempt::Failed)?;
                }
                (Copy::Gone, Copy::Held, Some(DOUBT)) => {
                    doubt = true;
                    self.is_not_served()?;
                    self.abort_is_refused()?;
                    self.on_target("release")?;
                    self.held_ends(Attempt::Restored)?;
                }
                (Copy::Unharmed, Copy::Gone, state) => {
                    self.is_not_served()?;
                    if state == Some(DOUBT) {
                        doubt = true;
                        self.forget_copy()?;
                        self.is_not_served()?;
                    }
                    break match doubt {
                        true => Outcome::DoubtLived,
                        false => Outcome::Lived,
                    };
                }
                (Copy::Gone, Copy::Unharmed, state) => {
                    if let Some(state) = state {
                        ensure!(
                            (self.plan.fault == Fault::KillRestore
                                && matches!(state, DOUBT | LEFT))
                                || (self.plan.keeps_set() && state == DOUBT),
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
                        matches!(state, None | Some(DOUBT)),
                        "it ended by itself, and its set is {state:?}"
                    );
                    self.is_not_served()?;
                    if state.is_some() {
                        self.on_target("drop")?;
                    }
                    break Outcome::Ended;
                }
                (Copy::Gone, Copy::Gone, Some(DOUBT)) => {
                    doubt = true;
                    self.is_not_served()?;
                    self.abort_is_refused()?;
                    self.on_target("release")?;
                    self.restore_again()?;
                }
                (Copy::Gone, Copy::Gone, Some("to be restored")) => self.restore_again()?,
                // The script of the hold, or a CRIU that fails, has ended them meanwhile.
                (Copy::Gone, Copy::Gone, Some(LEFT)) => {
                    std::thread::sleep(Duration::from_millis(100));
                }
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
                (Copy::Unharmed, Copy::Harmed(why), _) => {
                    ensure!(
                        matches!(self.plan.fault, Fault::KillRestore) && self.plan.holds(),
                        "two of it, and that on the target is harmed: {why}"
                    );
                    self.note(format!("the killed restore left a torso: {why}"));
                    self.program.kill(&self.pair.target)?;
                }
                (Copy::Harmed(why), Copy::Gone | Copy::Held, state) => {
                    ensure!(
                        self.plan.fault == Fault::KillDump,
                        "the process on the source is harmed: {why}"
                    );
                    ensure!(
                        matches!(state, None | Some(DOUBT)),
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
        let documented = match self.missed.load(Ordering::SeqCst) {
            // It came too late to do anything.
            true => &[Outcome::Moved],
            false => documented::outcomes(self.plan, struck, linked),
        };
        ensure!(
            documented.contains(&outcome),
            "{} in phase {struck} must not end so: {outcome}",
            self.plan.fault
        );
        if outcome == Outcome::DoubtMoved && self.plan.fault == Fault::KillRestore {
            let told = !self.cache_logged(TRIAL) || !self.plan.holds() || self.cache_logged(TOLD);
            ensure!(
                told,
                "in doubt, although its script was never told that it may run"
            );
        }
        if outcome == Outcome::DoubtMoved && self.plan.keeps_set() {
            let given = self.cache_logged("restore --stream begins");
            ensure!(given, "in doubt, and it was given to no restore");
        }
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
                    && !self.plan.holds()
                    && !self.plan.keeper
                    && self.cache_logged("prepared: every image is here")
                    && !restored =>
            {
                // Told to stop it says so, if it knew that it had the only copy.
                Ok(Outcome::Lost)
            }
            fault => bail!("the process is lost, by: {fault}"),
        }
    }

    /// The dump has failed because the restore did, and the operator of the source reads why.
    fn source_says_why(&self) -> Result<()> {
        let error = match self.plan.fault {
            Fault::TakenPid => "File exists",
            _ => "No such file or directory",
        };
        for words in ["the restore on the target failed", error] {
            ensure!(
                self.proxy_logged(words),
                "image-proxy does not say {words:?}"
            );
        }
        Ok(())
    }

    /// What becomes of the set when nothing is under way any more.
    fn settled(&self) -> Result<Option<String>> {
        let mut last = Vec::new();
        let mut series_ends_at = self.series_ends_at();
        let mut doubted_since = None;
        wait_for("image-cache coming to a decision", SETTLED, || {
            self.reap_held()?;
            let (runs, holds) = (lock(&self.cache).is_some(), lock(&self.held).is_some());
            if !runs && !holds {
                return Ok(Some(None));
            }
            let sessions = self.sessions().context("no status of image-cache")?;
            let own: Vec<_> = sessions
                .into_iter()
                .filter(|(name, _)| name != OTHER)
                .map(|(name, state)| match state.starts_with(DOUBT) {
                    true => (name, DOUBT.to_owned()),
                    false => (name, state),
                })
                .collect();
            let decided =
                |state: &str| matches!(state, DOUBT | "to be restored" | "aborted" | LEFT);
            last.clone_from(&own);
            let doubted = own.iter().any(|(_, state)| state == DOUBT);
            // What holds is known to an image-cache that was started since, a little later.
            let known = doubted || !holds;
            if !known || !own.iter().all(|(_, state)| decided(state)) {
                std::thread::sleep(Duration::from_millis(30));
                self.end_series_after(&mut series_ends_at)?;
                return Ok(None);
            }
            let since = doubted.then(|| *doubted_since.get_or_insert_with(Instant::now));
            if since.is_some_and(|since| since.elapsed() < self.patience()) {
                std::thread::sleep(Duration::from_millis(30));
                return Ok(None);
            }
            let mut kept = own.into_iter().filter(|(_, state)| state != "aborted");
            let one = kept.next().map(|(_, state)| state);
            ensure!(kept.next().is_none(), "two sets of one process");
            Ok(Some(one))
        })
        .with_context(|| format!("sessions: {last:?}"))
    }

    /// The link comes back to what is in doubt for want of it, and image-proxy brings what it knows. `false`: that is not
    /// what the operator waits for.
    fn link_decides(&self) -> Result<bool> {
        let away = self.plan.fault.is_of_link() && !self.plan.returns && self.plan.patient;
        if !away || self.came_back.swap(true, Ordering::SeqCst) {
            return Ok(false);
        }
        self.is_not_served()?;
        self.link.bar(false);
        self.link.release();
        wait_until("image-proxy bringing the decision", SETTLED, || {
            self.reap_held()?;
            std::thread::sleep(Duration::from_millis(30));
            let sessions = self.sessions();
            let doubted = (sessions.iter().flatten()).any(|(_, state)| state.starts_with(DOUBT));
            Ok(sessions.is_some() && !doubted && lock(&self.held).is_none())
        })?;
        self.note("the link is back, and has brought the decision");
        Ok(true)
    }

    /// A restore that held may have ended since.
    fn reap_held(&self) -> Result<()> {
        let ended = match &mut *lock(&self.held) {
            Some(running) => !running.is_running()?,
            None => false,
        };
        if ended {
            self.end_held()?;
        }
        Ok(())
    }

    fn held_ends(&self, expected: Attempt) -> Result<()> {
        let attempt = self.end_held()?;
        ensure!(attempt == expected, "the restore that held: {attempt:?}");
        Ok(())
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
        if host.init() == self.pair.target.init() && self.is_held() {
            // Where no other one counts, it does not either.
            let before = self.program.ticks()?.len();
            std::thread::sleep(Duration::from_millis(100));
            let counts = self.program.ticks()?.len() > before;
            let alone = !self.pair.source.is_alive(pid)?;
            ensure!(!(alone && counts), "it runs while its restore holds");
            return Ok(Copy::Held);
        }
        if host.init() == self.pair.target.init() && self.pair.source.is_alive(pid)? {
            // That one counts. If this one did, too, no number would come once.
            std::thread::sleep(Duration::from_millis(300));
            self.program.ticks()?;
            return Ok(match alive()? {
                true => Copy::Harmed("it is there beside the one on the source".to_owned()),
                false => Copy::Gone,
            });
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
            self.is_held() || !self.pair.target.is_alive(self.program.pid)?,
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
        match self.plan.commit_on {
            CommitOn::Restored => {
                let restore = Restore::spawn(&self.pair.target, IMAGES)?;
                ensure!(self.dump()?, "the dump failed");
                let attempt = self.end_restore(restore)?;
                ensure!(attempt == Attempt::Restored, "the restore: {attempt:?}");
            }
            CommitOn::Auto | CommitOn::Held => {
                ensure!(self.dump()?, "the dump failed");
                self.restore_again()?;
            }
        }
        let copies = (self.look(&self.pair.source)?, self.look(&self.pair.target)?);
        ensure!(
            copies == (Copy::Gone, Copy::Unharmed),
            "source and target: {copies:?}"
        );
        self.note("migrated after all");
        Ok(())
    }
}
