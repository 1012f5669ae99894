//! Restores that wait for a set: whether one of them would hold the set decides how that is committed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::image::SessionName;

use crate::store::changes::Changes;
use crate::store::set::Holds;

/// The restores that wait. `None`: for a dump of any session.
#[derive(Default)]
pub struct Waiting(Mutex<Vec<(u64, Option<SessionName>, Holds)>>);

/// A restore waits as long as this lives.
pub struct Waits {
    waiting: Arc<Waiting>,
    changes: Arc<Changes>,
    number: u64,
}

impl Waiting {
    fn all(&self) -> MutexGuard<'_, Vec<(u64, Option<SessionName>, Holds)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of which sessions the restores wait for a dump that would hold it.
    pub fn of_holding(&self) -> Vec<Option<SessionName>> {
        let all = self.all();
        let holding = all.iter().filter(|(_, _, holds)| *holds != Holds::No);
        holding.map(|(_, session, _)| session.clone()).collect()
    }
}

impl Waits {
    /// `changes`: a trial may depend on it.
    pub fn begin(
        waiting: &Arc<Waiting>,
        changes: &Arc<Changes>,
        session: Option<SessionName>,
        holds: Holds,
    ) -> Self {
        let mut all = waiting.all();
        let number = all.last().map_or(0, |(number, _, _)| number + 1);
        all.push((number, session, holds));
        drop(all);
        Self {
            waiting: waiting.clone(),
            changes: changes.clone(),
            number,
        }
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        let number = self.number;
        self.waiting.all().retain(|(n, _, _)| *n != number);
        self.changes.bump();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_restores_that_would_hold_count() {
        let (waiting, changes) = (Arc::default(), Arc::default());
        let begin = |session: Option<&str>, holds| {
            let session = session.map(|name| name.parse().unwrap());
            Waits::begin(&waiting, &changes, session, holds)
        };
        let of_holding = || waiting.of_holding().len();
        let without = begin(None, Holds::No);
        assert_eq!(of_holding(), 0);
        let first = begin(Some("web"), Holds::Promised);
        let second = begin(None, Holds::Named);
        assert_eq!(of_holding(), 2);
        drop(first);
        assert_eq!(waiting.of_holding(), [None]);
        let third = begin(Some("db"), Holds::Named);
        drop((without, second));
        assert_eq!(waiting.of_holding(), [Some("db".parse().unwrap())]);
        drop(third);
        assert_eq!(of_holding(), 0);
    }
}
