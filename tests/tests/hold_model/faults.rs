//! What can go wrong.

use crate::state::{
    push, Criu, Daemon, Process, Proxy, Rules, Script, SourceCriu, SourceScript, State, Step,
    Tasks, Way,
};

impl State {
    pub fn faults(&self, rules: Rules, all: &mut Vec<Step>) {
        let mut fault = |name, change: &dyn Fn(&mut Self)| {
            let counted = |s: &mut Self| {
                s.faults += 1;
                change(s);
            };
            push(self, name, &counted, all);
        };
        if self.link {
            fault("FAULT the link is cut", &Self::cut);
            if self.up.has_one() {
                fault("FAULT what the proxy said comes twice", &|s| {
                    s.up.0.rotate_right(1);
                    s.up.0[0] = s.up.0[1];
                });
            }
            if self.down.has_one() {
                fault("FAULT what the cache said comes twice", &|s| {
                    s.down.0.rotate_right(1);
                    s.down.0[0] = s.down.0[1];
                });
            }
        }
        if self.proxy_lives() {
            fault("FAULT the proxy is stopped", &|s| s.proxy_stopped = true);
        }
        if self.proxy_stopped {
            // No end waits for this.
            fault("FAULT the proxy goes on", &|s| {
                s.proxy_stopped = false;
                s.faults -= 1;
            });
        }
        if self.proxy != Proxy::Dead {
            fault("FAULT the proxy dies", &|s| {
                // What it wrote to the script stays in the socket.
                if s.proxy == Proxy::Told && s.source_script == SourceScript::Waits {
                    s.source_script = SourceScript::Told;
                }
                (s.proxy, s.proxy_stopped) = (Proxy::Dead, false);
                (s.proxy_noticed, s.down) = (true, Way::EMPTY);
                s.cut();
            });
        }
        if self.cache == Daemon::Runs {
            fault("FAULT the cache is stopped", &|s| s.cache = Daemon::Stopped);
        }
        if self.cache != Daemon::Dead {
            fault("FAULT the cache dies", &|s| {
                (s.cache, s.knows) = (Daemon::Dead, false);
                s.images &= rules.keeper;
                s.cut();
                s.cache_notices();
            });
        }
        if self.attached() && matches!(self.script, Script::Asks | Script::Holds) {
            fault("FAULT the script's connection ends", &|s| s.knows = false);
        }
        if matches!(self.source_script, SourceScript::Waits | SourceScript::Told) {
            fault("FAULT the source's script dies", &|s| {
                s.source_script = SourceScript::Dead;
            });
        }
        if self.source_criu != SourceCriu::Ended {
            fault("FAULT the source's CRIU dies", &|s| {
                s.source_ends(Process::Running, false);
            });
        }
        if self.source_criu == SourceCriu::Kills {
            // Or another script fails, or it was told to leave it running.
            fault("FAULT the source's CRIU does not kill", &|s| {
                s.source_ends(Process::Running, false);
            });
            fault("FAULT it kills, and how it ended is not told", &|s| {
                s.source_ends(Process::Dead, false);
            });
        }
        if matches!(self.script, Script::Asks | Script::Holds | Script::Goes)
            && matches!(self.criu, Criu::Script | Criu::Again | Criu::Killed)
        {
            fault("FAULT the target's script dies", &|s| {
                s.script = Script::Fails
            });
        }
        if matches!(self.criu, Criu::Builds | Criu::Script | Criu::Resumes) {
            // Another script behind ours; at the last the network, credentials, or detaching.
            if self.criu != Criu::Script || self.script == Script::Goes {
                fault("FAULT the restore fails", &|s| s.criu_ends(Criu::Failed));
            }
        }
        match self.criu {
            Criu::Waits => fault("FAULT the restore is killed", &|s| s.criu = Criu::Killed),
            Criu::Builds | Criu::Script | Criu::Again | Criu::Resumes => {
                fault("FAULT the restore is killed", &|s| s.criu = Criu::Killed);
                // Past the last system call of the tasks the kernel lets them go.
                let caught = self.criu == Criu::Script && !rules.at_post_restore;
                if self.criu == Criu::Resumes || caught {
                    fault("FAULT the restore is killed, the tasks run", &|s| {
                        (s.criu, s.tasks) = (Criu::Killed, Tasks::Run);
                    });
                }
            }
            _ => {}
        }
    }
}
