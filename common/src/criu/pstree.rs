//! `pstree.img`: the tasks that a restore makes (`images/pstree.proto`), and `core-*.img` as far
//! as it tells whether a task lives.

use prost::Message;

use super::image_file::{ImageError, Messages};

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
}

/// One task of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    pub pid: u32,
    /// The others; its first one is itself.
    pub threads: Vec<u32>,
}

/// The tasks of a `pstree.img`.
pub fn tasks<'a>(image: impl IntoIterator<Item = &'a [u8]>) -> Result<Vec<Task>, ImageError> {
    let mut messages = Messages::open(image, PSTREE_MAGIC)?;
    let mut tasks = Vec::new();
    let mut pids = 0;
    while let Some(message) = messages.message()? {
        if message.len() > MAX_ENTRY_BYTES {
            return Err(ImageError::TooLong);
        }
        let PstreeEntry { pid, mut threads } = PstreeEntry::decode(message)?;
        pids += threads.len().max(1);
        if pids > MAX_PIDS {
            return Err(ImageError::TooLong);
        }
        let pid = pid.ok_or(ImageError::Broken)?;
        threads.retain(|&thread| thread != pid);
        tasks.push(Task { pid, threads });
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
    fn the_recorded_tree() {
        let one = std::fs::read(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/stream-plain/images/pstree.img"
        ));
        let tasks = tasks([&one.unwrap()[..]]).unwrap();
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks[0].threads, [0u32; 0]);
    }

    /// pids 7 (threads 7, 8; once packed) and 9, which has none.
    #[test]
    fn threads_packed_or_not() {
        let mut image = b"\x19\x43\x56\x54\x30\x30\x27\x50".to_vec();
        for message in [
            &b"\x08\x07\x10\x00\x18\x07\x20\x07\x28\x07\x28\x08"[..],
            b"\x08\x07\x10\x00\x18\x07\x20\x07\x2a\x02\x07\x08",
            b"\x08\x09\x10\x07\x18\x07\x20\x07",
        ] {
            image.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
            image.extend(message);
        }
        let seven = Task {
            pid: 7,
            threads: vec![8],
        };
        let nine = Task {
            pid: 9,
            threads: vec![],
        };
        assert_eq!(
            tasks([&image[..]]),
            Ok(vec![seven.clone(), seven.clone(), nine])
        );
        assert_eq!(tasks([&image[..27]]), Err(ImageError::Cut));
        assert_eq!(tasks([&image[..24]]), Ok(vec![seven]));
        image.truncate(8);
        image.extend(b"\x02\0\0\0\x10\x01");
        assert_eq!(tasks([&image[..]]), Err(ImageError::Broken), "no pid");
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
