//! Hostile peers without an end, so many in a second.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Ended;

/// Connections that say nothing, for as long as it lasts.
const SILENT: usize = 40;

/// One peer, from its connection to its end.
pub type Kind = fn(SocketAddr) -> std::io::Result<Ended>;

/// An attack of several peers, until it is dropped: one thread for each kind.
pub struct Attack {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    begin: Instant,
    threads: Vec<JoinHandle<()>>,
    _silent: Vec<TcpStream>,
}

impl Attack {
    /// So many connections in a second, of each of the kinds.
    pub fn start(kinds: &[Kind], port: u16, per_second: u32) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (stop, made) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let begin = Instant::now();
        let attacks: Vec<_> = kinds
            .iter()
            .map(|&attack| {
                let (stop, made) = (stop.clone(), made.clone());
                std::thread::spawn(move || {
                    for n in 1.. {
                        if stop.load(Ordering::Relaxed) {
                            return;
                        }
                        // Each waits for its end. That it was reset, or found no place, is one, too.
                        let _ = attack(address);
                        made.fetch_add(1, Ordering::Relaxed);
                        let due = begin + Duration::from_secs(n) / per_second;
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                    }
                })
            })
            .collect();
        let silent = (0..SILENT).filter_map(|_| TcpStream::connect(address).ok());
        Self {
            _silent: silent.collect(),
            stop,
            made,
            begin,
            threads: attacks,
        }
    }

    /// Connections per second so far.
    pub fn rate(&self) -> f64 {
        self.made.load(Ordering::Relaxed) as f64 / self.begin.elapsed().as_secs_f64()
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
