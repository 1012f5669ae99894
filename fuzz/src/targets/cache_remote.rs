//! image-cache's img-cache.sock, `criu restore --remote`: restores of sets of all kinds, beside whose
//! links some still last; or any bytes. Nobody is given anything of an image that is not whole, nor
//! of a set that waits for its commit.

use crate::cache::filled;
use crate::input::Input;
use crate::unix::{remote, Peers};
use crate::world;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let (cache, links) = filled(&mut input).await;
        let mut peers = Peers::default();
        peers
            .play(kind, &mut input, &|| cache.restore_remote(), remote)
            .await;
        peers.check_unserved();
        drop(links);
        cache.end().await;
    });
}
