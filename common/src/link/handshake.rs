//! The handshake: one HELLO from the proxy, one answer from the cache, before any frame.
//!
//! Both begin with the magic and have a fixed head, so that either side can tell a peer of
//! another version, or something else entirely, from its first 16 bytes.

use std::ops::RangeInclusive;

use bytes::{Buf, BufMut, BytesMut};

use super::MAX_REASON_BYTES;
use crate::image::{NameError, SessionName};

pub const MAGIC: [u8; 8] = *b"CRIULINK";
pub const HEAD_BYTES: usize = 16;

/// Longest body: a reason, or a session name and a software name, and their lengths.
const MAX_BODY_BYTES: u32 = 2048;
const MAX_SOFTWARE_BYTES: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    #[error("the peer does not speak the image link protocol")]
    Magic,
    #[error("the handshake announces {0} bytes, the limit is {MAX_BODY_BYTES}")]
    TooLong(u32),
    #[error("the handshake is malformed")]
    Malformed,
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
    /// name whose old connection hangs somewhere replaces it; nobody else can.
    pub proxy: u64,
    pub session: SessionName,
    /// Name and version of the sending program, for the other side's log.
    pub software: String,
}

/// cache -> proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Welcome { version: u16, software: String },
    Refused { why: Refusal, reason: String },
}

/// Why a cache refuses a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Version,
    /// Another proxy is connected with this session name.
    SessionInUse,
    /// The cache is stopping, or at a limit.
    Unavailable,
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

fn encode(a: u16, b: u16, number: Option<u64>, texts: &[&str]) -> BytesMut {
    let mut body = BytesMut::new();
    number.iter().for_each(|n| body.put_u64_le(*n));
    for text in texts {
        // Session names, software names and reasons are all cut far below u16::MAX.
        body.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
        body.put_slice(text.as_bytes());
    }
    let mut out = BytesMut::with_capacity(HEAD_BYTES + body.len());
    out.put_slice(&MAGIC);
    out.put_u16_le(a);
    out.put_u16_le(b);
    out.put_u32_le(u32::try_from(body.len()).unwrap_or(u32::MAX));
    out.unsplit(body);
    out
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
    let clean = |c: char| if c.is_control() { '?' } else { c };
    text[..end].chars().map(clean).collect()
}

impl Hello {
    pub fn encode(&self) -> BytesMut {
        encode(
            *self.versions.start(),
            *self.versions.end(),
            Some(self.proxy),
            &[self.session.as_str(), &self.software],
        )
    }

    pub fn decode(head: &[u8; HEAD_BYTES], mut body: &[u8]) -> Result<Self, HandshakeError> {
        let (min, max, _) = decode_head(head)?;
        // Before the body: a version that we do not know may have another one.
        choose_version(&(min..=max), &super::VERSIONS)?;
        let (proxy, rest) = body.split_first_chunk().ok_or(HandshakeError::Malformed)?;
        let proxy = u64::from_le_bytes(*proxy);
        body = rest;
        let session = SessionName::new(take_text(&mut body)?)?;
        let software = printable(take_text(&mut body)?, MAX_SOFTWARE_BYTES);
        match body.is_empty() {
            true => Ok(Self {
                versions: min..=max,
                proxy,
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
            Self::Welcome { version, software } => encode(*version, 0, None, &[software]),
            Self::Refused { why, reason } => {
                let code = match why {
                    Refusal::Version => 1,
                    Refusal::SessionInUse => 2,
                    Refusal::Unavailable => 3,
                };
                encode(0, code, None, &[&printable(reason, MAX_REASON_BYTES)])
            }
        }
    }

    pub fn decode(
        head: &[u8; HEAD_BYTES],
        mut body: &[u8],
        offered: &RangeInclusive<u16>,
    ) -> Result<Self, HandshakeError> {
        let (version, code, _) = decode_head(head)?;
        let text = take_text(&mut body)?;
        if !body.is_empty() {
            return Err(HandshakeError::Malformed);
        }
        let why = match code {
            0 if offered.contains(&version) => {
                let software = printable(text, MAX_SOFTWARE_BYTES);
                return Ok(Self::Welcome { version, software });
            }
            0 => return Err(HandshakeError::NotOffered(version)),
            1 => Refusal::Version,
            2 => Refusal::SessionInUse,
            3 => Refusal::Unavailable,
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
            versions: 1..=1,
            proxy: 5,
            session: SessionName::new("web").unwrap(),
            software: "p 1".to_owned(),
        }
    }

    #[test]
    fn golden_hello() {
        let bytes = hello().encode();
        assert_eq!(
            &bytes[..],
            b"CRIULINK\x01\0\x01\0\x12\0\0\0\x05\0\0\0\0\0\0\0\x03\0web\x03\0p 1"
        );
        let (head, body) = split(&bytes);
        assert_eq!(Hello::decode(head, body), Ok(hello()));
    }

    #[test]
    fn golden_answers() {
        let welcome = Answer::Welcome {
            version: 1,
            software: "c".to_owned(),
        };
        let bytes = welcome.encode();
        assert_eq!(&bytes[..], b"CRIULINK\x01\0\0\0\x03\0\0\0\x01\0c");
        let (head, body) = split(&bytes);
        assert_eq!(Answer::decode(head, body, &(1..=1)), Ok(welcome));
        assert_eq!(
            Answer::decode(head, body, &(2..=3)),
            Err(HandshakeError::NotOffered(1))
        );
        for why in [
            Refusal::Version,
            Refusal::SessionInUse,
            Refusal::Unavailable,
        ] {
            let refused = Answer::Refused {
                why,
                reason: "busy".to_owned(),
            };
            let bytes = refused.encode();
            let (head, body) = split(&bytes);
            assert_eq!(Answer::decode(head, body, &(1..=1)), Ok(refused));
        }
    }

    #[test]
    fn versions() {
        assert_eq!(choose_version(&(1..=3), &(2..=5)), Ok(3));
        assert_eq!(choose_version(&(4..=9), &(2..=5)), Ok(5));
        assert!(choose_version(&(1..=1), &(2..=5)).is_err());
        assert!(choose_version(&(6..=9), &(2..=5)).is_err());
        let future = Hello {
            versions: 7..=9,
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
        let bad = encode(1, 1, Some(0), &["../x", "p"]);
        let (head, body) = split(&bad);
        assert!(matches!(
            Hello::decode(head, body),
            Err(HandshakeError::Session(_))
        ));
    }
}
