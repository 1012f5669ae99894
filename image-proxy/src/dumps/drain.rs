//! The end of image-proxy: nothing new, and what runs comes to its end or is given up.

use std::sync::Arc;

use crate::dumps::proxy::{Doubt, Proxy};
use crate::failure::Failure;
use crate::session::state::RunState;

impl Proxy {
    /// After a stop request: waits until nothing runs. A series between two rounds is ended:
    /// its next run would not be accepted. `false` if there was one, or if the target has not heard what became of a
    /// dump.
    pub async fn wind_down(self: &Arc<Self>) -> bool {
        let mut changes = self.changes.subscribe();
        let mut clean = true;
        loop {
            changes.mark_unchanged();
            {
                let mut registry = self.registry();
                for series in std::mem::take(&mut registry.series) {
                    clean = false;
                    tracing::error!(session = %series.name, "the series of pre-dumps is given up: image-proxy is stopping; its next round will be a full one");
                    self.close(&mut registry, series, Some("image-proxy is stopping"));
                }
                // What the target is to hear is said to it once more.
                let (late, doubts) = std::mem::take(&mut registry.doubts)
                    .into_iter()
                    .partition(|doubt| doubt.late.is_some());
                registry.doubts = late;
                for Doubt { active, .. } in doubts {
                    let reason = Some("image-proxy is stopping");
                    self.close(&mut registry, active.session, reason);
                }
                for announced in std::mem::take(&mut registry.announced) {
                    self.close(
                        &mut registry,
                        announced.session,
                        Some("image-proxy is stopping"),
                    );
                }
                let runs = registry.runs.len() + registry.concluding;
                if runs + registry.closing.len() + registry.doubts.len() == 0 {
                    return clean && !registry.unheard;
                }
            }
            let _ = changes.changed().await;
        }
    }

    /// Waits for the last word of dumps that are done: a `--remote` CRIU says FINISH after its
    /// commit, and would find no socket.
    pub async fn farewells(&self) {
        let recent = self.registry().recent.clone();
        for active in recent {
            // Ended in time or not, its watcher sees CRIU exit.
            active.run.wait_for(RunState::is_over).await;
        }
    }

    /// Gives up everything that runs.
    pub fn abort_all(&self, reason: &Failure) {
        let runs = self.registry().runs.clone();
        for active in runs {
            active.run.fail(reason.clone());
        }
    }
}
