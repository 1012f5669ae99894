//! Which session an operator means, and the dumps in doubt that wait for one.

use std::sync::Arc;

use image_common::link::session_id::Wanted;
use image_common::units::human_size;

use crate::dumps::proxy::{Active, Doubt, Proxy, Registry};
use crate::failure::Failure;
use crate::session::run::Run;
use crate::session::Session;

/// What a session is at the moment.
pub enum Found {
    Running(Active),
    /// For the next round of its series.
    Waiting(Arc<Session>),
    /// A dump was announced and nothing of it has come.
    Announced(Arc<Session>),
    InDoubt(Doubt),
}

impl Found {
    pub fn session(&self) -> &Arc<Session> {
        match self {
            Self::Running(active) | Self::InDoubt(Doubt { active, .. }) => &active.session,
            Self::Waiting(session) | Self::Announced(session) => session,
        }
    }

    fn run(&self) -> Option<&Arc<Run>> {
        match self {
            Self::Running(active) | Self::InDoubt(Doubt { active, .. }) => Some(&active.run),
            Self::Waiting(_) | Self::Announced(_) => None,
        }
    }

    /// One line for the operator, to choose between several.
    fn line(&self) -> String {
        let session = self.session();
        let what = match self {
            Self::Running(_) => "a dump or pre-dump is under way",
            Self::Waiting(_) => "waits for its next round",
            Self::Announced(_) => "announced by its script, nothing has come",
            Self::InDoubt(doubt) => &doubt.state(),
        };
        let id = match session.id() {
            Some(id) => id.to_string(),
            None => "(no id before image-cache answers)".to_owned(),
        };
        let age = session.age().as_secs_f64();
        let set = self.run().map_or_else(String::new, |run| {
            let set = run.status();
            let size = human_size(set.bytes);
            format!(
                "; {}: {}, {} images, {size}",
                set.snapshot, set.state, set.images
            )
        });
        format!(
            "  {id}  session {}: {what}, {age:.0} s old{set}",
            session.name
        )
    }
}

impl Proxy {
    /// What an operator means; an error if that is not one thing.
    pub fn find(&self, wanted: &Wanted) -> Result<Option<Found>, Failure> {
        let mut found = self.all();
        found.retain(|found| {
            let session = found.session();
            match found.run() {
                Some(run) => wanted.includes(&session.name, session.id(), run.set),
                None => wanted.is_session(&session.name, session.id()),
            }
        });
        // Of a session with several runs the newest is meant, as it always is.
        let mut known: Vec<Arc<Session>> = Vec::new();
        found.retain(|found| {
            let session = found.session();
            let first = !known.iter().any(|k| Arc::ptr_eq(k, session));
            known.extend(first.then(|| session.clone()));
            first
        });
        if found.len() <= 1 {
            return Ok(found.pop());
        }
        let lines: Vec<_> = found.iter().map(Found::line).collect();
        Err(Failure::operator(format!(
            "{wanted} is not one session but {}; nothing was done. Say which: `image-proxy abort ID`\n{}",
            found.len(),
            lines.join("\n")
        )))
    }

    fn all(&self) -> Vec<Found> {
        let registry = self.registry();
        let running = registry.runs.iter().rev().cloned().map(Found::Running);
        let announced = registry.announced.iter().map(|a| a.session.clone());
        let waiting = registry.series.iter().cloned().map(Found::Waiting);
        let doubts = registry.doubts.iter().rev().cloned().map(Found::InDoubt);
        running
            .chain(announced.map(Found::Announced))
            .chain(waiting)
            .chain(doubts)
            .collect()
    }

    pub fn doubt_of(&self, run: &Arc<Run>) -> Option<Doubt> {
        let registry = self.registry();
        let mut doubts = registry.doubts.iter();
        doubts.find(|d| Arc::ptr_eq(&d.active.run, run)).cloned()
    }

    /// No run continues this series. `false` if one has just begun.
    pub fn leave_series(&self, session: &Arc<Session>) -> bool {
        let mut registry = self.registry();
        let before = registry.series.len();
        registry.series.retain(|s| !Arc::ptr_eq(s, session));
        registry.series.len() < before
    }

    /// Returns when a run has ended, and what follows from that is done.
    pub async fn over(&self, run: &Arc<Run>) {
        let mut changes = self.changes.subscribe();
        loop {
            changes.mark_unchanged();
            let runs = |r: &Registry| r.runs.iter().any(|a| Arc::ptr_eq(&a.run, run));
            if !runs(&self.registry()) {
                return;
            }
            let _ = changes.changed().await;
        }
    }

    /// The operator has decided.
    pub fn forget_doubt(&self, doubt: &Doubt) {
        let run = &doubt.active.run;
        let mut registry = self.registry();
        registry.doubts.retain(|d| {
            let decided = Arc::ptr_eq(&d.active.run, run);
            if let Some(late) = d.late.as_ref().filter(|_| decided) {
                late.over.cancel();
            }
            !decided
        });
    }
}
