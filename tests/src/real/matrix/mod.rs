//! The fault matrix: at a random moment of a real migration something is killed, cut, corrupted, filled or restarted;
//! then there has to be what the documentation says: one living, unharmed process, or a set in doubt from which the
//! operator's command makes one, or one of the two losses that it names.
//!
//! Everything about a point follows from the seed and the point's number ([`Plan::draw`]). When it strikes is drawn;
//! in which phase it struck is observed ([`Phase`]).

mod point;
mod table;

use std::fmt;
use std::time::Duration;

use crate::fake::content::Random;
use crate::link::Direction;

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
}

impl Fault {
    const ALL: [Self; 11] = [
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
    ];

    /// Takes the memory of image-cache, and what is in it.
    pub fn ends_cache(self) -> bool {
        matches!(self, Self::KillCache | Self::RestartCache)
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
    Held,
    /// CRIU may kill, and has not.
    Committed,
    /// The process is dead on the source, image-cache does not know it yet.
    Dead,
    /// To be restored.
    Ready,
    Restoring,
    Restored,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 12] = [
        Self::Before,
        Self::Rounds,
        Self::Announced,
        Self::First,
        Self::Middle,
        Self::End,
        Self::Held,
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
            Self::Held => "held",
            Self::Committed => "committed",
            Self::Dead => "dead",
            Self::Ready => "ready",
            Self::Restoring => "restoring",
            Self::Restored => "restored",
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
}

impl Outcome {
    /// All of them, in the order of the table's legend.
    pub const ALL: [Self; 6] = [
        Self::Lived,
        Self::Moved,
        Self::DoubtLived,
        Self::DoubtMoved,
        Self::Lost,
        Self::Damaged,
    ];

    fn letter(self) -> char {
        match self {
            Self::Lived => 'S',
            Self::Moved => 'T',
            Self::DoubtLived => 's',
            Self::DoubtMoved => 't',
            Self::Lost => 'L',
            Self::Damaged => 'D',
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
        })
    }
}

/// After what the fault strikes, [`Plan::delay`] later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The n-th run of CRIU on the source has been started; the last one is the dump.
    Run(u32),
    /// So many thousandths of what will cross the link.
    Carried(u64),
    /// "held for commit" in image-cache's log.
    Held,
    /// "committed" in image-proxy's log.
    Committed,
    /// The process is gone from the source.
    Dead,
    /// CRIU's restore has been started.
    Restore,
    /// "restore --stream begins" in image-cache's log.
    Served,
    /// All is over.
    Over,
}

/// One point.
#[derive(Clone, Debug)]
pub struct Plan {
    pub number: u64,
    /// Pre-dumps through the page server before the dump; else `--stream`.
    pub rounds: bool,
    /// Of the process.
    pub mib: usize,
    pub fault: Fault,
    pub mark: Mark,
    pub delay: Duration,
    /// The link comes back, after [`Plan::away`].
    pub returns: bool,
    pub away: Duration,
    /// A dump fails with its link.
    pub at_once: bool,
    /// The daemon is asked to stop.
    pub term: bool,
    /// The link's connections are reset, and not closed.
    pub reset: bool,
    /// Whose bit flips.
    pub direction: Direction,
    /// How long the link's two ways are.
    pub latency: (Duration, Duration),
    /// How long the action script waits before image-proxy, and CRIU after it.
    pub pauses: (Duration, Duration),
    /// Between the end of the dump and the start of the restore.
    pub rest: Duration,
    /// The restore waits for the dump.
    pub early: bool,
    /// The operator tries `image-proxy abort` first.
    pub abort: bool,
    /// A process that lived is migrated after all.
    pub retry: bool,
    /// The memory limit, in thousandths of what there is to hold.
    pub limit: u64,
    /// Another set is in the cache.
    pub other: bool,
}

/// Runs of CRIU on the source, where there are rounds.
pub const ROUNDS: u32 = 3;

impl Plan {
    /// The point with this number.
    pub fn draw(seed: u64, number: u64, rounds: bool) -> Self {
        let faults = Fault::ALL.len() as u64;
        // Of so many points in a row each has another fault, in an order that is drawn, too.
        let mut order = Fault::ALL.to_vec();
        let mut random = Random::new(seed.wrapping_add((number / faults).wrapping_mul(0x9E37)));
        for last in (1..order.len()).rev() {
            order.swap(last, index(&mut random, last + 1));
        }
        let fault = order[usize::try_from(number % faults).expect("small")];
        let mut random = Random::new(seed ^ number.wrapping_mul(0xD134_2543_DE82_EF95));
        let mark = draw_mark(fault, rounds, &mut random);
        let chance = |random: &mut Random, one_in: u64| random.next() % one_in == 0;
        let millis =
            |random: &mut Random, most: u64| Duration::from_micros(random.between(0, most * 1000));
        let most = if chance(&mut random, 2) { 4 } else { 40 };
        let mut plan = Self {
            number,
            rounds,
            mib: if rounds { 8 } else { 32 },
            fault,
            mark,
            delay: millis(&mut random, most),
            returns: chance(&mut random, 2),
            // What does not come back is waited for, by image-cache for `--link-timeout` and 8 s.
            at_once: !chance(&mut random, 5),
            away: millis(&mut random, 1500),
            term: chance(&mut random, 2),
            reset: chance(&mut random, 2),
            direction: [Direction::Up, Direction::Down][index(&mut random, 2)],
            latency: Default::default(),
            pauses: Default::default(),
            rest: millis(&mut random, 60),
            early: chance(&mut random, 4),
            abort: chance(&mut random, 2),
            retry: chance(&mut random, 2),
            limit: random.between(100, 950),
            other: chance(&mut random, 2),
        };
        if chance(&mut random, 2) {
            plan.pauses = (millis(&mut random, 60), millis(&mut random, 60));
        }
        let (short, long) = (millis(&mut random, 15), Duration::from_millis(60));
        match mark {
            // What is brief on a quick link would be struck by nobody.
            Mark::Held => (plan.latency.1, plan.delay) = (long, short),
            Mark::Committed => (plan.pauses.1, plan.delay) = (long, short),
            Mark::Dead if chance(&mut random, 2) => {
                (plan.latency.0, plan.delay) = (long / 2, short)
            }
            Mark::Run(_) if rounds => plan.delay = millis(&mut random, 1500),
            _ => {}
        }
        plan
    }

    /// What CRIU and the daemons wait for a link.
    pub fn link_timeout(&self) -> &'static str {
        match self.link_returns() || self.fault == Fault::CorruptTls {
            true => "20",
            false if self.at_once => "0",
            false => "1",
        }
    }

    /// The link is away, and comes back in time.
    pub fn link_returns(&self) -> bool {
        matches!(self.fault, Fault::Cut | Fault::Stall) && self.returns
    }
}

fn index(random: &mut Random, below: usize) -> usize {
    usize::try_from(random.next() % below as u64).expect("small")
}

fn draw_mark(fault: Fault, rounds: bool, random: &mut Random) -> Mark {
    let dump = if rounds { ROUNDS } else { 1 };
    let carried = Mark::Carried(random.between(0, 1000));
    let round = Mark::Run(
        u32::try_from(random.between(1, 3))
            .expect("small")
            .min(dump),
    );
    let marks: &[Mark] = match fault {
        Fault::KillDump => &[
            round,
            Mark::Run(dump),
            carried,
            carried,
            Mark::Held,
            Mark::Committed,
            Mark::Dead,
        ],
        Fault::KillRestore => &[Mark::Restore, Mark::Served, Mark::Served],
        Fault::Memory => &[Mark::Over],
        Fault::CorruptTls | Fault::CorruptSummed => &[
            round,
            carried,
            carried,
            carried,
            Mark::Held,
            Mark::Committed,
        ],
        _ => &[
            round,
            carried,
            carried,
            carried,
            Mark::Held,
            Mark::Held,
            Mark::Committed,
            Mark::Committed,
            Mark::Dead,
            Mark::Dead,
            Mark::Restore,
            Mark::Served,
            Mark::Over,
        ],
    };
    marks[index(random, marks.len())]
}
