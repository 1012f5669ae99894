//! A rate limit for lines in the log about peers, for example refused ones: a peer must not be able to fill the log.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Lines that may come at once.
const BURST: f64 = 50.0;
/// And then, for as long as it lasts.
const PER_SECOND: f64 = 5.0;

/// Of one listener, or of several that share it.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    /// Used up of the burst at that moment.
    used: f64,
    at: Option<Instant>,
    /// Since the last line.
    unlogged: u64,
}

impl LogLimit {
    /// Calls `line` unless the rate is used up. Its argument is the end of the line: how many were left out
    /// before it.
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
        let log_limit = LogLimit::default();
        let begin = Instant::now();
        let ms = |n| begin + Duration::from_millis(n);
        let logged = (0..1000)
            .filter(|_| log_limit.take(begin).is_some())
            .count();
        assert_eq!(logged, 50);
        assert_eq!(log_limit.take(ms(190)), None);
        assert_eq!(log_limit.take(ms(201)), Some(951), "none is forgotten");
        let logged: Vec<u64> = (1..=10_000)
            .filter_map(|n| log_limit.take(ms(201 + n)))
            .collect();
        assert_eq!(logged.len(), 50, "of 10 s");
        let last = log_limit.take(ms(60_000)).unwrap();
        let all = logged.iter().sum::<u64>() + last + logged.len() as u64;
        assert_eq!(all, 10_000, "each is a line, or counted in the next one");
        assert_eq!(log_limit.take(ms(60_000)), Some(0));
    }
}
