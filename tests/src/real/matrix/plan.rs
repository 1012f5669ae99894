//! What is drawn of a point: everything, by the seed and its number.

use std::time::Duration;

use super::{Fault, Order, Phase};
use crate::fake::content::Random;
use crate::link::Direction;

/// After what the fault strikes, [`Plan::delay`] later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The n-th run of CRIU on the source has been started; the last one is the dump.
    Run(u32),
    /// So many thousandths of what will cross the link.
    Carried(u64),
    /// "prepared: every image is here" in image-cache's log.
    Prepared,
    /// "in trial: every image is here" there.
    Trial,
    /// "restored and held" there.
    Holding,
    /// "the restore goes on" there.
    Told,
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

/// How the link is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Plain,
    Tls,
    /// `--checksum`.
    Summed,
}

/// What the source waits for before it kills, by `--commit-on`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitOn {
    Auto,
    Restored,
    Held,
}

/// When the restore is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comes {
    /// It waits for the dump.
    Early,
    /// When the dump waits for it.
    InTrial,
    /// When the dump has ended.
    After,
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
    pub way: Way,
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
    pub commit_on: CommitOn,
    pub comes: Comes,
    /// `image-cache --keep-through-restart`.
    pub keeper: bool,
    /// What is in doubt for want of the link is left to the link that comes back.
    pub patient: bool,
    /// The operator tries `image-proxy abort` first.
    pub abort: bool,
    /// A process that lived is migrated after all.
    pub retry: bool,
    /// The memory limit, in thousandths of what there is to hold.
    pub limit: u64,
    /// Another set is in the cache.
    pub other: bool,
    /// How long what is stopped stands still.
    pub stopped: Duration,
}

/// Whether image-cache has `--keep-through-restart`, so that it is drawn.
pub const KEEPER: bool = true;

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
        let (commit_on, comes) = draw_order(fault, &mut random);
        let mark = draw_mark(fault, (commit_on, comes), rounds, &mut random);
        let chance = |random: &mut Random, one_in: u64| random.next() % one_in == 0;
        let millis =
            |random: &mut Random, most: u64| Duration::from_micros(random.between(0, most * 1000));
        let most = if chance(&mut random, 2) { 4 } else { 40 };
        let mut plan = Self {
            number,
            rounds,
            mib: if rounds { 8 } else { 32 },
            fault,
            way: match fault {
                Fault::CorruptTls => Way::Tls,
                Fault::CorruptSummed => Way::Summed,
                _ => [Way::Plain, Way::Plain, Way::Tls, Way::Summed][index(&mut random, 4)],
            },
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
            commit_on,
            comes,
            keeper: KEEPER && chance(&mut random, 2),
            patient: chance(&mut random, 2),
            abort: chance(&mut random, 2),
            retry: chance(&mut random, 2),
            limit: random.between(100, 950),
            other: chance(&mut random, 2),
            stopped: Duration::ZERO,
        };
        if plan.other && fault == Fault::Memory {
            // It would get the other one, and make room.
            (plan.commit_on, plan.comes) = (CommitOn::Auto, Comes::After);
        }
        if chance(&mut random, 2) {
            plan.pauses = (millis(&mut random, 60), millis(&mut random, 60));
        }
        let most = if chance(&mut random, 4) { 6000 } else { 800 };
        plan.stopped = millis(&mut random, most);
        let (short, long) = (millis(&mut random, 15), Duration::from_millis(60));
        match mark {
            // What is brief on a quick link would be struck by nobody.
            Mark::Prepared | Mark::Holding => (plan.latency.1, plan.delay) = (long, short),
            // It is to be stopped before it hears.
            Mark::Trial if fault == Fault::LoseAbort => plan.delay = Duration::ZERO,
            Mark::Told => plan.delay = short / 4,
            Mark::Committed => (plan.pauses.1, plan.delay) = (long, short),
            Mark::Dead if chance(&mut random, 2) => {
                (plan.latency.0, plan.delay) = (long / 2, short)
            }
            Mark::Run(_) if rounds => plan.delay = millis(&mut random, 1500),
            _ => {}
        }
        plan
    }

    /// A restore is to stand on the target before the source kills.
    pub fn holds(&self) -> bool {
        holds((self.commit_on, self.comes))
    }

    /// image-cache ends, and comes back with its set: whether a restore of it runs it may have to ask.
    pub fn keeps_set(&self) -> bool {
        self.keeper && self.fault.ends_cache()
    }

    /// As the tables have it.
    pub fn order(&self) -> Order {
        match self.holds() {
            true => Order::Trial,
            false => Order::Held,
        }
    }

    /// What CRIU and the daemons wait for a link.
    pub fn link_timeout(&self) -> &'static str {
        match self.link_returns() || self.fault == Fault::CorruptTls {
            true => "20",
            false if self.at_once => "0",
            false => "1",
        }
    }

    /// Whether the fault is meant to strike in this phase. It may come in another one: a mark is seen later than it is
    /// reached.
    pub fn aims_at(&self, phase: Phase) -> bool {
        let last = if self.rounds { ROUNDS } else { 1 };
        match self.mark {
            Mark::Run(n) if n < last => phase == Phase::Rounds,
            Mark::Run(_) => matches!(phase, Phase::Before | Phase::Announced),
            Mark::Carried(share) => match share {
                0..100 => phase == Phase::First,
                100..900 => phase == Phase::Middle,
                _ => phase == Phase::End,
            },
            // The limit itself is what strikes.
            _ if matches!(self.fault, Fault::Memory | Fault::MemoryGroup) => phase == Phase::Middle,
            _ if self.fault.fails_restore() => match self.holds() {
                true => phase == Phase::Trial,
                false => phase == Phase::Restoring,
            },
            _ if self.fault.is_built_in() => phase == Phase::Committed,
            Mark::Prepared => phase == Phase::Prepared,
            Mark::Trial => phase == Phase::Trial,
            Mark::Holding => phase == Phase::Holding,
            Mark::Told => phase == Phase::Restoring,
            Mark::Committed => phase == Phase::Committed,
            Mark::Dead => phase == Phase::Dead,
            Mark::Restore => phase == Phase::Ready,
            Mark::Served => phase == Phase::Restoring,
            Mark::Over => phase == Phase::Restored,
        }
    }

    /// The link is away, and comes back in time.
    pub fn link_returns(&self) -> bool {
        self.fault.is_of_link() && self.returns
    }

    /// Only an operator decides, in the end: the link is away, or a daemon is gone that knew, or CRIU has not said.
    pub fn may_doubt(&self) -> bool {
        match self.fault {
            Fault::KillProxy
            | Fault::RestartProxy
            | Fault::KillDump
            | Fault::KillRestore
            | Fault::LeaveStopped => true,
            fault => fault.vetoes() || (fault.is_of_link() && !self.returns),
        }
    }
}

fn holds((commit_on, comes): (CommitOn, Comes)) -> bool {
    match commit_on {
        CommitOn::Auto => comes == Comes::Early,
        CommitOn::Restored => true,
        CommitOn::Held => false,
    }
}

/// How the source commits, and when a restore comes: mostly as an operator has it who starts the restore first.
fn draw_order(fault: Fault, random: &mut Random) -> (CommitOn, Comes) {
    use {Comes as C, CommitOn as O};
    let trial = [
        (O::Auto, C::Early),
        (O::Auto, C::Early),
        (O::Restored, C::Early),
        (O::Restored, C::InTrial),
    ];
    let held = [
        (O::Auto, C::After),
        (O::Held, C::After),
        (O::Held, C::Early),
    ];
    let only_trial = matches!(fault, Fault::StopHold | Fault::KillHold);
    if only_trial || random.next() % 3 != 0 {
        let order = trial[index(random, trial.len())];
        return match fault {
            // Its log would have told when the dump waits.
            Fault::LogFull => (O::Auto, C::Early),
            _ => order,
        };
    }
    match fault {
        // A restore that waits would get the set of the retry, before that is looked at.
        fault if fault.vetoes() || fault == Fault::LeaveStopped => held[index(random, 2)],
        _ => held[index(random, held.len())],
    }
}

fn index(random: &mut Random, below: usize) -> usize {
    usize::try_from(random.next() % below as u64).expect("small")
}

fn draw_mark(fault: Fault, order: (CommitOn, Comes), rounds: bool, random: &mut Random) -> Mark {
    let trial = holds(order);
    let dump = if rounds { ROUNDS } else { 1 };
    let carried = Mark::Carried(random.between(0, 1000));
    let round = Mark::Run(
        u32::try_from(random.between(1, 3))
            .expect("small")
            .min(dump),
    );
    let marks: &[Mark] = match fault {
        Fault::KillDump | Fault::StopDump => &[
            round,
            Mark::Run(dump),
            carried,
            carried,
            Mark::Prepared,
            Mark::Committed,
            Mark::Dead,
        ],
        // With `restored` the dump would wait for another one.
        Fault::KillRestore if order == (CommitOn::Restored, Comes::Early) => BY_HOLD,
        Fault::KillRestore | Fault::StopRestore if trial => &[
            Mark::Restore,
            Mark::Trial,
            Mark::Trial,
            Mark::Holding,
            Mark::Committed,
            Mark::Dead,
            Mark::Told,
            Mark::Told,
        ],
        Fault::KillRestore | Fault::StopRestore => &[Mark::Restore, Mark::Served, Mark::Served],
        Fault::KillHold | Fault::StopHold => &[
            Mark::Holding,
            Mark::Holding,
            Mark::Committed,
            Mark::Dead,
            Mark::Told,
        ],
        Fault::StopGate => &[Mark::Prepared, Mark::Prepared, Mark::Committed],
        Fault::LoseCommit => &[Mark::Committed],
        Fault::LoseAbort => &[Mark::Prepared],
        fault if fault.is_built_in() => &[Mark::Over],
        Fault::CorruptTls | Fault::CorruptSummed => &[
            round,
            carried,
            carried,
            carried,
            Mark::Prepared,
            Mark::Committed,
        ],
        _ => &[
            round,
            carried,
            carried,
            carried,
            Mark::Prepared,
            Mark::Prepared,
            Mark::Committed,
            Mark::Committed,
            Mark::Dead,
            Mark::Dead,
            Mark::Restore,
            Mark::Served,
            Mark::Over,
        ],
    };
    match marks[index(random, marks.len())] {
        Mark::Prepared if trial && fault == Fault::LoseAbort => Mark::Trial,
        Mark::Prepared if trial => [Mark::Trial, Mark::Holding][index(random, 2)],
        Mark::Restore | Mark::Served if trial && !fault.is_of_restore() => {
            [Mark::Trial, Mark::Told][index(random, 2)]
        }
        mark => mark,
    }
}

/// Of a restore that is tried.
const BY_HOLD: &[Mark] = &[
    Mark::Trial,
    Mark::Trial,
    Mark::Holding,
    Mark::Committed,
    Mark::Dead,
    Mark::Told,
    Mark::Told,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_is_drawn_the_same_again_and_each_fault_in_turn() {
        let drawn = |seed| -> Vec<_> {
            (0..Fault::ALL.len() as u64)
                .map(|n| Plan::draw(seed, n, true))
                .collect()
        };
        let show = |plans: &[Plan]| format!("{plans:?}");
        assert_eq!(show(&drawn(1)), show(&drawn(1)));
        assert_ne!(show(&drawn(1)), show(&drawn(2)));
        let mut faults: Vec<_> = drawn(3).iter().map(|plan| plan.fault).collect();
        faults.sort_unstable();
        assert_eq!(faults, Fault::ALL);
    }

    #[test]
    fn moments_are_spread_over_the_migration() {
        let marks: Vec<_> = (0..500).map(|n| Plan::draw(5, n, false).mark).collect();
        for mark in [
            Mark::Run(1),
            Mark::Prepared,
            Mark::Trial,
            Mark::Holding,
            Mark::Told,
            Mark::Committed,
            Mark::Dead,
            Mark::Restore,
            Mark::Served,
            Mark::Over,
        ] {
            assert!(marks.contains(&mark), "{mark:?}");
        }
        for tenth in 0..10 {
            let hit = |m: &Mark| matches!(m, Mark::Carried(share) if share / 100 == tenth);
            assert!(marks.iter().any(hit), "tenth {tenth}");
        }
    }

    /// `--fault` and `--phase` find something to do, where there is something.
    #[test]
    fn each_fault_is_aimed_at_its_phases() {
        let plans: Vec<_> = (0..3000).map(|n| Plan::draw(1, n, true)).collect();
        let aimed = |fault, phase| {
            let hits = |plan: &&Plan| plan.fault == fault && plan.aims_at(phase);
            plans.iter().any(|plan| hits(&plan))
        };
        for phase in Phase::ALL {
            assert!(aimed(Fault::Cut, phase), "{phase}");
        }
        assert!(aimed(Fault::KillRestore, Phase::Restoring));
        assert!(!aimed(Fault::KillRestore, Phase::Middle));
    }
}
