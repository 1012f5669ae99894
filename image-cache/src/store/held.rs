//! What a restore holds, and whose images went with the image-cache that had served them: the decision about it comes
//! here all the same, and goes to the script of that restore.

use std::sync::Arc;
use std::time::Duration;

use image_common::control::hold::Held;
use image_common::criu::dialect::Dialect;
use image_common::image::{NameError, SessionName, SnapshotId};
use image_common::link::codec::SetNumber;

use crate::store::session::{Session, SessionError};
use crate::store::set::Set;
use crate::store::{unlike_others, Store};

/// Why a hold is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum NotHeld {
    #[error("bad name: {0}")]
    Name(#[from] NameError),
    #[error("the session with this id is another one here")]
    Another,
    #[error(transparent)]
    Session(#[from] SessionError),
}

impl Store {
    /// A restore holds this set. `true`: the session was here before, with its images; else it is made, without any.
    pub fn hold(&self, held: &Held) -> Result<(Arc<Session>, Arc<Set>, bool), NotHeld> {
        let name = SessionName::new(&held.session)?;
        let snapshot = SnapshotId::new(&held.snapshot)?;
        let number = SetNumber(held.set);
        let mut sessions = self.sessions();
        let known = sessions.values().find(|s| s.key == held.key).cloned();
        if let Some(session) = known {
            if !session.is_of_proxy(held.proxy) || session.name != name {
                return Err(NotHeld::Another);
            }
            let set = session.set(number)?;
            if !set.is_held_elsewhere() {
                return Ok((session, set, true));
            }
            // The same script, whose connection broke.
            sessions.remove(&session.number);
        }
        let session = Session::refound(
            self.next_number(&sessions),
            name,
            (held.key, held.proxy.into()),
            held.peer.clone(),
            Duration::ZERO,
            self.changes.clone(),
            &self.budget,
            &self.limits,
        );
        let session = unlike_others(&sessions, session);
        if session.key != held.key {
            return Err(NotHeld::Another);
        }
        let set = session.open_set(number, snapshot, None, true, Dialect::Stream)?;
        set.is_held_without_images();
        // It has no link.
        session.disconnect("its image-cache is gone");
        let session = Arc::new(session);
        sessions.insert(session.number, session.clone());
        drop(sessions);
        self.bump();
        Ok((session, set, false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image_common::link::session_id::SessionId;

    use crate::store::set::held::HoldEnd;
    use crate::store::{Policy, Scope};

    fn held() -> Held {
        Held {
            id: SessionId::of_key(7).to_string(),
            session: "web".to_owned(),
            snapshot: "/images".to_owned(),
            set: 3,
            key: 7,
            proxy: 9,
            peer: "10.0.0.1:5".to_owned(),
        }
    }

    #[test]
    fn one_without_images_is_in_doubt_and_served_to_no_restore() {
        let store = Store::new(1 << 20, Policy::default());
        let (session, set, here) = store.hold(&held()).unwrap();
        assert!(!here && session.id == SessionId::of_key(7) && session.is_of_proxy(9));
        assert!(session.is_in_doubt() && !session.is_only_copy() && !session.is_connected());
        assert_eq!(set.end_of_hold(), None);
        assert!(set.status().state.contains("held by a restore here"));
        assert!(store.newest_of_dumps(&Scope::Any).is_none());
        let snapshot = SnapshotId::new("/images").unwrap();
        assert!(store.snapshot(&Scope::Any, &snapshot).is_none());
        // The same script again, and one that only knows the key.
        let (again, set, here) = store.hold(&held()).unwrap();
        assert!(!here && store.holds(&again) && !store.holds(&session));
        let other = |proxy, session: &str, set| Held {
            proxy,
            session: session.to_owned(),
            set,
            ..held()
        };
        assert!(store.hold(&other(8, "web", 3)).is_err());
        assert!(store.hold(&other(9, "db", 3)).is_err());
        assert!(store.hold(&other(9, "web", 4)).is_err());
        set.commit().unwrap();
        assert_eq!(set.end_of_hold(), Some(HoldEnd::GoOn));
        assert!(store.newest_of_dumps(&Scope::Any).is_none());
    }

    #[test]
    fn an_operator_may_drop_it_at_once() {
        let store = Store::new(1 << 20, Policy::default());
        let (_, set, _) = store.hold(&held()).unwrap();
        set.drop_decided(false, "dropped").unwrap();
        assert_eq!(
            set.end_of_hold(),
            Some(HoldEnd::GiveUp("dropped".to_owned()))
        );
        let (_, set, _) = store.hold(&Held { key: 8, ..held() }).unwrap();
        set.release(false).unwrap();
        assert_eq!(set.end_of_hold(), Some(HoldEnd::GoOn));
    }
}
