//! Sizes and durations as people write them on a command line.

use std::time::Duration;

/// Why a text is no size and no time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    #[error("expected a number with an optional unit ({0})")]
    Form(&'static str),
    #[error("the value is too large")]
    TooLarge,
    #[error("0 is not a waiting time; the least is 1ms")]
    NoTime,
    #[error("0 leaves no space for anything")]
    NoRoom,
    #[error("it is empty")]
    Empty,
}

/// A duration in which something must be possible.
pub fn parse_some_time(text: &str) -> Result<Duration, UnitError> {
    match parse_duration(text)? {
        Duration::ZERO => Err(UnitError::NoTime),
        time => Ok(time),
    }
}

/// A duration after which something is done; 0: never.
pub fn parse_time_or_never(text: &str) -> Result<Duration, UnitError> {
    match parse_duration(text)? {
        Duration::ZERO => Ok(NEVER),
        time => Ok(time),
    }
}

/// Longer than any host runs, and short enough to be added to a moment.
pub const NEVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A size into which something must go.
pub fn parse_some_size(text: &str) -> Result<u64, UnitError> {
    match parse_size(text)? {
        0 => Err(UnitError::NoRoom),
        size => Ok(size),
    }
}

/// A number of things of which there must be one at least.
pub fn parse_count<T: TryFrom<u64>>(text: &str) -> Result<T, UnitError> {
    const FORM: UnitError = UnitError::Form("a number, without a unit");
    match text.parse::<u64>().map_err(|_| FORM)? {
        0 => Err(UnitError::NoRoom),
        count => T::try_from(count).map_err(|_| UnitError::TooLarge),
    }
}

/// A path, a name or an address. An empty one is a variable that is not set, in whatever started us.
pub fn parse_some<T: From<String>>(text: &str) -> Result<T, UnitError> {
    match text {
        "" => Err(UnitError::Empty),
        text => Ok(text.to_owned().into()),
    }
}

/// Bytes: a number with an optional `K`, `M`, `G` or `T` (powers of 1024, also `KiB` and `KB`).
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    const FORM: UnitError = UnitError::Form("K, M, G, T: powers of 1024");
    let (number, unit) = split(text).ok_or(FORM)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(FORM),
    };
    number.checked_mul(1 << shift).ok_or(UnitError::TooLarge)
}

/// A duration: seconds, or a number with `ms`, `s`, `m`, `h` or `d`.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    const FORM: UnitError = UnitError::Form("ms, s, m, h, d; seconds without one");
    let (number, unit) = split(text).ok_or(FORM)?;
    let millis = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(FORM),
    };
    let time = number.checked_mul(millis).map(Duration::from_millis);
    // What is longer overflows where it is added to a moment.
    time.filter(|time| *time <= NEVER)
        .ok_or(UnitError::TooLarge)
}

fn split(text: &str) -> Option<(u64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number = text[..end].parse().ok()?;
    Some((number, text[end..].trim()))
}

/// Bytes for people: three significant digits and a binary unit.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("0"), Ok(0));
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("16M"), Ok(16 << 20));
        assert_eq!(parse_size("2 GiB"), Ok(2 << 30));
        for bad in ["", "M", "-1", "1.5G", "1X", "1 G G"] {
            assert!(matches!(parse_size(bad), Err(UnitError::Form(_))), "{bad}");
        }
        assert_eq!(parse_size("99999999999T"), Err(UnitError::TooLarge));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert!(parse_duration("h").is_err());
        assert!(parse_duration("5 y").is_err());
    }

    #[test]
    fn nothing_is_never_or_refused() {
        assert_eq!(parse_some_time("0s"), Err(UnitError::NoTime));
        assert_eq!(parse_some_time("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(parse_time_or_never("0"), Ok(NEVER));
        assert_eq!(parse_time_or_never("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_some_size("0K"), Err(UnitError::NoRoom));
        assert_eq!(parse_some::<String>(""), Err(UnitError::Empty));
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(human_size(0), "0 B");
        assert_eq!(human_size(999), "999 B");
        assert_eq!(human_size(1 << 20), "1.00 MiB");
        assert_eq!(human_size(300 << 20), "300 MiB");
    }
}
