//! What `image-proxy status` and `image-cache status` show: one form for both, as JSON for
//! programs and as text for people. Sizes are bytes, times seconds, pages counts.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::units::human_size;

/// What `status --json` shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub program: String,
    pub version: String,
    /// image-proxy: where its cache is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// image-cache: what the images take, and what they may.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Newest last.
    pub sessions: Vec<Session>,
}

/// The memory of image-cache for images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub used_bytes: u64,
    pub limit_bytes: u64,
}

/// A session that is there.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Session {
    pub name: String,
    /// What no other session has ever had; `None` until image-cache has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<String>,
    pub state: String,
    pub age_seconds: f64,
    pub sets: Vec<Set>,
    pub rounds: Vec<Round>,
    /// What the page store holds for the series.
    pub page_store_bytes: u64,
}

/// A set of images in a session.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    pub snapshot: String,
    pub protocol: String,
    pub state: String,
    pub gated: bool,
    pub images: u64,
    pub bytes: u64,
    /// image-cache, with `--checksum`: of what arrived.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digests: Option<Digests>,
}

/// The checksums of a set, with `--checksum`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Of all images, as the source and the target compared it at the commit.
    pub set: String,
    pub images: Vec<ImageDigest>,
}

/// The checksum of one image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDigest {
    pub image: String,
    pub bytes: u64,
    pub crc32c: String,
}

/// One merged page server round.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    pub snapshot: String,
    pub new_pages: u64,
    pub replaced_pages: u64,
    pub unchanged_pages: u64,
    pub dropped_pages: u64,
    pub bytes: u64,
    pub seconds: f64,
}

impl Status {
    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = format!("{} {}", self.program, self.version);
        if let Some(cache) = &self.cache {
            let _ = write!(out, ", cache at {cache}");
        }
        if let Some(memory) = self.memory {
            let (used, limit) = (memory.used_bytes, memory.limit_bytes);
            let _ = write!(
                out,
                ", memory {} of {}",
                human_size(used),
                human_size(limit)
            );
        }
        out.push('\n');
        if self.sessions.is_empty() {
            out.push_str("no sessions\n");
        }
        for session in &self.sessions {
            session.write_text(&mut out);
        }
        out
    }
}

impl Session {
    fn write_text(&self, out: &mut String) {
        let _ = write!(
            out,
            "\nsession {}: {}, {:.0} s old",
            self.name, self.state, self.age_seconds
        );
        if let Some(id) = &self.id {
            let _ = write!(out, ", id {id}");
        }
        if let Some(peer) = &self.peer {
            let _ = write!(out, ", from {peer}");
        }
        if self.page_store_bytes > 0 {
            let _ = write!(out, ", page store {}", human_size(self.page_store_bytes));
        }
        out.push('\n');
        for (n, round) in (1..).zip(&self.rounds) {
            let rate = if round.seconds > 0.0 {
                round.bytes as f64 / round.seconds
            } else {
                0.0
            };
            // A rate is far below 2^64 and not negative.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let rate = human_size(rate as u64);
            let _ = writeln!(
                out,
                "  round {n}  {}: {} in {:.2} s ({rate}/s); pages: {} new, {} replaced, {} unchanged, {} dropped",
                round.snapshot, human_size(round.bytes), round.seconds,
                round.new_pages, round.replaced_pages, round.unchanged_pages, round.dropped_pages,
            );
        }
        for set in &self.sets {
            let gated = if set.gated { ", gated" } else { "" };
            let size = human_size(set.bytes);
            let _ = writeln!(
                out,
                "  set  {} ({}): {}{gated}, {} images, {size}",
                set.snapshot, set.protocol, set.state, set.images,
            );
            if let Some(digests) = &set.digests {
                let _ = writeln!(
                    out,
                    "       digest {} over {} images",
                    digests.set,
                    digests.images.len()
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_json() {
        let status = Status {
            program: "image-cache".into(),
            version: "1".into(),
            memory: Some(Memory {
                used_bytes: 1 << 20,
                limit_bytes: 1 << 30,
            }),
            sessions: vec![Session {
                name: "web".into(),
                id: Some("@dc4a9c109090".into()),
                peer: Some("10.0.0.1:5".into()),
                state: "receiving".into(),
                age_seconds: 3.0,
                rounds: vec![Round {
                    snapshot: "/d1".into(),
                    new_pages: 256,
                    bytes: 1 << 20,
                    seconds: 0.5,
                    ..Round::default()
                }],
                sets: vec![Set {
                    snapshot: "/d1".into(),
                    protocol: "page-server".into(),
                    state: "receiving".into(),
                    gated: true,
                    ..Set::default()
                }],
                page_store_bytes: 1 << 20,
            }],
            ..Status::default()
        };
        let expected = "\
image-cache 1, memory 1.00 MiB of 1.00 GiB

session web: receiving, 3 s old, id @dc4a9c109090, from 10.0.0.1:5, page store 1.00 MiB
  round 1  /d1: 1.00 MiB in 0.50 s (2.00 MiB/s); pages: 256 new, 0 replaced, 0 unchanged, 0 dropped
  set  /d1 (page-server): receiving, gated, 0 images, 0 B
";
        assert_eq!(status.to_text(), expected);
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
        assert!(Status::default().to_text().ends_with("no sessions\n"));
    }
}
