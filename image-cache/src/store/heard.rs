//! What sources have said of their sets, also of those that have gone since: a source that does not know whether it was
//! heard says it again.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use image_common::link::codec::SetNumber;

/// A source asks again at once. The oldest are forgotten first.
const MOST: usize = 1024;

/// A decision of the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    Commit,
    Abort,
}

/// The last decisions, by the session's key and the set's number.
#[derive(Default)]
pub struct Heard(Mutex<VecDeque<(u64, SetNumber, Said)>>);

impl Heard {
    fn all(&self) -> MutexGuard<'_, VecDeque<(u64, SetNumber, Said)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn note(&self, key: u64, set: SetNumber, said: Said) {
        let mut all = self.all();
        if all.len() >= MOST {
            all.pop_front();
        }
        all.push_back((key, set, said));
    }

    pub fn of(&self, key: u64, set: SetNumber) -> Option<Said> {
        let all = self.all();
        let mut its = all.iter().filter(|(k, s, _)| (*k, *s) == (key, set));
        its.next_back().map(|&(_, _, said)| said)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_known() {
        let heard = Heard::default();
        heard.note(1, SetNumber(1), Said::Commit);
        heard.note(1, SetNumber(2), Said::Abort);
        assert_eq!(heard.of(1, SetNumber(1)), Some(Said::Commit));
        assert_eq!(heard.of(1, SetNumber(2)), Some(Said::Abort));
        assert_eq!(heard.of(2, SetNumber(1)), None);
        for key in 10..10 + MOST as u64 {
            heard.note(key, SetNumber(1), Said::Commit);
        }
        assert_eq!(heard.of(1, SetNumber(2)), None);
        assert_eq!(heard.all().len(), MOST);
    }
}
