//! `pstree.img`: the tasks that a restore makes (`images/pstree.proto`), and `core-*.img` as far
//! as it tells whether a task lives.

use std::collections::HashSet;

use prost::Message;

use crate::criu::image_file::{ImageError, Messages};

const PSTREE_MAGIC: u32 = 0x5027_3030;
const CORE_MAGIC: u32 = 0x5505_3847;

/// `TASK_DEAD`, a zombie (`criu/include/pid.h`).
const TASK_DEAD: u32 = 2;

/// No host has more tasks and threads (`PID_MAX_LIMIT` of Linux). A pid has up to 5 bytes here.
const MAX_PIDS: usize = 1 << 22;
const MAX_ENTRY_BYTES: usize = 64 + 5 * MAX_PIDS;

#[derive(Clone, PartialEq, Message)]
struct PstreeEntry {
    #[prost(uint32, optional, tag = "1")]
    pid: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    threads: Vec<u32>,
    // Instead of them in criu-dev of 2017 and 2018, which knew nested pid namespaces: one pid for
    // each namespace, the outermost first. That one is in the names of images.
    #[prost(uint32, repeated, packed = "false", tag = "6")]
    ns_pid: Vec<u32>,
    #[prost(message, repeated, tag = "9")]
    ns_threads: Vec<NsTid>,
}

#[derive(Clone, PartialEq, Message)]
struct NsTid {
    #[prost(uint32, repeated, packed = "false", tag = "1")]
    tid: Vec<u32>,
}

impl PstreeEntry {
    /// Without a pid it is of no CRIU that is known.
    fn task(self) -> Result<Task, ImageError> {
        let outermost = |pids: &[u32]| pids.first().copied();
        let pid = self.pid.or(outermost(&self.ns_pid));
        let pid = pid.ok_or(ImageError::Foreign)?;
        let mut threads = self.threads;
        threads.extend(self.ns_threads.iter().filter_map(|t| outermost(&t.tid)));
        threads.retain(|&thread| thread != pid);
        Ok(Task { pid, threads })
    }
}

/// One task of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub pid: u32,
    /// The others; the first one of a task is itself.
    pub threads: Vec<u32>,
}

/// The tasks of a `pstree.img`.
pub fn tasks<'a>(image: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Task>, ImageError> {
    let mut messages = Messages::open(image, PSTREE_MAGIC)?;
    let mut tasks = Vec::new();
    let mut pids = HashSet::new();
    while let Some(message) = messages.message()? {
        if message.len() > MAX_ENTRY_BYTES {
            return Err(ImageError::TooLong);
        }
        let task = PstreeEntry::decode(message)?.task()?;
        for &pid in std::iter::once(&task.pid).chain(&task.threads) {
            // `lookup_create_pid` in CRIU's `pstree.c` takes a second one for an error.
            if !pids.insert(pid) {
                return Err(ImageError::Broken);
            }
            if pids.len() > MAX_PIDS {
                return Err(ImageError::TooLong);
            }
        }
        tasks.push(task);
    }
    Ok(tasks)
}

#[derive(Clone, PartialEq, Message)]
struct CoreEntry {
    #[prost(message, optional, tag = "3")]
    task: Option<TaskCoreEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct TaskCoreEntry {
    #[prost(uint32, optional, tag = "1")]
    state: Option<u32>,
}

/// Whether the task of a `core-*.img` is a zombie: of it there is nothing but this image.
pub fn is_zombie<'a>(image: impl IntoIterator<Item = &'a [u8]>) -> Result<bool, ImageError> {
    let mut messages = Messages::open(image, CORE_MAGIC)?;
    let core = messages.message()?.ok_or(ImageError::Cut)?;
    let task = CoreEntry::decode(core)?.task;
    Ok(task.and_then(|t| t.state) == Some(TASK_DEAD))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn recorded_trees() {
        let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");
        for dir in ["stream-plain/images", "remote-2018-incremental/images/dump"] {
            let dir = std::path::Path::new(fixtures).join(dir);
            let image = std::fs::read(dir.join("pstree.img")).unwrap();
            let tasks = tasks([&image[..]]).unwrap();
            assert_eq!(tasks.len(), 1);
            assert_eq!(tasks[0].threads, [0u32; 0]);
            assert!(dir.join(format!("core-{}.img", tasks[0].pid)).exists());
        }
    }

    /// pids 7 (threads 7, 8), 5 (5, 6; packed) and 9, which has none.
    #[test]
    fn threads_packed_or_not() {
        let mut image = b"\x19\x43\x56\x54\x30\x30\x27\x50".to_vec();
        for message in [
            &b"\x08\x07\x10\x00\x18\x07\x20\x07\x28\x07\x28\x08"[..],
            b"\x08\x05\x10\x00\x18\x07\x20\x07\x2a\x02\x05\x06",
            b"\x08\x09\x10\x07\x18\x07\x20\x07",
        ] {
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
        }
        let task = |pid, threads: &[u32]| Task {
            pid,
            threads: threads.to_vec(),
        };
        let (seven, five, nine) = (task(7, &[8]), task(5, &[6]), task(9, &[]));
        assert_eq!(tasks([&image[..]]), Ok(vec![seven.clone(), five, nine]));
        let twice = [&image[..], &image[8..24]];
        assert_eq!(tasks(twice), Err(ImageError::Broken), "a pid twice");
        assert_eq!(tasks([&image[..27]]), Err(ImageError::Cut));
        assert_eq!(tasks([&image[..24]]), Ok(vec![seven]));
        image.truncate(8);
        image.extend(b"\x02\0\0\0\x10\x01");
        assert_eq!(tasks([&image[..]]), Err(ImageError::Foreign), "no pid");
    }

    #[test]
    fn a_zombie_is_told_by_its_core() {
        let core = |task: &[u8]| {
            let mut image = b"\x19\x43\x56\x54\x47\x38\x05\x55".to_vec();
            let mut message = vec![0x08, 1, 0x1a, u8::try_from(task.len()).unwrap()];
            message.extend(task);
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
            image
        };
        assert_eq!(is_zombie([&core(b"\x08\x02\x10\x09")[..]]), Ok(true));
        assert_eq!(is_zombie([&core(b"\x08\x01\x10\x00")[..]]), Ok(false));
        assert_eq!(
            is_zombie([&core(b"\x08\x03\x10\x00")[..]]),
            Ok(false),
            "stopped"
        );
        assert_eq!(is_zombie([&core(b"")[..]]), Ok(false), "a thread's");
        assert_eq!(is_zombie([&core(b"")[..8]]), Err(ImageError::Cut));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for magic in [PSTREE_MAGIC, CORE_MAGIC] {
                let mut image = magic.to_le_bytes().to_vec();
                image.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
                image.extend(&bytes);
                let _ = (tasks([&image[..]]), is_zombie([&image[..]]));
            }
        }
    }
}
