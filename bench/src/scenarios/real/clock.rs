//! The clock that this program, the moved process and the daemons' logs can be compared on: the
//! kernel's monotonic one. Of a restored process it has an offset.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use e2e_tests::real::program::monotonic_offset;
use rustix::time::{clock_gettime, ClockId};

const DAY: u64 = 24 * 60 * 60;

pub fn now() -> Duration {
    let now = Duration::try_from(clock_gettime(ClockId::Monotonic));
    now.expect("this clock is never negative")
}

/// What is `nanos` on the clock of a process with these `/proc/PID/timens_offsets`.
pub fn outside(nanos: u64, timens_offsets: &str) -> Result<Duration> {
    let offset = monotonic_offset(timens_offsets)
        .with_context(|| format!("no offset in {timens_offsets:?}"))?;
    let outside = i128::from(nanos) - offset;
    Ok(Duration::from_nanos(u64::try_from(outside)?))
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
    fn the_clock_of_a_restored_process() {
        let behind = "monotonic          -1 937861117\nboottime           -1 937852508\n";
        let time = Duration::from_nanos(5_000_000_000 + 62_138_883);
        assert_eq!(outside(5_000_000_000, behind).unwrap(), time);
        let none = "monotonic           0         0\nboottime            0         0\n";
        assert_eq!(outside(7, none).unwrap(), Duration::from_nanos(7));
        assert!(outside(7, "").is_err());
    }

    #[test]
    fn the_time_of_a_line() {
        let line = "\u{1b}[2m2025-11-21T01:02:03.000456Z\u{1b}[0m \u{1b}[32m INFO\u{1b}[0m T 1.2Z";
        let time = Duration::from_secs(3723) + Duration::from_micros(456);
        assert_eq!(time_of_day(line), Some(time));
        assert_eq!(time_of_day("no time: T1"), None);
    }
}
