//! What a daemon gives up when it starts, because it holds other processes' memory: core files,
//! being traced by its own user, capabilities that it does not need, and new privileges. And,
//! if it is told so, being swapped out.

use std::io;

use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::procfs::exit_status::pidfds_tell;

/// What both daemons need if they have it. Without them they serve processes of their own user.
///
/// - `SYS_PTRACE`: `/proc/PID/fd` and `/proc/PID/exe` of a CRIU, and of restored tasks, that
///   have more rights than we, or another user.
/// - `DAC_READ_SEARCH`: images in CRIU's images directory, whatever their owner.
/// - `SYS_RESOURCE`: large pipes beyond what one user may have (`pipe-user-pages-soft`), and
///   descriptors on their way through sockets.
const NEEDED: CapabilitySet = CapabilitySet::SYS_PTRACE
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::SYS_RESOURCE);

/// What they need besides before Linux 6.15, where a pidfd does not tell how a process has ended.
///
/// - `NET_ADMIN`: the kernel's records of exits (taskstats), in the initial namespaces.
/// - `KILL`: to stop the tasks of another user's dump, so that none runs on unseen.
const NEEDED_TO_SEE_ENDS: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::KILL);

/// Why a daemon cannot protect its memory or give up capabilities.
#[derive(Debug, thiserror::Error)]
pub enum HardenError {
    #[error("cannot turn core files off")]
    Core(#[source] io::Error),
    #[error("cannot give up capabilities")]
    Capabilities(#[source] io::Error),
    #[error("--mlock: the memory cannot be locked; it takes CAP_IPC_LOCK or a limit that is large enough (ulimit -l, LimitMEMLOCK= in a unit)")]
    Lock(#[source] io::Error),
}

/// To be called before any thread exists: capabilities are each thread's own. `ports` are still
/// to be listened on, `besides` is what this daemon alone needs.
pub fn harden(
    mlock: bool,
    ports: impl IntoIterator<Item = u16>,
    besides: CapabilitySet,
) -> Result<(), HardenError> {
    no_core_files().map_err(|e| HardenError::Core(e.into()))?;
    let mut needed = NEEDED | besides;
    if !pidfds_tell() {
        needed |= NEEDED_TO_SEE_ENDS;
    }
    if ports.into_iter().any(|port| (1..1024).contains(&port)) {
        needed |= CapabilitySet::NET_BIND_SERVICE;
    }
    if mlock {
        // What is mapped later is checked then.
        needed |= CapabilitySet::IPC_LOCK;
        // ONFAULT: images are received into mappings that are larger than they.
        let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
        rustix::mm::mlockall(all).map_err(|e| HardenError::Lock(e.into()))?;
    }
    keep_capabilities(needed).map_err(|e| HardenError::Capabilities(e.into()))
}

/// Not dumpable also means that no process of our own user may trace us, or read our memory,
/// without CAP_SYS_PTRACE. The limit alone would not do: a `core_pattern` that is a pipe
/// ignores it (core(5)).
fn no_core_files() -> rustix::io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    rustix::process::setrlimit(Resource::Core, none)
}

fn keep_capabilities(needed: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let kept = rustix::thread::capabilities(None)?.permitted & needed;
    // Those that go leave the ambient set, too.
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
}
