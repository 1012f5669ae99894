//! One connection of a session, as it is read.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use image_common::daemon::shutdown::Shutdown;
use image_common::link::codec::{Header, Message, StreamNumber};
use image_common::link::reader::FrameReader;
use image_common::link::resumable::{ResumableReader, ResumableStream, ACK_WAITING_BYTES};
use tokio::sync::mpsc;

use crate::page_server::fill::RoundFiller;
use crate::receiver::failure::LinkFailure;
use crate::receiver::reassembly::Reassembly;
use crate::receiver::session_links::SessionLinks;
use crate::store::session::Session;
use crate::store::set::Set;
use crate::store::Store;

/// Images of sets that were given up are read into this and forgotten.
const DISCARD_BYTES: usize = 64 << 10;

/// A page server round on its way.
pub struct RoundTransfer {
    pub set: Arc<Set>,
    /// `None`: it was refused; the rest is read and forgotten.
    pub filler: Option<RoundFiller>,
    pub began: Instant,
}

/// Reads one connection.
pub struct Receiver {
    pub reader: FrameReader<ResumableReader>,
    /// So much of the stream was acknowledged. `None`: the proxy keeps nothing to retransmit.
    pub acknowledged: Option<u64>,
    pub answers: mpsc::Sender<Message>,
    pub session: Arc<Session>,
    pub store: Arc<Store>,
    /// Shared by the connections of the session.
    pub images: Arc<Reassembly>,
    /// Which of them this is; all but image data come on 0.
    pub connection: u16,
    pub rounds: HashMap<StreamNumber, RoundTransfer>,
    /// RESERVE has come.
    pub reserved: bool,
    /// The connection that the answers go out on.
    pub first: Option<Arc<ResumableStream>>,
    pub shutdown: Shutdown,
}

impl Receiver {
    pub fn new(
        reader: ResumableReader,
        links: &SessionLinks,
        connection: u16,
        store: &Arc<Store>,
        shutdown: &Shutdown,
    ) -> Self {
        Self {
            reader: FrameReader::new(reader).with_format(links.frame_format),
            acknowledged: (!links.patience.is_zero()).then_some(0),
            first: links.first(),
            answers: links.answers(),
            session: links.session.clone(),
            store: store.clone(),
            images: links.images.clone(),
            connection,
            rounds: HashMap::new(),
            reserved: false,
            shutdown: shutdown.clone(),
        }
    }

    /// The next frame's header. Before a wait for it the proxy is told what has come.
    pub async fn header(&mut self) -> Result<Option<Header>, LinkFailure> {
        tokio::select! {
            biased;
            header = self.reader.header() => return Ok(header?),
            () = std::future::ready(()) => {}
        }
        self.acknowledge(ACK_WAITING_BYTES).await?;
        Ok(self.reader.header().await?)
    }

    /// Tells the proxy what it need not keep any more, if that is so much.
    pub async fn acknowledge(&mut self, least: u64) -> Result<(), LinkFailure> {
        let (connection, total) = (self.connection, self.reader.get_ref().received());
        match &mut self.acknowledged {
            Some(told) if total - *told >= least => *told = total,
            _ => return Ok(()),
        }
        self.answer(Message::Received { connection, total }).await
    }

    pub async fn answer(&self, message: Message) -> Result<(), LinkFailure> {
        self.answers
            .send(message)
            .await
            .map_err(|_| LinkFailure::Answers)
    }

    /// Reads so many bytes and forgets them.
    pub async fn discard(&mut self, mut left: usize) -> Result<(), LinkFailure> {
        let mut scratch = vec![0; left.min(DISCARD_BYTES)];
        while left > 0 {
            let n = scratch.len().min(left);
            let n = self.reader.data(&mut scratch[..n]).await?;
            self.images.count(n);
            left -= n;
        }
        Ok(())
    }
}

/// A message that a proxy does not send.
pub fn unexpected(message: &Message) -> LinkFailure {
    LinkFailure::Protocol(format!("a proxy does not send {message:?}"))
}
