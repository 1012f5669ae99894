//! Page server rounds on the link: their frames into the page store.

use std::sync::Arc;
use std::time::Instant;

use image_common::control::chain;
use image_common::criu::page_server::PagemapId;
use image_common::link::codec::{Message, SetNumber, StreamNumber};
use image_common::status;

use super::{LinkFailure, Receiver};
use crate::store::pages::{PageError, Round};
use crate::store::set::Set;

/// A page server round on its way.
pub(super) struct RoundTransfer {
    pub(super) set: Arc<Set>,
    /// `None`: it was refused; the rest is read and forgotten.
    pub(super) round: Option<Round>,
    pub(super) map: Option<PagemapId>,
    pub(super) entries: u64,
    pub(super) began: Instant,
}

impl Receiver {
    pub(super) fn open_round(
        &mut self,
        stream: StreamNumber,
        set: SetNumber,
        page_bytes: u32,
    ) -> Result<(), LinkFailure> {
        let used = self.images.contains_key(&stream) || self.rounds.contains_key(&stream);
        if used || self.rounds.len() >= self.store.limits.max_open_images {
            return Err(LinkFailure::Protocol("one round too many".to_owned()));
        }
        // Memory goes back by pages of this host; and none else could be restored here.
        if page_bytes as usize != rustix::param::page_size() {
            return Err(LinkFailure::Protocol(format!(
                "pages of {page_bytes} bytes, which this host does not have"
            )));
        }
        let set = self.session.set(set)?;
        tracing::info!(snapshot = %set.snapshot, "page server round begins");
        let round = Round::new(page_bytes.into(), &self.session.budget);
        let transfer = RoundTransfer {
            set,
            round: Some(round),
            map: None,
            entries: 0,
            began: Instant::now(),
        };
        self.rounds.insert(stream, transfer);
        Ok(())
    }

    pub(super) fn round(
        &mut self,
        stream: StreamNumber,
    ) -> Result<&mut RoundTransfer, LinkFailure> {
        let unknown = || LinkFailure::Protocol(format!("there is no round {}", stream.0));
        self.rounds.get_mut(&stream).ok_or_else(unknown)
    }

    pub(super) async fn refuse_round(
        &mut self,
        stream: StreamNumber,
        error: &PageError,
    ) -> Result<(), LinkFailure> {
        let transfer = self.round(stream)?;
        transfer.round = None;
        let reason = chain(error);
        tracing::error!(snapshot = %transfer.set.snapshot, "page server round refused: {reason}");
        self.answer(Message::ImageRefused { stream, reason }).await
    }

    pub(super) async fn end_round(
        &mut self,
        stream: StreamNumber,
        entries: u64,
        pages: u64,
    ) -> Result<(), LinkFailure> {
        let transfer = self.round(stream)?;
        let counted = (transfer.entries, transfer.round.as_ref().map(Round::pages));
        let (set, round) = (transfer.set.clone(), transfer.round.take());
        let began = transfer.began;
        self.rounds.remove(&stream);
        let Some(round) = round else { return Ok(()) };
        if counted != (entries, Some(pages)) {
            let ours = format!("{counted:?}");
            return Err(LinkFailure::Protocol(format!(
                "a round of {entries} entries and {pages} pages, here are {ours}"
            )));
        }
        let bytes = round.pages() * round.page_bytes();
        match self.session.merge_round(round, &self.session.budget) {
            Ok((merged, superseded)) => {
                set.has_round();
                self.session.round_done(status::Round {
                    snapshot: set.snapshot.to_string(),
                    new_pages: merged.new,
                    replaced_pages: merged.replaced,
                    unchanged_pages: merged.unchanged,
                    dropped_pages: merged.dropped,
                    bytes,
                    seconds: began.elapsed().as_secs_f64(),
                });
                tracing::info!(
                    snapshot = %set.snapshot, new = merged.new, replaced = merged.replaced,
                    unchanged = merged.unchanged, dropped = merged.dropped, "page server round merged"
                );
                let pages = merged;
                self.answer(Message::RoundAck { stream, pages }).await?;
                // Behind the answer: CRIU need not wait for memory to go back.
                drop(superseded);
                Ok(())
            }
            Err(e) => {
                let reason = chain(&e);
                tracing::error!(snapshot = %set.snapshot, "page server round refused: {reason}");
                self.answer(Message::ImageRefused { stream, reason }).await
            }
        }
    }

    /// Receives pages into the round, straight from the socket.
    pub(super) async fn pages(
        &mut self,
        stream: StreamNumber,
        length: usize,
    ) -> Result<(), LinkFailure> {
        let mut left = length;
        while left > 0 {
            let Some(transfer) = self.rounds.get_mut(&stream) else {
                return Err(LinkFailure::Protocol(format!(
                    "there is no round {}",
                    stream.0
                )));
            };
            let (Some(round), Some(id)) = (&mut transfer.round, transfer.map) else {
                return self.discard(left).await;
            };
            let received = match round.spare(left) {
                Ok(spare) => {
                    let n = self.reader.data(spare).await?;
                    left -= n;
                    round.filled(id, n)
                }
                Err(e) => Err(e),
            };
            if let Err(e) = received {
                self.refuse_round(stream, &e).await?;
            }
        }
        Ok(())
    }
}
