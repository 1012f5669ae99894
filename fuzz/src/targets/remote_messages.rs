//! Messages of `--remote`: any body. Names that are accepted are names; what we answer is what a
//! client reads.

use e2e_tests::fake::wire::{framed, one_string};
use image_common::criu::frame::{body_length, MAX_MESSAGE_BYTES};
use image_common::criu::remote::{decode_snapshot_id, encode_reply, encode_snapshot_id, Request};
use image_common::image::{ImageName, SnapshotId};

pub fn run(body: &[u8]) {
    if let Some((prefix, _)) = body.split_first_chunk() {
        if let Ok(length) = body_length(*prefix) {
            assert!(length <= MAX_MESSAGE_BYTES as usize);
        }
        let _ = encode_reply(u32::from_le_bytes(*prefix));
    }
    match Request::decode(body) {
        Ok(Request::Write {
            snapshot,
            image,
            append,
            mode,
        }) => {
            names(&snapshot, &image);
            assert!(mode != 0 && append == (mode & 0x400 != 0));
        }
        Ok(Request::Read { snapshot, image }) => names(&snapshot, &image),
        _ => {}
    }
    if let Ok(id) = decode_snapshot_id(body) {
        let again = encode_snapshot_id(id.as_str());
        assert_eq!(again, framed(&one_string(id.as_str().as_bytes())));
        assert_eq!(decode_snapshot_id(&again[4..]), Ok(id));
    }
}

fn names(snapshot: &SnapshotId, image: &ImageName) {
    assert_eq!(SnapshotId::new(snapshot.as_str()).as_ref(), Ok(snapshot));
    assert_eq!(ImageName::new(image.as_str()).as_ref(), Ok(image));
    // These mean something else.
    assert!(snapshot.as_str() != "null");
}
