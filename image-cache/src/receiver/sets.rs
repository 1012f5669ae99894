//! The messages about sets: each begins, is complete, and is prepared and committed, or given up.
use image_common::criu::inventory::SetKind;
use image_common::error_chain::chain;
use image_common::link::codec::{Message, SetNumber};

use crate::receiver::connection::{unexpected, Receiver};
use crate::receiver::failure::LinkFailure;
use crate::receiver::trial::Asked;
use crate::store::set::{Set, SetError};

impl Receiver {
    pub async fn set_message(&mut self, message: Message) -> Result<(), LinkFailure> {
        match message {
            Message::SetOpen {
                set,
                gated,
                dialect,
                parent,
                snapshot,
            } => {
                tracing::info!(%snapshot, gated, "set begins");
                self.session
                    .open_set(set, snapshot, parent, gated, dialect)?;
                if gated {
                    self.answer(Message::SetGated { set }).await?;
                }
                Ok(())
            }
            Message::SetDialect { set, dialect } => {
                self.session.set(set)?.set_dialect(dialect);
                Ok(())
            }
            Message::SetGate { set } => match self.session.set(set)?.gate() {
                Ok(()) => self.answer(Message::SetGated { set }).await,
                Err(e) => self.abort(set, &chain(&e)).await,
            },
            Message::SetComplete { set, images, bytes } => self.complete(set, images, bytes).await,
            Message::Prepare {
                set,
                images,
                bytes,
                digest,
            } => self.prepare(set, images, bytes, digest).await,
            Message::PrepareTrial {
                set,
                images,
                bytes,
                digest,
                on,
            } => {
                let asked = Asked {
                    images,
                    bytes,
                    digest,
                    on,
                };
                self.try_set(set, asked).await
            }
            Message::Commit { set } => self.commit(set),
            Message::SetClose { set } => self.close_set(set),
            Message::SetDoubt { set, reason } => self.doubt(set, &reason),
            Message::SetAbort { set, reason } => self.given_up(set, &reason),
            other => Err(unexpected(&other)),
        }
    }

    /// Every image is here, the source says, and asks whether the process may be killed.
    pub async fn prepare(
        &mut self,
        set: SetNumber,
        images: u32,
        bytes: u64,
        digest: u64,
    ) -> Result<(), LinkFailure> {
        let ready = self.session.set(set)?;
        let may = self.may_prepare(&ready, digest);
        let prepared = may.and_then(|()| ready.prepare(images, bytes).map_err(|e| chain(&e)));
        match prepared {
            Ok(()) => {
                tracing::info!(snapshot = %ready.snapshot, images, bytes, "prepared: every image is here");
                self.session.prepared.notify_one();
                self.answer(Message::Prepared { set }).await
            }
            Err(reason) => self.refuse_prepare(&ready, reason).await,
        }
    }

    pub fn may_prepare(&self, set: &Set, digest: u64) -> Result<(), String> {
        if self.shutdown.requested.is_cancelled() {
            // What is promised now would be gone in a moment.
            return Err("image-cache is stopping".to_owned());
        }
        set.digests.check(digest).map_err(|e| chain(&e))
    }

    pub async fn refuse_prepare(&self, set: &Set, reason: String) -> Result<(), LinkFailure> {
        tracing::error!(snapshot = %set.snapshot, "cannot be prepared, so the source must not kill the process: {reason}");
        let set = set.number;
        self.answer(Message::PrepareRefused { set, reason }).await
    }

    async fn complete(
        &mut self,
        set: SetNumber,
        images: u32,
        bytes: u64,
    ) -> Result<(), LinkFailure> {
        let stored = self.session.set(set)?;
        if stored.is_depended_on() {
            return Err(LinkFailure::Protocol(
                "SET_COMPLETE after PREPARE".to_owned(),
            ));
        }
        self.images.settled(set, None).await?;
        if stored.expected_kind().is_dump() {
            // Before the set can be served: they are a part of it.
            let host = self.session.host();
            if let Err(e) = self.store.gather_pages(&self.session, &stored, host) {
                return self.abort(set, &chain(&e)).await;
            }
        }
        // All that was to come is here, and its tasks are frozen.
        self.session.budget.release_reserved().drop_aside();
        self.judge(&stored);
        match stored.complete(images, bytes) {
            Ok(kind) => {
                let what = match kind {
                    SetKind::Dump | SetKind::Unclear => "dump",
                    SetKind::PreDump => "pre-dump",
                };
                tracing::info!(snapshot = %stored.snapshot, images, bytes, "{what} complete");
                self.answer(Message::SetStored { set, kind }).await
            }
            Err(SetError::Aborted(_)) => Ok(()), // the proxy was told when it happened
            Err(e) => self.abort(set, &chain(&e)).await,
        }
    }

    /// Before the set is called complete, from when on an ungated one may be restored.
    fn judge(&self, set: &Set) {
        let parents = self.session.parents(set);
        let Err(flaw) = set.judge(&parents, self.store.allowed) else {
            return;
        };
        let (snapshot, id) = (&set.snapshot, self.session.id);
        match set.is_in_doubt() {
            false => {
                tracing::warn!(%snapshot, "this set will not be prepared for a commit: {flaw}")
            }
            true => tracing::error!(
                %snapshot,
                "in doubt: {flaw}. The dump has no action script, so CRIU kills the process all the same. \
                 `image-cache release {id}` lets a restore try, `image-cache drop {id}` forgets this copy"
            ),
        }
    }

    /// Gives a set up and tells the proxy.
    pub async fn abort(&mut self, number: SetNumber, reason: &str) -> Result<(), LinkFailure> {
        let set = self.session.set(number)?;
        if set.is_aborted() {
            return Ok(());
        }
        if set.is_depended_on() {
            // The source may have killed: only it, or an operator, gives such a set up.
            return Err(LinkFailure::Protocol(format!("{reason}, after PREPARE")));
        }
        tracing::error!(snapshot = %set.snapshot, "set given up: {reason}");
        self.images.forget_set(number);
        self.session.budget.release_reserved().drop_aside();
        set.abort(reason)
            .map_err(|e| LinkFailure::Protocol(e.to_string()))?;
        let reason = reason.to_owned();
        self.answer(Message::SetAbort {
            set: number,
            reason,
        })
        .await
    }
}
