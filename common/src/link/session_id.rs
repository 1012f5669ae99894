//! The id of a session: what an operator's decision is about.
//!
//! Names are for people, and are used again: `image-proxy --session web` gives the second migration the name of the
//! first. A decision about a set in doubt must not hit another process's set, so it can name the session by an id that no
//! other session has, before or after. Both daemons know it without a word on the link: it is made of the session's key,
//! 64 random bits that image-cache draws and tells image-proxy in WELCOME. The key itself is a secret (it lets a
//! connection join the session) and is never shown; the id is the beginning of a digest of it.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::{BuildHasher, Hasher};
use std::str::FromStr;

use rustix::rand::{getrandom, GetRandomFlags};

use crate::image::{NameError, SessionName};
use crate::link::codec::SetNumber;

/// What is shown: enough that no two sessions have the same, and short enough to be copied by hand.
const ID_BYTES: usize = 6;
const DIGITS: usize = ID_BYTES * 2;

/// No session name can begin with it, so an id is never taken for a name.
const SIGN: char = '@';

/// What no other digest of a key is made with.
const CONTEXT: &[u8] = b"criulink session id\0";

/// A session of image-cache, the same on both hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId([u8; ID_BYTES]);

impl SessionId {
    /// The id of the session with this key.
    pub fn of_key(key: u64) -> Self {
        let digest = ring::digest::digest(
            &ring::digest::SHA256,
            &[CONTEXT, &key.to_le_bytes()].concat(),
        );
        let mut id = [0; ID_BYTES];
        id.copy_from_slice(&digest.as_ref()[..ID_BYTES]);
        Self(id)
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SIGN}")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A key of a new session. Never the same twice, whatever restarts.
pub fn new_key() -> u64 {
    let mut random = [0; 8];
    loop {
        match getrandom(&mut random, GetRandomFlags::empty()) {
            Ok(8) => return u64::from_ne_bytes(random),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // A filter for system calls: the standard library then has other sources of its own.
            Err(_) => return RandomState::new().build_hasher().finish(),
        }
    }
}

/// What an operator names: everything of a name, one session, or one set of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    Name(SessionName),
    Id(SessionId),
    Set(SessionId, SetNumber),
}

/// Why a text names no session.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadWanted {
    #[error("neither the name of a session nor an id: {0}")]
    Name(#[from] NameError),
    #[error("an id is {SIGN} and {DIGITS} digits out of 0-9 and a-f, as `status` shows it; with .N behind it, it is set N of that session")]
    Id,
}

impl Wanted {
    /// Whether it is this set of this session.
    pub fn includes(&self, name: &SessionName, id: Option<SessionId>, set: SetNumber) -> bool {
        match self {
            Self::Set(_, wanted) => self.is_session(name, id) && *wanted == set,
            Self::Name(_) | Self::Id(_) => self.is_session(name, id),
        }
    }

    /// Whether it is, or is of, this session. `id`: as far as it is known.
    pub fn is_session(&self, name: &SessionName, id: Option<SessionId>) -> bool {
        match self {
            Self::Name(wanted) => wanted == name,
            Self::Id(wanted) | Self::Set(wanted, _) => Some(*wanted) == id,
        }
    }
}

impl FromStr for Wanted {
    type Err = BadWanted;

    fn from_str(text: &str) -> Result<Self, BadWanted> {
        let Some(digits) = text.strip_prefix(SIGN) else {
            return Ok(Self::Name(SessionName::new(text)?));
        };
        let (digits, set) = match digits.split_once('.') {
            Some((digits, set)) => (digits, Some(set.parse().map_err(|_| BadWanted::Id)?)),
            None => (digits, None),
        };
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if digits.len() != DIGITS || !digits.bytes().all(hex) {
            return Err(BadWanted::Id);
        }
        let mut id = [0; ID_BYTES];
        for (n, byte) in id.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).map_err(|_| BadWanted::Id)?;
        }
        let id = SessionId(id);
        Ok(set.map_or(Self::Id(id), |set| Self::Set(id, SetNumber(set))))
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Id(id) => write!(f, "{id}"),
            Self::Set(id, set) => write!(f, "{id}.{}", set.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both daemons must make the same of a key.
    #[test]
    fn golden_id() {
        assert_eq!(SessionId::of_key(0x0102).to_string(), "@dc4a9c109090");
        assert_ne!(SessionId::of_key(0x0102), SessionId::of_key(0x0103));
        assert_ne!(new_key(), new_key());
    }

    #[test]
    fn an_id_is_never_a_name() {
        let id = SessionId::of_key(7);
        assert!(SessionName::new(&id.to_string()).is_err());
        assert_eq!(id.to_string().parse(), Ok(Wanted::Id(id)));
        let set = Wanted::Set(id, SetNumber(3));
        assert_eq!(set.to_string(), format!("{id}.3"));
        assert_eq!(set.to_string().parse(), Ok(set));
        let name = SessionName::new("web").unwrap();
        assert_eq!("web".parse(), Ok(Wanted::Name(name)));
        for bad in [
            "@",
            "@12",
            "@1234567890AB",
            "@1234567890abc",
            "@1234567890ab.",
            "@1234567890ab.x",
            "@1234567890ab.-1",
            "@+234567890ab",
            "@äääääääääääää",
            "",
            "../x",
        ] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_wanted() {
        let (id, other) = (SessionId::of_key(7), SessionId::of_key(8));
        let name = SessionName::new("web").unwrap();
        let is = |wanted: &Wanted, id, set| wanted.includes(&name, id, SetNumber(set));
        for (wanted, own, others, first, unknown) in [
            (Wanted::Name(name.clone()), true, true, true, true),
            (Wanted::Id(id), true, false, true, false),
            (Wanted::Set(id, SetNumber(2)), true, false, false, false),
        ] {
            assert_eq!(is(&wanted, Some(id), 2), own, "{wanted}");
            assert_eq!(is(&wanted, Some(other), 2), others, "{wanted}");
            assert_eq!(is(&wanted, Some(id), 1), first, "{wanted}");
            assert_eq!(is(&wanted, None, 2), unknown, "{wanted}");
        }
    }
}
