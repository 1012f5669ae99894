//! Which session an operator means, and the dumps in doubt that wait for one.

use std::sync::Arc;

use image_common::image::SessionName;

use super::{Active, Proxy, Registry};
use crate::run::{Run, Told};
use crate::session::Session;

/// Dumps in doubt whose links are held. The oldest is closed when there are more: then its set
/// can be dropped on the target alone.
const OPEN_DOUBTS: usize = 64;

/// A dump whose CRIU was told to kill, or may have killed, and whose process nobody saw die.
#[derive(Clone)]
pub struct Doubt {
    pub active: Active,
    pub told: Told,
}

/// What a session is at the moment.
pub enum Found {
    Running(Active),
    /// For the next round of its series.
    Waiting(Arc<Session>),
    /// A dump was announced and nothing of it has come.
    Announced(Arc<Session>),
    InDoubt(Doubt),
}

impl Proxy {
    pub fn find(&self, name: &SessionName) -> Option<Found> {
        let registry = self.registry();
        let running = registry.runs.iter().rev().find(|a| a.session.name == *name);
        if let Some(active) = running {
            return Some(Found::Running(active.clone()));
        }
        let mut announced = registry.announced.iter().map(|a| &a.session);
        if let Some(session) = announced.find(|s| s.name == *name) {
            return Some(Found::Announced(session.clone()));
        }
        if let Some(session) = registry.series.iter().find(|s| s.name == *name) {
            return Some(Found::Waiting(session.clone()));
        }
        let mut doubts = registry.doubts.iter().rev();
        let doubt = doubts.find(|d| d.active.session.name == *name);
        doubt.cloned().map(Found::InDoubt)
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

    pub(super) fn keep_doubt(self: &Arc<Self>, registry: &mut Registry, active: &Active) {
        registry.doubts.push(Doubt {
            active: active.clone(),
            told: active.run.take_told(),
        });
        if !active.session.is_usable() {
            self.close(registry, active.session.clone(), "");
        }
        if registry.doubts.len() > OPEN_DOUBTS {
            let oldest = registry.doubts.remove(0).active.session;
            self.close(registry, oldest, "too many dumps are in doubt");
        }
    }

    /// Somebody has decided.
    pub fn forget_doubt(&self, doubt: &Doubt) {
        let run = &doubt.active.run;
        let mut registry = self.registry();
        registry.doubts.retain(|d| !Arc::ptr_eq(&d.active.run, run));
    }
}
