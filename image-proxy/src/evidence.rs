//! What proves that CRIU has killed what it dumped.
//!
//! CRIU kills each task while it has it stopped, waits until all are dead, and exits with 0. Behind a dump
//! that has failed, also by another script or a lost page server, it lets the tasks go and exits with
//! something else. With `--leave-running` and `--leave-stopped` it exits with 0 as well, and the tasks live.
//! So a kill is proven by both: CRIU's own exit status is 0, and when CRIU had ended no task lived. No time
//! counts for it: what dies later has been killed by somebody else.

use image_common::dumped::{DumpedTree, Seen};
use image_common::process::Process;

/// Waits until `criu` has ended, and gives what became of `tree`. An error says what was seen instead of a kill.
pub async fn killed(criu: &Process, tree: &DumpedTree) -> Result<(), String> {
    criu.exited().await;
    // At once: it is what CRIU has left behind.
    let left = tree.look();
    let pid = criu.pid();
    let Some(status) = criu.exit_status().await else {
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
