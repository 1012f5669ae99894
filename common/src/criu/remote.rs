//! `--remote`: what CRIU asks on `img-proxy.sock` and `img-cache.sock`, and the answers.
//!
//! One connection is one operation. The message has no type tag; what it means follows from
//! its strings and its open mode ([`Request::decode`]).

use prost::Message;

use crate::criu::frame::{self, MessageError};
use crate::image::{ImageName, SnapshotId};

/// Name of the socket on which `criu dump --remote` looks for image-proxy.
pub const PROXY_SOCKET: &str = "img-proxy.sock";
/// Name of the socket on which `criu restore --remote` looks for image-cache.
pub const CACHE_SOCKET: &str = "img-cache.sock";

/// `O_APPEND` as x86-64 and arm64 number it; CRIU puts the host's number on the wire.
const O_APPEND: u32 = 0x400;
/// Name of the snapshot list (`PARENT_IMG` in `img-remote.h`).
const LIST_NAME: &str = "parent";
/// How clients before commit 55d417de6 spell "no snapshot id".
const NULL_ID: &str = "null";

#[derive(Clone, PartialEq, Message)]
struct LocalImageEntry {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(string, optional, tag = "2")]
    snapshot_id: Option<String>,
    #[prost(uint32, optional, tag = "3")]
    open_mode: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct LocalImageReplyEntry {
    #[prost(uint32, required, tag = "1")]
    error: u32,
}

#[derive(Clone, PartialEq, Message)]
struct SnapshotIdEntry {
    #[prost(string, optional, tag = "1")]
    snapshot_id: Option<String>,
}

/// How a client writes "no snapshot id". Only the older spelling belongs to clients some of
/// which can dump with parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdSpelling {
    /// `"null"`, `DUMP_FINISH`, `RESTORE_FINISH`.
    Null,
    /// The empty string.
    Empty,
}

/// One operation of a `--remote` client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// First thing of dump and pre-dump; a framed snapshot id follows ([`decode_snapshot_id`]).
    ListPush(IdSpelling),
    ListRead(IdSpelling),
    Write {
        snapshot: SnapshotId,
        image: ImageName,
        append: bool,
        mode: u32,
    },
    Read {
        snapshot: SnapshotId,
        image: ImageName,
    },
    /// dump is over, well or not: it carries no status and comes after the kill.
    FinishDump,
    /// restore has resumed the tasks; a failed restore sends nothing.
    FinishRestore,
}

impl Request {
    /// The request in the body of a message.
    pub fn decode(body: &[u8]) -> Result<Self, MessageError> {
        let entry = LocalImageEntry::decode(body)?;
        // A missing field must not read as an empty one: that would be a FINISH.
        let name = entry.name.ok_or(MessageError::Missing("name"))?;
        let id = entry
            .snapshot_id
            .ok_or(MessageError::Missing("snapshot_id"))?;
        let mode = entry.open_mode.ok_or(MessageError::Missing("open_mode"))?;

        let spelling = match id.as_str() {
            "" => IdSpelling::Empty,
            NULL_ID => IdSpelling::Null,
            _ => return Self::of_image(&id, &name, mode),
        };
        match (name.as_str(), mode) {
            (LIST_NAME, 0) => Ok(Self::ListRead(spelling)),
            (LIST_NAME, m) if m & O_APPEND != 0 => Ok(Self::ListPush(spelling)),
            (LIST_NAME, mode) => Err(MessageError::Mode {
                what: "the snapshot list",
                mode,
            }),
            ("", 0) | ("RESTORE_FINISH", _) => Ok(Self::FinishRestore),
            ("", _) | ("DUMP_FINISH", _) => Ok(Self::FinishDump),
            _ => Err(MessageError::NoSnapshot),
        }
    }

    fn of_image(id: &str, name: &str, mode: u32) -> Result<Self, MessageError> {
        let snapshot = SnapshotId::new(id).map_err(MessageError::SnapshotId)?;
        let image = ImageName::new(name).map_err(MessageError::ImageName)?;
        // CRIU itself takes every mode but O_RDONLY to the write path (`img-remote.c`).
        Ok(match mode {
            0 => Self::Read { snapshot, image },
            _ => Self::Write {
                snapshot,
                image,
                append: mode & O_APPEND != 0,
                mode,
            },
        })
    }
}

/// The framed answer to a list or image read: 0, or a positive errno. Anything but 0 and
/// ENOENT is fatal for CRIU.
pub fn encode_reply(error: u32) -> Vec<u8> {
    frame::encode(&LocalImageReplyEntry { error })
}

/// One framed entry of the snapshot list.
pub fn encode_snapshot_id(id: &str) -> Vec<u8> {
    frame::encode(&SnapshotIdEntry {
        snapshot_id: Some(id.to_owned()),
    })
}

/// The id in an entry of the snapshot list.
pub fn decode_snapshot_id(body: &[u8]) -> Result<SnapshotId, MessageError> {
    let id = SnapshotIdEntry::decode(body)?
        .snapshot_id
        .ok_or(MessageError::Missing("snapshot_id"))?;
    SnapshotId::new(&id).map_err(MessageError::SnapshotId)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request(name: &str, id: &str, mode: u32) -> Vec<u8> {
        LocalImageEntry {
            name: Some(name.into()),
            snapshot_id: Some(id.into()),
            open_mode: Some(mode),
        }
        .encode_to_vec()
    }

    fn id(text: &str) -> SnapshotId {
        SnapshotId::new(text).unwrap()
    }

    fn image(text: &str) -> ImageName {
        ImageName::new(text).unwrap()
    }

    /// The reference encodings of criu-remote.md, produced there with protobuf-c 1.4.1.
    #[test]
    fn golden_requests() {
        let write = b"\x0a\x0dinventory.img\x12\x06/img/1\x18\x01";
        assert_eq!(
            Request::decode(write),
            Ok(Request::Write {
                snapshot: id("/img/1"),
                image: image("inventory.img"),
                append: false,
                mode: 1
            })
        );
        let push = b"\x0a\x06parent\x12\x00\x18\x80\x08";
        assert_eq!(
            Request::decode(push),
            Ok(Request::ListPush(IdSpelling::Empty))
        );
        let read_list = b"\x0a\x06parent\x12\x00\x18\x00";
        assert_eq!(
            Request::decode(read_list),
            Ok(Request::ListRead(IdSpelling::Empty))
        );
        let finish_dump = b"\x0a\x00\x12\x00\x18\x01";
        assert_eq!(Request::decode(finish_dump), Ok(Request::FinishDump));
        let finish_restore = b"\x0a\x00\x12\x00\x18\x00";
        assert_eq!(Request::decode(finish_restore), Ok(Request::FinishRestore));
    }

    #[test]
    fn golden_answers() {
        assert_eq!(encode_reply(0), b"\x02\0\0\0\x08\x00");
        assert_eq!(encode_reply(2), b"\x02\0\0\0\x08\x02");
        assert_eq!(
            encode_snapshot_id("/img/1"),
            b"\x08\0\0\0\x0a\x06/img/1".to_vec()
        );
        assert_eq!(decode_snapshot_id(b"\x0a\x06/img/1"), Ok(id("/img/1")));
    }

    #[test]
    fn both_spellings() {
        for (name, mode, expected) in [
            ("parent", 0x400, Request::ListPush(IdSpelling::Null)),
            ("parent", 0, Request::ListRead(IdSpelling::Null)),
            ("DUMP_FINISH", 1, Request::FinishDump),
            ("RESTORE_FINISH", 0, Request::FinishRestore),
        ] {
            assert_eq!(Request::decode(&request(name, "null", mode)), Ok(expected));
        }
    }

    #[test]
    fn any_mode_but_zero_writes_and_append_appends() {
        for (mode, append) in [
            (1, false),
            (2, false),
            (0x241, false),
            (0x400, true),
            (0x401, true),
        ] {
            match Request::decode(&request("x.img", "/i", mode)) {
                Ok(Request::Write {
                    append: a, mode: m, ..
                }) => assert_eq!((a, m), (append, mode)),
                other => panic!("mode {mode:#x}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_missing_field_is_never_a_finish() {
        assert_eq!(Request::decode(b""), Err(MessageError::Missing("name")));
        assert_eq!(
            Request::decode(b"\x0a\x00\x12\x00"),
            Err(MessageError::Missing("open_mode"))
        );
        assert_eq!(
            Request::decode(b"\x0a\x00\x18\x01"),
            Err(MessageError::Missing("snapshot_id"))
        );
    }

    #[test]
    fn bad_names_are_refused() {
        for name in ["a/b", "..", "", "x\0y"] {
            assert!(
                Request::decode(&request(name, "/i", 1)).is_err(),
                "{name:?}"
            );
        }
        assert!(Request::decode(&request("x.img", "", 1)).is_err());
        assert!(Request::decode(&request(&"n".repeat(4096), "/i", 1)).is_err());
        assert!(Request::decode(&request("parent", "", 1)).is_err());
        assert_eq!(
            frame::body_length([0xff, 0xff, 0, 0]),
            Err(MessageError::TooLong(0xffff))
        );
    }

    #[test]
    fn every_truncation_is_an_error() {
        let whole = request("inventory.img", "/img/1", 1);
        for cut in 0..whole.len() {
            assert!(Request::decode(&whole[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Request::decode(&body);
            let _ = decode_snapshot_id(&body);
        }

        #[test]
        fn snapshot_ids_round_trip(text in "[ -~]{1,300}") {
            let framed = encode_snapshot_id(&text);
            let length = frame::body_length(framed[..4].try_into().unwrap()).unwrap();
            prop_assert_eq!(length, framed.len() - 4);
            let decoded = decode_snapshot_id(&framed[4..]).unwrap();
            prop_assert_eq!(decoded.as_str(), text);
        }
    }
}
