//! The fault matrix: at a random moment of a real migration something is killed, cut, corrupted, filled or restarted;
//! then there has to be what the documentation says: one living, unharmed process, or a set in doubt from which the
//! operator's command makes one, or one of the two losses that it names. A restore may stand on the target before the
//! source kills, asleep in its action script: that is no harm as long as nothing has decided about its set.
//!
//! Everything about a point follows from the seed and the point's number ([`Plan::draw`]). When it strikes is drawn;
//! in which phase it struck is observed ([`Phase`]).

mod documented;
mod judge;
mod operator;
mod plan;
mod point;
mod saboteur;
mod stage;
mod table;

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result};

pub use plan::Plan;
pub use point::{run, Notes, Record};
pub use table::Table;

/// What is done to a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL, and nobody starts it again before the operator does.
    KillProxy,
    KillCache,
    KillDump,
    KillRestore,
    /// SIGTERM or SIGKILL, and started again with the same options.
    RestartProxy,
    RestartCache,
    /// Connections are reset or closed, and the link is away for a while, or for longer than `--link-timeout`.
    Cut,
    /// Nothing moves for a while; or nothing moves, and then the link goes.
    Stall,
    /// One bit of the next bytes on the link, with `--tls`.
    CorruptTls,
    /// The same with `--checksum`.
    CorruptSummed,
    /// `--memory-limit` below the set, or below the set and another one that is there.
    Memory,
    /// The same by the limit of image-cache's memory control group, which kills where it is not looked at.
    MemoryGroup,
    /// SIGSTOP, and SIGCONT a while later: a debugger, a frozen control group, a host that swaps.
    StopProxy,
    StopCache,
    StopDump,
    StopRestore,
    /// The action script of the dump, and that of a restore that holds.
    StopGate,
    StopHold,
    /// SIGKILL for the action script of a restore that holds.
    KillHold,
    /// What says that the process is dead vanishes on the link, and the link with it: for a while, or for good.
    LoseCommit,
    /// The same of what says that it lives: the dump's script dies before it has read the answer.
    LoseAbort,
    /// Another process on the target has its pid.
    TakenPid,
    /// A file that the process has open is not there on the target.
    MissingFile,
    /// `criu dump --leave-stopped`.
    LeaveStopped,
    /// Another action script fails behind ours: CRIU lets the process go on.
    ScriptFails,
    /// The same, and then the process is ended by something else than CRIU.
    EndsItself,
    /// The daemons' logs cannot be written any more.
    LogFull,
}

impl Fault {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 27] = [
        Self::KillProxy,
        Self::KillCache,
        Self::KillDump,
        Self::KillRestore,
        Self::RestartProxy,
        Self::RestartCache,
        Self::Cut,
        Self::Stall,
        Self::CorruptTls,
        Self::CorruptSummed,
        Self::Memory,
        Self::MemoryGroup,
        Self::StopProxy,
        Self::StopCache,
        Self::StopDump,
        Self::StopRestore,
        Self::StopGate,
        Self::StopHold,
        Self::KillHold,
        Self::LoseCommit,
        Self::LoseAbort,
        Self::TakenPid,
        Self::MissingFile,
        Self::LeaveStopped,
        Self::ScriptFails,
        Self::EndsItself,
        Self::LogFull,
    ];

    /// Takes the memory of image-cache, and what is in it.
    pub fn ends_cache(self) -> bool {
        matches!(self, Self::KillCache | Self::RestartCache)
    }

    /// A restore on the target cannot succeed.
    pub fn fails_restore(self) -> bool {
        matches!(self, Self::TakenPid | Self::MissingFile)
    }

    /// The link is away.
    pub fn is_of_link(self) -> bool {
        matches!(
            self,
            Self::Cut | Self::Stall | Self::LoseCommit | Self::LoseAbort
        )
    }

    /// It strikes the CRIU on the target.
    pub fn is_of_restore(self) -> bool {
        matches!(self, Self::KillRestore | Self::StopRestore)
    }

    /// It is there from the beginning, or strikes by itself: no moment is chosen.
    pub fn is_built_in(self) -> bool {
        let alone = matches!(self, Self::Memory | Self::MemoryGroup | Self::LeaveStopped);
        alone || self.vetoes() || self.fails_restore()
    }

    /// Another action script has CRIU keep the process.
    pub fn vetoes(self) -> bool {
        matches!(self, Self::ScriptFails | Self::EndsItself)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::KillProxy => "kill image-proxy",
            Self::KillCache => "kill image-cache",
            Self::KillDump => "kill criu dump",
            Self::KillRestore => "kill criu restore",
            Self::RestartProxy => "restart image-proxy",
            Self::RestartCache => "restart image-cache",
            Self::Cut => "cut the link",
            Self::Stall => "stall the link",
            Self::CorruptTls => "flip a bit, --tls",
            Self::CorruptSummed => "flip a bit, --checksum",
            Self::Memory => "fill the memory limit",
            Self::MemoryGroup => "fill the memory group",
            Self::StopProxy => "stop image-proxy",
            Self::StopCache => "stop image-cache",
            Self::StopDump => "stop criu dump",
            Self::StopRestore => "stop criu restore",
            Self::StopGate => "stop dump's script",
            Self::StopHold => "stop restore's script",
            Self::KillHold => "kill restore's script",
            Self::LoseCommit => "lose COMMIT",
            Self::LoseAbort => "lose ABORT",
            Self::TakenPid => "its pid is taken",
            Self::MissingFile => "a file is missing",
            Self::LeaveStopped => "--leave-stopped",
            Self::ScriptFails => "another script fails",
            Self::EndsItself => "it ends by itself",
            Self::LogFull => "fill the log's disk",
        })
    }
}

/// How far the migration was, by the logs of both daemons, the bytes on the link and the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// No session.
    Before,
    /// A pre-dump, or between two of them.
    Rounds,
    /// The script has announced the dump, no image has begun.
    Announced,
    /// Up to a tenth of the pages.
    First,
    Middle,
    /// The last tenth of the pages, up to the commit.
    End,
    /// image-cache holds the set, image-proxy does not know it yet.
    Prepared,
    /// A restore on the target reads the set, or is to. The source was told nothing.
    Trial,
    /// It stands there, asleep in its script; CRIU on the source was not told yet.
    Holding,
    /// CRIU may kill, and has not.
    Committed,
    /// The process is dead on the source, image-cache does not know it yet.
    Dead,
    /// To be restored, or to go on.
    Ready,
    /// Before the commit that is a trial. Behind it: its script was told to go on.
    Restoring,
    Restored,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 14] = [
        Self::Before,
        Self::Rounds,
        Self::Announced,
        Self::First,
        Self::Middle,
        Self::End,
        Self::Prepared,
        Self::Trial,
        Self::Holding,
        Self::Committed,
        Self::Dead,
        Self::Ready,
        Self::Restoring,
        Self::Restored,
    ];
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Before => "before",
            Self::Rounds => "rounds",
            Self::Announced => "announced",
            Self::First => "first",
            Self::Middle => "middle",
            Self::End => "end",
            Self::Prepared => "prepared",
            Self::Trial => "trial",
            Self::Holding => "holding",
            Self::Committed => "committed",
            Self::Dead => "dead",
            Self::Ready => "ready",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
        })
    }
}

/// What comes first: a restore that stands on the target, or the kill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Order {
    Trial,
    Held,
}

impl Order {
    /// Both, in the order of the tables.
    pub const ALL: [Self; 2] = [Self::Trial, Self::Held];
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trial => "trial",
            Self::Held => "held",
        })
    }
}

/// Where the process is in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It never left.
    Lived,
    Moved,
    /// The set was in doubt; the operator's look said that the process lives, and the target forgot its copy.
    DoubtLived,
    /// The set was in doubt; the process was dead (or damaged by CRIU's death), and the operator released it.
    DoubtMoved,
    /// image-cache was ended with the only copy.
    Lost,
    /// By the death of `criu dump`.
    Damaged,
    /// It went on where it was, and was ended there by something else than CRIU: its set is served to no restore.
    Ended,
}

impl Outcome {
    /// All of them, in the order of the table's legend.
    pub const ALL: [Self; 7] = [
        Self::Lived,
        Self::Moved,
        Self::DoubtLived,
        Self::DoubtMoved,
        Self::Lost,
        Self::Damaged,
        Self::Ended,
    ];

    fn letter(self) -> char {
        match self {
            Self::Lived => 'S',
            Self::Moved => 'T',
            Self::DoubtLived => 's',
            Self::DoubtMoved => 't',
            Self::Lost => 'L',
            Self::Damaged => 'D',
            Self::Ended => 'E',
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Lived => "lived on the source",
            Self::Moved => "moved",
            Self::DoubtLived => "in doubt, lives on the source",
            Self::DoubtMoved => "in doubt, released, moved",
            Self::Lost => "lost with image-cache",
            Self::Damaged => "damaged by CRIU's death",
            Self::Ended => "ended by itself, not restored",
        })
    }
}

/// The one that is called so.
fn named<T: fmt::Display>(all: impl IntoIterator<Item = T>, name: &str) -> Result<T> {
    let mut all = all.into_iter();
    all.find(|one| one.to_string() == name)
        .with_context(|| format!("{name:?} is unknown"))
}

impl FromStr for Fault {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        named(Self::ALL, name)
    }
}

impl FromStr for Phase {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        named(Self::ALL, name)
    }
}
