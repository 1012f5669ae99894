//! Real CRIU, real processes, two hosts on one machine.
//!
//! A host is a set of pid, mount, network, IPC and UTS namespaces whose root is a Debian with CRIU
//! ([`lab`]). Two hosts joined by a veth pair are a [`Pair`]: dump in one, restore in the other,
//! where the pids are still free. The daemons run inside the hosts as they would on two machines.
//!
//! Nothing needs cleaning up by name: namespaces, mounts, links and processes all hang on process 1
//! of a host, which ends as soon as the test process lets go of a pipe, be it by returning, by
//! panicking or by SIGKILL.
//!
//! Layout inside a host (the root itself is read-only):
//!
//! | path | what |
//! | --- | --- |
//! | `/opt` | the daemons' binaries |
//! | `/srv` | the test programs (`tests/programs`) |
//! | `/mnt` | tmpfs that all hosts of the lab share: the migrated programs' files |
//! | `/run` | the host's own tmpfs: `images` (only sockets!), `log`, `criu` (work dirs) |

pub mod content;
pub mod criu;
pub mod daemon;
pub mod job;
pub mod lab;
pub mod matrix;
pub mod pair;
pub mod program;
pub mod redis;

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{bail, Result};

pub use criu::{Dump, Restore};
pub use daemon::{Cache, Daemon, Proxy};
pub use lab::{Host, Lab};
pub use pair::Pair;
pub use program::Program;

/// Where the daemons listen and CRIU's `-D` points, unless a test wants it otherwise.
pub const IMAGES: &str = "/run/images";

/// How long anything may take that normally takes well below a second.
pub const SOON: Duration = Duration::from_secs(30);

/// How long a dump or a restore may take, whether it succeeds or fails. A cut link is found out by
/// timers of the network stack, hence minutes.
pub const CRIU_LIMIT: Duration = Duration::from_secs(150);

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs one test between two fresh hosts, and prints all logs if it fails.
///
/// One test at a time: each of them keeps both CPUs busy, and they measure time.
///
/// # Panics
/// If the test fails, or if the hosts cannot be made (which is a failure too: nothing is skipped).
pub fn between_two_hosts(test: impl FnOnce(&Pair) -> Result<()>) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let pair = match Pair::new() {
        Ok(pair) => pair,
        Err(error) => panic!("cannot make two hosts: {error:#}"),
    };
    // A panic is caught by the lab's drop, which prints the logs as well.
    if let Err(error) = test(&pair) {
        panic!("{error:#}");
    }
    // For a look at how a passing test went.
    if std::env::var_os("REAL_CRIU_LOGS").is_some() {
        pair.lab.print_logs();
    }
}

/// Polls until `probe` has an answer.
///
/// # Errors
/// If the probe fails, or has no answer within `limit`; `what` says what was waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = probe()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// [`wait_for`] a plain condition.
///
/// # Errors
/// As [`wait_for`].
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    wait_for(what, limit, || Ok(condition()?.then_some(())))
}
