//! image-proxy's page server: rounds on several connections, and an image-cache behind it; or any
//! bytes.
#![no_main]

use image_fuzz::input::Input;
use image_fuzz::pages::Senders;
use image_fuzz::proxy::Daemons;
use image_fuzz::world;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: world::init(), |bytes: &[u8]| {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let daemons = Daemons::start(&mut input).await;
        let mut senders = Senders::default();
        if kind % 4 == 3 {
            senders.raw(&mut input, daemons.pages()).await;
        }
        while !input.is_empty() {
            senders.step(&mut input, &|_| daemons.pages()).await;
        }
        drop(senders);
        daemons.end().await;
    });
});
