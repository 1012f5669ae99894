//! Page server rounds on the link: their frames into the page store.

use std::time::Instant;

use image_common::control::status;
use image_common::criu::page_server::Layout;
use image_common::error_chain::chain;
use image_common::link::codec::{Message, SetNumber, StreamNumber};

use crate::page_server::fill::{FillError, RoundFiller};
use crate::receiver::connection::{unexpected, Receiver, RoundTransfer};
use crate::receiver::failure::LinkFailure;
use crate::store::set::Set;

impl Receiver {
    pub async fn round_message(&mut self, message: Message) -> Result<(), LinkFailure> {
        match message {
            Message::RoundOpen {
                stream,
                set,
                page_bytes,
                layout,
            } => self.open_round(stream, set, page_bytes, layout),
            Message::RoundEnd {
                stream,
                entries,
                pages,
            } => self.end_round(stream, entries, pages).await,
            other => Err(unexpected(&other)),
        }
    }

    fn open_round(
        &mut self,
        stream: StreamNumber,
        set: SetNumber,
        page_bytes: u32,
        layout: Layout,
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
        let round = self
            .session
            .begin_round(page_bytes.into(), &self.session.budget);
        let transfer = RoundTransfer {
            set,
            filler: Some(RoundFiller::new(layout, round)),
            began: Instant::now(),
        };
        self.rounds.insert(stream, transfer);
        Ok(())
    }

    fn round(&mut self, stream: StreamNumber) -> Result<&mut RoundTransfer, LinkFailure> {
        self.rounds.get_mut(&stream).ok_or_else(|| unknown(stream))
    }

    async fn refuse_round(
        &mut self,
        stream: StreamNumber,
        error: &FillError,
    ) -> Result<(), LinkFailure> {
        let transfer = self.round(stream)?;
        transfer.filler = None;
        let set = transfer.set.clone();
        self.say_refused(stream, &set, error).await
    }

    async fn say_refused(
        &mut self,
        stream: StreamNumber,
        set: &Set,
        error: &(dyn std::error::Error + Sync),
    ) -> Result<(), LinkFailure> {
        let reason = chain(error);
        tracing::error!(snapshot = %set.snapshot, "page server round refused: {reason}");
        self.answer(Message::ImageRefused { stream, reason }).await
    }

    async fn end_round(
        &mut self,
        stream: StreamNumber,
        entries: u64,
        pages: u64,
    ) -> Result<(), LinkFailure> {
        let transfer = self.rounds.remove(&stream);
        let RoundTransfer { set, filler, began } = transfer.ok_or_else(|| unknown(stream))?;
        let Some(filler) = filler else {
            return Ok(());
        };
        let counted = (filler.entries(), filler.pages());
        if counted != (entries, pages) {
            return Err(LinkFailure::Protocol(format!(
                "a round of {entries} entries and {pages} pages, here are {counted:?}"
            )));
        }
        let round = match filler.finish() {
            Ok(round) => round,
            Err(e) => return self.say_refused(stream, &set, &e).await,
        };
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
            Err(e) => self.say_refused(stream, &set, &e).await,
        }
    }

    /// Receives a frame of the round: pages of long entries straight from the socket to where they
    /// stay, all else by way of the buffer.
    pub async fn pages(&mut self, stream: StreamNumber, length: usize) -> Result<(), LinkFailure> {
        let mut left = length;
        while left > 0 {
            let transfer = match self.rounds.get_mut(&stream) {
                Some(transfer) => transfer,
                None => return Err(unknown(stream)),
            };
            let Some(filler) = &mut transfer.filler else {
                return self.discard(left).await;
            };
            let straight = match self.reader.is_empty() {
                true => filler.straight(left),
                false => Ok(None),
            };
            let taken = match straight {
                Ok(Some(spare)) => {
                    let n = self.reader.data(spare).await?;
                    left -= n;
                    filler.received(n)
                }
                Ok(None) => {
                    let bytes = self.reader.some(left).await?;
                    left -= bytes.len();
                    take(filler, &bytes)
                }
                Err(e) => Err(e),
            };
            if let Err(e) = taken {
                self.refuse_round(stream, &e).await?;
            }
        }
        Ok(())
    }
}

/// The answers are image-proxy's.
fn take(filler: &mut RoundFiller, mut bytes: &[u8]) -> Result<(), FillError> {
    while filler.take(&mut bytes)?.is_some() {}
    Ok(())
}

fn unknown(stream: StreamNumber) -> LinkFailure {
    LinkFailure::Protocol(format!("there is no round {}", stream.0))
}
