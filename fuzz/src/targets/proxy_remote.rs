//! image-proxy's img-proxy.sock, `criu dump --remote`: dumps on pipes and sockets, and an image-cache
//! behind it; or any bytes. The cache gets nothing but whole images.

use crate::proxy::Daemons;
use crate::unix::{dumps, remote};

pub fn run(bytes: &[u8]) {
    dumps(bytes, Daemons::remote, remote);
}
