//! image-cache's page server: rounds on several connections, and a link whose dump may claim what they
//! brought; or any bytes.

use crate::cache::{policy, Cache};
use crate::input::Input;
use crate::link::Session;
use crate::pages::Senders;
use crate::world;

pub fn run(bytes: &[u8]) {
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
}
