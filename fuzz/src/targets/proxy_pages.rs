//! image-proxy's page server: rounds on several connections, and an image-cache behind it; or any
//! bytes.

use crate::input::Input;
use crate::pages::Senders;
use crate::proxy::Daemons;
use crate::world;

pub fn run(bytes: &[u8]) {
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
}
