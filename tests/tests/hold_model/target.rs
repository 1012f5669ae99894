//! The target: image-cache, and the first restore with its script.

use crate::state::{push, Criu, Daemon, Message, Rules, Script, Set, State, Step, Tasks};

impl State {
    pub fn cache(&self, rules: Rules, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        match self.cache {
            Daemon::Runs => {}
            Daemon::Stopped => {
                can("the cache goes on", &|s| s.cache = Daemon::Runs);
                return;
            }
            Daemon::Dead => {
                can("the cache is started again", &|s| {
                    s.cache = Daemon::Runs;
                    s.given &= rules.keeper && rules.journals_given;
                    s.set = match s.set {
                        Set::Released => Set::Released,
                        _ if !rules.keeper => Set::None,
                        Set::Prepared | Set::Holding | Set::InDoubt if s.images => Set::InDoubt,
                        Set::Committed if s.images => Set::Committed,
                        _ => Set::None,
                    };
                    s.images &= s.set != Set::None;
                    s.given &= s.set != Set::None;
                });
                return;
            }
        }
        // A set without a restore that has it.
        if self.set == Set::Committed && self.images && !self.given {
            can("a second restore runs", &|s| {
                (s.set, s.second_runs) = (Set::Released, true);
            });
        }
        if !self.given {
            return;
        }
        let over = |s: &mut Self| {
            s.given = false;
            s.set = match s.set {
                Set::Aborted | Set::Released => s.set,
                // What was only held here.
                _ if !s.images => Set::None,
                Set::Trial => {
                    s.says(Message::Failed);
                    Set::Complete
                }
                Set::Holding => {
                    s.says(Message::Failed);
                    Set::Prepared
                }
                set => set,
            };
        };
        if self.knows {
            if self.tasks == Tasks::Run && self.set != Set::Released {
                can("the cache sees it run", &|s| s.set = Set::Released);
            } else if self.criu_is_over() && self.tasks == Tasks::None {
                can("the cache sees that the restore is over", &over);
            }
        } else if !rules.sees_the_end {
            can("the cache takes the hold for over", &over);
        } else if matches!(self.script, Script::Holds | Script::Asks) {
            // It lives: its lock says so. It comes back, or fails.
        } else if !self.mark && rules.leaves_word {
            can("the cache sees that the hold ended in nothing", &over);
        } else if self.tasks == Tasks::Run && self.set != Set::Released {
            can("the cache sees the tasks run", &|s| s.set = Set::Released);
        } else if self.criu_is_over() && self.tasks == Tasks::None {
            // Whether tasks that are gone have run, nothing else tells.
            can("the operator looks at the target", &over);
        }
    }

    pub fn restore(&self, rules: Rules, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        let cache_runs = self.cache == Daemon::Runs;
        match self.criu {
            Criu::Absent => can("a restore comes", &|s| s.criu = Criu::Waits),
            Criu::Waits if cache_runs && self.images && !self.given => {
                if matches!(self.set, Set::Trial | Set::Committed) {
                    can("the restore gets the set", &|s| {
                        (s.given, s.knows) = (true, true);
                        (s.criu, s.tasks) = (Criu::Builds, Tasks::Asleep);
                    });
                }
            }
            Criu::Builds => match self.attached() && self.set != Set::Aborted {
                true => can("the restore is at post-restore", &|s| {
                    (s.criu, s.script) = (Criu::Script, Script::Asks);
                }),
                false => can("the restore cannot read on", &|s| {
                    s.criu_ends(Criu::Refused)
                }),
            },
            Criu::Script | Criu::Again => self.script(rules, all),
            Criu::Resumes => can("CRIU detaches, the tasks run", &|s| {
                (s.criu, s.tasks) = (Criu::Ended, Tasks::Run);
            }),
            Criu::Killed if matches!(self.script, Script::Asks | Script::Holds) => {
                can("the script ends the tasks", &|s| {
                    (s.script, s.tasks) = (Script::Fails, Tasks::None);
                });
            }
            _ => {}
        }
    }

    fn script(&self, rules: Rules, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        let answers = self.attached() && self.cache == Daemon::Runs;
        match self.script {
            Script::Asks if !self.attached() => {
                can("the script hears nothing", &|s| s.script = Script::Deserted);
            }
            Script::Asks | Script::Holds if answers && self.set == Set::Committed => {
                can("the script hears yes", &Self::script_goes);
            }
            Script::Asks | Script::Holds if answers && self.set == Set::Aborted => {
                can("the script hears no", &|s| s.script = Script::Fails);
            }
            Script::Asks if answers && self.set == Set::Trial && !rules.told_before_holding => {
                can("the cache says HOLDING", &|s| {
                    s.set = Set::Holding;
                    s.says(Message::Holding);
                });
            }
            Script::Asks if answers && !rules.holds_promised => {
                can("no script holds", &|s| s.script = Script::Goes);
            }
            Script::Asks if answers => {
                can("the script is told to hold", &|s| s.script = Script::Holds);
            }
            Script::Holds if answers && self.set == Set::Trial => {
                can("the cache says HOLDING", &|s| {
                    s.set = Set::Holding;
                    s.says(Message::Holding);
                });
            }
            Script::Holds if self.cache == Daemon::Runs && !self.attached() => {
                can("the script comes to the new cache", &|s| {
                    match s.set {
                        // Of this set it has nothing, or it was decided without this restore.
                        Set::None => (s.set, s.given) = (Set::InDoubt, true),
                        Set::Released | Set::Aborted => s.script = Script::Fails,
                        _ => s.given = true,
                    }
                    s.knows = true;
                });
            }
            Script::Goes if self.criu == Criu::Script => {
                can("CRIU goes on", &|s| s.criu = Criu::Resumes);
                can("CRIU runs the script again", &|s| s.criu = Criu::Again);
            }
            Script::Goes if answers || rules.leaves_word => {
                can("CRIU goes on", &|s| s.criu = Criu::Resumes);
            }
            Script::Goes if self.cache == Daemon::Stopped => {}
            Script::Goes => can("it finds nothing to ask", &|s| s.criu_ends(Criu::Refused)),
            Script::Fails | Script::Deserted if !rules.at_post_restore => {
                can("CRIU goes on all the same", &|s| s.criu = Criu::Resumes);
            }
            Script::Fails => can("CRIU kills what it built", &|s| s.criu_ends(Criu::Failed)),
            Script::Deserted => can("CRIU kills what it built", &|s| s.criu_ends(Criu::Refused)),
            _ => {}
        }
    }
}
