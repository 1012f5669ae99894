//! image-cache's page server: rounds on several connections, and a link whose dump may claim what they
//! brought; or any bytes.
#![no_main]

use image_fuzz::cache::{policy, Cache};
use image_fuzz::input::Input;
use image_fuzz::link::Session;
use image_fuzz::pages::Senders;
use image_fuzz::world;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: world::init(), |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let cache = Cache::new(policy(&mut input));
        let mut senders = Senders::default();
        if kind % 4 == 3 {
            senders.raw(&mut input, cache.pages(1)).await;
        } else {
            let mut session = None;
            while !input.is_empty() {
                if kind % 4 == 0 && input.u8() % 2 == 0 {
                    if session.is_none() {
                        session = Some(Session::begin(&mut input, cache.link(1)).await);
                    }
                    if let Some(session) = &mut session {
                        session.step(&mut input, &|| cache.link(1)).await;
                    }
                } else {
                    senders.step(&mut input, &|host| cache.pages(host)).await;
                }
            }
        }
        drop(senders);
        cache.end().await;
    });
});
