//! What peers that mean no good cost everybody else.
//!
//! Whoever attacks has a machine of its own; here it shares the CPUs with those whom it attacks, and
//! its own work alone slows them. So the same attack is also made on a process that does nothing
//! but accept, read once, and close: what is between the two is what our daemon makes of it. How
//! fast the attack really was, in both, has rows of its own: the comparison is worth as much as
//! these are alike.

use std::net::{Ipv4Addr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context as _, Result};
use e2e_tests::authority::Authority;
use e2e_tests::hostile::{
    client_hello, half_closed, header_bomb, name_bomb, plaintext, Attack, Kind,
};

use super::connections::dump_and_restore;
use super::link::{Guard, NAMES};
use super::{gib_per_second, IMAGE};
use crate::runner::{Context, Scenario};
use crate::table::{Group, Reach, RowSpec, Samples, Unit};
use e2e_tests::daemons::{free_port, Pair};
use e2e_tests::memory::GIB;
use e2e_tests::process::Process;

/// Connections in a second, of each of the kinds.
const PACED: u32 = 25;
const FLOOD: u32 = 500;
const START: Duration = Duration::from_secs(10);

/// On a port without TLS, and with it. None of them has to be waited for.
const PLAIN: [Kind; 4] = [
    header_bomb::attack,
    name_bomb::attack,
    half_closed::attack,
    header_bomb::attack,
];
const TLS: [Kind; 4] = [
    client_hello::attack,
    client_hello::attack,
    plaintext::attack,
    half_closed::attack,
];

const GUARDS: [Guard; 2] = [Guard::Resume, Guard::Tls];

fn kinds(guard: Guard) -> [Kind; 4] {
    match guard {
        Guard::Tls => TLS,
        _ => PLAIN,
    }
}

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
    fn key(self, guard: Guard) -> String {
        let port = match guard {
            Guard::Tls => "tls",
            _ => "plain",
        };
        let what = match self {
            Beside::Nothing => "none",
            Beside::Paced => "paced",
            Beside::Elsewhere => "flood-elsewhere",
            Beside::Flood => "flood",
        };
        format!("hostile.{port}.{what}")
    }

    fn title(self, guard: Guard) -> String {
        let tls = match guard {
            Guard::Tls => "--tls, ",
            _ => "",
        };
        let all = |per_second: u32| 4 * per_second;
        match self {
            Beside::Nothing => format!("{tls}1 GiB, no hostile peers"),
            Beside::Paced => format!("{tls}beside {} hostile connections/s", all(PACED)),
            Beside::Elsewhere => {
                let flood = all(FLOOD);
                format!("{tls}beside {flood} of them, at a process that discards")
            }
            Beside::Flood => format!("{tls}beside {} hostile connections/s", all(FLOOD)),
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

/// The pairs, each with the order of what goes on beside it, and the process that discards.
struct Lab {
    pairs: Vec<(Guard, Pair, [Beside; 4])>,
    elsewhere: (Process, u16),
}

#[derive(Default)]
pub struct Hostile(Option<Lab>);

fn discard() -> Result<(Process, u16)> {
    let port = free_port();
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
        let mut rows = Vec::new();
        for guard in GUARDS {
            let key = |beside: Beside| beside.key(guard);
            let nobody = "no hostile peers";
            let discards = "at a process that discards";
            for beside in ALL {
                let unit = Unit::GibPerSecond;
                let row = RowSpec::new(Group::Link, key(beside), beside.title(guard), unit);
                let reach = Reach::RatioAtLeast(0.9);
                rows.push(match beside {
                    Beside::Nothing => row,
                    Beside::Paced => row
                        .beside(key(Beside::Nothing), nobody)
                        .target(reach, false),
                    Beside::Elsewhere => row.beside(key(Beside::Nothing), nobody),
                    Beside::Flood => row
                        .beside(key(Beside::Elsewhere), discards)
                        .target(reach, false),
                });
            }
            for beside in ALL.into_iter().filter(|beside| beside.rate().is_some()) {
                let title = format!("connections made, {}", beside.title(guard));
                let row = RowSpec::new(
                    Group::Link,
                    format!("{}.rate", key(beside)),
                    title,
                    Unit::PerSecond,
                );
                rows.push(match beside {
                    Beside::Flood => {
                        row.beside(format!("{}.rate", key(Beside::Elsewhere)), discards)
                    }
                    _ => row,
                });
            }
            for beside in ALL {
                let title = format!("image-cache, {}", beside.title(guard));
                let cpu = format!("{}.cache.cpu", key(beside));
                let row = RowSpec::new(Group::Link, cpu, title, Unit::CpuSecondsPerGib);
                rows.push(match beside {
                    Beside::Nothing => row,
                    _ => row.beside(format!("{}.cache.cpu", key(Beside::Nothing)), nobody),
                });
            }
        }
        rows
    }

    fn start(&mut self, context: &Context) -> Result<()> {
        let ca = Authority::below(&context.dir, &NAMES)?;
        let mut pairs = Vec::new();
        for guard in GUARDS {
            let name = Beside::Nothing.key(guard);
            pairs.push((guard, context.start_pair_at(&name, guard.place(&ca))?, ALL));
        }
        self.0 = Some(Lab {
            pairs,
            elsewhere: discard()?,
        });
        Ok(())
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let lab = self.0.as_mut().context("it has been started")?;
        for (guard, pair, order) in &mut lab.pairs {
            for beside in *order {
                let port = match beside {
                    Beside::Elsewhere => lab.elsewhere.1,
                    _ => pair.port,
                };
                let begin = |rate| Attack::start(&kinds(*guard), port, rate);
                let attack = beside.rate().map(begin);
                let took = dump_and_restore(pair, context, IMAGE)?;
                let key = beside.key(*guard);
                if let Some(attack) = attack {
                    out.push(format!("{key}.rate"), attack.rate());
                }
                let cpu = took.cache_cpu.as_secs_f64() * GIB as f64 / IMAGE as f64;
                out.push(format!("{key}.cache.cpu"), cpu);
                out.push(key, gib_per_second(IMAGE, took.wall));
            }
            // Whoever comes first in a round finds memory that the machine has to make ready anew.
            order.rotate_left(1);
        }
        Ok(())
    }

    fn finish(&mut self, _: &mut Samples) -> Result<()> {
        let pairs = self.0.take().map_or_else(Vec::new, |lab| lab.pairs);
        pairs.into_iter().try_for_each(|(_, pair, _)| pair.stop())
    }
}
