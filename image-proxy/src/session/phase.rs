//! Where a run is, and what moves it from one phase to the next.
//!
//! ```text
//!            PREPARE            PREPARED          answer to the script       CRIU has killed
//!   Sending ---------> Preparing --------> Prepared -------------------> Told ------> Committed
//!      |                   |                  |                           |
//!      |                   | PREPARE_REFUSED  | CRIU has ended            | the answer was not taken
//!      | CRIU has ended    v                  v (without script)          v
//!      +-----> Judged   Refused             Judged                     Failed
//! ```
//!
//! With `--commit-on restored` or `auto` a restore on the target may be tried first:
//!
//! ```text
//!        PREPARE_TRIAL          TRIAL             HOLDING           answer to the script
//!   Sending -----> Preparing ----------> Trial -------------> Holding --------> Told
//!                      | PREPARED          | FAILED             | FAILED
//!                      v (no restore)      v                    v
//!                   Prepared             Failed               Failed
//! ```
//!
//! Each of them fails (`Failed`), except `Committed`, and each ends (`Ended`). What CRIU says and
//! what has come of the images is in [`RunState`](crate::session::state::RunState), which decides.

use crate::failure::Failure;
use crate::session::evidence::CriuEnd;

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    PreDump,
    Dump,
    /// All was sent, and whether CRIU came to the kill is not known.
    InDoubt(Failure),
    Failed(Failure),
}

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Phase {
    /// Images come, or nothing was asked of the cache behind the last one.
    Sending,
    /// PREPARE is sent, or PREPARE_TRIAL.
    Preparing,
    /// The cache holds the set.
    Prepared,
    /// A restore on the target reads the set, or is to.
    Trial,
    /// The set stands restored on the target, asleep, and the cache has it, too.
    Holding,
    /// The cache does not hold the set.
    Refused(Failure),
    /// Without script: CRIU has ended. With `prepared` the cache holds the set.
    Judged { prepared: bool, end: CriuEnd },
    /// With a script: CRIU was told to go on, or is being told. Its process is dead, or dies now.
    Told,
    /// The process is dead, and the cache knows.
    Committed,
    /// Nothing more is sent. How far the run came decides what becomes of the set.
    Failed { reason: Failure, after: Reached },
    /// `failure`: why it failed before it ended.
    Ended {
        how: Ended,
        failure: Option<Failure>,
    },
}

/// How far a run came before it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reached {
    /// The cache was not asked to hold the set.
    Sending,
    /// The cache holds the set, or is about to.
    Held,
    /// CRIU was told that it may kill.
    Told,
}

/// What moves a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// PREPARE is being sent.
    Prepare,
    /// PREPARED has come.
    Prepared,
    /// PREPARE_REFUSED has come.
    Refused(Failure),
    /// TRIAL has come.
    Trial,
    /// HOLDING has come.
    Holding,
    /// FAILED has come: nothing of the set runs on the target, or ever will by that restore.
    TrialFailed(Failure),
    /// CRIU has ended, without script.
    Judged(CriuEnd),
    /// The answer is being given to the script.
    Tell,
    /// The script is gone without its answer.
    Untold(Failure),
    /// CRIU has killed what it dumped, and COMMIT is sent.
    Commit,
    Fail(Failure),
    End(Ended),
}

impl Phase {
    /// The whole table. `None`: the event changes nothing in this phase.
    pub fn after(&self, event: Event) -> Option<Self> {
        use Event as E;
        use Phase as P;
        match (self, event) {
            // What it has ended as, it stays.
            (P::Ended { .. }, _) => None,
            (phase, E::End(how)) => {
                let failure = match &how {
                    Ended::Failed(reason) => Some(reason.clone()),
                    Ended::InDoubt(reason) if *phase == P::Committed => Some(reason.clone()),
                    _ => phase.failure().cloned(),
                };
                Some(P::Ended { how, failure })
            }
            // The process is dead, and the cache was told so: nothing is lost by a failure.
            (P::Committed, _) => None,
            // The kill was seen, and the cache has been told, whatever failed beside that.
            (
                P::Told
                | P::Failed {
                    after: Reached::Told,
                    ..
                },
                E::Commit,
            ) => Some(P::Committed),
            (P::Told, E::Untold(reason)) => Some(P::Failed {
                reason,
                after: Reached::Sending,
            }),
            (P::Failed { reason, .. }, E::Untold(_)) => Some(P::Failed {
                reason: reason.clone(),
                after: Reached::Sending,
            }),
            // PREPARE goes out all the same, so the cache may hold the set.
            (
                P::Failed {
                    reason,
                    after: Reached::Sending,
                },
                E::Prepare,
            ) => Some(P::Failed {
                reason: reason.clone(),
                after: Reached::Held,
            }),
            // The first reason is the one that counts.
            (P::Failed { .. }, _) => None,
            (phase, E::Fail(reason)) => Some(P::Failed {
                reason,
                after: phase.reached(),
            }),
            (P::Sending, E::Prepare) => Some(P::Preparing),
            // An answer that nothing waits for changes nothing: least of all when CRIU was told.
            (P::Preparing, E::Prepared) => Some(P::Prepared),
            (P::Preparing, E::Refused(reason)) => Some(P::Refused(reason)),
            (P::Preparing, E::Trial) => Some(P::Trial),
            (P::Preparing | P::Trial, E::Holding) => Some(P::Holding),
            // Before CRIU was told it fails the dump. Behind that the cache has the set as a prepared one.
            (P::Preparing | P::Trial | P::Holding, E::TrialFailed(reason)) => Some(P::Failed {
                reason,
                after: Reached::Held,
            }),
            (P::Sending | P::Prepared, E::Judged(end)) => Some(P::Judged {
                prepared: *self == P::Prepared,
                end,
            }),
            (P::Prepared | P::Holding, E::Tell) => Some(P::Told),
            _ => None,
        }
    }

    fn reached(&self) -> Reached {
        match self {
            Self::Preparing
            | Self::Prepared
            | Self::Trial
            | Self::Holding
            | Self::Judged { prepared: true, .. } => Reached::Held,
            Self::Told | Self::Committed => Reached::Told,
            Self::Failed { after, .. } => *after,
            _ => Reached::Sending,
        }
    }

    pub fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Failed { reason, .. } => Some(reason),
            Self::Ended { failure, .. } => failure.as_ref(),
            _ => None,
        }
    }

    pub fn ended(&self) -> Option<&Ended> {
        match self {
            Self::Ended { how, .. } => Some(how),
            _ => None,
        }
    }

    /// It has neither failed nor ended.
    pub fn is_active(&self) -> bool {
        !matches!(self, Self::Failed { .. } | Self::Ended { .. })
    }

    /// The cache holds the set, or is about to: PREPARE is sent and was not refused.
    pub fn is_held(&self) -> bool {
        self.reached() == Reached::Held
    }

    /// The cache is asked to hold the set, and has not said whether it does.
    pub fn waits_for_verdict(&self) -> bool {
        matches!(self, Self::Preparing | Self::Trial)
    }

    /// CRIU was told that it may kill, and the run has not ended.
    pub fn was_told(&self) -> bool {
        self.reached() == Reached::Told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(what: &str) -> Failure {
        Failure::link(what)
    }

    fn short(phase: &Phase) -> String {
        match phase {
            Phase::Refused(_) => "Refused".to_owned(),
            Phase::Judged { prepared, .. } => format!("Judged({prepared})"),
            Phase::Failed { reason, after } => format!("Failed({},{after:?})", reason.text()),
            Phase::Ended { how, failure } => {
                let why = failure.as_ref().map_or("-".to_owned(), Failure::text);
                format!("Ended({how:?},{why})")
            }
            other => format!("{other:?}"),
        }
    }

    /// The whole table, so that a change to it shows in review.
    #[test]
    fn table() {
        let failed = |after| Phase::Failed {
            reason: failure("old"),
            after,
        };
        let judged = |prepared| Phase::Judged {
            prepared,
            end: CriuEnd::Killed,
        };
        let phases = [
            Phase::Sending,
            Phase::Preparing,
            Phase::Prepared,
            Phase::Trial,
            Phase::Holding,
            Phase::Refused(failure("no")),
            judged(false),
            judged(true),
            Phase::Told,
            Phase::Committed,
            failed(Reached::Sending),
            failed(Reached::Held),
            failed(Reached::Told),
            Phase::Ended {
                how: Ended::Dump,
                failure: None,
            },
        ];
        let events = [
            Event::Prepare,
            Event::Prepared,
            Event::Refused(failure("no")),
            Event::Trial,
            Event::Holding,
            Event::TrialFailed(failure("gone")),
            Event::Judged(CriuEnd::Killed),
            Event::Tell,
            Event::Untold(failure("new")),
            Event::Commit,
            Event::Fail(failure("new")),
            Event::End(Ended::InDoubt(failure("new"))),
        ];
        let mut table = String::new();
        for phase in &phases {
            let row: Vec<String> = events
                .iter()
                .map(|event| match phase.after(event.clone()) {
                    Some(next) => short(&next),
                    None => "-".to_owned(),
                })
                .collect();
            table += &format!("{}: {}\n", short(phase), row.join(" "));
        }
        let expected = "\
Sending: Preparing - - - - - Judged(false) - - - Failed(new,Sending) Ended(InDoubt(Link(new)),-)
Preparing: - Prepared Refused Trial Holding Failed(gone,Held) - - - - Failed(new,Held) Ended(InDoubt(Link(new)),-)
Prepared: - - - - - - Judged(true) Told - - Failed(new,Held) Ended(InDoubt(Link(new)),-)
Trial: - - - - Holding Failed(gone,Held) - - - - Failed(new,Held) Ended(InDoubt(Link(new)),-)
Holding: - - - - - Failed(gone,Held) - Told - - Failed(new,Held) Ended(InDoubt(Link(new)),-)
Refused: - - - - - - - - - - Failed(new,Sending) Ended(InDoubt(Link(new)),-)
Judged(false): - - - - - - - - - - Failed(new,Sending) Ended(InDoubt(Link(new)),-)
Judged(true): - - - - - - - - - - Failed(new,Held) Ended(InDoubt(Link(new)),-)
Told: - - - - - - - - Failed(new,Sending) Committed Failed(new,Told) Ended(InDoubt(Link(new)),-)
Committed: - - - - - - - - - - - Ended(InDoubt(Link(new)),new)
Failed(old,Sending): Failed(old,Held) - - - - - - - Failed(old,Sending) - - Ended(InDoubt(Link(new)),old)
Failed(old,Held): - - - - - - - - Failed(old,Sending) - - Ended(InDoubt(Link(new)),old)
Failed(old,Told): - - - - - - - - Failed(old,Sending) Committed - Ended(InDoubt(Link(new)),old)
Ended(Dump,-): - - - - - - - - - - - -
";
        assert_eq!(table, expected);
    }

    #[test]
    fn a_run_that_ends_keeps_why_it_failed() {
        let told = Phase::Told.after(Event::Fail(failure("the link"))).unwrap();
        let doubt = Ended::InDoubt(failure("the link"));
        let ended = told.after(Event::End(doubt.clone())).unwrap();
        assert_eq!(
            (ended.failure(), ended.ended()),
            (Some(&failure("the link")), Some(&doubt))
        );
        // CRIU has ended and it is not known how: no failure.
        let ended = Phase::Sending.after(Event::End(doubt)).unwrap();
        assert_eq!(ended.failure(), None);
        let failed = Ended::Failed(failure("no inventory"));
        let ended = Phase::Sending.after(Event::End(failed)).unwrap();
        assert_eq!(ended.failure(), Some(&failure("no inventory")));
    }
}
