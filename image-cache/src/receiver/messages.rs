//! Reads the frames of a connection, and hands each message to the file about its kind.

use std::time::Instant;

use image_common::link::codec::Message;
use image_common::link::resumable::ACK_BYTES;
use image_common::tasks;
use image_common::units::human_size;

use crate::receiver::connection::{unexpected, Receiver};
use crate::receiver::failure::LinkFailure;
use crate::store::memory::reservation;

impl Receiver {
    /// The first connection, until the session ends; gives the proxy's farewell.
    pub async fn run(&mut self) -> Result<String, LinkFailure> {
        while let Some(header) = self.header().await? {
            if let Some(stream) = header.as_data() {
                self.data(stream, header).await?;
            } else {
                match self.reader.message(header).await? {
                    Message::Goodbye { reason } => return Ok(reason),
                    message => self.message(message).await?,
                }
            }
            self.acknowledge(ACK_BYTES).await?;
        }
        Err(LinkFailure::Closed)
    }

    /// A further connection: image data alone, until the session ends.
    pub async fn run_further(&mut self) -> Result<(), LinkFailure> {
        while let Some(header) = self.header().await? {
            match header.as_data() {
                Some(stream) => self.data(stream, header).await?,
                None => return Err(LinkFailure::NotData(self.connection)),
            }
            self.acknowledge(ACK_BYTES).await?;
        }
        Err(LinkFailure::Closed)
    }

    /// Of a session that an operator has dropped only the source's last word is of interest.
    fn still_wanted(&self, message: &Message) -> Result<(), LinkFailure> {
        let last = matches!(
            message,
            Message::Commit { .. }
                | Message::SetDoubt { .. }
                | Message::SetAbort { .. }
                | Message::Received { .. }
        );
        match self.session.aborted().is_none() || last {
            true => Ok(()),
            false => Err(LinkFailure::Decided("it is dropped")),
        }
    }

    async fn message(&mut self, message: Message) -> Result<(), LinkFailure> {
        self.still_wanted(&message)?;
        match &message {
            Message::SetOpen { .. }
            | Message::SetDialect { .. }
            | Message::SetGate { .. }
            | Message::SetComplete { .. }
            | Message::Prepare { .. }
            | Message::PrepareTrial { .. }
            | Message::Commit { .. }
            | Message::SetClose { .. }
            | Message::SetDoubt { .. }
            | Message::SetAbort { .. } => self.set_message(message).await,
            Message::ImageOpen { .. } | Message::ImageEnd { .. } | Message::ImageAbort { .. } => {
                self.image_message(message).await
            }
            Message::RoundOpen { .. } | Message::RoundEnd { .. } => {
                self.round_message(message).await
            }
            _ => self.session_message(message),
        }
    }

    fn session_message(&mut self, message: Message) -> Result<(), LinkFailure> {
        match message {
            Message::Reserve { bytes } => self.reserve(bytes),
            Message::Received {
                connection: 0,
                total,
            } => {
                if let Some(first) = &self.first {
                    first.acknowledge(total);
                }
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    /// Makes memory ready, aside: the proxy need not wait for it.
    fn reserve(&mut self, bytes: u64) -> Result<(), LinkFailure> {
        if std::mem::replace(&mut self.reserved, true) {
            return Err(LinkFailure::Protocol("a second RESERVE".to_owned()));
        }
        let budget = self.session.budget.clone();
        // A sender that is kept would make the end of the session wait.
        let answers = self.answers.downgrade();
        let answer = async move {
            let began = Instant::now();
            let ready = reservation::reserve(&budget, bytes).await;
            tracing::info!(
                expected = human_size(bytes),
                ready = human_size(ready),
                "memory made ready in {:.1?}",
                began.elapsed()
            );
            if let Some(answers) = answers.upgrade() {
                let _ = answers.send(Message::Reserved { bytes: ready }).await;
            }
        };
        // The proxy bounds its own wait (`--reserve-timeout`).
        tasks::spawn("making memory ready", answer, |_| {});
        Ok(())
    }
}
