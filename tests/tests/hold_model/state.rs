//! What the model is made of: one state, and what changes several parts of it at once.

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    Frozen,
    /// CRIU has let it go.
    Running,
    /// By CRIU.
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceCriu {
    /// For its post-dump script.
    Waits,
    Kills,
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceScript {
    Waits,
    /// Has read "done".
    Told,
    /// Exited with an error, or was killed.
    Dead,
    Exited,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Proxy {
    /// Sent PREPARE_TRIAL.
    Asks,
    /// Heard HOLDING, or PREPARED.
    MayTell,
    /// Wrote the answer to the script.
    Told,
    /// Has decided, by evidence: COMMIT, SET_DOUBT, SET_ABORT.
    Commits,
    Doubts,
    Aborts,
    Dead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Message {
    None,
    Prepare,
    Commit,
    Doubt,
    Abort,
    Prepared,
    Trial,
    Holding,
    Failed,
}

/// One way of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Way(pub [Message; 4]);

impl Way {
    pub const EMPTY: Self = Self([Message::None; 4]);

    pub fn first(self) -> Option<Message> {
        Some(self.0[0]).filter(|m| *m != Message::None)
    }

    pub fn push(&mut self, message: Message) {
        let free = self.0.iter().position(|m| *m == Message::None);
        self.0[free.expect("room on the link")] = message;
    }

    pub fn pop(&mut self) -> Message {
        self.0.rotate_left(1);
        std::mem::replace(&mut self.0[3], Message::None)
    }

    /// With one message in it, which may come twice.
    pub fn has_one(self) -> bool {
        self.0[0] != Message::None && self.0[1] == Message::None
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Daemon {
    Runs,
    Stopped,
    Dead,
}

/// In image-cache; while that is dead, in its journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Set {
    Complete,
    Trial,
    Holding,
    Prepared,
    InDoubt,
    Committed,
    Aborted,
    /// It runs here.
    Released,
    /// This image-cache knows of none.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Criu {
    /// Not there yet.
    Absent,
    /// For the inventory; its script has promised to hold.
    Waits,
    Builds,
    /// At `post-restore`.
    Script,
    /// The same script is named twice, and runs again.
    Again,
    /// Behind `post-restore`.
    Resumes,
    /// The tasks are detached.
    Ended,
    /// By itself, with its tasks.
    Failed,
    /// The same, because its script said so without having been told.
    Refused,
    Killed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Script {
    None,
    /// Has asked image-cache.
    Asks,
    Holds,
    /// Exits with 0.
    Goes,
    /// Was told to fail, or was killed.
    Fails,
    /// Fails because it was told nothing.
    Deserted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tasks {
    None,
    Asleep,
    Run,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    pub process: Process,
    /// CRIU's exit status is 0, and all that it dumped was dead then.
    pub proven: bool,
    pub source_criu: SourceCriu,
    pub source_script: SourceScript,
    pub proxy: Proxy,
    pub proxy_stopped: bool,
    /// The other side has confirmed the decision (GOODBYE).
    pub heard: bool,
    pub up: Way,
    pub down: Way,
    pub link: bool,
    pub proxy_noticed: bool,
    pub cache_noticed: bool,
    pub cache: Daemon,
    pub set: Set,
    /// A trial has begun: the source kills only what stands restored.
    pub trial: bool,
    pub images: bool,
    /// The first restore has the set.
    pub given: bool,
    /// image-cache knows that restore: it has not been started again since, or its script came back.
    pub knows: bool,
    pub criu: Criu,
    pub script: Script,
    pub tasks: Tasks,
    /// The script has left word that it goes on, before it did.
    pub mark: bool,
    pub second_runs: bool,
    pub faults: u8,
}

pub const FIRST: State = State {
    process: Process::Frozen,
    proven: false,
    source_criu: SourceCriu::Waits,
    source_script: SourceScript::Waits,
    proxy: Proxy::Asks,
    proxy_stopped: false,
    heard: false,
    up: Way([
        Message::Prepare,
        Message::None,
        Message::None,
        Message::None,
    ]),
    down: Way::EMPTY,
    link: true,
    proxy_noticed: false,
    cache_noticed: false,
    cache: Daemon::Runs,
    set: Set::Complete,
    trial: false,
    images: true,
    given: false,
    knows: true,
    criu: Criu::Absent,
    script: Script::None,
    tasks: Tasks::None,
    mark: false,
    second_runs: false,
    faults: 0,
};

/// The design, and what could have been chosen instead.
#[derive(Clone, Copy)]
pub struct Rules {
    /// `--keep-through-restart`.
    pub keeper: bool,
    /// The journal has which restore has a set.
    pub journals_given: bool,
    /// The script leaves word before it goes on: for a restarted cache, and for itself. Else an operator has to look.
    pub leaves_word: bool,
    /// The script holds at `post-restore`; else at `pre-resume`.
    pub at_post_restore: bool,
    /// The source waits for HOLDING; else TRIAL is enough.
    pub waits_for_holding: bool,
    /// HOLDING is sent when the script has been told to hold; else before.
    pub told_before_holding: bool,
    /// A decision is confirmed when the script was told; else at once.
    pub confirms_late: bool,
    /// A hold is over when its CRIU and its script have ended; else when the script's connection has.
    pub sees_the_end: bool,
    /// In a trial the set goes to a restore alone whose script has promised to hold.
    pub holds_promised: bool,
    pub faults: u8,
}

pub const RULES: Rules = Rules {
    keeper: false,
    journals_given: true,
    leaves_word: true,
    at_post_restore: true,
    waits_for_holding: true,
    told_before_holding: true,
    confirms_late: true,
    sees_the_end: true,
    holds_promised: true,
    faults: 3,
};

pub const KEEPER: Rules = Rules {
    keeper: true,
    ..RULES
};

impl State {
    /// What is on its way comes until its reader has noticed.
    pub fn cut(&mut self) {
        self.link = false;
    }

    pub fn cache_notices(&mut self) {
        (self.cache_noticed, self.up) = (true, Way::EMPTY);
    }

    pub fn says(&mut self, message: Message) {
        if self.link {
            self.down.push(message);
        }
    }

    /// image-proxy has decided, and says so on the link if that is there.
    pub fn decides(&mut self, proxy: Proxy) {
        (self.proxy, self.heard) = (proxy, false);
        if self.link {
            self.up.push(match proxy {
                Proxy::Commits => Message::Commit,
                Proxy::Doubts => Message::Doubt,
                _ => Message::Abort,
            });
        }
    }

    pub fn source_ends(&mut self, process: Process, proven: bool) {
        (self.process, self.proven) = (process, proven);
        self.source_criu = SourceCriu::Ended;
    }

    pub fn script_goes(&mut self) {
        (self.script, self.mark) = (Script::Goes, true);
    }

    pub fn criu_ends(&mut self, criu: Criu) {
        (self.criu, self.tasks) = (criu, Tasks::None);
    }

    pub fn proxy_lives(&self) -> bool {
        self.proxy != Proxy::Dead && !self.proxy_stopped
    }

    pub fn criu_is_over(&self) -> bool {
        matches!(self.criu, Criu::Failed | Criu::Refused | Criu::Killed)
    }

    /// The script of the first restore talks to this image-cache.
    pub fn attached(&self) -> bool {
        self.cache != Daemon::Dead && self.knows && self.given
    }

    /// The first restore stands, and its script has no image-cache.
    pub fn holds_alone(&self) -> bool {
        self.criu == Criu::Script && self.script == Script::Holds && !self.attached()
    }

    /// What image-cache makes of a message.
    pub fn cache_hears(&mut self, message: Message) {
        self.set = match (message, self.set) {
            (Message::Commit, Set::Prepared | Set::Holding | Set::InDoubt) => Set::Committed,
            (Message::Commit, Set::Complete | Set::Trial | Set::Aborted) => {
                panic!("COMMIT of a set that is {:?}", self.set)
            }
            (Message::Doubt, Set::Prepared | Set::Holding) => Set::InDoubt,
            (Message::Abort, Set::Committed) => panic!("SET_ABORT of a committed set"),
            (
                Message::Abort,
                Set::Complete | Set::Trial | Set::Prepared | Set::Holding | Set::InDoubt,
            ) => Set::Aborted,
            (_, set) => set,
        };
    }

    /// image-cache has done what was decided, as far as image-proxy waits for it.
    pub fn done(&self, rules: Rules) -> bool {
        let untold = self.given && self.script == Script::Holds && rules.confirms_late;
        match self.proxy {
            Proxy::Commits => matches!(self.set, Set::Committed | Set::Released) && !untold,
            Proxy::Aborts => self.set == Set::Aborted && !untold,
            _ => false,
        }
    }
}

/// A step, by name.
pub type Step = (&'static str, State);

pub fn push(
    state: &State,
    name: &'static str,
    change: &dyn Fn(&mut State),
    all: &mut Vec<(&'static str, State)>,
) {
    let mut next = *state;
    change(&mut next);
    if next != *state {
        all.push((name, next));
    }
}
