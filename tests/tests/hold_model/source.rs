//! The source: image-proxy, its script, CRIU; and the link.

use crate::state::{
    push, Criu, Daemon, Message, Process, Proxy, Rules, Set, SourceCriu, SourceScript, State, Step,
    Way,
};

impl State {
    pub fn source(&self, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        match (self.proxy, self.source_script) {
            (Proxy::Asks | Proxy::MayTell, SourceScript::Waits) if self.proxy_stopped => {
                can("TIME the script has waited long enough", &|s| {
                    s.source_script = SourceScript::Dead;
                });
            }
            _ if self.proxy_stopped => {}
            (Proxy::Asks, SourceScript::Waits) => {
                can("TIME --commit-timeout", &|s| s.decides(Proxy::Aborts));
            }
            (Proxy::MayTell, SourceScript::Waits) => {
                can("the proxy tells", &|s| s.proxy = Proxy::Told);
            }
            (Proxy::Asks | Proxy::MayTell | Proxy::Told, SourceScript::Dead) => {
                can("the proxy gives up", &|s| s.decides(Proxy::Aborts));
            }
            _ => {}
        }
        match (self.proxy, self.source_script) {
            (Proxy::Aborts | Proxy::Dead, SourceScript::Waits) => {
                can("the source's script hears no", &|s| {
                    s.source_script = SourceScript::Dead;
                });
            }
            (Proxy::Told | Proxy::Doubts, SourceScript::Waits) => {
                can("the source's script hears yes", &|s| {
                    s.source_script = SourceScript::Told;
                });
            }
            (_, SourceScript::Told) => {
                can("the source's script exits", &|s| {
                    s.source_script = SourceScript::Exited;
                });
            }
            _ => {}
        }
        match (self.source_criu, self.source_script) {
            (SourceCriu::Waits, SourceScript::Exited) => {
                can("the source's CRIU goes on", &|s| {
                    s.source_criu = SourceCriu::Kills;
                });
            }
            (SourceCriu::Waits, SourceScript::Dead) => {
                can("the process goes on", &|s| {
                    s.source_ends(Process::Running, false)
                });
            }
            (SourceCriu::Kills, _) => {
                can("the process is killed", &|s| {
                    s.source_ends(Process::Dead, true)
                });
            }
            _ => {}
        }
        let taken = matches!(
            self.source_script,
            SourceScript::Told | SourceScript::Exited
        );
        if self.proxy == Proxy::Told && taken && !self.proxy_stopped {
            if self.proven {
                can("the proxy sees the kill", &|s| s.decides(Proxy::Commits));
            } else if self.source_criu == SourceCriu::Ended {
                can("the proxy sees no kill", &|s| s.decides(Proxy::Doubts));
            }
        }
    }

    pub fn link(&self, rules: Rules, all: &mut Vec<Step>) {
        let mut can = |name, change: &dyn Fn(&mut Self)| push(self, name, change, all);
        let cache_runs = self.cache == Daemon::Runs;
        if let Some(message) = self.up.first().filter(|_| cache_runs) {
            if message == Message::Prepare && self.set == Set::Complete {
                can("the cache begins a trial", &|s| {
                    s.up.pop();
                    (s.set, s.trial) = (Set::Trial, true);
                    if !rules.waits_for_holding {
                        s.says(Message::Trial);
                    }
                });
                // With `auto` alone.
                if self.criu == Criu::Absent {
                    can("the cache prepares the set", &|s| {
                        s.up.pop();
                        s.set = Set::Prepared;
                        s.says(Message::Prepared);
                    });
                }
            } else {
                can("the cache hears", &|s| {
                    s.up.pop();
                    match message {
                        // Out of turn: the session ends.
                        Message::Prepare => s.cut(),
                        _ => s.cache_hears(message),
                    }
                });
            }
        }
        if self.link && cache_runs && !self.heard && self.up == Way::EMPTY && self.done(rules) {
            can("the cache says GOODBYE", &|s| s.heard = true);
        }
        if self.proxy_lives() && self.down != Way::EMPTY {
            can("the proxy hears", &|s| {
                match (s.down.pop(), s.proxy) {
                    (Message::Failed, Proxy::Asks | Proxy::MayTell) => s.decides(Proxy::Aborts),
                    (Message::Holding | Message::Prepared | Message::Trial, Proxy::Asks) => {
                        s.proxy = Proxy::MayTell;
                    }
                    _ => {}
                };
            });
        }
        if !self.link && self.proxy_lives() && !self.proxy_noticed {
            can("the proxy notices", &|s| {
                (s.proxy_noticed, s.down) = (true, Way::EMPTY);
                if matches!(s.proxy, Proxy::Asks | Proxy::MayTell) {
                    s.proxy = Proxy::Aborts;
                }
            });
        }
        if !self.link && cache_runs && !self.cache_noticed {
            can("the cache notices", &|s| {
                s.cache_notices();
                s.set = match s.set {
                    Set::Complete | Set::Trial => Set::Aborted,
                    Set::Prepared | Set::Holding => Set::InDoubt,
                    set => set,
                };
            });
        }
        let held = matches!(self.set, Set::Prepared | Set::Holding);
        if self.proxy_stopped && self.link && cache_runs && held {
            can("TIME the cache doubts the silence", &|s| {
                s.set = Set::InDoubt
            });
        }
    }
}
