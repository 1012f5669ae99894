//! `--stream`: what CRIU >= 3.15 asks on `streamer-capture.sock` (dump) and
//! `streamer-serve.sock` (restore). One connection per CRIU run; a request per image.

use prost::Message;

use crate::criu::frame::{self, MessageError};
use crate::image::ImageName;

/// Name of the socket on which `criu dump --stream` looks for image-proxy.
pub const CAPTURE_SOCKET: &str = "streamer-capture.sock";
/// Name of the socket on which `criu restore --stream` looks for image-cache.
pub const SERVE_SOCKET: &str = "streamer-serve.sock";

#[derive(Clone, PartialEq, Message)]
struct ImgStreamerRequestEntry {
    #[prost(string, optional, tag = "1")]
    filename: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
struct ImgStreamerReplyEntry {
    #[prost(bool, required, tag = "1")]
    exists: bool,
}

/// The image that a request names.
pub fn decode_request(body: &[u8]) -> Result<ImageName, MessageError> {
    let name = ImgStreamerRequestEntry::decode(body)?
        .filename
        .ok_or(MessageError::Missing("filename"))?;
    ImageName::new(&name).map_err(MessageError::ImageName)
}

/// The framed answer to a restore's request.
pub fn encode_reply(exists: bool) -> Vec<u8> {
    frame::encode(&ImgStreamerReplyEntry { exists })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The reference encodings of criu-stream.md, produced there with protobuf-c 1.4.1.
    #[test]
    fn golden() {
        assert_eq!(
            decode_request(b"\x0a\x0dinventory.img").map(|n| n.to_string()),
            Ok("inventory.img".to_owned())
        );
        assert_eq!(encode_reply(true), b"\x02\0\0\0\x08\x01");
        assert_eq!(encode_reply(false), b"\x02\0\0\0\x08\x00");
    }

    #[test]
    fn truncated_or_bad() {
        let whole = b"\x0a\x0dinventory.img";
        for cut in 0..whole.len() {
            assert!(decode_request(&whole[..cut]).is_err(), "cut at {cut}");
        }
        assert!(decode_request(b"\x0a\x02..").is_err());
        assert!(decode_request(b"\x0a\x03a/b").is_err());
        assert!(
            decode_request(b"\x08\x01").is_err(),
            "a field of another type"
        );
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_request(&body);
        }
    }
}
