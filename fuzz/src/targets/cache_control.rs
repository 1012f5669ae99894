//! image-cache-control.sock: operators and action scripts, with restores beside them; or any bytes. What
//! an operator does not release is not served.

use crate::cache::filled;
use crate::input::Input;
use crate::unix::{control, stream, Peers};
use crate::world;

pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let (cache, links) = filled(&mut input).await;
        let (mut operators, mut restores) = (Peers::default(), Peers::default());
        let connect = || cache.control();
        if kind % 4 == 3 {
            operators.raw(&mut input, &connect).await;
        }
        while !input.is_empty() {
            if kind % 4 == 0 && input.u8() % 4 == 0 {
                restores
                    .step(&mut input, &|| cache.restore_stream(), stream)
                    .await;
            } else {
                operators.step(&mut input, &connect, control).await;
            }
        }
        operators.end();
        restores.end();
        drop(links);
        cache.end().await;
    });
}
