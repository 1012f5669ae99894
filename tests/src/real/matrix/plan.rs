//! What is drawn of a point: everything, by the seed and its number.

use std::time::Duration;

use super::{Fault, Phase};
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
    /// How long what is stopped stands still.
    pub stopped: Duration,
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
            early: chance(&mut random, 4),
            abort: chance(&mut random, 2),
            retry: chance(&mut random, 2),
            limit: random.between(100, 950),
            other: chance(&mut random, 2),
            stopped: Duration::ZERO,
        };
        if plan.other && fault == Fault::Memory {
            // It would get the other one, and make room.
            plan.early = false;
        }
        if chance(&mut random, 2) {
            plan.pauses = (millis(&mut random, 60), millis(&mut random, 60));
        }
        let most = if chance(&mut random, 4) { 6000 } else { 800 };
        plan.stopped = millis(&mut random, most);
        if fault.vetoes() {
            // A restore that waits would get the set of the retry, before that is looked at.
            plan.early = false;
        }
        let (short, long) = (millis(&mut random, 15), Duration::from_millis(60));
        match mark {
            // What is brief on a quick link would be struck by nobody.
            Mark::Prepared => (plan.latency.1, plan.delay) = (long, short),
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
            Mark::Prepared => phase == Phase::Prepared,
            Mark::Committed => phase == Phase::Committed,
            Mark::Dead => phase == Phase::Dead,
            Mark::Restore => phase == Phase::Ready,
            Mark::Served => phase == Phase::Restoring,
            // The limit itself is what strikes.
            Mark::Over if matches!(self.fault, Fault::Memory | Fault::MemoryGroup) => {
                phase == Phase::Middle
            }
            Mark::Over if self.fault.vetoes() => phase == Phase::Committed,
            Mark::Over => phase == Phase::Restored,
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
        Fault::KillDump | Fault::StopDump => &[
            round,
            Mark::Run(dump),
            carried,
            carried,
            Mark::Prepared,
            Mark::Committed,
            Mark::Dead,
        ],
        Fault::KillRestore | Fault::StopRestore => &[Mark::Restore, Mark::Served, Mark::Served],
        Fault::Memory | Fault::MemoryGroup | Fault::ScriptFails | Fault::EndsItself => {
            &[Mark::Over]
        }
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
    marks[index(random, marks.len())]
}

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
