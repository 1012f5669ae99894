//! Messages of `--stream`: any body. What is accepted is a name, and the same when it is encoded by
//! hand.

use e2e_tests::fake::wire::one_string;
use image_common::criu::stream::decode_request;
use image_common::image::ImageName;

pub fn run(body: &[u8]) {
    if let Ok(name) = decode_request(body) {
        assert_eq!(ImageName::new(name.as_str()).as_ref(), Ok(&name));
        assert_eq!(
            decode_request(&one_string(name.as_str().as_bytes())),
            Ok(name)
        );
    }
}
