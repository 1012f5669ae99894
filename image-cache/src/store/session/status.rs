//! What an operator is shown of a session.

use std::fmt;

use image_common::control::status;

use crate::store::page_rounds::PageStore;
use crate::store::session::Session;

/// Where a session stands. Scripts read these texts, so they stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionStatus {
    InDoubt,
    ReceivingPages,
    PagesToBeClaimed,
    Aborted,
    ToBeRestored,
    ReceivingLinkAway,
    Prepared,
    Receiving,
    RestoredKept,
    BeingRestored,
    LeftBehind,
}

impl SessionStatus {
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InDoubt => "in doubt",
            Self::ReceivingPages => "receiving pages",
            Self::PagesToBeClaimed => "pages, to be claimed by a dump",
            Self::Aborted => "aborted",
            Self::ToBeRestored => "to be restored",
            Self::ReceivingLinkAway => "receiving, its link is away",
            Self::Prepared => "prepared: waits for the commit",
            Self::Receiving => "receiving",
            Self::RestoredKept => "restored, kept",
            Self::BeingRestored => "being restored",
            Self::LeftBehind => "held by what a restore has left behind",
        }
    }
}

impl fmt::Display for SessionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Session {
    /// Where it stands.
    pub fn stands(&self) -> SessionStatus {
        let sets = self.sets();
        let pages = self.page_source.is_some();
        match (self.aborted(), self.is_connected()) {
            _ if self.is_in_doubt() => SessionStatus::InDoubt,
            (None, true) if pages => SessionStatus::ReceivingPages,
            (None, false) if pages => SessionStatus::PagesToBeClaimed,
            (Some(_), _) => SessionStatus::Aborted,
            (None, true) if self.is_decided() => SessionStatus::ToBeRestored,
            (None, true) if self.is_away() => SessionStatus::ReceivingLinkAway,
            (None, true) if sets.iter().any(|set| set.is_prepared()) => SessionStatus::Prepared,
            (None, true) => SessionStatus::Receiving,
            (None, false) if self.was_restored() => SessionStatus::RestoredKept,
            (None, false) => match sets.iter().find_map(|set| set.is_being_restored()) {
                Some(false) => SessionStatus::BeingRestored,
                Some(true) => SessionStatus::LeftBehind,
                None => SessionStatus::ToBeRestored,
            },
        }
    }

    pub fn status(&self) -> status::Session {
        status::Session {
            name: self.name.to_string(),
            id: Some(self.id.to_string()),
            peer: Some(self.peer.clone()),
            state: self.stands().to_string(),
            age_seconds: self.began.elapsed().as_secs_f64(),
            sets: self.sets().iter().rev().map(|s| s.status()).collect(),
            rounds: self.rounds().merged.clone(),
            page_store_bytes: self.pages().as_ref().map_or(0, PageStore::bytes),
        }
    }
}
