//! What peers that mean no good cost everybody else.
//!
//! Whoever attacks has a machine of its own; here it shares the CPUs with those whom it attacks, and
//! its own work alone slows them. So the same attack is also made on a process that does nothing
//! but accept, read once, and close: what is between the two is what our daemon makes of it. How
//! fast the attack really was, in both, has rows of its own: the comparison is worth as much as
//! these are alike.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};
use e2e_tests::hostile::{half_closed, header_bomb, name_bomb, plaintext, Ended};

use super::connections::dump_and_restore;
use super::{gib_per_second, IMAGE};
use crate::daemons::{free_port, Pair, Place};
use crate::memory::GIB;
use crate::process::Process;
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};

/// Connections in a second, of each of the kinds.
const PACED: u32 = 25;
const FLOOD: u32 = 500;
/// Connections that say nothing, for as long as it lasts.
const SILENT: usize = 40;
const START: Duration = Duration::from_secs(10);

type Kind = fn(SocketAddr) -> std::io::Result<Ended>;

const KINDS: [Kind; 4] = [
    header_bomb::attack,
    name_bomb::attack,
    half_closed::attack,
    plaintext::attack,
];

/// What goes on beside a migration.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    Paced,
    /// A flood at the process that discards.
    Elsewhere,
    Flood,
}

const ALL: [Beside; 4] = [
    Beside::Nothing,
    Beside::Paced,
    Beside::Elsewhere,
    Beside::Flood,
];

impl Beside {
    fn key(self) -> &'static str {
        match self {
            Beside::Nothing => "hostile.none",
            Beside::Paced => "hostile.paced",
            Beside::Elsewhere => "hostile.flood-elsewhere",
            Beside::Flood => "hostile.flood",
        }
    }

    fn title(self) -> String {
        let kinds = KINDS.len();
        match self {
            Beside::Nothing => "1 GiB, no hostile peers".to_owned(),
            Beside::Paced => {
                format!("{kinds} hostile peers of image-cache, {PACED} connections/s each")
            }
            Beside::Elsewhere => {
                format!("{kinds} at a process that discards, {FLOOD} connections/s each")
            }
            Beside::Flood => {
                format!("{kinds} hostile peers of image-cache, {FLOOD} connections/s each")
            }
        }
    }

    fn rate(self) -> Option<u32> {
        match self {
            Beside::Nothing => None,
            Beside::Paced => Some(PACED),
            Beside::Elsewhere | Beside::Flood => Some(FLOOD),
        }
    }
}

/// An attack, until it is dropped: one thread for each kind.
struct Attack {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicU64>,
    begin: Instant,
    threads: Vec<JoinHandle<()>>,
    _silent: Vec<TcpStream>,
}

impl Attack {
    fn start(port: u16, per_second: u32) -> Self {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let (stop, made) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let begin = Instant::now();
        let attacks = KINDS.map(|attack| {
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
        });
        let silent = (0..SILENT).filter_map(|_| TcpStream::connect(address).ok());
        Self {
            _silent: silent.collect(),
            stop,
            made,
            begin,
            threads: attacks.into(),
        }
    }

    /// Connections per second so far.
    fn rate(&self) -> f64 {
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

/// The pair, and the process that discards.
struct Lab {
    pair: Pair,
    elsewhere: (Process, u16),
    order: [Beside; 4],
}

#[derive(Default)]
pub struct Hostile(Option<Lab>);

fn discard() -> Result<(Process, u16)> {
    let port = free_port()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--discard", &port.to_string()]);
    let process = Process::spawn("the process that discards", command)?;
    let deadline = Instant::now() + START;
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        ensure!(Instant::now() < deadline, "nobody discards");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((process, port))
}

impl Scenario for Hostile {
    fn name(&self) -> String {
        "hostile".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        let moved = ALL.iter().map(|beside| {
            let unit = Unit::GibPerSecond;
            let row = RowSpec::new(Group::Link, beside.key(), beside.title(), unit);
            let reach = Reach::RatioAtLeast(0.9);
            match beside {
                Beside::Nothing => row,
                Beside::Paced => row
                    .beside(Beside::Nothing.key(), "no hostile peers")
                    .target(reach, false),
                Beside::Elsewhere => row.beside(Beside::Nothing.key(), "no hostile peers"),
                Beside::Flood => row
                    .beside(Beside::Elsewhere.key(), "at a process that discards")
                    .target(reach, false),
            }
        });
        let attacked = ALL.iter().filter(|beside| beside.rate().is_some());
        let rates = attacked.map(|beside| {
            let key = format!("{}.rate", beside.key());
            let title = format!("connections made, {}", beside.title());
            let row = RowSpec::new(Group::Link, key, title, Unit::PerSecond);
            match beside {
                Beside::Flood => row.beside(
                    format!("{}.rate", Beside::Elsewhere.key()),
                    "at a process that discards",
                ),
                _ => row,
            }
        });
        let cpu = ALL.iter().map(|beside| {
            let key = format!("{}.cache.cpu", beside.key());
            let title = format!("image-cache, {}", beside.title());
            let row = RowSpec::new(Group::Link, key, title, Unit::CpuSecondsPerGib);
            match beside {
                Beside::Nothing => row,
                _ => row.beside("hostile.none.cache.cpu", "no hostile peers"),
            }
        });
        moved.chain(rates).chain(cpu).collect()
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        self.0 = Some(Lab {
            pair: context.start_pair_at("hostile", &Place::default())?,
            elsewhere: discard()?,
            order: ALL,
        });
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let lab = self.0.as_mut().context("it has been started")?;
        for beside in lab.order {
            let port = match beside {
                Beside::Elsewhere => lab.elsewhere.1,
                _ => lab.pair.port,
            };
            let attack = beside.rate().map(|rate| Attack::start(port, rate));
            let took = dump_and_restore(&lab.pair, context, IMAGE)?;
            let key = beside.key();
            if let Some(attack) = attack {
                out.push(format!("{key}.rate"), attack.rate());
            }
            out.push(key, gib_per_second(IMAGE, took.wall));
            let cpu = took.cache_cpu.as_secs_f64() * GIB as f64 / IMAGE as f64;
            out.push(format!("{key}.cache.cpu"), cpu);
        }
        // Whoever comes first in a round finds memory that the machine has to make ready anew.
        lab.order.rotate_left(1);
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        self.0.take().map_or(Ok(()), |lab| lab.pair.stop())
    }
}
