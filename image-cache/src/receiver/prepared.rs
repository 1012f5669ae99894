//! A set that is prepared: what its source says of it, what an operator has decided meanwhile, and a source that says nothing.

use std::sync::Arc;
use std::time::Duration;

use image_common::error_chain::chain;
use image_common::link::codec::SetNumber;
use image_common::link::resumable::ResumableStream;
use image_common::units::human_size;
use tokio::time::Instant;

use crate::receiver::connection::Receiver;
use crate::receiver::failure::LinkFailure;
use crate::store::heard::Said;
use crate::store::session::Session;
use crate::store::set::decision::{Committed, Doubted};
use crate::store::set::Set;
use crate::store::Store;

/// How exactly the silence is measured.
const LOOK: Duration = Duration::from_secs(1);

/// Makes sets doubtful that are prepared while nothing comes on a link that is there. An image-proxy that lives speaks every
/// two seconds as long as a set of its is prepared (`image-proxy/src/link/mod.rs`); the kernel of its host alone, which keeps the
/// connection whole, does not. A link that is away has a time of its own. Nothing is decided by this: a set in doubt
/// is kept, and the source's COMMIT still makes it restorable.
pub async fn watch(session: &Session, wire: &ResumableStream, silence: Duration) {
    loop {
        session.prepared.notified().await;
        let is_prepared = |set: &Arc<Set>| set.waits_for_word() && !set.is_in_doubt();
        let (mut heard, mut before) = (Instant::now(), wire.received());
        while session.sets().iter().any(is_prepared) {
            tokio::time::sleep(LOOK).await;
            let now = wire.received();
            if now != before || !wire.is_attached() {
                (heard, before) = (Instant::now(), now);
                continue;
            }
            if heard.elapsed() < silence {
                continue;
            }
            for set in session.sets().iter().filter(|set| set.doubt_silence()) {
                tracing::error!(
                    session = %session.name, id = %session.id, snapshot = %set.snapshot, peer = %session.peer,
                    "in doubt: image-proxy says nothing for {silence:?} although its connection is there (is it stopped, \
                     or its host without memory?); the set is kept and not served until the source commits the set. {}",
                    session.advice()
                );
            }
        }
    }
}

/// Says so of a set that a restore gets from now on.
fn ready(set: &Set) {
    if set.is_in_doubt() {
        return;
    }
    let (images, bytes) = set.totals();
    tracing::info!(snapshot = %set.snapshot, images, size = human_size(bytes), "ready to be restored");
}

/// The process is dead on the source.
pub fn commit(store: &Store, session: &Session, set: &Set) -> Result<(), LinkFailure> {
    let committed = set.commit();
    let committed = committed.map_err(|e| LinkFailure::Protocol(chain(&e)))?;
    store.heard.note(session.key, set.number, Said::Commit);
    match committed {
        Committed::Committed => ready(set),
        Committed::DoubtEnded => {
            tracing::warn!(snapshot = %set.snapshot, "not in doubt any more: the source has committed the set");
            ready(set);
        }
        Committed::AlreadyReleased => {
            tracing::info!(snapshot = %set.snapshot, "the source commits what the operator has released: the process is dead there");
        }
        Committed::GivenUp(reason) => tracing::error!(
            snapshot = %set.snapshot,
            "the source says that it has killed the process, and its set is not here any more ({reason}): the process is lost"
        ),
    }
    Ok(())
}

/// The source does not know whether the process is dead.
pub fn doubt(session: &Session, set: &Set, reason: &str) -> Result<(), LinkFailure> {
    let doubted = set.doubt();
    match doubted.map_err(|e| LinkFailure::Protocol(chain(&e)))? {
        Doubted::InDoubt if set.is_aborted() => {
            tracing::warn!(snapshot = %set.snapshot, "the source is in doubt about a set that was given up: {reason}");
            Ok(())
        }
        Doubted::InDoubt => {
            tracing::error!(
                id = %session.id, snapshot = %set.snapshot, "in doubt: {reason}. {}", session.advice()
            );
            Ok(())
        }
        Doubted::Decided => {
            tracing::warn!(snapshot = %set.snapshot, "the source is in doubt ({reason}); the operator has decided before");
            let is = match set.is_aborted() {
                true => "it is dropped",
                false => "it is released, and may be restored",
            };
            Err(LinkFailure::Decided(is))
        }
    }
}

/// The process goes on on the source. `forget`: what still arrives of the set.
pub fn given_up(
    store: &Store,
    session: &Session,
    set: &Set,
    reason: &str,
    forget: impl FnOnce(),
) -> Result<(), LinkFailure> {
    if set.is_decided() && !set.is_aborted() {
        tracing::error!(
            snapshot = %set.snapshot,
            "the source gave the set up ({reason}), but an operator has released it: if it is restored, the process runs twice. \
             `image-cache drop {}` forgets it if it is not restored yet",
            session.id
        );
        return Err(LinkFailure::Decided("it is released, and may be restored"));
    }
    tracing::warn!(snapshot = %set.snapshot, "the source gave the set up: {reason}");
    forget();
    session.budget.release_reserved().drop_aside();
    set.abort(&format!("the source gave it up: {reason}"))
        .map_err(|e| LinkFailure::Protocol(e.to_string()))?;
    store.heard.note(session.key, set.number, Said::Abort);
    Ok(())
}

impl Receiver {
    pub fn commit(&self, set: SetNumber) -> Result<(), LinkFailure> {
        commit(&self.store, &self.session, &*self.session.set(set)?)
    }

    /// An ungated dump is over.
    pub fn close_set(&self, set: SetNumber) -> Result<(), LinkFailure> {
        let set = self.session.set(set)?;
        set.close().map_err(|e| LinkFailure::Protocol(chain(&e)))?;
        match set.is_aborted() {
            true => {
                tracing::warn!(snapshot = %set.snapshot, "the source has finished a set that was given up before")
            }
            false => ready(&set),
        }
        Ok(())
    }

    pub fn doubt(&self, set: SetNumber, reason: &str) -> Result<(), LinkFailure> {
        doubt(&self.session, &*self.session.set(set)?, reason)
    }

    pub fn given_up(&self, number: SetNumber, reason: &str) -> Result<(), LinkFailure> {
        let set = self.session.set(number)?;
        let forget = || self.images.forget_set(number);
        given_up(&self.store, &self.session, &set, reason, forget)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::set::decision::tests::open;
    use crate::store::Policy;
    use image_common::link::resumable::ResumableReader;
    use image_common::net::socket::Socket;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    const SILENCE: Duration = Duration::from_secs(20);

    /// Case adv11: a kernel that keeps the connection whole is not a proxy that lives.
    #[tokio::test(start_paused = true)]
    async fn a_source_that_says_nothing_makes_its_set_doubtful() {
        let store = Store::new(1 << 24, Policy::default());
        let session = store.open_session("web".parse().unwrap(), 1, "10.0.0.1:5".to_owned());
        let session = session.unwrap();
        let (ours, mut proxy) = UnixStream::pair().unwrap();
        let wire = ResumableStream::new(Socket::Unix(ours));
        let mut reader = ResumableReader::new(wire.clone(), None);
        let watching = (session.clone(), wire.clone());
        tokio::spawn(async move { watch(&watching.0, &watching.1, SILENCE).await });
        // Nothing is prepared: the proxy need not say anything.
        tokio::time::sleep(SILENCE * 2).await;
        let set = open(&session, 1, "prepared");
        session.prepared.notify_one();
        for _ in 0..30 {
            tokio::time::sleep(Duration::from_secs(2)).await;
            proxy.write_all(&[1]).await.unwrap();
            reader.read_u8().await.unwrap();
        }
        assert!(!set.is_in_doubt(), "it speaks");
        // A link that is away has its own time.
        wire.detach(std::io::ErrorKind::ConnectionReset.into());
        tokio::time::sleep(SILENCE * 2).await;
        assert!(!set.is_in_doubt(), "it is away");
        let (ours, _proxy) = UnixStream::pair().unwrap();
        wire.attach(Socket::Unix(ours), 0);
        tokio::time::sleep(SILENCE - Duration::from_secs(2)).await;
        assert!(!set.is_in_doubt(), "not yet");
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(set.is_in_doubt());
        set.commit().unwrap();
        assert!(!set.is_in_doubt() && set.is_final_dump());
    }
}
