//! What proves that CRIU has killed what it dumped.
//!
//! CRIU kills each task while it has it stopped, waits until all are dead, and exits with 0. Behind a dump
//! that has failed, also by another script or a lost page server, it lets the tasks go and exits with
//! something else. With `--leave-running` and `--leave-stopped` it exits with 0 as well, and the tasks live.
//! So a kill is proven by both: CRIU's own exit status is 0, and when CRIU had ended no task lived. No time
//! counts for it: what dies later was not killed by CRIU.

use std::sync::Arc;
use std::time::Duration;

use image_common::criu::options::FinalState;
use image_common::criu_io::options;
use image_common::procfs::dumped::{DumpedTree, HeldBack, Seen};
use image_common::procfs::process::Process;

use crate::failure::Failure;

/// How often a tree that is held back is looked at: if CRIU lets it go it stands still until then.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Has the tasks stand still if CRIU lets them go, where the kernel will not tell how CRIU ends (before Linux 6.15, in
/// a container). To be called before CRIU is told that it may kill. `None`: not needed, or the rights do not suffice.
pub async fn hold_back(criu: &Process, tree: &Arc<DumpedTree>) -> Option<HeldBack> {
    if criu.tells_status() {
        return None;
    }
    // It would be woken where CRIU is to leave it stopped.
    if options::of_peer(Some(criu.pid())).await.after_dump() == FinalState::Stopped {
        return None;
    }
    let held = tree.hold_back();
    let held = held.inspect_err(|e| {
        tracing::warn!(
            "process {} cannot be stopped ({e}), and this kernel does not tell how CRIU ends: the set may end in \
             doubt. Give image-proxy CAP_KILL, or run it as root",
            tree.root()
        );
    });
    held.ok()
}

/// Waits until `criu` has ended, and gives what became of `tree`. An error says what was seen instead of a kill.
pub async fn killed(
    criu: &Process,
    tree: &DumpedTree,
    held_back: Option<&HeldBack>,
) -> Result<(), Failure> {
    let pid = criu.pid();
    let let_go = async {
        while held_back.is_some() {
            tokio::time::sleep(LOOK_EVERY).await;
            if let Some(task) = tree.let_go() {
                return task;
            }
        }
        std::future::pending().await
    };
    tokio::select! {
        biased;
        () = criu.exited() => {}
        task = let_go => return Err(Failure::criu(format!("CRIU (pid {pid}) has let process {task} go"))),
    }
    // At once: it is what CRIU has left behind.
    let left = tree.look();
    let Some(status) = criu.exit_status().await else {
        if held_back.is_some() && matches!(left, Seen::Dying) {
            // None of them has run since it was dumped, whatever has killed it.
            tree.exited().await;
            return Ok(());
        }
        return Err(Failure::criu(format!(
            "how CRIU (pid {pid}) has ended is not known here: {}",
            of_tree(tree, left)
        )));
    };
    if !status.is_success() {
        return Err(Failure::criu(format!(
            "CRIU (pid {pid}) has ended with {status}: {}",
            of_tree(tree, left)
        )));
    }
    if let Seen::Lives { .. } = left {
        return Err(Failure::criu(format!(
            "CRIU (pid {pid}) has ended with success, and did not kill (--leave-running, --leave-stopped?): {}",
            of_tree(tree, left)
        )));
    }
    tree.exited().await;
    match tree.ended_otherwise() {
        Some(task) => Err(Failure::criu(format!("{task}, which is no kill by CRIU"))),
        None => Ok(()),
    }
}

fn of_tree(tree: &DumpedTree, seen: Seen) -> String {
    match seen {
        Seen::Dying => format!(
            "process {} is dead, and CRIU may not have killed it",
            tree.root()
        ),
        Seen::Lives { pid, dying: 0 } => format!("process {pid} lives"),
        Seen::Lives { pid, dying } => {
            format!("process {pid} lives, and {dying} of its tree are dead")
        }
    }
}

/// How the CRIU of a dump without script has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CriuEnd {
    /// It has killed what it dumped.
    Killed,
    /// Its dump has failed, and all tasks were seen to live when it had ended: they are not killed any more.
    Failed(Failure),
    InDoubt(Failure),
}

/// What was seen of a CRIU without script while it dumped.
#[derive(Debug, Clone, Default)]
pub struct Dumped {
    /// The tasks that it had stopped. `None`: they were not seen, e.g. because it was faster.
    pub tree: Option<Arc<DumpedTree>>,
    /// What it does with the tasks, by its options.
    pub after: FinalState,
    /// It is of `--remote`, whose options are looked at behind its first push, when it may have ended.
    pub remote: bool,
    /// All pages were copied while it had the tasks stopped.
    pub copied_frozen: bool,
}

impl Dumped {
    /// Looks at all processes; to be called when the tasks are frozen, and nowhere where CRIU waits for it.
    pub fn look(criu: &Process) -> Self {
        if criu.has_exited() {
            return Self::default(); // its number may be that of another process
        }
        Self {
            tree: DumpedTree::of_tracer(criu.pid()).map(Arc::new),
            ..Self::default()
        }
    }
}

/// Waits until the CRIU of a dump without script has ended, and gives what is known then. It has written everything.
pub async fn end_of(criu: Option<&Process>, dumped: &Dumped) -> CriuEnd {
    let Some(criu) = criu else {
        let why = "CRIU had ended, or is in another pid namespace: how it ends cannot be seen";
        return CriuEnd::InDoubt(Failure::criu(why));
    };
    criu.exited().await;
    let tree = dumped.tree.as_deref();
    // At once: it is what CRIU has left behind.
    let left = tree.map(|tree| (tree, tree.look()));
    let status = criu.exit_status().await;
    let how = match status {
        Some(status) => format!("CRIU (pid {}) has ended with {status}", criu.pid()),
        None => format!("how CRIU (pid {}) has ended is not known here", criu.pid()),
    };
    let and = |left: Option<(&DumpedTree, Seen)>| match left {
        Some((tree, seen)) => format!("{how}: {}", of_tree(tree, seen)),
        None => format!("{how}, and the process that it dumped was not seen"),
    };
    let lives = matches!(left, Some((_, Seen::Lives { .. })));
    // All of them, by a CRIU of which nothing says that it kills: what it dumped goes on here.
    let all_live = matches!(left, Some((_, Seen::Lives { dying: 0, .. })));
    let given_up = all_live && !dumped.copied_frozen && dumped.after != FinalState::Killed;
    let leaves = matches!(dumped.after, FinalState::Running | FinalState::Stopped);
    match (status, left) {
        (Some(status), _) if status.is_success() && (lives || leaves) => {
            let pid = criu.pid();
            let left = format!(
                "CRIU (pid {pid}) has ended with success, and did not kill (--leave-running, --leave-stopped?)"
            );
            match given_up {
                false => CriuEnd::InDoubt(Failure::criu(left)),
                true => CriuEnd::Failed(Failure::criu(format!(
                    "{left}; its last pages may be of a later moment than the others, so the set cannot be used: \
                     dump with the action script"
                ))),
            }
        }
        // It kills if it succeeds, by its options. Unknown ones may leave the tasks running.
        (Some(status), None)
            if status.is_success() && (dumped.after == FinalState::Killed || dumped.remote) =>
        {
            CriuEnd::Killed
        }
        (Some(status), Some((tree, _))) if status.is_success() => dead(tree).await,
        // Killed by a signal, it may have left its code in the process.
        (Some(status), Some((_, Seen::Lives { dying: 0, .. }))) if status.code().is_some() => {
            CriuEnd::Failed(Failure::criu(and(left)))
        }
        // Its failure is not seen, and what it had let go may have ended by itself.
        (None, Some((tree, Seen::Dying))) if tree.were_killed() => dead(tree).await,
        _ => CriuEnd::InDoubt(Failure::criu(and(left))),
    }
}

async fn dead(tree: &DumpedTree) -> CriuEnd {
    tree.exited().await;
    match tree.ended_otherwise() {
        Some(task) => CriuEnd::InDoubt(Failure::criu(format!("{task}, which is no kill by CRIU"))),
        None => CriuEnd::Killed,
    }
}
