//! What proves that CRIU has killed what it dumped.
//!
//! CRIU kills each task while it has it stopped, waits until all are dead, and exits with 0. Behind a dump
//! that has failed, also by another script or a lost page server, it lets the tasks go and exits with
//! something else. With `--leave-running` and `--leave-stopped` it exits with 0 as well, and the tasks live.
//! So a kill is proven by both: CRIU's own exit status is 0, and when CRIU had ended no task lived. No time
//! counts for it: what dies later has been killed by somebody else.

use std::sync::Arc;
use std::time::Duration;

use image_common::dumped::{DumpedTree, HeldBack, Seen};
use image_common::process::Process;

/// How often a tree that is held back is looked at: if CRIU lets it go it stands still until then.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Has the tasks stand still if CRIU lets them go, where the kernel will not tell how CRIU ends (before Linux 6.15, in
/// a container). To be called before CRIU is told that it may kill. `None`: not needed, or the rights do not suffice.
pub fn hold_back(criu: &Process, tree: &Arc<DumpedTree>) -> Option<HeldBack> {
    if criu.tells_status() {
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
) -> Result<(), String> {
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
        task = let_go => return Err(format!("CRIU (pid {pid}) has let process {task} go")),
    }
    // At once: it is what CRIU has left behind.
    let left = tree.look();
    let Some(status) = criu.exit_status().await else {
        if held_back.is_some() && matches!(left, Seen::Dying) {
            // None of them has run since it was dumped, whatever has killed it.
            tree.exited().await;
            return Ok(());
        }
        return Err(format!(
            "how CRIU (pid {pid}) has ended is not known here: {}",
            of_tree(tree, left)
        ));
    };
    if !status.is_success() {
        return Err(format!(
            "CRIU (pid {pid}) has ended with {status}: {}",
            of_tree(tree, left)
        ));
    }
    if let Seen::Lives { .. } = left {
        return Err(format!(
            "CRIU (pid {pid}) has ended with success, and did not kill (--leave-running, --leave-stopped?): {}",
            of_tree(tree, left)
        ));
    }
    tree.exited().await;
    match tree.ended_otherwise() {
        Some(task) => Err(format!("{task}, which is no kill by CRIU")),
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
