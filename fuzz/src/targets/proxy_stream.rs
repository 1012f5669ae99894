//! image-proxy's streamer-capture.sock, `criu dump --stream`: dumps on pipes and sockets, and an image-cache
//! behind it; or any bytes. The cache gets nothing but whole images.

use crate::input::Input;
use crate::proxy::Daemons;
use crate::unix::{stream, Peers};
use crate::world;
use std::time::Duration;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let daemons = Daemons::start(&mut input).await;
        let mut peers = Peers::default();
        peers
            .play(kind, &mut input, &|| daemons.stream(), stream)
            .await;
        world::pass(Duration::from_secs(20)).await;
        daemons.check(&peers);
        daemons.end().await;
    });
}
