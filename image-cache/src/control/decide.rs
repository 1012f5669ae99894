//! `image-cache release` and `image-cache drop`: which set an operator means, and what is done with it.
//!
//! A decision is about one session: its dump, with the pre-dumps that the dump needs. A session that has several dumps (no
//! image-proxy of ours makes one) wants a number behind the id. A name may fit several sessions, then nothing is done and
//! they are listed.

use std::fmt::Write;
use std::sync::Arc;

use image_common::link::codec::SetNumber;
use image_common::link::session_id::Wanted;
use image_common::units::human_size;

use crate::store::session::Session;
use crate::store::set::decision::NotDropped;
use crate::store::set::Set;
use crate::store::{Scope, Store};

const DROPPED: &str = "an operator dropped it";

/// One thing that a decision may be about.
struct Candidate {
    session: Arc<Session>,
    /// `None`: the session as a whole.
    set: Option<Arc<Set>>,
}

impl Candidate {
    /// How to name it, so that it is the only one.
    fn id(&self, sets: usize) -> String {
        let id = self.session.id;
        match &self.set {
            Some(set) if sets > 1 => Wanted::Set(id, set.number).to_string(),
            _ => id.to_string(),
        }
    }

    fn line(&self, id: &str) -> String {
        let status = self.session.status();
        let mut line = format!(
            "  {id}  session {}: {}, {:.0} s old",
            status.name, status.state, status.age_seconds
        );
        if let Some(peer) = &status.peer {
            let _ = write!(line, ", from {peer}");
        }
        let newest = self.set.clone().or_else(|| newest_of(&self.session));
        if let Some(set) = newest {
            let set = set.status();
            let size = human_size(set.bytes);
            let _ = write!(
                line,
                "; {}: {}, {} images, {size}",
                set.snapshot, set.state, set.images
            );
        } else if status.page_store_bytes > 0 {
            let _ = write!(line, "; pages, {}", human_size(status.page_store_bytes));
        }
        line
    }
}

fn newest_of(session: &Session) -> Option<Arc<Set>> {
    let sets = session.sets();
    let given_up = |s: &&Arc<Set>| !s.is_aborted();
    sets.iter().find(given_up).or_else(|| sets.first()).cloned()
}

/// The dumps of a session that a process may depend on.
fn dumps(session: &Session) -> usize {
    let sets = session.sets();
    sets.iter().filter(|s| s.is_depended_on()).count()
}

fn sessions(store: &Store, wanted: &Wanted) -> Result<Vec<Arc<Session>>, String> {
    let mut all = store.newest(&Scope::Any);
    all.retain(|s| wanted.is_session(&s.name, Some(s.id)));
    match all.is_empty() {
        true => Err(format!(
            "there is no session {wanted} here (`image-cache status` shows all); nothing was done"
        )),
        false => Ok(all),
    }
}

fn ask(verb: &str, wanted: &Wanted, all: &[Candidate]) -> String {
    let mut text = format!(
        "{wanted} is not one set but {}; nothing was done. Say which: `image-cache {verb} ID`",
        all.len()
    );
    for candidate in all {
        let id = candidate.id(dumps(&candidate.session));
        let _ = write!(text, "\n{}", candidate.line(&id));
    }
    text
}

fn wanted(text: &str) -> Result<Wanted, String> {
    text.parse().map_err(|e| format!("{text:?}: {e}"))
}

/// Lets the one set that is meant be restored.
pub fn release(store: &Store, text: &str, process_is_dead: bool) -> Result<(), String> {
    let wanted = wanted(text)?;
    let sessions = sessions(store, &wanted)?;
    let sets_of = |session: &Arc<Session>| {
        let mut sets = session.sets();
        sets.retain(|set| wanted.includes(&session.name, Some(session.id), set.number));
        sets
    };
    let mut waiting = Vec::new();
    for session in &sessions {
        let sets = sets_of(session).into_iter();
        waiting.extend(
            sets.filter(|s| s.waits_for_decision())
                .map(|set| Candidate {
                    session: session.clone(),
                    set: Some(set),
                }),
        );
    }
    let (session, set) = match &waiting[..] {
        [Candidate {
            session,
            set: Some(set),
        }] => (session, set),
        [] => return Err(nothing_waits(&wanted, &sessions, sets_of)),
        _ => return Err(ask("release", &wanted, &waiting)),
    };
    set.release(process_is_dead)
        .map_err(|why| format!("session {} ({}): {why}", session.name, session.id))?;
    session.restart_clock();
    // The proxy may still hold the link, to give the set up by it. One that has not spoken yet may.
    if set.source_doubts() {
        session.taken_over.cancel();
    }
    store.session_changes.bump();
    tracing::warn!(
        session = %session.name, id = %session.id, snapshot = %set.snapshot, process_is_dead,
        "released by the operator: ready to be restored"
    );
    Ok(())
}

fn nothing_waits(
    wanted: &Wanted,
    sessions: &[Arc<Session>],
    sets_of: impl Fn(&Arc<Session>) -> Vec<Arc<Set>>,
) -> String {
    let mut text = format!("nothing of {wanted} waits for a release; nothing was done");
    for session in sessions {
        let id = session.id;
        let why = match sets_of(session).iter().find(|s| !s.is_aborted()) {
            Some(set) => match set.why_not_released() {
                Some(why) => why.to_string(),
                None => "in doubt since this moment: ask again".to_owned(),
            },
            None if session.page_source.is_some() => {
                "pages alone, which `image-cache import` makes a set of".to_owned()
            }
            None => "no set".to_owned(),
        };
        let _ = write!(text, "\n  {id}  session {}: {why}", session.name);
    }
    text
}

/// Forgets the one that is meant.
pub fn forget(store: &Store, text: &str, process_lives: bool) -> Result<(), String> {
    let wanted = wanted(text)?;
    let mut candidates = Vec::new();
    for session in sessions(store, &wanted)? {
        let dumps = dumps(&session);
        let of_session = |set| Candidate {
            session: session.clone(),
            set,
        };
        match &wanted {
            Wanted::Set(_, number) => {
                let set = session.set(*number).map_err(|e| e.to_string())?;
                if !set.is_depended_on() && session.sets().len() > 1 {
                    let id = session.id;
                    return Err(format!(
                        "set {} of {id} is a part of its session, which `image-cache drop {id}` forgets as a whole",
                        number.0
                    ));
                }
                candidates.push(of_session(Some(set).filter(|_| dumps > 1)));
            }
            Wanted::Name(_) | Wanted::Id(_) if dumps > 1 => {
                let mut sets = session.sets();
                sets.retain(|s| s.is_depended_on());
                candidates.extend(sets.into_iter().map(|set| of_session(Some(set))));
            }
            Wanted::Name(_) | Wanted::Id(_) => candidates.push(of_session(None)),
        }
    }
    let [Candidate { session, set }] = &candidates[..] else {
        return Err(ask("drop", &wanted, &candidates));
    };
    let sets = set
        .as_ref()
        .map_or_else(|| session.sets(), |s| vec![s.clone()]);
    let refused = |number: SetNumber, why: NotDropped| {
        let Session { name, id, .. } = &**session;
        format!("session {name} ({id}), set {}, is {why}", number.0)
    };
    // Not half of it: only what changes in this very moment is refused below.
    for set in &sets {
        let may = set.may_be_dropped(process_lives);
        may.map_err(|why| refused(set.number, why))?;
    }
    if session.page_source.is_some() && session.is_connected() && !process_lives {
        let id = session.id;
        return Err(format!(
            "a page server round of session {} ({id}) is {}",
            session.name,
            NotDropped::NoScript
        ));
    }
    // From here on nothing new arrives in it, e.g. a dump that needs these as its parents.
    if set.is_none() && session.is_connected() {
        session.drop_decided(DROPPED);
    }
    let sets = set
        .as_ref()
        .map_or_else(|| session.sets(), |s| vec![s.clone()]);
    // Its link stays as long as the source may still say what became of the process.
    let hears = sets
        .iter()
        .any(|s| s.waits_for_word() && !s.source_doubts());
    // The newest first: as long as it is there, what it needs is. A restore that reads one that may be restored goes on
    // to its end with what it holds.
    for set in sets.iter().filter(|s| set.is_some() || !s.is_restorable()) {
        if let Err(why) = set.drop_decided(process_lives, DROPPED) {
            session.undo_drop();
            return Err(refused(set.number, why));
        }
    }
    let number = set.as_ref().map(|s| s.number.0);
    tracing::warn!(session = %session.name, id = %session.id, number, process_lives, "dropped by the operator");
    if set.is_none() {
        if !hears {
            session.taken_over.cancel();
        }
        store.remove(session);
    } else {
        store.session_changes.bump();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
