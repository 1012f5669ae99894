//! From when until when certificates and revocation lists hold, for what is said about them when they are read: rustls
//! looks at these dates in each handshake, but does not tell them. Also whose they are. The files are the operator's own;
//! whatever is not as expected is left to rustls.

use std::fmt;
use std::time::{Duration, SystemTime};

/// Tags of X.690 that certificates and lists (RFC 5280) have before their dates.
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const VERSION: u8 = 0xa0;

/// An attribute of a name, 2.5.4.n: the last byte of its OID, and how it is written.
const ATTRIBUTES: [(u8, &str); 4] = [(3, "CN"), (6, "C"), (10, "O"), (11, "OU")];

/// Longest name in a log line.
const NAME_CHARS: usize = 80;

/// Seconds since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Date(pub i64);

/// A name as it is in certificates, as bytes to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(Vec<u8>);

/// Of a certificate or a list. `issuer` made a list, `subject` has a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dates {
    pub name: Name,
    pub from: Date,
    pub until: Date,
}

/// How dates stand to a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    NotYet,
    Holds,
    /// Less than a tenth of the time is left.
    Ends,
    Expired,
}

impl Date {
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let seconds = since.map_or(0, |since| since.as_secs());
        Self(i64::try_from(seconds).unwrap_or(i64::MAX))
    }

    /// How long from `now` to here.
    pub fn after(self, now: Self) -> Duration {
        let seconds = self.0.saturating_sub(now.0);
        Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
    }
}

impl Dates {
    /// Of a certificate.
    pub fn of_certificate(der: &[u8]) -> Option<Self> {
        let mut fields = to_be_signed(der)?;
        if fields.first() == Some(&VERSION) {
            take(&mut fields, VERSION)?;
        }
        take(&mut fields, INTEGER)?; // its serial number
        take(&mut fields, SEQUENCE)?; // how it is signed
        take(&mut fields, SEQUENCE)?; // the issuer
        let mut validity = take(&mut fields, SEQUENCE)?;
        Some(Self {
            from: take_time(&mut validity)?,
            until: take_time(&mut validity)?,
            name: Name(take(&mut fields, SEQUENCE)?.to_vec()),
        })
    }

    /// Of a revocation list: when it was made, and when the next one is due.
    pub fn of_list(der: &[u8]) -> Option<Self> {
        let mut fields = to_be_signed(der)?;
        if fields.first() == Some(&INTEGER) {
            take(&mut fields, INTEGER)?; // its version
        }
        take(&mut fields, SEQUENCE)?; // how it is signed
        Some(Self {
            name: Name(take(&mut fields, SEQUENCE)?.to_vec()),
            from: take_time(&mut fields)?,
            until: take_time(&mut fields)?,
        })
    }

    /// `slack`: clocks differ by so much.
    pub fn at(&self, now: Date, slack: Duration) -> Standing {
        if self.until <= now {
            Standing::Expired
        } else if self.from.after(now) > slack {
            Standing::NotYet
        } else if self.ends() <= now {
            Standing::Ends
        } else {
            Standing::Holds
        }
    }

    /// From when on less than a tenth is left.
    pub fn ends(&self) -> Date {
        Date(self.until.0 - self.until.0.saturating_sub(self.from.0) / 10)
    }
}

/// The content of the first element, which has this tag.
fn take<'a>(der: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    let (&[found, short], mut rest) = der.split_first_chunk()?;
    if found != tag {
        return None;
    }
    let length = match short {
        ..=0x7f => usize::from(short),
        0x81..=0x84 => {
            let (bytes, behind) = rest.split_at_checked(usize::from(short - 0x80))?;
            rest = behind;
            bytes.iter().fold(0, |sum, &b| sum << 8 | usize::from(b))
        }
        _ => return None,
    };
    let (content, behind) = rest.split_at_checked(length)?;
    *der = behind;
    Some(content)
}

/// What is signed of a certificate or list.
fn to_be_signed(mut der: &[u8]) -> Option<&[u8]> {
    let mut whole = take(&mut der, SEQUENCE)?;
    take(&mut whole, SEQUENCE)
}

/// `YYMMDDHHMMSSZ` of 1950 to 2049, or `YYYYMMDDHHMMSSZ`.
fn take_time(der: &mut &[u8]) -> Option<Date> {
    let (text, century) = match der.first()? {
        &UTC_TIME => (take(der, UTC_TIME)?, None),
        _ => {
            let (century, text) = take(der, GENERALIZED_TIME)?.split_at_checked(2)?;
            (text, Some(century))
        }
    };
    let two = |digits: &[u8]| match digits {
        [a @ b'0'..=b'9', b @ b'0'..=b'9'] => Some(i64::from(a - b'0') * 10 + i64::from(b - b'0')),
        _ => None,
    };
    let (digits, b"Z") = text.split_at_checked(12)? else {
        return None;
    };
    let mut numbers = [0; 6];
    for (number, digits) in numbers.iter_mut().zip(digits.chunks(2)) {
        *number = two(digits)?;
    }
    let [year, month, day, hour, minute, second] = numbers;
    let year = match century {
        Some(century) => two(century)? * 100 + year,
        None if year < 50 => 2000 + year,
        None => 1900 + year,
    };
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) {
        return None;
    }
    let days = days_of(year, month, day);
    Some(Date(((days * 24 + hour) * 60 + minute) * 60 + second))
}

/// Days from 1970 to a day of the Gregorian calendar. Years begin in March here, so that the leap day is the last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let (year, month) = match month {
        ..=2 => (year - 1, month + 9),
        _ => (year, month - 3),
    };
    let leaps = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    365 * year + leaps + (153 * month + 2) / 5 + day - 1 - 719_468
}

impl fmt::Display for Date {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, seconds) = (self.0.div_euclid(86_400), self.0.rem_euclid(86_400));
        // A guess that is at most a year too early, and the month from its first day.
        let mut year = 1970 + days.div_euclid(366);
        while days_of(year + 1, 1, 1) <= days {
            year += 1;
        }
        let month = (1..=12).rev().find(|&m| days_of(year, m, 1) <= days);
        let month = month.unwrap_or(1);
        let day = days - days_of(year, month, 1) + 1;
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(
            f,
            "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC"
        )
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        let mut sets = &self.0[..];
        while let Some(mut set) = take(&mut sets, SET) {
            while let Some(mut attribute) = take(&mut set, SEQUENCE) {
                let oid = take(&mut attribute, 0x06);
                let known = |(last, _): &&(u8, &str)| oid == Some(&[0x55, 0x04, *last][..]);
                let (Some((_, key)), Some(tag)) =
                    (ATTRIBUTES.iter().find(known), attribute.first().copied())
                else {
                    continue;
                };
                let value = take(&mut attribute, tag).unwrap_or_default();
                let value = String::from_utf8_lossy(value);
                parts.push(format!("{key}={}", value.escape_default()));
            }
        }
        let text = parts.join(", ");
        match text.char_indices().nth(NAME_CHARS) {
            _ if text.is_empty() => f.write_str("a name without CN, O, OU and C"),
            Some((end, _)) => write!(f, "{}...", &text[..end]),
            None => f.write_str(&text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(tag: u8, text: &str) -> Option<Date> {
        let mut der = vec![tag, u8::try_from(text.len()).unwrap()];
        der.extend(text.as_bytes());
        take_time(&mut &der[..])
    }

    /// The seconds are those of date(1).
    #[test]
    fn times() {
        for (text, seconds, printed) in [
            ("19700101000000Z", 0, "1970-01-01 00:00:00 UTC"),
            ("20000229235959Z", 951_868_799, "2000-02-29 23:59:59 UTC"),
            ("20261130100322Z", 1_796_033_002, "2026-11-30 10:03:22 UTC"),
            ("21000301000000Z", 4_107_542_400, "2100-03-01 00:00:00 UTC"),
            (
                "99991231235959Z",
                253_402_300_799,
                "9999-12-31 23:59:59 UTC",
            ),
            ("19691231235958Z", -2, "1969-12-31 23:59:58 UTC"),
        ] {
            let date = time(GENERALIZED_TIME, text);
            assert_eq!(date, Some(Date(seconds)), "{text}");
            assert_eq!(date.unwrap().to_string(), printed);
        }
        assert_eq!(
            time(UTC_TIME, "491231235959Z"),
            time(GENERALIZED_TIME, "20491231235959Z")
        );
        assert_eq!(
            time(UTC_TIME, "500101000000Z"),
            time(GENERALIZED_TIME, "19500101000000Z")
        );
        for bad in [
            "",
            "20261130100322",
            "20261330100322Z",
            "2026113010032xZ",
            "202611301003220Z",
        ] {
            assert_eq!(time(GENERALIZED_TIME, bad), None, "{bad}");
        }
    }

    #[test]
    fn standing() {
        let dates = Dates {
            name: Name(Vec::new()),
            from: Date(1000),
            until: Date(2000),
        };
        let at = |now| dates.at(Date(now), Duration::from_secs(60));
        assert_eq!(at(939), Standing::NotYet);
        assert_eq!((at(940), at(1899)), (Standing::Holds, Standing::Holds));
        assert_eq!((at(1900), at(1999)), (Standing::Ends, Standing::Ends));
        assert_eq!((at(2000), at(9999)), (Standing::Expired, Standing::Expired));
    }

    /// No bytes make it panic.
    #[test]
    fn what_is_no_certificate() {
        let mut der = vec![SEQUENCE, 0x84, 0xff, 0xff, 0xff, 0xff];
        for _ in 0..2 {
            assert_eq!(Dates::of_certificate(&der), None);
            assert_eq!(Dates::of_list(&der), None);
            der = vec![SEQUENCE, 4, SEQUENCE, 2, VERSION, 0];
        }
        assert_eq!(Dates::of_list(&[]), None);
    }
}
