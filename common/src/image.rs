//! The names that travel: image, snapshot and session. Newtypes, so that they cannot be
//! swapped, checked once where peer bytes become values: nothing behind this module has to
//! ask again whether a name may touch a path or a log line.

use std::fmt;
use std::sync::Arc;

/// `inventory.img`: the image that a dump opens last and a restore reads first
/// (CRIU `cr-dump.c`, `cr-restore.c`), and so the seal of a set.
pub const INVENTORY: &str = "inventory.img";

/// A file name that CRIU gives an image: one path component of at most 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName(Arc<str>);

/// The literal string that a `--remote` CRIU was given as `-D` ("snapshot id", "namespace" in
/// the original patch). It may contain `/`: it is a key here and never used as a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotId(Arc<str>);

/// The name of a session. The cache makes a directory of this name, and people type it into
/// commands, so it is restricted to letters, digits, `.`, `_` and `-`, begins with a letter or a
/// digit, and has at most 64 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionName(Arc<str>);

/// Why a name was refused. Holds no part of the name: it may be 4 KiB of hostile text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("the name is empty")]
    Empty,
    #[error("the name has {0} bytes, the limit is {1}")]
    TooLong(usize, usize),
    #[error("the name contains a byte that is not allowed ({0:#04x})")]
    Byte(u8),
    /// A control character, also one beyond ASCII (names are in our logs), or a slash.
    #[error("the name contains a character that is not allowed ({0:#04x})")]
    Character(u32),
    #[error("the name is not one path component")]
    NotAComponent,
    #[error("the name does not begin with a letter or a digit ({0:#04x})")]
    Begins(u8),
}

impl ImageName {
    /// NAME_MAX of every file system that CRIU can write its images to.
    pub const MAX_BYTES: usize = 255;

    pub fn new(text: &str) -> Result<Self, NameError> {
        check_length(text, Self::MAX_BYTES)?;
        if text == "." || text == ".." {
            return Err(NameError::NotAComponent);
        }
        match text.chars().find(|&c| c == '/' || c.is_control()) {
            Some(c) => Err(NameError::Character(u32::from(c))),
            None => Ok(Self(text.into())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `inventory.img`, which a restore reads first.
    pub fn is_inventory(&self) -> bool {
        self.as_str() == INVENTORY
    }

    /// `pages-N.img`: raw page data. CRIU notices when one ends early ("Reached EOF
    /// unexpectedly"), which it does not for a protobuf image cut between two entries.
    pub fn is_pages(&self) -> bool {
        self.as_str().starts_with("pages-")
    }

    /// `pagemap-N.img`: which pages a task has, and where they are.
    pub fn is_pagemap(&self) -> bool {
        self.as_str().starts_with("pagemap-")
    }
}

impl SnapshotId {
    /// What CRIU's own daemons cut their strings to (`PATHLEN` in `img-remote.h`).
    pub const MAX_BYTES: usize = 4095;

    pub fn new(text: &str) -> Result<Self, NameError> {
        check_length(text, Self::MAX_BYTES)?;
        match text.chars().find(|c| c.is_control()) {
            Some(c) => Err(NameError::Character(u32::from(c))),
            None => Ok(Self(text.into())),
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl SessionName {
    /// Longest name of a session.
    pub const MAX_BYTES: usize = 64;

    pub fn new(text: &str) -> Result<Self, NameError> {
        check_length(text, Self::MAX_BYTES)?;
        // `-D` and `--help` would be options, `.` another directory.
        match text.as_bytes()[0] {
            first if first.is_ascii_alphanumeric() => {}
            first => return Err(NameError::Begins(first)),
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        match text.bytes().find(|&b| !allowed(b)) {
            Some(b) => Err(NameError::Byte(b)),
            None => Ok(Self(text.into())),
        }
    }

    /// A unique name: the host's name, as far as it is allowed, and 64 random bits.
    pub fn unique() -> Self {
        let mut random = [0u8; 8];
        // A short read cannot happen for 8 bytes once the pool is initialised (getrandom(2)).
        let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
        let uname = rustix::system::uname();
        let host: String = uname
            .nodename()
            .to_string_lossy()
            .chars()
            .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
            .skip_while(|c| *c == '-')
            .take(40)
            .collect();
        let host = if host.is_empty() { "session" } else { &host };
        Self(format!("{host}-{:016x}", u64::from_be_bytes(random)).into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn check_length(text: &str, max: usize) -> Result<(), NameError> {
    match text.len() {
        0 => Err(NameError::Empty),
        n if n > max => Err(NameError::TooLong(n, max)),
        _ => Ok(()),
    }
}

macro_rules! text_traits {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", &*self.0)
            }
        }
        impl std::str::FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::new(text)
            }
        }
    )*};
}
text_traits!(ImageName, SnapshotId, SessionName);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn image_names_are_one_component() {
        for good in [
            "inventory.img",
            "pages-1.img",
            "tmpfs-dev-0.tar.gz",
            "..img",
            "a b",
        ] {
            assert_eq!(
                ImageName::new(good).map(|n| n.to_string()),
                Ok(good.to_owned())
            );
        }
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "/",
            "../x",
            "a\0b",
            "a\nb",
            "a\x7f",
            "a\u{9b}2J",
        ] {
            assert!(ImageName::new(bad).is_err(), "{bad:?}");
        }
        assert!(ImageName::new(&"a".repeat(255)).is_ok());
        assert_eq!(
            ImageName::new(&"a".repeat(4096)),
            Err(NameError::TooLong(4096, 255))
        );
    }

    #[test]
    fn snapshot_ids_are_keys_not_paths() {
        for good in [".", "/tmp/pre1", "/proc/7/fd/9", "../x", "a b"] {
            assert!(SnapshotId::new(good).is_ok(), "{good:?}");
        }
        assert!(SnapshotId::new("").is_err());
        assert!(SnapshotId::new("a\0").is_err() && SnapshotId::new("a\u{91}").is_err());
        assert!(SnapshotId::new(&"a".repeat(4096)).is_err());
    }

    #[test]
    fn unique_session_names_differ_and_are_valid() {
        let (a, b) = (SessionName::unique(), SessionName::unique());
        assert_ne!(a, b);
        assert_eq!(SessionName::new(a.as_str()), Ok(a));
    }

    #[test]
    fn a_session_name_is_no_option() {
        for good in ["web", "7", "W-1_a.b", &"a".repeat(64)] {
            assert!(SessionName::new(good).is_ok(), "{good}");
        }
        for bad in [
            "-D", "--help", "-", ".", "..", ".x", "_x", "a/b", "a b", "é", "",
        ] {
            assert!(SessionName::new(bad).is_err(), "{bad}");
        }
        assert_eq!(SessionName::new("-D"), Err(NameError::Begins(b'-')));
    }

    proptest! {
        #[test]
        fn a_session_name_is_a_harmless_directory_name(text in ".{0,80}") {
            if let Ok(name) = SessionName::new(&text) {
                prop_assert!(!name.as_str().contains('/'));
                prop_assert!(name.as_str().as_bytes()[0].is_ascii_alphanumeric());
                prop_assert!(name.as_str().len() <= SessionName::MAX_BYTES);
            }
        }
    }
}
