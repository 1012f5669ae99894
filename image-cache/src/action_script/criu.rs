//! The CRIU that a script holds, and what it has built.
//!
//! Without that CRIU the tasks stay asleep in its restorer for ever, and hold their numbers and their files. So if it ends in
//! the hold, the script ends them: by pidfds that were opened when the hold began.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use image_common::procfs::dumped::{DumpedTree, WatchError};
use image_common::procfs::process::{descends, parent_of, Process};

/// How long the killed may take to be gone, until the script says no more than that they were killed.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// A helper of CRIU may end while its tree is looked at.
const LOOKS: usize = 5;

/// CRIU, and the tree that it restores.
pub struct Criu {
    /// The process that started this script, and the parent of the tree if that is another one: a shell may stand between.
    processes: Vec<Process>,
    tree: Result<Arc<DumpedTree>, String>,
}

impl Criu {
    /// `parent` has started this script, and `root` is the tree's, as CRIU says.
    pub fn watch(parent: (i32, OwnedFd), root: Option<i32>) -> Self {
        let script = i32::try_from(std::process::id()).unwrap_or(0);
        let (number, pidfd) = parent;
        let mut processes: Vec<Process> = Process::of_pidfd(number, pidfd).into_iter().collect();
        let tree = match root.map(|root| (root, parent_of(root))) {
            None => Err("CRIU does not say which tasks are its own".to_owned()),
            // With --restore-sibling the tree belongs to another process.
            Some((root, Some(above))) if above > 1 && descends(script, above) => {
                if above != number {
                    processes.extend(Process::open(above));
                }
                watch(root).map_err(|e| e.to_string())
            }
            Some((root, _)) => Err(format!("process {root} is not a child of that CRIU")),
        };
        Self { processes, tree }
    }

    /// Why its tasks cannot be ended by this script, if they cannot.
    pub fn unwatched(&self) -> Option<&str> {
        self.tree.as_ref().err().map(String::as_str)
    }

    /// Resolves when CRIU has ended.
    pub async fn ended(&self) {
        match &self.processes[..] {
            [] => std::future::pending().await,
            [one] => one.exited().await,
            [one, other, ..] => tokio::select! {
                () = one.exited() => {}
                () = other.exited() => {}
            },
        }
    }

    /// CRIU has ended: ends what it has built. Gives what was done, for the log.
    pub async fn end_tasks(&self) -> String {
        let tree = match &self.tree {
            Ok(tree) => tree,
            Err(why) => {
                return format!("its tasks are left asleep ({why}): end them (kill -9)");
            }
        };
        // Children that came since. The number was that of the root all the time if the root is still there.
        let later = DumpedTree::watch(tree.root());
        let later = later.ok().filter(|_| tree.has_root());
        tree.kill();
        if let Some(later) = &later {
            later.kill();
        }
        let gone = async {
            tree.exited().await;
            if let Some(later) = &later {
                later.exited().await;
            }
        };
        let count = tree.count();
        match tokio::time::timeout(GONE_WITHIN, gone).await {
            Ok(()) => {
                format!("its {count} tasks were asleep and were ended; nothing of them has run")
            }
            Err(_) => format!(
                "its {count} tasks were asleep and have been sent SIGKILL, and are not gone yet"
            ),
        }
    }
}

fn watch(root: i32) -> Result<Arc<DumpedTree>, WatchError> {
    let mut looks = LOOKS;
    loop {
        match DumpedTree::watch(root) {
            Err(WatchError::Changes(_) | WatchError::NotThere(_)) if looks > 1 => looks -= 1,
            watched => return watched.map(Arc::new),
        }
    }
}
