//! What must never be.

use crate::state::{Criu, Daemon, Process, Proxy, Rules, Script, Set, State, Tasks};

pub const TWO: &str = "two of it on the target";
pub const EARLY: &str = "it runs on the target before it is dead on the source";
pub const LOST: &str = "lost";
pub const FORGOTTEN: &str = "the decision is confirmed, and the script will never hear it";

impl State {
    /// Where the process is, or can still be put by an answer.
    fn has_a_copy(&self, rules: Rules) -> bool {
        let kept = matches!(
            self.set,
            Set::Prepared | Set::Holding | Set::InDoubt | Set::Committed
        );
        let stands = matches!(self.criu, Criu::Script | Criu::Again | Criu::Resumes)
            && matches!(self.script, Script::Holds | Script::Goes);
        kept && self.images && (self.cache != Daemon::Dead || rules.keeper)
            || stands && self.tasks == Tasks::Asleep
            || self.tasks == Tasks::Run
            || self.second_runs
    }

    /// A loss that the design has: image-cache died without a keeper, and no restore stood, or that was hit as well.
    fn is_a_known_loss(&self, rules: Rules) -> bool {
        let hit = matches!(self.criu, Criu::Failed | Criu::Killed) || self.script == Script::Fails;
        !rules.keeper && !self.images && (hit || !self.trial)
    }

    /// What must never be.
    pub fn wrong(&self, rules: Rules) -> Option<&'static str> {
        let runs = self.tasks == Tasks::Run;
        if runs && self.second_runs {
            return Some(TWO);
        }
        if (runs || self.second_runs) && self.process != Process::Dead {
            return Some(EARLY);
        }
        if self.process == Process::Dead && !self.has_a_copy(rules) && !self.is_a_known_loss(rules)
        {
            return Some(LOST);
        }
        let decided = matches!(self.proxy, Proxy::Commits | Proxy::Aborts) && self.heard;
        if decided && self.script == Script::Holds && self.cache == Daemon::Dead {
            return Some(FORGOTTEN);
        }
        (self.faults == 0 && self.set == Set::InDoubt).then_some("in doubt without a fault")
    }

    /// Nothing more happens by a message, evidence, or a command: then it is in one place.
    pub fn wrong_end(&self, rules: Rules) -> Option<&'static str> {
        match self.process {
            // Its script has a limit.
            Process::Frozen if self.proxy_stopped => return None,
            Process::Frozen => return Some("frozen for ever"),
            Process::Running if self.images && self.set == Set::Committed => return Some("two"),
            Process::Dead if self.is_a_known_loss(rules) => {}
            Process::Dead if self.tasks != Tasks::Run && !self.second_runs => {
                return Some("runs nowhere")
            }
            _ => {}
        }
        if self.tasks == Tasks::Asleep {
            return Some("asleep for ever");
        }
        let open = matches!(
            self.set,
            Set::Trial | Set::Holding | Set::Prepared | Set::InDoubt
        );
        open.then_some("nothing ends the doubt")
    }
}
