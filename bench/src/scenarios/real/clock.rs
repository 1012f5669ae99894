//! The clock that this program, the moved process and the daemons' logs can be compared on: the
//! kernel's monotonic one, which is the same in all namespaces here.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use rustix::time::{clock_gettime, ClockId};

const DAY: u64 = 24 * 60 * 60;

pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is negative on this clock.
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// When a line of a daemon's log was written. It has the time of day, so it is one of the last day.
pub fn when_logged(line: &str) -> Result<Duration> {
    let logged = time_of_day(line).with_context(|| format!("no time in {line:?}"))?;
    let day = Duration::from_secs(DAY);
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let time_of_day = Duration::new(since_epoch.as_secs() % DAY, since_epoch.subsec_nanos());
    let age = match time_of_day.checked_sub(logged) {
        Some(age) => age,
        None => time_of_day + day - logged,
    };
    now().checked_sub(age).context("a time before the boot")
}

/// Of `2025-11-21T12:18:29.123456Z`, with colours around it or not.
fn time_of_day(line: &str) -> Option<Duration> {
    let (_, rest) = line.split_once('T')?;
    let (time, _) = rest.split_once('Z')?;
    let (seconds, micros) = time.split_once('.')?;
    let mut fields = seconds.split(':').map(|field| field.parse::<u64>().ok());
    let seconds = (fields.next()?? * 60 + fields.next()??) * 60 + fields.next()??;
    Some(Duration::from_secs(seconds) + Duration::from_micros(micros.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_line() {
        let line = "\u{1b}[2m2025-11-21T01:02:03.000456Z\u{1b}[0m \u{1b}[32m INFO\u{1b}[0m T 1.2Z";
        let time = Duration::from_secs(3723) + Duration::from_micros(456);
        assert_eq!(time_of_day(line), Some(time));
        assert_eq!(time_of_day("no time: T1"), None);
    }
}
