//! Where a hold stands: whether an image-cache speaks for it, and what was decided. The first decision counts.

use image_common::control::status::Session;
use tokio::sync::watch;

/// What becomes of the restore.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The process is dead on the source: the tasks may run. What has said so.
    GoOn(&'static str),
    /// The restore fails: CRIU ends what it has built. The reason.
    GiveUp(String),
}

impl Decision {
    fn is_same(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// What was decided, for a peer that wanted something else.
    fn refuses(&self) -> String {
        match self {
            Self::GoOn(by) => {
                format!("decided before, by {by}: the restore goes on, and its tasks run")
            }
            Self::GiveUp(reason) => {
                format!("decided before: the restore fails, and nothing of it runs ({reason})")
            }
        }
    }
}

/// What the parts of the hold have in common.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hold {
    pub decided: Option<Decision>,
    /// The connection to the image-cache has ended, and there is no other one yet.
    pub orphaned: bool,
    /// So many image-caches that start, or run, want the link's port.
    pub yielded: usize,
    /// Whether an operator can reach the socket of the hold, once that was tried.
    pub socket: Option<bool>,
    /// The link's port is open here.
    pub port_open: bool,
}

impl Hold {
    /// The link's port is to be open here.
    pub fn wants_port(&self) -> bool {
        self.orphaned && self.yielded == 0 && self.decided.is_none()
    }

    /// For `status`.
    pub fn as_str(&self) -> &'static str {
        match (&self.decided, self.orphaned) {
            (Some(Decision::GoOn(_)), _) => "held by a restore here, which goes on",
            (Some(Decision::GiveUp(_)), _) => "held by a restore here, which fails",
            (None, true) => "in doubt: held by a restore here, asleep; its image-cache is gone",
            (None, false) => "held by a restore here, asleep; its image-cache runs",
        }
    }
}

/// The state, and the news of it.
#[derive(Debug, Clone, Default)]
pub struct State(watch::Sender<Hold>);

impl State {
    /// Decides, unless that is done. An error is what was decided before, for the peer.
    pub fn decide(&self, decision: Decision) -> Result<(), String> {
        self.decide_if(decision, |_| Ok(()))
    }

    /// The same if `may` finds nothing against it, in one step.
    pub fn decide_if(
        &self,
        decision: Decision,
        may: impl FnOnce(&Hold) -> Result<(), String>,
    ) -> Result<(), String> {
        let mut outcome = Ok(());
        self.0.send_if_modified(|hold| {
            outcome = match &hold.decided {
                Some(before) if before.is_same(&decision) => Ok(()),
                Some(before) => Err(before.refuses()),
                None => may(hold),
            };
            let news = outcome.is_ok() && hold.decided.is_none();
            if news {
                hold.decided = Some(decision);
            }
            news
        });
        outcome
    }

    /// Changes what is not the decision.
    pub fn change(&self, change: impl FnOnce(&mut Hold)) {
        self.0.send_modify(change);
    }

    pub fn now(&self) -> Hold {
        self.0.borrow().clone()
    }

    /// Resolves when this holds.
    pub async fn until(&self, test: impl FnMut(&Hold) -> bool) {
        let mut news = self.0.subscribe();
        // The sender lives in `self`.
        let _ = news.wait_for(test).await;
    }

    /// What was decided, once it is.
    pub async fn decided(&self) -> Decision {
        let mut news = self.0.subscribe();
        loop {
            if let Some(decision) = news.borrow_and_update().decided.clone() {
                return decision;
            }
            let _ = news.changed().await;
        }
    }

    /// For `status`.
    pub fn show(&self, session: Session) -> Session {
        let state = self.now().as_str().to_owned();
        Session { state, ..session }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decision_counts() {
        let state = State::default();
        let give_up = || Decision::GiveUp("an operator drops it".to_owned());
        let refused = state.decide_if(give_up(), |hold| match hold.orphaned {
            true => Ok(()),
            false => Err("image-cache runs".to_owned()),
        });
        assert_eq!(refused, Err("image-cache runs".to_owned()));
        assert_eq!(state.now().decided, None);
        state.decide(Decision::GoOn("the source")).unwrap();
        state.decide(Decision::GoOn("an operator")).unwrap();
        assert!(state
            .decide(give_up())
            .unwrap_err()
            .contains("by the source"));
        assert_eq!(state.now().decided, Some(Decision::GoOn("the source")));
        state.change(|hold| hold.orphaned = true);
        assert!(
            !state.now().wants_port(),
            "nothing is to be decided any more"
        );
    }
}
