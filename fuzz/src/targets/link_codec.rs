//! Frames of the link: any header and payload, with checksums and without. What is accepted is
//! within its limit, and is the same when it is encoded and decoded again.

use bytes::{BufMut, BytesMut};
use image_common::link::codec::{FrameFormat, Header, Message, CHECKED_HEADER_BYTES, HEADER_BYTES};
use image_common::link::{MAX_CONTROL_BYTES, MAX_DATA_BYTES, MAX_REASON_BYTES};

pub fn run(bytes: &[u8]) {
    if let Some((head, _)) = bytes.split_first_chunk::<CHECKED_HEADER_BYTES>() {
        if let Ok((header, _)) = Header::decode_checked(head) {
            assert_eq!(
                Header::decode(head.first_chunk().expect("longer")),
                Ok(header)
            );
        }
    }
    let Some((head, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return;
    };
    let Ok(header) = Header::decode(head) else {
        return;
    };
    let mut again = BytesMut::new();
    header.encode(&mut again);
    assert_eq!(again[..], head[..], "a header has one form");
    let limit = match header.as_data() {
        Some(_) => MAX_DATA_BYTES,
        None => MAX_CONTROL_BYTES,
    };
    assert!(header.length <= limit);
    if header.as_data().is_some() {
        return;
    }
    // A payload of the length that the header says, and one of another.
    let said = payload.get(..header.length as usize);
    for payload in said.into_iter().chain([payload]) {
        if let Ok(message) = Message::decode(header, payload) {
            check(&message, payload);
        }
    }
}

fn check(message: &Message, payload: &[u8]) {
    for format in [FrameFormat::Plain, FrameFormat::Checked] {
        let mut frame = BytesMut::new();
        message.encode_with(&mut frame, format);
        let (head, again) = frame.split_at(format.head_bytes());
        let header = match format {
            FrameFormat::Plain => Header::decode(head.try_into().expect("a header")).expect("ours"),
            FrameFormat::Checked => {
                let head: [u8; CHECKED_HEADER_BYTES] = head.try_into().expect("a header");
                let (header, check) = Header::decode_checked(&head).expect("ours");
                assert_eq!(check, crc32c::crc32c(again));
                header
            }
        };
        assert_eq!(header.length as usize, again.len());
        assert_eq!(Message::decode(header, again).as_ref(), Ok(message));
        // Reasons are cut and cleaned; everything else has one form.
        let (Message::SetAbort { reason, .. }
        | Message::SetDoubt { reason, .. }
        | Message::ImageAbort { reason, .. }
        | Message::Goodbye { reason }
        | Message::PrepareRefused { reason, .. }
        | Message::ImageRefused { reason, .. }) = message
        else {
            assert_eq!(again, payload);
            continue;
        };
        assert!(reason.len() <= MAX_REASON_BYTES && !reason.chars().any(char::is_control));
    }
    let mut sealed = BytesMut::zeroed(CHECKED_HEADER_BYTES);
    sealed.put_slice(payload);
    FrameFormat::Checked.seal(&mut sealed);
}
