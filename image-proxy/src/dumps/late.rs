//! What the target is to hear of a dump whose link is gone.

use tokio_util::sync::CancellationToken;

use crate::link::decision::Decision;

/// A decision that is being brought.
#[derive(Clone)]
pub struct Late {
    pub decision: Decision,
    /// Why the last attempt was in vain.
    pub why: Option<String>,
    /// It need not be brought any more.
    pub(super) over: CancellationToken,
}

impl Late {
    /// What is known of the process here.
    pub fn process(&self) -> &'static str {
        match self.decision {
            Decision::Commit => "the process is dead here",
            Decision::Abort(_) => "the process lives here",
        }
    }

    /// What does the same on the target.
    pub fn command(&self, handle: &str) -> String {
        match self.decision {
            Decision::Commit => format!("image-cache release {handle}"),
            Decision::Abort(_) => format!("image-cache drop {handle}"),
        }
    }
}
