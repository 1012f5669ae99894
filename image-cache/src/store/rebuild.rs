//! The store as an earlier image-cache left it, of its journal and its memory (`--keep-through-restart`).

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use image_common::error_chain::chain;
use image_common::image::SessionName;
use image_common::link::codec::SetNumber;
use image_common::units::human_size;

use crate::store::journal::record::SessionRecord;
use crate::store::journal::{Journal, Kept, KeptSession, Ledger};
use crate::store::memory::arena::Arena;
use crate::store::session::{Opener, Session};
use crate::store::set::kept::Memory;
use crate::store::set::Set;
use crate::store::Store;

/// Why the links of these sessions are gone.
const RESTARTED: &str = "image-cache was restarted";

impl Store {
    /// From now on what is to be kept is noted there. To be called once, before any session begins.
    pub fn keep_in(&self, journal: &Arc<Journal>) {
        let _ = self.journal.set(journal.clone());
    }

    /// The session's part of the journal, if there is one.
    pub(super) fn note(&self, session: &Session) {
        if let Some(journal) = self.journal.get() {
            let ledger = Ledger::new(journal, record(session));
            let _ = session.ledger.set(ledger); // it is new
        }
    }

    /// Makes what an earlier process had again, before anything is served. What was not yet as a whole here is gone, and its
    /// memory goes back.
    pub fn rebuild(&self, kept: Kept, arena: &Arc<Arena>) -> Vec<Arc<Session>> {
        for fault in &kept.faults {
            tracing::error!(
                "the journal of the image-cache before: {fault}; what else it says is kept"
            );
        }
        let mut memory = Memory::new(arena.clone());
        let mut found = Vec::new();
        for session in kept.sessions.into_values().filter(|s| !s.sets.is_empty()) {
            match self.rebuild_session(&session, kept.has_gaps, &mut memory) {
                Ok(session) => found.push(session),
                Err(why) => tracing::error!(
                    session = session.session.name,
                    "a session of the image-cache before cannot be made again, and is lost: {why}"
                ),
            }
        }
        if let Some(journal) = self.journal.get() {
            journal.taken_over();
        }
        memory.give_back_unused();
        for session in &found {
            self.disconnect(session, RESTARTED);
            let (stands, id) = (session.stands(), session.id);
            let read = |set: &Arc<Set>| set.is_in_doubt() && !set.waits_for_word();
            let advice = match session.sets().iter().any(read) {
                true => format!(
                    "A restore was reading it. Look at the process here: if it runs, run `image-cache drop {id}`; if not, end what is \
                     left of it, and run `image-cache release {id}` to restore it again"
                ),
                false => session.advice(),
            };
            match self.holds(session) {
                true if session.is_in_doubt() => tracing::error!(
                    session = %session.name, id = %session.id,
                    "kept through the restart of image-cache: {stands}. {advice}"
                ),
                true => tracing::warn!(
                    session = %session.name, id = %session.id,
                    "kept through the restart of image-cache: {stands}"
                ),
                false => {}
            }
        }
        found.retain(|session| self.holds(session));
        if !found.is_empty() {
            let held = human_size(self.budget.used());
            tracing::warn!(
                sessions = found.len(),
                held,
                "taken over from the image-cache before"
            );
        }
        found
    }

    fn rebuild_session(
        &self,
        kept: &KeptSession,
        has_gaps: bool,
        memory: &mut Memory,
    ) -> Result<Arc<Session>, String> {
        let record = &kept.session;
        let name = SessionName::new(&record.name).map_err(|e| chain(&e))?;
        let opener = Opener {
            proxy: record.proxy,
            opening: record.opening,
        };
        let mut sessions = self.sessions();
        let age = unix_time().saturating_sub(record.began);
        let session = Session::refound(
            self.next_number(&sessions),
            name,
            (record.key, opener),
            record.peer.clone(),
            Duration::from_secs(age),
            self.changes.clone(),
            &self.budget,
            &self.limits,
        );
        self.note(&session);
        let session = Arc::new(session);
        for set in kept.sets.values() {
            let ledger = session.ledger.get();
            let changes = self.changes.clone();
            let made = Set::refound(set, memory, changes, &session.budget, ledger);
            match made {
                Ok(made) => {
                    if has_gaps {
                        made.doubt_record();
                    }
                    made.note_again();
                    session.put_set(SetNumber(set.number), made);
                }
                Err(e) => tracing::error!(
                    session = %session.name, id = %session.id, snapshot = set.snapshot,
                    "a set of the image-cache before cannot be made again, and is lost: {}", chain(&e)
                ),
            }
        }
        if session.sets().is_empty() {
            return Err("none of its sets is here".to_owned());
        }
        if kept.restored {
            session.mark_restored();
            session.ledger.get().inspect(|ledger| ledger.restored());
        }
        sessions.insert(session.number, session.clone());
        Ok(session)
    }
}

fn record(session: &Session) -> SessionRecord {
    let opener = session.opener();
    SessionRecord {
        number: session.number,
        name: session.name.to_string(),
        key: session.key,
        proxy: opener.proxy,
        opening: opener.opening,
        peer: session.peer.clone(),
        began: unix_time().saturating_sub(session.age().as_secs()),
    }
}

fn unix_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

#[cfg(test)]
mod tests;
