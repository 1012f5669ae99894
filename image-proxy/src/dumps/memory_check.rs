//! Whether there is memory for one more dump, asked before its tasks are frozen: a proxy that the kernel
//! kills takes all dumps under way along, and leaves those in doubt that are between commit and kill.
//!
//! Pages are in pipes by reference, and charged to the process that is dumped. What a session takes of
//! its own is bounded: what its window has as copies, buffers of its sockets, frames.

use image_common::procfs::host_memory::{Bound, HostMemory};
use image_common::units::human_size;

use crate::failure::Failure;

/// Copies in the window of one connection, and buffers of its sockets.
const CONNECTION_BYTES: u64 = 5 << 20;

/// What else a session has.
const SESSION_BYTES: u64 = 1 << 20;

/// For what is of no session, and for what others take meanwhile.
const SPARE_BYTES: u64 = 8 << 20;

/// So much less than this makes it worth to know what can be reclaimed.
const PLENTY_BYTES: u64 = 1 << 30;

/// Refuses if `sessions` at once, of so many connections, may need more than there is.
pub fn check(memory: &HostMemory, sessions: usize, connections: u16) -> Result<(), Failure> {
    let session = SESSION_BYTES + u64::from(connections) * CONNECTION_BYTES;
    let all = session.saturating_mul(u64::try_from(sessions).unwrap_or(u64::MAX));
    // What they have taken is in the usage already.
    let to_come = all.saturating_sub(memory.own_anonymous().unwrap_or(0));
    let needed = to_come.max(session).saturating_add(SPARE_BYTES);
    let bounds = memory.bounds(PLENTY_BYTES).into_iter();
    match bounds.min_by_key(|bound| bound.left) {
        Some(bound) if bound.left < needed => Err(Failure::limit(too_little(&bound, needed))),
        _ => Ok(()),
    }
}

fn too_little(bound: &Bound, needed: u64) -> String {
    format!(
        "memory is short on this host: {}, {}, is used up to {}, and one more dump may need {}; nothing is frozen, the process goes on. Give image-proxy more (MemoryMax=), or begin fewer dumps at once",
        bound.of,
        human_size(bound.limit),
        human_size(bound.left),
        human_size(needed)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_dump_is_refused_where_it_does_not_fit() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("proc/self/cgroup", "4:memory:/x\n");
        let mounts = "35 31 0:32 / /m rw - cgroup cgroup rw,memory\n";
        put("proc/self/mountinfo", mounts);
        put("m/x/memory.limit_in_bytes", &(64 << 20).to_string());
        put("m/x/memory.usage_in_bytes", &(30 << 20).to_string());
        let memory = HostMemory::below(root.path());
        assert_eq!(check(&memory, 1, 1), Ok(()));
        assert_eq!(check(&memory, 1, 4), Ok(()));
        for (sessions, connections) in [(1, 16), (100, 1)] {
            let why = check(&memory, sessions, connections).unwrap_err();
            assert!(
                why.text()
                    .contains("memory.limit_in_bytes of the control group"),
                "{why:?}"
            );
        }
        put("m/x/memory.usage_in_bytes", &(54 << 20).to_string());
        assert!(check(&memory, 1, 1).is_err());
        // Pages of files go before that.
        put(
            "m/x/memory.stat",
            &format!("total_inactive_file {}\n", 20 << 20),
        );
        assert_eq!(check(&memory, 1, 1), Ok(()));
    }
}
