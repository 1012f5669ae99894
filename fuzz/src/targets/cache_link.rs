//! image-cache's link port: a session over one to three connections that break and are resumed, or
//! bytes that are none. See [`crate::link`] for what must hold.

use image_common::link::codec::FrameFormat;

use crate::cache::{policy, Cache};
use crate::client::Client;
use crate::input::Input;
use crate::link::{hello, Session};
use crate::world;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let cache = Cache::new(policy(&mut input));
        match kind % 4 {
            0 | 1 => structured(&mut input, &cache).await,
            2 => raw(&mut input, &cache, true).await,
            _ => raw(&mut input, &cache, false).await,
        }
        cache.end().await;
    });
}

async fn structured(input: &mut Input<'_>, cache: &Cache) {
    let mut session = Session::begin(input, cache.link(1)).await;
    while !input.is_empty() {
        session.step(input, &|| cache.link(1)).await;
    }
    world::turn().await;
    session.check(&cache.store);
    session.end();
    world::ended().await;
    session.check(&cache.store);
}

/// Any bytes, behind a handshake or not, in pieces.
async fn raw(input: &mut Input<'_>, cache: &Cache, greeted: bool) {
    let piece = *input.pick(&[usize::MAX, 1, 16, 1000]);
    let mut client = Client::new(cache.link(1));
    if greeted {
        let format = FrameFormat::with_checksums(input.u8() & 1 != 0);
        client.say(&hello(format).encode()).await;
    }
    while !input.is_empty() && !client.over {
        client.say(input.bytes(piece)).await;
        world::turn().await;
        client.hear();
    }
}
