//! Lines in the log about peers that were refused: so many, and no more. A log that anybody who
//! knocks can fill is no log.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Lines that may come at once.
const BURST: f64 = 50.0;
/// And then, for as long as it lasts.
const PER_SECOND: f64 = 5.0;

/// The refusals of one listener, or of several that have them in common.
#[derive(Debug, Default)]
pub struct Refusals(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    /// Used up of the burst at that moment.
    used: f64,
    at: Option<Instant>,
    /// Since the last line.
    unlogged: u64,
}

impl Refusals {
    /// Has `line` written if it is time for one. It ends with what it is given: how many were not
    /// logged before it.
    pub fn log(&self, line: impl FnOnce(&str)) {
        match self.take(Instant::now()) {
            None => {}
            Some(0) => line(""),
            Some(unlogged) => line(&format!("; {unlogged} more not logged")),
        }
    }

    fn take(&self, now: Instant) -> Option<u64> {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = lines.at.map(|at| now.saturating_duration_since(at));
        let back = since.map_or(0.0, |since| since.as_secs_f64() * PER_SECOND);
        lines.used = (lines.used - back).max(0.0);
        lines.at = Some(now);
        if lines.used + 1.0 > BURST {
            lines.unlogged += 1;
            return None;
        }
        lines.used += 1.0;
        Some(std::mem::take(&mut lines.unlogged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_and_then_so_many_in_a_second() {
        let refusals = Refusals::default();
        let begin = Instant::now();
        let ms = |n| begin + Duration::from_millis(n);
        let logged = (0..1000).filter(|_| refusals.take(begin).is_some()).count();
        assert_eq!(logged, 50);
        assert_eq!(refusals.take(ms(190)), None);
        assert_eq!(refusals.take(ms(201)), Some(951), "none is forgotten");
        let logged: Vec<u64> = (1..=10_000)
            .filter_map(|n| refusals.take(ms(201 + n)))
            .collect();
        assert_eq!(logged.len(), 50, "of 10 s");
        let last = refusals.take(ms(60_000)).unwrap();
        let all = logged.iter().sum::<u64>() + last + logged.len() as u64;
        assert_eq!(all, 10_000, "each is a line, or counted in the next one");
        assert_eq!(refusals.take(ms(60_000)), Some(0));
    }
}
