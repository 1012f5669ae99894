//! image-cache's streamer-serve.sock, `criu restore --stream`: restores of sets of all kinds, beside whose
//! links some still last; or any bytes. Nobody is given anything of an image that is not whole, nor
//! of a set that waits for its commit.

use crate::cache::Cache;
use crate::unix::{restores, stream};

pub fn run(bytes: &[u8]) {
    restores(bytes, Cache::restore_stream, stream);
}
