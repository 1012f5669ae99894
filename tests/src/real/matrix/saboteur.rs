//! What strikes: when it is time, in which phase that was, and the fault itself.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{ensure, Result};
use rustix::process::{pidfd_send_signal, Signal};

use super::super::{Daemon, SOON};
use super::operator::logs;
use super::plan::{Mark, ROUNDS};
use super::stage::{lock, pid_of, script_of, Stage, HOLDING, MIB, SESSION, STRIDE, TOLD, TRIAL};
use super::{Fault, Phase};
use crate::link::{self, Direction};

/// How often the saboteur looks.
const GLANCE: Duration = Duration::from_micros(300);

impl Stage<'_> {
    /// Waits for the moment and strikes. If it does not come, the end is the moment.
    pub fn sabotage(&self) -> Result<Phase> {
        while !self.over.load(Ordering::SeqCst) {
            if self.is_reached()? {
                std::thread::sleep(self.plan.delay);
                break;
            }
            std::thread::sleep(GLANCE);
        }
        let phase = self.phase()?;
        self.strike()?;
        Ok(phase)
    }

    fn is_reached(&self) -> Result<bool> {
        Ok(match self.plan.mark {
            Mark::Run(n) => self.runs.load(Ordering::SeqCst) >= n,
            Mark::Carried(share) => {
                self.link.carried(Direction::Up) >= self.expected() * share / 1000
                    && self.runs.load(Ordering::SeqCst) > 0
            }
            Mark::Prepared => self.cache_logged("prepared: every image is here"),
            Mark::Trial => self.cache_logged(TRIAL),
            Mark::Holding => self.cache_logged(HOLDING),
            Mark::Told => self.cache_logged(TOLD),
            Mark::Committed => self.proxy_logged(" committed"),
            Mark::Dead => !self.pair.source.is_alive(self.program.pid)?,
            Mark::Restore => lock(&self.restore).is_some(),
            Mark::Served => self.cache_logged("restore --stream begins"),
            Mark::Over => false,
        })
    }

    /// What the whole migration puts on the link, about.
    fn expected(&self) -> u64 {
        let size = self.plan.mib as u64 * MIB;
        let later = size / STRIDE as u64 * u64::from(ROUNDS - 1);
        if self.plan.rounds {
            size + later
        } else {
            size
        }
    }

    pub fn phase(&self) -> Result<Phase> {
        let cache = logs(&self.pair.target, "image-cache");
        let held = cache.contains("prepared: every image is here");
        let dead = !self.pair.source.is_alive(self.program.pid)?;
        let own = cache.rsplit_once(&format!("session={SESSION}")).is_some();
        let begun = own && cache.contains("set begins");
        let rounds = if self.plan.rounds { ROUNDS } else { 1 };
        let run = self.runs.load(Ordering::SeqCst);
        if cache.contains("restored; released") && self.other.is_none() {
            return Ok(Phase::Restored);
        }
        if cache.contains(TRIAL) && self.plan.holds() {
            return Ok(match () {
                () if cache.contains(TOLD) => Phase::Restoring,
                () if cache.contains("ready to be restored") => Phase::Ready,
                () if dead => Phase::Dead,
                () if self.proxy_logged(" committed") => Phase::Committed,
                () if cache.contains(HOLDING) => Phase::Holding,
                () => Phase::Trial,
            });
        }
        if cache.contains("restore --stream begins") {
            return Ok(Phase::Restoring);
        }
        if held && dead {
            let count = cache.matches("ready to be restored").count();
            let others = usize::from(self.other.is_some());
            return Ok(if count > others {
                Phase::Ready
            } else {
                Phase::Dead
            });
        }
        if held && self.other.is_none() {
            return Ok(match self.proxy_logged(" committed") {
                true => Phase::Committed,
                false => Phase::Prepared,
            });
        }
        if run < rounds {
            return Ok(match run {
                0 => Phase::Before,
                _ => Phase::Rounds,
            });
        }
        let carried = self.link.carried(Direction::Up) - *lock(&self.before);
        let size = match self.plan.rounds {
            true => self.plan.mib as u64 * MIB / STRIDE as u64,
            false => self.expected(),
        };
        Ok(match carried * 10 / size {
            _ if carried < 64 << 10 && !self.proxy_logged("session=moving") => Phase::Before,
            _ if carried < 64 << 10 && !begun => Phase::Announced,
            0 => Phase::First,
            1..9 => Phase::Middle,
            _ => Phase::End,
        })
    }

    fn strike(&self) -> Result<()> {
        let plan = self.plan;
        match plan.fault {
            Fault::KillProxy => self.end_proxy(Signal::KILL)?,
            Fault::KillCache => self.end_cache(Signal::KILL)?,
            Fault::KillDump => self.kill_criu(&self.dump),
            Fault::KillRestore => self.kill_criu(&self.restore),
            Fault::RestartProxy => {
                self.end_proxy(self.signal())?;
                self.start_proxy()?;
            }
            Fault::RestartCache => {
                self.end_cache(self.signal())?;
                self.start_cache()?;
            }
            Fault::Cut => {
                self.link.bar(true);
                self.link.strike(match plan.reset {
                    true => link::Fault::Reset,
                    false => link::Fault::Close,
                });
                if plan.returns {
                    std::thread::sleep(plan.away);
                    self.link.bar(false);
                }
            }
            Fault::Stall => {
                self.link.freeze();
                std::thread::sleep(plan.away);
                if !plan.returns {
                    self.link.bar(true);
                    self.link.strike(link::Fault::Reset);
                }
                self.link.release();
            }
            Fault::CorruptTls | Fault::CorruptSummed => self.link.flip(plan.direction),
            Fault::StopProxy => self.pause(lock(&self.proxy).as_deref())?,
            Fault::StopCache => self.pause(lock(&self.cache).as_deref())?,
            Fault::StopDump => self.pause_criu(&self.dump),
            Fault::StopRestore => self.pause_criu(&self.restore),
            Fault::LogFull => self.fill_logs()?,
            Fault::StopGate => self.pause_script(self.gate()),
            Fault::StopHold => self.pause_script(self.hold()),
            Fault::KillHold => self.kill_script(self.hold()),
            Fault::LoseCommit => self.lose_commit()?,
            Fault::LoseAbort => self.lose_abort()?,
            // The limit strikes, or the script, or it is there from the beginning.
            fault => ensure!(fault.is_built_in(), "{fault} is not done"),
        }
        self.note("struck");
        Ok(())
    }

    /// The action script of the dump.
    fn gate(&self) -> Option<OwnedFd> {
        let criu = lock(&self.dump).as_ref().and_then(pid_of)?;
        script_of(criu, "post-dump", "image-proxy")
    }

    /// That of a restore that holds.
    fn hold(&self) -> Option<OwnedFd> {
        let criu = lock(&self.restore).as_ref().and_then(pid_of)?;
        script_of(criu, "post-restore", "image-cache")
    }

    /// Whether the script was there for the signal.
    fn signal_script(&self, script: Option<&OwnedFd>, signal: Signal) -> bool {
        let sent = script.is_some_and(|script| pidfd_send_signal(script, signal).is_ok());
        self.note(format!("{signal:?} for the script: {sent}"));
        sent
    }

    fn pause_script(&self, script: Option<OwnedFd>) {
        if self.signal_script(script.as_ref(), Signal::STOP) {
            std::thread::sleep(self.plan.stopped);
            self.signal_script(script.as_ref(), Signal::CONT);
        }
    }

    fn kill_script(&self, script: Option<OwnedFd>) {
        let killed = self.signal_script(script.as_ref(), Signal::KILL);
        self.missed.store(!killed, Ordering::SeqCst);
    }

    /// What the source says after the kill does not arrive.
    fn lose_commit(&self) -> Result<()> {
        self.link.swallow(Direction::Up);
        let ended = || !self.pair.source.is_alive(self.program.pid).unwrap_or(false);
        self.wait_while_under_way(ended);
        std::thread::sleep(Duration::from_millis(100));
        self.cut_for_a_while();
        Ok(())
    }

    /// The script of the dump dies with the answer unread, and what the source says of that does not arrive.
    fn lose_abort(&self) -> Result<()> {
        let gate = self.gate();
        let stopped = self.signal_script(gate.as_ref(), Signal::STOP);
        // As far as the target comes by itself.
        let holds = || !self.plan.holds() || self.cache_logged(HOLDING);
        self.wait_while_under_way(|| !stopped || holds());
        self.link.swallow(Direction::Up);
        let killed = self.signal_script(gate.as_ref(), Signal::KILL);
        self.missed.store(!killed, Ordering::SeqCst);
        if killed {
            std::thread::sleep(Duration::from_millis(100));
        }
        self.cut_for_a_while();
        Ok(())
    }

    fn wait_while_under_way(&self, until: impl Fn() -> bool) {
        while !self.over.load(Ordering::SeqCst) && !until() {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// For as long as the plan has it.
    fn cut_for_a_while(&self) {
        self.link.bar(true);
        self.link.strike(link::Fault::Reset);
        if self.plan.returns {
            std::thread::sleep(self.plan.away);
            self.link.bar(false);
        }
    }

    fn signal(&self) -> Signal {
        match self.plan.term {
            true => Signal::TERM,
            false => Signal::KILL,
        }
    }

    fn end_proxy(&self, signal: Signal) -> Result<()> {
        let Some(proxy) = lock(&self.proxy).take() else {
            return Ok(());
        };
        end(proxy.into_daemon(), signal)
    }

    pub fn end_cache(&self, signal: Signal) -> Result<()> {
        let Some(cache) = lock(&self.cache).take() else {
            return Ok(());
        };
        end(cache.into_daemon(), signal)
    }

    /// SIGSTOP, and SIGCONT when its time is over.
    fn pause(&self, daemon: Option<&Daemon>) -> Result<()> {
        let Some(daemon) = daemon else {
            return Ok(());
        };
        daemon.signal(Signal::STOP)?;
        std::thread::sleep(self.plan.stopped);
        daemon.signal(Signal::CONT)
    }

    /// It may have ended before.
    fn pause_criu(&self, which: &Mutex<Option<OwnedFd>>) {
        let Some(criu) = lock(which).as_ref().and_then(|criu| criu.try_clone().ok()) else {
            return;
        };
        let stopped = pidfd_send_signal(criu.as_fd(), Signal::STOP);
        std::thread::sleep(self.plan.stopped);
        let _ = pidfd_send_signal(criu.as_fd(), Signal::CONT);
        self.note(format!("SIGSTOP for CRIU: {stopped:?}"));
    }

    /// Whatever the daemons say from here on cannot be written.
    fn fill_logs(&self) -> Result<()> {
        for host in [&self.pair.source, &self.pair.target] {
            // Fails when the file system is full, as it should be.
            let fill = ["sh", "-c", "cat /dev/zero >/run/log/full; sync"];
            let said = host.run(&fill, SOON)?;
            ensure!(said.stderr.contains("No space left"), "{}", said.stderr);
        }
        Ok(())
    }

    /// It may have ended before.
    fn kill_criu(&self, which: &Mutex<Option<OwnedFd>>) {
        let killed = lock(which)
            .as_ref()
            .map(|criu| pidfd_send_signal(criu.as_fd(), Signal::KILL));
        self.note(format!("SIGKILL for CRIU: {killed:?}"));
    }
}

fn end(daemon: Daemon, signal: Signal) -> Result<()> {
    match signal {
        Signal::KILL => daemon.kill(),
        _ => daemon.terminate().map(drop),
    }
}
