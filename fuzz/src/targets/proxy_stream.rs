//! image-proxy's streamer-capture.sock, `criu dump --stream`: dumps on pipes and sockets, and an image-cache
//! behind it; or any bytes. The cache gets nothing but whole images.

use crate::proxy::Daemons;
use crate::unix::{dumps, stream};

pub fn run(bytes: &[u8]) {
    dumps(bytes, Daemons::stream, stream);
}
