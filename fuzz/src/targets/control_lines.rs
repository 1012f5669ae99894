//! Lines of the control sockets: any JSON as request, answer and status. What is accepted is the same
//! when it is written and read again, and a status that is shown keeps to its lines.

use image_common::control::status::Status;
use image_common::control::{Answer, Request};
use serde_json::{from_slice, to_vec};

pub fn run(line: &[u8]) {
    if let Ok(request) = from_slice::<Request>(line) {
        let again = to_vec(&request).expect("as JSON");
        assert!(!again.contains(&b'\n'), "a request is one line");
        assert_eq!(from_slice::<Request>(&again).expect("our own"), request);
    }
    if let Ok(answer) = from_slice::<Answer>(line) {
        let again = to_vec(&answer).expect("as JSON");
        assert!(!again.contains(&b'\n'), "an answer is one line");
        // A float may come back as its neighbour; then it stays.
        let answer: Answer = from_slice(&again).expect("our own");
        let third = to_vec(&answer).expect("as JSON");
        assert_eq!(from_slice::<Answer>(&third).expect("our own"), answer);
    }
    if let Ok(status) = from_slice::<Status>(line) {
        let _ = status.to_text();
    }
}
