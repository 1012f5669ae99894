//! The handshake: one HELLO from the proxy, one answer from the cache, before any frame.
//!
//! Both begin with the magic and have a fixed head, so that either side can tell a peer of
//! another version, or something else entirely, from its first 16 bytes.

use std::ops::RangeInclusive;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};

use crate::image::{NameError, SessionName};
use crate::link::codec::{FrameFormat, SetNumber};
use crate::link::{MAX_CONNECTIONS, MAX_REASON_BYTES};
use crate::text::is_unseen;

/// The first bytes of each connection of the link.
pub const MAGIC: [u8; 8] = *b"CRIULINK";
/// Length of what each side sends before the body of its handshake.
pub const HEAD_BYTES: usize = 16;

/// Longest body: a reason, or a session name and a software name, and their lengths.
const MAX_BODY_BYTES: u32 = 2048;
const MAX_SOFTWARE_BYTES: usize = 128;

/// What comes before the texts of a HELLO.
const NUMBERS_BYTES: usize = 8 + 8 + 8 + 2 + 2 + 1 + 1 + 2 + 4;

/// At the end of the body of HELLO and WELCOME: CRC-32C of all before it, head included.
const CHECK_BYTES: usize = 4;

const FLAG_CHECKSUMS: u8 = 1;

/// Why a connection is no link to this peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("the peer does not speak the image link protocol")]
    Magic,
    #[error("the handshake announces {0} bytes, the limit is {MAX_BODY_BYTES}")]
    TooLong(u32),
    #[error("the handshake is malformed")]
    Malformed,
    #[error("the handshake was damaged on its way: wrong checksum")]
    Checksum,
    #[error("connection {connection} of {connections} cannot exist")]
    Connection { connection: u16, connections: u16 },
    #[error("bad session name: {0}")]
    Session(#[from] NameError),
    #[error("no common version: the peer speaks {theirs_min} to {theirs_max}, we {ours_min} to {ours_max}")]
    Version {
        theirs_min: u16,
        theirs_max: u16,
        ours_min: u16,
        ours_max: u16,
    },
    #[error("the cache chose version {0}, which was not offered")]
    NotOffered(u16),
}

/// proxy -> cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    pub versions: RangeInclusive<u16>,
    /// Random, the same for as long as a proxy runs. A proxy that comes back with a session
    /// name whose old connection hangs somewhere replaces it; no other proxy can.
    pub proxy: u64,
    /// Which connection of its session this is.
    pub place: Place,
    /// How many connections the session has.
    pub connections: u16,
    /// Both ways.
    pub frame_format: FrameFormat,
    /// How long the proxy tries to replace a connection that broke; zero: not at all.
    pub patience: Duration,
    pub session: SessionName,
    /// Name and version of the sending program, for the other side's log.
    pub software: String,
}

/// The first connection of a session opens it; the others join it and carry image data alone.
/// One that broke is replaced by one that resumes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `opening` counts the sessions that this proxy has tried to open, from 1: a HELLO that was
    /// held up on its way is known by it. 0: not numbered.
    First { opening: u64 },
    /// `key` is the one of the session's WELCOME: it tells a session from an older one of the
    /// same name and proxy, and no other peer knows it.
    Joins { connection: u16, key: u64 },
    /// Of what the cache sent on this connection the proxy has `received` bytes. `attempt` counts
    /// the HELLOs that would resume it, see [`is_later`].
    Resumes {
        connection: u16,
        key: u64,
        received: u64,
        attempt: u16,
    },
    /// Brings the decision about a set of a session whose link is gone: COMMIT, SET_ABORT or SET_DOUBT, and GOODBYE.
    /// From version 7 on.
    Decides { key: u64, set: SetNumber },
}

/// cache -> proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Welcome {
        version: u16,
        /// What further connections of this session have to show.
        key: u64,
        /// So many bytes that the proxy sent on this connection have arrived: 0 on a new one.
        received: u64,
        /// How long the cache waits for a connection that broke; zero: not at all.
        patience: Duration,
        software: String,
    },
    Refused {
        why: Refusal,
        reason: String,
    },
}

/// Why a cache refuses a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Version,
    /// Another proxy is connected with this session name.
    SessionInUse,
    /// The cache is stopping, or at a limit.
    Unavailable,
    /// A further connection, or one to be resumed, of a session that is not here, or not of this
    /// proxy, or does not wait for it.
    NoSession,
    /// A later HELLO of this proxy has taken the place already.
    Overtaken,
}

/// The attempt after this one: counted from 1, and after 65,535 comes 1 again.
pub fn next_attempt(attempt: u16) -> u16 {
    attempt.checked_add(1).unwrap_or(1)
}

/// Whether an attempt was made after another one of the same connection, as far as their numbers tell:
/// 0 is none. The difference counts, as in RFC 1982. It is small, since each attempt that the cache
/// takes is what later ones are compared with.
pub fn is_later(attempt: u16, than: u16) -> bool {
    attempt == 0 || than == 0 || (1..0x8000).contains(&attempt.wrapping_sub(than))
}

/// The highest version that both speak.
pub fn choose_version(
    theirs: &RangeInclusive<u16>,
    ours: &RangeInclusive<u16>,
) -> Result<u16, HandshakeError> {
    let newest = *theirs.end().min(ours.end());
    if newest < *theirs.start() || newest < *ours.start() {
        return Err(HandshakeError::Version {
            theirs_min: *theirs.start(),
            theirs_max: *theirs.end(),
            ours_min: *ours.start(),
            ours_max: *ours.end(),
        });
    }
    Ok(newest)
}

/// Splits a head into its two numbers and the length of the body to read next.
fn decode_head(head: &[u8; HEAD_BYTES]) -> Result<(u16, u16, usize), HandshakeError> {
    let mut head = &head[..];
    if head[..8] != MAGIC {
        return Err(HandshakeError::Magic);
    }
    head.advance(8);
    let (a, b, length) = (head.get_u16_le(), head.get_u16_le(), head.get_u32_le());
    if length > MAX_BODY_BYTES {
        return Err(HandshakeError::TooLong(length));
    }
    Ok((a, b, length as usize))
}

/// Length of the body that follows a head.
pub fn body_length(head: &[u8; HEAD_BYTES]) -> Result<usize, HandshakeError> {
    decode_head(head).map(|(_, _, length)| length)
}

/// Appends the texts to `body`, puts the head before it and, but for a refusal, the checksum
/// behind it.
fn encode(a: u16, b: u16, mut body: BytesMut, texts: &[&str], checked: bool) -> BytesMut {
    for text in texts {
        // Session names, software names and reasons are all cut far below u16::MAX.
        body.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
        body.put_slice(text.as_bytes());
    }
    let check_bytes = if checked { CHECK_BYTES } else { 0 };
    let length = body.len() + check_bytes;
    let mut out = BytesMut::with_capacity(HEAD_BYTES + length);
    out.put_slice(&MAGIC);
    out.put_u16_le(a);
    out.put_u16_le(b);
    out.put_u32_le(u32::try_from(length).unwrap_or(u32::MAX));
    out.unsplit(body);
    if checked {
        let check = crc32c::crc32c(&out);
        out.put_u32_le(check);
    }
    out
}

/// The body without its checksum, if that is right.
fn checked<'a>(head: &[u8; HEAD_BYTES], body: &'a [u8]) -> Result<&'a [u8], HandshakeError> {
    let (body, check) = body
        .split_last_chunk::<CHECK_BYTES>()
        .ok_or(HandshakeError::Malformed)?;
    match crc32c::crc32c_append(crc32c::crc32c(head), body) == u32::from_le_bytes(*check) {
        true => Ok(body),
        false => Err(HandshakeError::Checksum),
    }
}

/// Whole milliseconds, as far as they fit.
fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

fn take_text<'a>(body: &mut &'a [u8]) -> Result<&'a str, HandshakeError> {
    let split = |body: &mut &'a [u8], n: usize| {
        let (head, tail) = body.split_at_checked(n)?;
        *body = tail;
        Some(head)
    };
    let length = split(body, 2)
        .ok_or(HandshakeError::Malformed)?
        .get_u16_le();
    let bytes = split(body, usize::from(length)).ok_or(HandshakeError::Malformed)?;
    std::str::from_utf8(bytes).map_err(|_| HandshakeError::Malformed)
}

/// A peer's words, bounded and made harmless for a log line.
fn printable(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let clean = |c: char| if is_unseen(c) { '?' } else { c };
    text[..end].chars().map(clean).collect()
}

impl Hello {
    pub fn encode(&self) -> BytesMut {
        let (kind, connection, key, count, attempt) = match self.place {
            Place::First { opening } => (1, 0, 0, opening, 0),
            Place::Joins { connection, key } => (2, connection, key, 0, 0),
            Place::Resumes {
                connection,
                key,
                received,
                attempt,
            } => (3, connection, key, received, attempt),
            Place::Decides { key, set } => (4, 0, key, set.0.into(), 0),
        };
        let mut body = BytesMut::new();
        body.put_u64_le(self.proxy);
        body.put_u64_le(key);
        body.put_u64_le(count);
        body.put_u16_le(connection);
        body.put_u16_le(self.connections);
        body.put_u8(kind);
        body.put_u8(if self.frame_format.is_checked() {
            FLAG_CHECKSUMS
        } else {
            0
        });
        body.put_u16_le(attempt);
        body.put_u32_le(millis(self.patience));
        encode(
            *self.versions.start(),
            *self.versions.end(),
            body,
            &[self.session.as_str(), &self.software],
            true,
        )
    }

    pub fn decode(head: &[u8; HEAD_BYTES], body: &[u8]) -> Result<Self, HandshakeError> {
        let (min, max, _) = decode_head(head)?;
        // Before the body: a version that we do not know may have another one.
        choose_version(&(min..=max), &super::VERSIONS)?;
        let (mut numbers, mut body) = checked(head, body)?
            .split_at_checked(NUMBERS_BYTES)
            .ok_or(HandshakeError::Malformed)?;
        let (proxy, key) = (numbers.get_u64_le(), numbers.get_u64_le());
        let count = numbers.get_u64_le();
        let (connection, connections) = (numbers.get_u16_le(), numbers.get_u16_le());
        let (kind, flags, attempt) = (numbers.get_u8(), numbers.get_u8(), numbers.get_u16_le());
        let patience = Duration::from_millis(numbers.get_u32_le().into());
        let place = match (kind, connection, key, count, attempt) {
            (1, 0, 0, opening, 0) => Place::First { opening },
            (2, 1.., key, 0, 0) => Place::Joins { connection, key },
            (3, connection, key, received, attempt) => Place::Resumes {
                connection,
                key,
                received,
                attempt,
            },
            (4, 0, key, set @ 1.., 0) => Place::Decides {
                key,
                set: SetNumber(u32::try_from(set).map_err(|_| HandshakeError::Malformed)?),
            },
            _ => return Err(HandshakeError::Malformed),
        };
        if flags & !FLAG_CHECKSUMS != 0 {
            return Err(HandshakeError::Malformed);
        }
        if connection >= connections || connections > MAX_CONNECTIONS {
            return Err(HandshakeError::Connection {
                connection,
                connections,
            });
        }
        let session = SessionName::new(take_text(&mut body)?)?;
        let software = printable(take_text(&mut body)?, MAX_SOFTWARE_BYTES);
        match body.is_empty() {
            true => Ok(Self {
                versions: min..=max,
                proxy,
                place,
                connections,
                frame_format: FrameFormat::with_checksums(flags & FLAG_CHECKSUMS != 0),
                patience,
                session,
                software,
            }),
            false => Err(HandshakeError::Malformed),
        }
    }
}

impl Answer {
    pub fn encode(&self) -> BytesMut {
        match self {
            Self::Welcome {
                version,
                key,
                received,
                patience,
                software,
            } => {
                let mut body = BytesMut::new();
                body.put_u64_le(*key);
                body.put_u64_le(*received);
                body.put_u32_le(millis(*patience));
                encode(*version, 0, body, &[software], true)
            }
            Self::Refused { why, reason } => {
                let code = match why {
                    Refusal::Version => 1,
                    Refusal::SessionInUse => 2,
                    Refusal::Unavailable => 3,
                    Refusal::NoSession => 4,
                    Refusal::Overtaken => 5,
                };
                let reason = printable(reason, MAX_REASON_BYTES);
                encode(0, code, BytesMut::new(), &[&reason], false)
            }
        }
    }

    pub fn decode(
        head: &[u8; HEAD_BYTES],
        mut body: &[u8],
        offered: &RangeInclusive<u16>,
    ) -> Result<Self, HandshakeError> {
        let (version, code, _) = decode_head(head)?;
        // A refusal is laid out the same in all versions: it may be about the version.
        let (mut key, mut received, mut patience) = (0, 0, Duration::ZERO);
        if code == 0 {
            if !offered.contains(&version) {
                return Err(HandshakeError::NotOffered(version));
            }
            body = checked(head, body)?;
            let malformed = |_| HandshakeError::Malformed;
            key = body.try_get_u64_le().map_err(malformed)?;
            received = body.try_get_u64_le().map_err(malformed)?;
            patience = Duration::from_millis(body.try_get_u32_le().map_err(malformed)?.into());
        }
        let text = take_text(&mut body)?;
        if !body.is_empty() {
            return Err(HandshakeError::Malformed);
        }
        let why = match code {
            0 => {
                let software = printable(text, MAX_SOFTWARE_BYTES);
                return Ok(Self::Welcome {
                    version,
                    key,
                    received,
                    patience,
                    software,
                });
            }
            1 => Refusal::Version,
            2 => Refusal::SessionInUse,
            3 => Refusal::Unavailable,
            4 => Refusal::NoSession,
            5 => Refusal::Overtaken,
            _ => return Err(HandshakeError::Malformed),
        };
        Ok(Self::Refused {
            why,
            reason: printable(text, MAX_REASON_BYTES),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(bytes: &[u8]) -> (&[u8; HEAD_BYTES], &[u8]) {
        let (head, body) = bytes.split_first_chunk().unwrap();
        assert_eq!(body_length(head), Ok(body.len()));
        (head, body)
    }

    fn hello() -> Hello {
        Hello {
            versions: 5..=5,
            proxy: 5,
            place: Place::First { opening: 0 },
            connections: 1,
            frame_format: FrameFormat::Plain,
            patience: Duration::from_secs(30),
            session: SessionName::new("web").unwrap(),
            software: "p 1".to_owned(),
        }
    }

    #[test]
    fn golden_hello() {
        let bytes = hello().encode();
        assert_eq!(
            &bytes[..],
            b"CRIULINK\x05\0\x05\0\x32\0\0\0\
              \x05\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
              \0\0\x01\0\x01\0\0\0\x30\x75\0\0\
              \x03\0web\x03\0p 1\xf2\x5c\xda\xda"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(hello()));
    }

    #[test]
    fn golden_hello_of_a_further_connection() {
        let joins = Hello {
            place: Place::Joins {
                connection: 3,
                key: 0x0102,
            },
            connections: 4,
            frame_format: FrameFormat::Checked,
            ..hello()
        };
        let bytes = joins.encode();
        assert_eq!(
            &bytes[..],
            b"CRIULINK\x05\0\x05\0\x32\0\0\0\
              \x05\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
              \x03\0\x04\0\x02\x01\0\0\x30\x75\0\0\
              \x03\0web\x03\0p 1\xa7\xad\x8d\xe2"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(joins));
        let resumes = Hello {
            place: Place::Resumes {
                connection: 0,
                key: 0x0102,
                received: 1 << 40,
                attempt: 0x0607,
            },
            ..hello()
        };
        let bytes = resumes.encode();
        assert_eq!(
            &bytes[..],
            b"CRIULINK\x05\0\x05\0\x32\0\0\0\
              \x05\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\
              \0\0\x01\0\x03\0\x07\x06\x30\x75\0\0\
              \x03\0web\x03\0p 1\x34\x16\x70\x13"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(resumes));
        let decides = Hello {
            place: Place::Decides {
                key: 0x0102,
                set: SetNumber(3),
            },
            ..hello()
        };
        let bytes = decides.encode();
        assert_eq!(
            &bytes[..bytes.len() - CHECK_BYTES],
            b"CRIULINK\x05\0\x05\0\x32\0\0\0\
              \x05\0\0\0\0\0\0\0\x02\x01\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\
              \0\0\x01\0\x04\0\0\0\x30\x75\0\0\
              \x03\0web\x03\0p 1"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(decides));
        let third = Hello {
            place: Place::First { opening: 3 },
            ..hello()
        };
        let bytes = third.encode();
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(third));
    }

    #[test]
    fn attempts_are_later_than_those_before_them() {
        let mut attempt = 0;
        for n in 1..=200_000u32 {
            let before = attempt;
            attempt = next_attempt(before);
            assert!(attempt != 0, "0 is no number");
            assert!(is_later(attempt, before), "{n}");
            assert_eq!(is_later(before, attempt), before == 0, "{n}");
            assert!(!is_later(attempt, attempt), "the same one again");
        }
        // What is not numbered is not known to be late.
        assert!(is_later(0, 7) && is_later(7, 0) && is_later(0, 0));
    }

    /// Only what is resumed has attempts.
    #[test]
    fn attempts_of_other_kinds_are_malformed() {
        for kind in [1, 2] {
            let mut numbers = BytesMut::zeroed(NUMBERS_BYTES);
            (numbers[26], numbers[28], numbers[30]) = (2, kind, 1);
            numbers[24] = kind - 1;
            let bad = encode(5, 5, numbers, &["web", "p"], true);
            let (head, body) = split(&bad);
            assert_eq!(Hello::decode(head, body), Err(HandshakeError::Malformed));
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_is_seen() {
        let answer = Answer::Welcome {
            version: 5,
            key: 1,
            received: 2,
            patience: Duration::from_secs(3),
            software: "c".to_owned(),
        };
        let flips = |bytes: BytesMut| {
            (0..bytes.len() * 8).map(move |bit| {
                let mut bytes = bytes.to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                bytes
            })
        };
        for bytes in flips(hello().encode()) {
            let (head, body) = bytes.split_first_chunk().unwrap();
            assert!(body_length(head) != Ok(body.len()) || Hello::decode(head, body).is_err());
        }
        for bytes in flips(answer.encode()) {
            let (head, body) = bytes.split_first_chunk().unwrap();
            // What turns a welcome into a refusal is not a welcome.
            let welcome = Answer::decode(head, body, &(5..=5));
            assert!(
                body_length(head) != Ok(body.len())
                    || !matches!(welcome, Ok(Answer::Welcome { .. }))
            );
        }
    }

    #[test]
    fn connections_are_counted_from_0_and_bounded() {
        let first = |connections| Hello {
            connections,
            ..hello()
        };
        let joins = |connection, connections| Hello {
            place: Place::Joins { connection, key: 1 },
            connections,
            ..hello()
        };
        let decode = |hello: Hello| {
            let bytes = hello.encode();
            let (head, body) = split(&bytes);
            Hello::decode(head, body).map(|_| ())
        };
        assert_eq!(decode(first(MAX_CONNECTIONS)), Ok(()));
        assert_eq!(decode(joins(MAX_CONNECTIONS - 1, MAX_CONNECTIONS)), Ok(()));
        for bad in [
            first(0),
            first(MAX_CONNECTIONS + 1),
            joins(1, 1),
            joins(2, 2),
            joins(u16::MAX, u16::MAX),
        ] {
            let error = decode(bad.clone());
            assert!(
                matches!(error, Err(HandshakeError::Connection { .. })),
                "{bad:?}: {error:?}"
            );
        }
        // A first connection has no key to show.
        assert_eq!(decode(joins(0, 2)), Err(HandshakeError::Malformed));
    }

    #[test]
    fn golden_answers() {
        let welcome = Answer::Welcome {
            version: 5,
            key: 0x0102,
            received: 0x03,
            patience: Duration::from_millis(0x0405),
            software: "c".to_owned(),
        };
        let bytes = welcome.encode();
        assert_eq!(
            &bytes[..],
            b"CRIULINK\x05\0\0\0\x1b\0\0\0\x02\x01\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\
              \x05\x04\0\0\x01\0c\x9e\x44\x8e\x0c"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Answer::decode(head, body, &(5..=5)), Ok(welcome));
        for cut in 0..body.len() {
            assert!(Answer::decode(head, &body[..cut], &(5..=5)).is_err());
        }
        assert_eq!(
            Answer::decode(head, body, &(6..=6)),
            Err(HandshakeError::NotOffered(5))
        );
        // What a cache of version 1 says to us is understood, too.
        let old = b"CRIULINK\0\0\x01\0\x04\0\0\0\x02\0no";
        let (head, body) = split(old);
        let refused = Answer::Refused {
            why: Refusal::Version,
            reason: "no".to_owned(),
        };
        assert_eq!(Answer::decode(head, body, &(5..=5)), Ok(refused));
        for why in [
            Refusal::Version,
            Refusal::SessionInUse,
            Refusal::Unavailable,
            Refusal::NoSession,
            Refusal::Overtaken,
        ] {
            let refused = Answer::Refused {
                why,
                reason: "busy".to_owned(),
            };
            let bytes = refused.encode();
            let (head, body) = split(&bytes);
            assert_eq!(Answer::decode(head, body, &(5..=5)), Ok(refused));
        }
    }

    #[test]
    fn versions() {
        assert_eq!(choose_version(&(1..=3), &(2..=5)), Ok(3));
        assert_eq!(choose_version(&(4..=9), &(2..=5)), Ok(5));
        assert!(choose_version(&(1..=1), &(2..=5)).is_err());
        assert!(choose_version(&(6..=9), &(2..=5)).is_err());
        let future = Hello {
            versions: 8..=9,
            ..hello()
        }
        .encode();
        let (head, body) = split(&future);
        assert!(matches!(
            Hello::decode(head, body),
            Err(HandshakeError::Version { .. })
        ));
    }

    #[test]
    fn truncation_garbage_and_bad_names() {
        let bytes = hello().encode();
        let (head, body) = split(&bytes);
        for cut in 0..body.len() {
            assert!(Hello::decode(head, &body[..cut]).is_err(), "cut at {cut}");
        }
        let http = b"GET / HTTP/1.1\r\n";
        assert_eq!(body_length(http), Err(HandshakeError::Magic));
        let mut huge = *head;
        huge[12..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(body_length(&huge), Err(HandshakeError::TooLong(u32::MAX)));
        let mut numbers = BytesMut::zeroed(NUMBERS_BYTES);
        (numbers[26], numbers[28]) = (1, 1); // connections, kind
        let bad = encode(5, 5, numbers, &["../x", "p"], true);
        let (head, body) = split(&bad);
        assert!(matches!(
            Hello::decode(head, body),
            Err(HandshakeError::Session(_))
        ));
    }
}
