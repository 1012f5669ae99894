//! image-cache's img-cache.sock, `criu restore --remote`: restores of sets of all kinds, beside whose
//! links some still last; or any bytes. Nobody is given anything of an image that is not whole, nor
//! of a set that waits for its commit.

use crate::cache::Cache;
use crate::unix::{remote, restores};

pub fn run(bytes: &[u8]) {
    restores(bytes, Cache::restore_remote, remote);
}
