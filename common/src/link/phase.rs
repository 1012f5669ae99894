//! What may happen to a set, in which order. The cache enforces it on what the proxy sends.
//!
//! ```text
//!                    COMPLETE            PREPARE             COMMIT
//!   Receiving ------------------> Complete ------> Prepared ---------> Committed
//!    |  ^  |                       |  |  |          |                  ^
//!    |  |  +-- GATE (stays) -------+  |  |          | ABORT            |
//!    |  +------- IMAGE_OPEN ----------+  |          v                  |
//!    +------------- ABORT --------> Aborted <-------+                  |
//!                                        +-------- CLOSE (ungated) ----+
//! ```
//!
//! With a trial, a restore stands on the target before the source kills:
//!
//! ```text
//!             PREPARE_TRIAL         the restore holds            COMMIT
//!   Complete --------------> Trial ------------------> Holding ----------> Committed
//!      ^                     |   |                     |     |
//!      +-- the restore failed    +-------> Aborted <---+     +-- what held is gone --> Prepared
//! ```
//!
//! `Prepared`: the cache said PREPARED and does not know yet whether the source heard it. A link
//! that breaks there leaves the set in doubt: kept, and not served.

/// Where a set is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Receiving,
    /// The inventory ended and nothing was open.
    Complete,
    /// PREPARED was sent, COMMIT has not come.
    Prepared,
    /// A restore reads it, or is to. The source was told nothing yet.
    Trial,
    /// A restore of it stands on the target, asleep. HOLDING was sent, COMMIT has not come.
    Holding,
    /// Nothing more comes; the set may be restored.
    Committed,
    Aborted,
}

impl Phase {
    /// The source was told that it may kill, and has not said what became of the process.
    pub fn waits_for_word(self) -> bool {
        matches!(self, Self::Prepared | Self::Holding)
    }

    /// The source may depend on the set: it may have killed the process.
    pub fn is_depended_on(self) -> bool {
        self.waits_for_word() || self == Self::Committed
    }
}

/// What moves a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    ImageOpen,
    Gate,
    Complete,
    Prepare,
    /// PREPARE_TRIAL has come.
    Try,
    /// The restore stands, and holds.
    Hold,
    /// The restore of a trial has failed, or what held is gone.
    TrialOver,
    Commit,
    Close,
    Abort,
}

/// An event that does not fit the phase of its set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} is not allowed for a {gated} set that is {phase:?}", gated = if *.gated { "gated" } else { "ungated" })]
pub struct OutOfOrder {
    pub phase: Phase,
    pub gated: bool,
    pub event: Event,
}

/// The whole table.
pub fn next(phase: Phase, gated: bool, event: Event) -> Result<Phase, OutOfOrder> {
    use Event as E;
    use Phase as P;
    match (phase, event) {
        (P::Receiving | P::Complete, E::ImageOpen) => Ok(P::Receiving),
        (P::Receiving | P::Complete, E::Gate) => Ok(phase),
        (P::Receiving | P::Complete, E::Complete) => Ok(P::Complete),
        (P::Complete, E::Prepare) if gated => Ok(P::Prepared),
        (P::Complete, E::Try) if gated => Ok(P::Trial),
        (P::Trial, E::Hold) => Ok(P::Holding),
        (P::Trial, E::TrialOver) => Ok(P::Complete),
        (P::Holding, E::TrialOver) => Ok(P::Prepared),
        (P::Prepared | P::Holding, E::Commit) => Ok(P::Committed),
        (P::Complete, E::Close) if !gated => Ok(P::Committed),
        (P::Receiving | P::Complete | P::Prepared | P::Trial | P::Holding, E::Abort) => {
            Ok(P::Aborted)
        }
        // A set that the cache aborted by itself: what the proxy sent before it heard of that.
        (P::Aborted, _) => Ok(P::Aborted),
        _ => Err(OutOfOrder {
            phase,
            gated,
            event,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole table, so that a change to it shows in review.
    #[test]
    fn table() {
        use Event::*;
        let events = [
            ImageOpen, Gate, Complete, Prepare, Try, Hold, TrialOver, Commit, Close, Abort,
        ];
        let mut table = String::new();
        for phase in [
            Phase::Receiving,
            Phase::Complete,
            Phase::Prepared,
            Phase::Trial,
            Phase::Holding,
            Phase::Committed,
            Phase::Aborted,
        ] {
            for gated in [false, true] {
                let row: Vec<String> = events
                    .iter()
                    .map(|&e| next(phase, gated, e).map_or("-".into(), |p| format!("{p:?}")))
                    .collect();
                table += &format!("{phase:?} {gated}: {}\n", row.join(" "));
            }
        }
        let expected = "\
Receiving false: Receiving Receiving Complete - - - - - - Aborted
Receiving true: Receiving Receiving Complete - - - - - - Aborted
Complete false: Receiving Complete Complete - - - - - Committed Aborted
Complete true: Receiving Complete Complete Prepared Trial - - - - Aborted
Prepared false: - - - - - - - Committed - Aborted
Prepared true: - - - - - - - Committed - Aborted
Trial false: - - - - - Holding Complete - - Aborted
Trial true: - - - - - Holding Complete - - Aborted
Holding false: - - - - - - Prepared Committed - Aborted
Holding true: - - - - - - Prepared Committed - Aborted
Committed false: - - - - - - - - - -
Committed true: - - - - - - - - - -
Aborted false: Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted
Aborted true: Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted Aborted
";
        assert_eq!(table, expected);
    }
}
