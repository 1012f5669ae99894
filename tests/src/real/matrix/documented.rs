//! Where the process may be in the end, by fault and phase: `docs/fault-matrix.md` as code.

use super::Outcome::{self, Damaged, DoubtLived, DoubtMoved, Ended, Lived, Lost, Moved};
use super::{Fault, Phase, Plan};

/// The outcomes that are documented for a fault that struck in `phase`, or a little later: a phase is looked at before the
/// fault strikes. `linked`: the session had a connection by then, so there was something to lose.
pub fn outcomes(plan: &Plan, phase: Phase, linked: bool) -> &'static [Outcome] {
    // COMMIT has been heard.
    let heard = matches!(phase, Phase::Ready | Phase::Restoring | Phase::Restored);
    match plan.fault {
        // The first connection is tried once.
        Fault::CorruptTls => survived(linked),
        Fault::Cut | Fault::Stall if plan.returns => survived(linked),
        Fault::LoseCommit if plan.returns => &[Moved],
        Fault::LoseCommit => &[Moved, DoubtMoved],
        Fault::LoseAbort if plan.returns => &[Lived],
        Fault::LoseAbort => &[Lived, DoubtLived],
        // Of tasks that are dead it is not known whether they ran.
        Fault::KillRestore if plan.holds() && !heard && phase != Phase::Dead => {
            &[Lived, Moved, DoubtMoved]
        }
        Fault::KillRestore => &[Moved, DoubtMoved],
        // Nothing ran.
        // Killed behind its word that the restore goes on. The machine's kernel does not tell how CRIU ends then.
        Fault::KillHold if plan.rounds && phase < Phase::Dead => &[Lived, Moved, DoubtMoved],
        Fault::KillHold if plan.rounds => &[Moved, DoubtMoved],
        Fault::KillHold if phase < Phase::Dead => &[Lived, Moved],
        Fault::KillHold => &[Moved],
        Fault::TakenPid | Fault::MissingFile if plan.holds() => &[Lived],
        Fault::TakenPid | Fault::MissingFile => &[Moved],
        Fault::LeaveStopped => &[DoubtLived],
        Fault::Memory => &[Lived],
        // What it refuses depends on what the kernel counts; what was held before is there.
        Fault::MemoryGroup => &[Lived, Moved],
        // What stands still goes on as if nothing had been.
        Fault::StopProxy
        | Fault::StopCache
        | Fault::StopDump
        | Fault::StopRestore
        | Fault::StopGate
        | Fault::StopHold
        | Fault::LogFull => &[Moved],
        Fault::ScriptFails => &[Lived, DoubtLived],
        Fault::EndsItself => &[Ended],
        // A restore that stands outlives it.
        Fault::KillCache | Fault::RestartCache if plan.holds() => match phase < Phase::Dead {
            true => &[Lived, Moved],
            false => &[Moved],
        },
        // Of a set that a restore was given before that nothing tells whether it runs.
        Fault::KillCache | Fault::RestartCache if plan.keeper => match phase < Phase::Dead {
            true => &[Lived, Moved, DoubtMoved],
            false => &[Moved, DoubtMoved],
        },
        Fault::KillCache | Fault::RestartCache => match phase {
            Phase::Restored => &[Moved],
            Phase::Dead | Phase::Ready | Phase::Restoring => &[Moved, Lost],
            _ => &[Lived, Moved, Lost],
        },
        Fault::KillDump => match phase {
            _ if heard => &[Moved],
            Phase::Dead => &[Moved, DoubtMoved],
            _ => &[Lived, Moved, DoubtLived, DoubtMoved, Damaged],
        },
        // The link of the session is gone, and there are others.
        Fault::CorruptSummed => match phase < Phase::Dead {
            true => &[Lived, Moved],
            false => &[Moved],
        },
        // The link is gone for good, or what knows.
        Fault::KillProxy | Fault::RestartProxy | Fault::Cut | Fault::Stall => match phase {
            _ if heard => &[Moved],
            Phase::Dead => &[Moved, DoubtMoved],
            _ => &[Lived, Moved, DoubtLived, DoubtMoved],
        },
    }
}

fn survived(linked: bool) -> &'static [Outcome] {
    match linked {
        true => &[Moved],
        false => &[Lived],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A later phase promises no less than an earlier one.
    #[test]
    fn the_later_the_fewer() {
        for number in 0..200 {
            let plan = Plan::draw(3, number, true);
            for pair in Phase::ALL.windows(2) {
                let (earlier, later) = (
                    outcomes(&plan, pair[0], true),
                    outcomes(&plan, pair[1], true),
                );
                assert!(
                    later.iter().all(|o| earlier.contains(o)),
                    "{plan:?} {pair:?}"
                );
            }
        }
    }
}
