//! What an operator is shown of a set.

use image_common::control::status;
use image_common::criu::inventory::SetKind;
use image_common::link::phase::Phase;

use crate::store::set::given::Given;
use crate::store::set::Set;

impl Set {
    pub fn status(&self) -> status::Set {
        let (images, bytes) = self.totals();
        let state = self.state();
        let kind = match state.kind {
            Some(SetKind::Dump | SetKind::Unclear) => "dump ",
            Some(SetKind::PreDump) => "pre-dump ",
            None => "",
        };
        let phase = match state.phase {
            _ if state.in_doubt => "in doubt",
            _ if state.lost => "lost with the restore that took its memory",
            _ if matches!(state.given, Given::Doubt(_)) => "in doubt: a restore of it may run here",
            _ if state.taken_by.is_some() => "taken by a restore as it is read",
            _ if matches!(state.given, Given::To(_)) => "being restored",
            _ if matches!(state.given, Given::Left(_)) => "held by what a restore has left behind",
            Phase::Receiving => "receiving",
            Phase::Complete => "complete",
            Phase::Prepared => "prepared: waits for the commit",
            Phase::Committed => "ready to be restored",
            Phase::Aborted => "given up",
        };
        status::Set {
            snapshot: self.snapshot.to_string(),
            protocol: state.dialect.name().to_owned(),
            state: format!("{kind}{phase}"),
            gated: state.gated,
            images: images as u64,
            bytes,
            digests: self.digests.status(),
        }
    }
}
