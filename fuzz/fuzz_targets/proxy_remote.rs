//! image-proxy's img-proxy.sock, `criu dump --remote`: dumps on pipes and sockets, and an image-cache
//! behind it; or any bytes. The cache gets nothing but whole images.
#![no_main]

use image_fuzz::input::Input;
use image_fuzz::proxy::Daemons;
use image_fuzz::unix::{remote, Peers};
use image_fuzz::world;
use libfuzzer_sys::fuzz_target;
use std::time::Duration;

fuzz_target!(init: world::init(), |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let daemons = Daemons::start(&mut input).await;
        let mut peers = Peers::default();
        peers.play(kind, &mut input, &|| daemons.remote(), remote).await;
        world::pass(Duration::from_secs(20)).await;
        daemons.check(&peers);
        daemons.end().await;
    });
});
