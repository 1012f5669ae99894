//! What decides when the link is gone: image-proxy by another connection, and an operator.

use crate::state::{
    push, Criu, Daemon, Message, Process, Proxy, Rules, Script, Set, SourceCriu, SourceScript,
    State, Step, Tasks,
};

impl State {
    /// HELLO of kind 4: to image-cache, or to the script while there is none.
    pub fn late_decision(&self, rules: Rules, all: &mut Vec<Step>) {
        let message = match self.proxy {
            Proxy::Commits => Message::Commit,
            Proxy::Doubts => Message::Doubt,
            Proxy::Aborts => Message::Abort,
            _ => return,
        };
        if self.link || !self.proxy_lives() || !self.proxy_noticed || self.heard {
            return;
        }
        let told = |s: &mut Self| {
            s.cache_notices();
            s.cache_hears(message);
            s.heard = s.done(rules);
        };
        let reached = self.cache == Daemon::Runs && self.set != Set::None;
        if reached {
            push(self, "the proxy brings its decision", &told, all);
        }
        // Also while image-cache has been started again, and the script has not come to it yet.
        let to_script = |s: &mut Self| {
            match message {
                Message::Commit => s.script_goes(),
                Message::Abort => s.script = Script::Fails,
                _ => return,
            }
            s.heard = true;
        };
        if self.holds_alone() {
            push(self, "the proxy tells the target's script", &to_script, all);
        }
        if self.faults < rules.faults {
            let unheard = |s: &mut Self| (s.heard, s.faults) = (false, s.faults + 1);
            if reached {
                let change = |s: &mut Self| {
                    told(s);
                    unheard(s);
                };
                push(
                    self,
                    "FAULT the proxy does not hear that the cache heard",
                    &change,
                    all,
                );
            }
            if self.holds_alone() {
                let change = |s: &mut Self| {
                    to_script(s);
                    unheard(s);
                };
                push(
                    self,
                    "FAULT the proxy does not hear that the script heard",
                    &change,
                    all,
                );
            }
        }
    }

    pub fn operator(&self, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        let not_told = matches!(self.proxy, Proxy::Asks | Proxy::MayTell)
            && self.source_script == SourceScript::Waits;
        let ended = self.source_criu == SourceCriu::Ended;
        let lives = self.proxy == Proxy::Doubts && ended && self.process == Process::Running;
        if !self.proxy_stopped && (not_told || lives) {
            can("the operator aborts on the source", &|s| {
                s.decides(Proxy::Aborts)
            });
        }
        let dead = self.process == Process::Dead;
        if self.cache == Daemon::Runs {
            if self.set == Set::Trial {
                can("the operator drops the trial", &|s| {
                    s.set = Set::Aborted;
                    s.says(Message::Failed);
                });
            }
            let undecided = matches!(self.set, Set::InDoubt | Set::Prepared | Set::Holding);
            // When nothing moves on the source any more.
            if undecided && ended {
                can("the operator decides", &|s| {
                    s.set = match dead {
                        true => Set::Committed,
                        false => Set::Aborted,
                    };
                });
            }
        }
        if self.holds_alone() && ended {
            can("the operator tells the script", &|s| match dead {
                true => s.script_goes(),
                false => s.script = Script::Fails,
            });
        }
        let left = self.tasks == Tasks::Asleep && self.criu == Criu::Killed;
        if left && self.script != Script::Holds {
            can("the operator kills what is asleep", &|s| {
                s.tasks = Tasks::None
            });
        }
    }
}
