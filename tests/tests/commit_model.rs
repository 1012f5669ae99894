//! The commit as a model (docs/commit.md), and everything that can happen to it: each party dies at each point, the link
//! breaks at each point and each end notices late, a message comes twice, image-proxy is stopped and goes on or does not; an
//! operator aborts at each point at which `image-proxy abort` accepts it, and decides on the target. All states are
//! visited, up to three faults.
//!
//! A link that breaks and is resumed delivers each message once, later: that is a link that is slow, so it is in here. One
//! that is not resumed is a link that breaks. A restarted cache has nothing: that is one that died.
//!
//! It models what the daemons do (`image-proxy/src/control/commit.rs`, `image-cache/src/store/set/mod.rs`), not their code; the code
//! is driven through the same situations by `commit.rs`, `link_faults.rs` and real CRIU.

use std::collections::{HashMap, VecDeque};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Process {
    Frozen,
    Running,
    /// By CRIU.
    Dead,
    /// The root is dead, by itself or by a CRIU that was killed behind it. Its children run.
    ChildrenRun,
    /// It went on, did its work, and has ended by itself.
    Over,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Criu {
    /// For its post-dump script.
    Waits,
    Kills,
    /// Ended, whatever became of the process.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Script {
    Waits,
    /// Has read "done".
    Told,
    /// Exited with an error, or was killed.
    Dead,
    Exited,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Proxy {
    /// Sent PREPARE.
    Preparing,
    /// Heard PREPARED.
    Prepared,
    /// Wrote the answer to the script.
    Told,
    /// Sent COMMIT.
    Committed,
    Doubt,
    Failed,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Set {
    Complete,
    Prepared,
    Committed,
    InDoubt,
    Aborted,
    /// With the cache.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Message {
    Prepare,
    Prepared,
    Refused,
    Commit,
    Doubt,
    Abort,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    process: Process,
    criu: Criu,
    exit: Exit,
    /// When CRIU had ended, all that it dumped was dead.
    left_dead: bool,
    script: Script,
    /// CRIU has run it again, and gave it the same answer.
    twice: bool,
    proxy: Proxy,
    set: Set,
    up: Vec<Message>,
    down: Vec<Message>,
    link: bool,
    /// SIGSTOP, a frozen cgroup: it does nothing, and its kernel keeps the link.
    stopped: bool,
    /// The operator has decided about the set, which its link may outlive.
    decided: bool,
    /// The source confirms a set that is not there any more.
    lost_by_the_operator: bool,
    /// The end has noticed that the link is gone.
    proxy_noticed: bool,
    cache_noticed: bool,
    restored: bool,
    faults: u8,
}

/// By what image-proxy takes the process for killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sees {
    /// CRIU's exit status is 0, and all that it dumped was dead when it had ended.
    Kill,
    /// The root of the tree is dead.
    Death,
    /// The script has its answer.
    Script,
}

/// How CRIU has ended, as its exit status says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Exit {
    Runs,
    Well,
    Failed,
    /// It was killed, or the kernel does not tell.
    Unknown,
}

impl State {
    fn first() -> Self {
        Self {
            process: Process::Frozen,
            criu: Criu::Waits,
            exit: Exit::Runs,
            left_dead: false,
            script: Script::Waits,
            twice: false,
            proxy: Proxy::Preparing,
            set: Set::Complete,
            up: vec![Message::Prepare],
            down: Vec::new(),
            link: true,
            stopped: false,
            decided: false,
            lost_by_the_operator: false,
            proxy_noticed: false,
            cache_noticed: false,
            restored: false,
            faults: 0,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn criu_ends(&mut self, exit: Exit) {
        (self.criu, self.exit) = (Criu::Ended, exit);
        self.left_dead = self.process == Process::Dead;
    }

    fn cut(&mut self) {
        self.link = false;
        self.up.clear();
        self.down.clear();
    }

    fn cache_lives(&self) -> bool {
        self.set != Set::Gone
    }

    /// All that can happen next, by name.
    fn next(&self, sees: Sees) -> Vec<(&'static str, Self)> {
        let mut all = Vec::new();
        let mut can = |name, next| all.push((name, next));
        // The link carries in order, or not at all.
        if let Some(&message) = self.up.first().filter(|_| self.link && self.cache_lives()) {
            can(
                "the cache hears",
                self.with(|s| {
                    s.up.remove(0);
                    match (message, s.set) {
                        (Message::Prepare, Set::Complete) => {
                            s.set = Set::Prepared;
                            s.down.push(Message::Prepared);
                        }
                        (Message::Prepare, Set::Prepared) => s.down.push(Message::Refused),
                        // Also of one that is in doubt because nothing was heard for some time.
                        (Message::Commit, Set::Prepared | Set::InDoubt) => s.set = Set::Committed,
                        // What the operator has said before.
                        (Message::Commit, Set::Committed) if s.decided => s.decided = false,
                        // Out of turn: the session ends, the set stays.
                        (Message::Commit | Message::Abort, Set::Committed) => s.cut(),
                        (Message::Commit, Set::Aborted) => s.lost_by_the_operator = true,
                        (Message::Doubt, Set::Committed) if s.decided => s.cut(),
                        (Message::Doubt, Set::Prepared) => s.set = Set::InDoubt,
                        (Message::Abort, Set::Complete | Set::Prepared | Set::InDoubt) => {
                            s.set = Set::Aborted;
                        }
                        _ => {}
                    }
                }),
            );
        }
        let proxy_lives = self.proxy != Proxy::Dead && !self.stopped;
        if self.link && proxy_lives && !self.down.is_empty() {
            can(
                "the proxy hears",
                self.with(|s| {
                    let message = s.down.remove(0);
                    if s.proxy == Proxy::Preparing {
                        s.proxy = match message {
                            Message::Prepared => Proxy::Prepared,
                            _ => Proxy::Failed,
                        };
                    }
                }),
            );
        }
        if !self.link && proxy_lives && !self.proxy_noticed {
            can(
                "the proxy notices",
                self.with(|s| {
                    s.proxy_noticed = true;
                    s.proxy = match s.proxy {
                        Proxy::Preparing | Proxy::Prepared => Proxy::Failed,
                        Proxy::Told => Proxy::Doubt,
                        other => other,
                    };
                }),
            );
        }
        if !self.link && self.cache_lives() && !self.cache_noticed {
            can(
                "the cache notices",
                self.with(|s| {
                    s.cache_noticed = true;
                    s.set = match s.set {
                        Set::Complete => Set::Aborted,
                        Set::Prepared => Set::InDoubt,
                        other => other,
                    };
                }),
            );
        }
        // It says nothing, and its link is there.
        if self.stopped && self.link && self.set == Set::Prepared {
            can(
                "the cache doubts the silence",
                self.with(|s| s.set = Set::InDoubt),
            );
        }
        // image-proxy and the script.
        match (self.proxy, self.script) {
            (Proxy::Preparing | Proxy::Prepared, Script::Waits) if self.stopped => {
                can(
                    "the script has waited long enough",
                    self.with(|s| s.script = Script::Dead),
                );
            }
            (Proxy::Prepared | Proxy::Told, Script::Dead) if self.stopped => {}
            (Proxy::Prepared, Script::Waits) => {
                can("the proxy tells", self.with(|s| s.proxy = Proxy::Told))
            }
            // Gone without its answer: CRIU takes that for a refusal.
            (Proxy::Prepared | Proxy::Told, Script::Dead) => can(
                "the proxy gives up",
                self.with(|s| {
                    s.proxy = Proxy::Failed;
                    s.up.extend(s.link.then_some(Message::Abort));
                }),
            ),
            (Proxy::Failed | Proxy::Dead, Script::Waits) => {
                can(
                    "the script hears no",
                    self.with(|s| s.script = Script::Dead),
                );
            }
            (Proxy::Told | Proxy::Doubt, Script::Waits) => {
                can(
                    "the script hears yes",
                    self.with(|s| s.script = Script::Told),
                );
            }
            _ => {}
        }
        // It may also have been written before image-proxy died.
        if self.script == Script::Told {
            can("the script exits", self.with(|s| s.script = Script::Exited));
        }
        // CRIU.
        match (self.criu, self.script) {
            (Criu::Waits, Script::Exited) => {
                can("CRIU goes on", self.with(|s| s.criu = Criu::Kills));
                if !self.twice {
                    // A configuration file that is read twice. The daemon says the same, as long as it still means it.
                    can(
                        "CRIU runs the script again",
                        self.with(|s| {
                            s.twice = true;
                            s.script = match s.proxy {
                                Proxy::Told => Script::Told,
                                _ => Script::Dead,
                            };
                        }),
                    );
                }
            }
            (Criu::Waits, Script::Dead) => can(
                "CRIU resumes",
                self.with(|s| {
                    s.process = Process::Running;
                    s.criu_ends(Exit::Failed);
                }),
            ),
            (Criu::Kills, _) => {
                can(
                    "CRIU kills",
                    self.with(|s| {
                        s.process = Process::Dead;
                        s.criu_ends(Exit::Well);
                    }),
                );
            }
            _ => {}
        }
        // What was let go ends some time, as all processes do.
        if matches!(self.process, Process::Running | Process::ChildrenRun) {
            can(
                "the process ends by itself",
                self.with(|s| s.process = Process::Over),
            );
        }
        // image-proxy learns what became of it.
        let taken = matches!(self.script, Script::Told | Script::Exited);
        if self.proxy == Proxy::Told && taken && !self.stopped {
            let root_dead = !matches!(self.process, Process::Frozen | Process::Running);
            let killed = match sees {
                Sees::Kill => self.exit == Exit::Well && self.left_dead,
                Sees::Death => root_dead,
                Sees::Script => true,
            };
            if killed {
                can(
                    "the proxy confirms",
                    self.with(|s| {
                        s.proxy = Proxy::Committed;
                        s.up.extend(s.link.then_some(Message::Commit));
                    }),
                );
            } else if self.criu == Criu::Ended {
                can(
                    "the proxy sees no kill",
                    self.with(|s| {
                        s.proxy = Proxy::Doubt;
                        s.up.extend(s.link.then_some(Message::Doubt));
                    }),
                );
            }
        }
        // `image-proxy abort`, with the link there: before the script is told, or when CRIU has ended and the process is
        // seen to live.
        let not_told = matches!(self.proxy, Proxy::Preparing | Proxy::Prepared)
            && self.script == Script::Waits;
        let lives = self.proxy == Proxy::Doubt
            && sees == Sees::Kill
            && self.criu == Criu::Ended
            && self.process == Process::Running;
        if self.link && !self.stopped && (not_told || lives) {
            can(
                "the operator aborts",
                self.with(|s| {
                    s.proxy = Proxy::Failed;
                    s.up.push(Message::Abort);
                }),
            );
        }
        // The target.
        if self.set == Set::Committed && !self.restored {
            can("restore", self.with(|s| s.restored = true));
        }
        // An operator looks at the source when nothing moves there any more. Of a set that is held they say so
        // (`--process-is-dead`, `--process-lives`).
        if matches!(self.set, Set::InDoubt | Set::Prepared) && self.criu == Criu::Ended {
            can(
                "the operator decides",
                self.with(|s| {
                    s.decided = true;
                    s.set = match s.process {
                        Process::Dead => Set::Committed,
                        // The children first, then what is left is on the target alone. What has ended by itself
                        // has done its work: CRIU's exit status says so.
                        _ => Set::Aborted,
                    };
                }),
            );
        }
        if self.stopped {
            // It may also stay so for ever: no end waits for this.
            can("FAULT the proxy goes on", self.with(|s| s.stopped = false));
        }
        if self.faults < 3 {
            let mut fault = |name, change: fn(&mut Self)| {
                can(
                    name,
                    self.with(|s| {
                        s.faults += 1;
                        change(s);
                    }),
                );
            };
            if self.link {
                fault("FAULT the link breaks", Self::cut);
                if !self.up.is_empty() {
                    fault("FAULT what the proxy said comes twice", |s| {
                        s.up.insert(0, s.up[0])
                    });
                }
                if !self.down.is_empty() {
                    fault("FAULT what the cache said comes twice", |s| {
                        s.down.insert(0, s.down[0])
                    });
                }
            }
            if proxy_lives {
                fault("FAULT the proxy is stopped", |s| s.stopped = true);
            }
            if self.proxy != Proxy::Dead {
                fault("FAULT the proxy dies", |s| {
                    // What it wrote to the script stays in the socket.
                    if s.proxy == Proxy::Told && s.script == Script::Waits {
                        s.script = Script::Told;
                    }
                    (s.proxy, s.stopped) = (Proxy::Dead, false);
                    s.cut();
                });
            }
            if self.cache_lives() {
                fault("FAULT the cache dies", |s| {
                    s.set = Set::Gone;
                    s.cut();
                });
            }
            if matches!(self.script, Script::Waits | Script::Told) {
                fault("FAULT the script dies", |s| s.script = Script::Dead);
            }
            if self.criu != Criu::Ended {
                fault("FAULT CRIU dies", |s| {
                    s.process = Process::Running;
                    s.criu_ends(Exit::Unknown);
                });
            }
            if self.criu == Criu::Kills {
                fault("FAULT another script fails after ours", |s| {
                    s.process = Process::Running;
                    s.criu_ends(Exit::Failed);
                });
                fault("FAULT CRIU is told to leave it running", |s| {
                    s.process = Process::Running;
                    s.criu_ends(Exit::Well);
                });
                fault("FAULT CRIU dies between the root and its children", |s| {
                    s.process = Process::ChildrenRun;
                    s.criu_ends(Exit::Unknown);
                });
                fault("FAULT CRIU kills, and how it ended is not told", |s| {
                    s.process = Process::Dead;
                    s.criu_ends(Exit::Unknown);
                });
            }
        }
        all
    }
}

/// Visits every state; gives each with the way to it.
fn explore(sees: Sees) -> HashMap<State, Option<(State, &'static str)>> {
    let mut known = HashMap::from([(State::first(), None)]);
    let mut queue = VecDeque::from([State::first()]);
    while let Some(state) = queue.pop_front() {
        for (name, next) in state.next(sees) {
            if !known.contains_key(&next) {
                known.insert(next.clone(), Some((state.clone(), name)));
                queue.push_back(next);
            }
        }
    }
    known
}

fn way(known: &HashMap<State, Option<(State, &'static str)>>, state: &State) -> Vec<&'static str> {
    let mut names = Vec::new();
    let mut at = state;
    while let Some(Some((before, name))) = known.get(at) {
        names.push(*name);
        at = before;
    }
    names.reverse();
    names
}

#[test]
fn never_lost_never_twice() {
    let known = explore(Sees::Kill);
    let mut ends = 0;
    for state in known.keys() {
        let way = || format!("{state:?}\n{:#?}", way(&known, state));
        let held = matches!(state.set, Set::Prepared | Set::InDoubt | Set::Committed);
        let lost_with_its_cache = state.set == Set::Gone;
        if state.process == Process::Dead {
            assert!(held || lost_with_its_cache, "lost: {}", way());
        } else {
            assert!(
                state.set != Set::Committed,
                "may be restored while it lives: {}",
                way()
            );
            assert!(!state.restored, "two of it: {}", way());
        }
        assert!(
            !state.lost_by_the_operator,
            "a decision and the source contradict each other: {}",
            way()
        );
        // Where nothing more can happen, but for faults, it lives in one place.
        let moves = state.next(Sees::Kill).into_iter();
        if moves.filter(|(name, _)| !name.starts_with("FAULT")).count() == 0 {
            ends += 1;
            let here = matches!(state.process, Process::Running | Process::Over);
            assert!(here != state.restored || lost_with_its_cache, "{}", way());
            assert!(
                state.process != Process::Frozen,
                "frozen for ever: {}",
                way()
            );
        }
    }
    println!("{} states, {ends} ends", known.len());
    assert!(known.len() > 500 && ends > 20, "the model does not move");
}

/// If image-proxy cannot see the process, all that it can wait for is that the script has its answer. Then a copy can be
/// restored while the process lives, and only if the script or CRIU dies between that and the kill.
#[test]
fn without_a_look_at_the_process_a_death_in_between_can_double_it() {
    let known = explore(Sees::Script);
    let mut doubled = 0;
    for state in known.keys() {
        if state.process == Process::Dead {
            let held = matches!(state.set, Set::Prepared | Set::InDoubt | Set::Committed);
            assert!(held || state.set == Set::Gone, "lost: {state:?}");
        }
        if state.restored && state.process == Process::Running {
            doubled += 1;
            let way = way(&known, state);
            let cause = |name: &&str| name.starts_with("FAULT") || name.contains("again");
            assert!(way.iter().any(cause), "{way:#?}");
        }
    }
    assert!(doubled > 0, "then the look would not be needed");
}

/// A root that is dead was not killed for that: it may have ended by itself after a dump that failed, or its children
/// may run.
#[test]
fn the_death_of_the_root_is_no_evidence() {
    let known = explore(Sees::Death);
    for process in [Process::Over, Process::ChildrenRun] {
        let doubled = |s: &&State| s.restored && s.process == process;
        assert!(known.keys().any(|s| doubled(&s)), "{process:?}");
    }
}
