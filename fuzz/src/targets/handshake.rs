//! HELLO and the answers to it: any bytes, with the checksum that they have or the right one. What is
//! accepted is the same when it is encoded and decoded again.

use image_common::image::SessionName;
use image_common::link::handshake::{body_length, Answer, Hello, HEAD_BYTES};
use image_common::link::{MAX_CONNECTIONS, MAX_REASON_BYTES, VERSIONS};

pub fn run(bytes: &[u8]) {
    let Some((&seal, bytes)) = bytes.split_first() else {
        return;
    };
    let mut bytes = bytes.to_vec();
    if bytes.len() >= HEAD_BYTES + 4 && seal & 1 != 0 {
        // The length, too.
        let length = u32::try_from(bytes.len() - HEAD_BYTES).unwrap_or(u32::MAX);
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        let end = bytes.len() - 4;
        let check = crc32c::crc32c(&bytes[..end]).to_le_bytes();
        bytes[end..].copy_from_slice(&check);
    }
    let Some((head, body)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
        return;
    };
    if let Ok(length) = body_length(head) {
        assert!(length <= 2048, "that is the limit");
    }
    if let Ok(hello) = Hello::decode(head, body) {
        assert!((1..=MAX_CONNECTIONS).contains(&hello.connections));
        assert!(SessionName::new(hello.session.as_str()).is_ok());
        assert!(printable(&hello.software, 128));
        let again = hello.encode();
        let (head, body) = again.split_first_chunk().expect("a head");
        assert_eq!(body_length(head), Ok(body.len()));
        assert_eq!(Hello::decode(head, body), Ok(hello));
    }
    for offered in [VERSIONS, 0..=u16::MAX] {
        let Ok(answer) = Answer::decode(head, body, &offered) else {
            continue;
        };
        match &answer {
            Answer::Welcome {
                version, software, ..
            } => assert!(offered.contains(version) && printable(software, 128)),
            Answer::Refused { reason, .. } => assert!(printable(reason, MAX_REASON_BYTES)),
        }
        let again = answer.encode();
        let (head, body) = again.split_first_chunk().expect("a head");
        assert_eq!(body_length(head), Ok(body.len()));
        assert_eq!(Answer::decode(head, body, &offered), Ok(answer));
    }
}

/// As far as a log line goes. Some character of a cut text may take more bytes than `?`.
fn printable(text: &str, max: usize) -> bool {
    text.len() <= max && !text.chars().any(char::is_control)
}
