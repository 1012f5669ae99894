//! image-proxy-control.sock: action scripts and operators, beside dumps on the other sockets, and an
//! image-cache behind it; or any bytes.

use crate::input::Input;
use crate::pages::Senders;
use crate::proxy::Daemons;
use crate::unix::{control, remote, stream, Peers};
use crate::world;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    // The parent of the fuzzer passes for the CRIU of every script.
    world::run_alone(async move {
        let kind = input.u8();
        let daemons = Daemons::start(&mut input).await;
        let mut scripts = Peers::default();
        let (mut streams, mut remotes) = (Peers::default(), Peers::default());
        let mut senders = Senders::default();
        let connect = || daemons.control();
        if kind % 4 == 3 {
            scripts.raw(&mut input, &connect).await;
        }
        while !input.is_empty() {
            match input.u8() % 8 {
                0 | 1 => streams.step(&mut input, &|| daemons.stream(), stream).await,
                2 => remotes.step(&mut input, &|| daemons.remote(), remote).await,
                3 => senders.step(&mut input, &|_| daemons.pages()).await,
                _ => scripts.step(&mut input, &connect, control).await,
            }
        }
        for mut peers in [scripts, streams, remotes] {
            peers.end();
        }
        drop(senders);
        daemons.end().await;
    });
}
