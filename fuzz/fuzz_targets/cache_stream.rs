//! image-cache's streamer-serve.sock, `criu restore --stream`: restores of sets of all kinds, beside whose
//! links some still last; or any bytes. Nobody is given anything of an image that is not whole, nor
//! of a set that waits for its commit.
#![no_main]

use image_fuzz::cache::filled;
use image_fuzz::input::Input;
use image_fuzz::unix::{stream, Peers};
use image_fuzz::world;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: world::init(), |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let (cache, links) = filled(&mut input).await;
        let mut peers = Peers::default();
        peers.play(kind, &mut input, &|| cache.restore_stream(), stream).await;
        peers.check_unserved();
        drop(links);
        cache.end().await;
    });
});
