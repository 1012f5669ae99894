//! The tasks of a dump, watched from before CRIU is told that it may kill them.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use rustix::process::Signal;

use crate::procfs::process::{parent_of, tracer_of, Process};
use crate::procfs::tree_memory::{children, MAX_TASKS};

/// The tree of a dump. Each task that lives has its pidfd here.
#[derive(Debug)]
pub struct DumpedTree {
    root: i32,
    tasks: Vec<Process>,
}

/// What can be seen of the tasks at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// All have exited, or do so now.
    Dying,
    /// This one lives, and so many others have exited, or do so now.
    Lives { pid: i32, dying: usize },
}

/// Why a tree of processes cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error(
        "process {0} cannot be watched: it is not there, or there are no file descriptors left"
    )]
    NotThere(i32),
    #[error("the tree of process {0} changes: it is not frozen")]
    Changes(i32),
    #[error("the tree of process {0} has more than {MAX_TASKS} tasks")]
    TooMany(i32),
}

impl DumpedTree {
    /// Watches `root` and all its descendants. They are frozen, so there is time for it and nothing changes.
    pub fn watch(root: i32) -> Result<Self, WatchError> {
        let mut tasks = Vec::new();
        let before = pids(root)?;
        for &pid in &before {
            // A zombie is there until its parent has reaped it, which is frozen.
            let task = Process::open(pid)
                .ok_or(WatchError::NotThere(pid))?
                .with_status();
            match task.has_exited() {
                true if pid == root => return Err(WatchError::NotThere(root)),
                true => {} // dead before the dump
                false => tasks.push(task),
            }
        }
        // The numbers were those of this tree when the pidfds were opened, and still are.
        match pids(root)? == before {
            true => Ok(Self { root, tasks }),
            false => Err(WatchError::Changes(root)),
        }
    }

    /// All tasks that `criu` has stopped now, where nothing tells the root of its dump. `None`: there are none, or
    /// they cannot be seen. Looks at every process of the host.
    pub fn of_tracer(criu: i32) -> Option<Self> {
        let mut tasks = Vec::new();
        let pids = std::fs::read_dir("/proc").ok()?.flatten();
        for pid in pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
            if tracer_of(pid) != Some(criu) {
                continue;
            }
            let Some(task) = Process::open(pid) else {
                // One that cannot be watched is not left out: then nothing is known of the tree.
                if tracer_of(pid) == Some(criu) {
                    return None;
                }
                continue;
            };
            // The pidfd is of the task that was seen.
            if task.tracer() == Some(criu) {
                tasks.push(task.with_status());
            }
        }
        let is_task = |pid: Option<i32>| tasks.iter().any(|t| Some(t.pid()) == pid);
        let root = tasks.iter().find(|t| !is_task(parent_of(t.pid())))?.pid();
        Some(Self { root, tasks })
    }

    /// The pid of the root task.
    pub fn root(&self) -> i32 {
        self.root
    }

    /// The CRIU that has the root stopped, in the numbers of our pid namespace.
    pub fn tracer(&self) -> Option<i32> {
        self.tasks.iter().find(|t| t.pid() == self.root)?.tracer()
    }

    /// Any process that follows a task.
    pub fn any_tracer(&self) -> Option<i32> {
        self.tasks.iter().find_map(Process::tracer)
    }

    /// Whether a task of the tree lives.
    pub fn look(&self) -> Seen {
        let lives: Vec<_> = self.tasks.iter().filter(|t| !t.is_dying()).collect();
        match lives.first() {
            None => Seen::Dying,
            Some(task) => Seen::Lives {
                pid: task.pid(),
                dying: self.tasks.len() - lives.len(),
            },
        }
    }

    /// Stops all tasks, which are frozen: one that is let go stops before it runs an instruction of its program.
    pub fn hold_back(self: &Arc<Self>) -> io::Result<HeldBack> {
        // If a task cannot be stopped, those that were go on.
        let held = HeldBack(self.clone());
        for task in &self.tasks {
            task.signal(Signal::STOP)?;
        }
        Ok(held)
    }

    /// Kills all tasks: those that are watched, and no others that have their numbers since.
    pub fn kill(&self) {
        for task in &self.tasks {
            let _ = task.signal(Signal::KILL); // one that has ended has no use for it
        }
    }

    /// Whether the root is there: then its number is its own.
    pub fn has_root(&self) -> bool {
        let mut tasks = self.tasks.iter();
        tasks.any(|task| task.pid() == self.root && !task.has_exited())
    }

    /// How many tasks are watched.
    pub fn count(&self) -> usize {
        self.tasks.len()
    }

    /// A task that lives and is held by no CRIU any more.
    pub fn let_go(&self) -> Option<i32> {
        let free = |task: &&Process| !task.is_dying() && task.tracer().is_none();
        let task = self.tasks.iter().find(free)?;
        // It may have died between the two looks.
        (!task.is_dying()).then(|| task.pid())
    }

    /// Resolves when all tasks have exited.
    pub async fn exited(&self) {
        for task in &self.tasks {
            task.exited().await;
        }
    }

    /// SIGKILL has ended all tasks, as the kernel tells.
    pub fn were_killed(&self) -> bool {
        let killed = |task: &Process| task.exit_status_now().is_some_and(|s| s.is_killed());
        self.tasks.iter().all(killed)
    }

    /// A task that has ended by something else than SIGKILL, as far as the kernel tells, and how.
    pub fn ended_otherwise(&self) -> Option<String> {
        self.tasks.iter().find_map(|task| {
            let status = task.exit_status_now().filter(|s| !s.is_killed())?;
            Some(format!("process {} ended with {status}", task.pid()))
        })
    }
}

/// Tasks that do not run when CRIU lets them go: what is dead then was killed while CRIU held it, or at
/// least has not run since. They go on when this is dropped.
#[derive(Debug)]
pub struct HeldBack(Arc<DumpedTree>);

impl Drop for HeldBack {
    fn drop(&mut self) {
        for task in &self.0.tasks {
            let _ = task.signal(Signal::CONT); // it may be dead
        }
    }
}

/// `root` and its descendants.
fn pids(root: i32) -> Result<HashSet<i32>, WatchError> {
    let (mut all, mut left) = (HashSet::from([root]), vec![root]);
    while let Some(pid) = left.pop() {
        for child in children(pid) {
            if all.insert(child) {
                left.push(child);
            }
        }
        if all.len() > MAX_TASKS {
            return Err(WatchError::TooMany(root));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    #[tokio::test]
    async fn a_child_that_outlives_its_parent_is_seen() {
        let mut root = Command::new("sh")
            .args(["-c", "sleep 60 >/dev/null & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(root.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let child: i32 = line.trim().parse().unwrap();
        let pid = i32::try_from(root.id()).unwrap();
        let tree = DumpedTree::watch(pid).unwrap();
        assert_eq!(
            (tree.root(), tree.tasks.len(), tree.tracer()),
            (pid, 2, None)
        );
        assert!(matches!(tree.look(), Seen::Lives { dying: 0, .. }));
        root.kill().unwrap();
        root.wait().unwrap();
        assert_eq!(
            tree.look(),
            Seen::Lives {
                pid: child,
                dying: 1
            }
        );
        let child = rustix::process::Pid::from_raw(child).unwrap();
        rustix::process::kill_process(child, rustix::process::Signal::TERM).unwrap();
        tree.exited().await;
        assert_eq!(tree.look(), Seen::Dying);
    }

    /// A task that a tracer lets go stands still until it is known that it was let go.
    #[tokio::test]
    async fn what_is_held_back_does_not_run_when_it_is_let_go() {
        let mut child = Command::new("sh")
            .args(["-c", "read x; echo ran; read y"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let state = || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = status.lines().find(|l| l.starts_with("State:")).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        let until = |wanted: &str| {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            while state() != wanted {
                assert!(std::time::Instant::now() < deadline, "{}", state());
                std::thread::yield_now();
            }
        };
        let tree = Arc::new(DumpedTree::watch(pid).unwrap());
        let held = tree.hold_back().unwrap();
        until("T");
        // What would wake it does not.
        std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"go\n").unwrap();
        assert_eq!((state().as_str(), tree.let_go()), ("T", Some(pid)));
        drop(held);
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "ran\n");
        // Killed while it is held back, it has not run.
        let held = tree.hold_back().unwrap();
        child.kill().unwrap();
        tree.exited().await;
        assert_eq!((tree.look(), tree.let_go()), (Seen::Dying, None));
        drop(held);
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_task_by_itself_is_no_kill() {
        let task = || {
            let mut child = Command::new("sh");
            child
                .args(["-c", "read x; exit 3"])
                .stdin(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let (mut one, mut two) = (task(), task());
        let tree = |child: &std::process::Child| {
            DumpedTree::watch(i32::try_from(child.id()).unwrap()).unwrap()
        };
        let (ended, killed) = (tree(&one), tree(&two));
        drop(one.stdin.take());
        two.kill().unwrap();
        ended.exited().await;
        killed.exited().await;
        // Zombies of ours.
        assert!(ended.ended_otherwise().unwrap().contains("exit status 3"));
        assert_eq!(killed.ended_otherwise(), None);
        one.wait().unwrap();
        two.wait().unwrap();
        assert!(DumpedTree::watch(i32::try_from(one.id()).unwrap()).is_err());
    }
}
