//! The page server of image-cache itself: CRIU's pre-dumps and dumps send their pages straight
//! to the target, without image-proxy between.
//!
//! A connection is a round of a series. Nothing in it says which series: CRIU sends pagemap ids,
//! and answers are due before its pages come. So a series is known by where it comes from (the
//! peer's address and our port) and by the pagemaps of its last round. To migrate two trees
//! with equal pids from one host at once (two containers, whose first process is always 1) must
//! give each a port of its own; two rounds at once for the same pagemap are refused.
//!
//! What the rounds brought waits for a dump's other images: from image-proxy's commit, or by
//! `image-cache import`.

pub mod fill;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use bytes::Buf;
use image_common::admission::{Admission, AdmissionError};
use image_common::control::status;
use image_common::criu::options::Unserved;
use image_common::criu::page_server::Request;
use image_common::criu_io::options;
use image_common::criu_io::page_server::{Connection, ConnectionError};
use image_common::daemon::shutdown::Shutdown;
use image_common::error_chain::chain;
use image_common::net;
use image_common::procfs::tcp_peer::Holder;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;

use crate::page_server::fill::{FillError, RoundFiller};
use crate::store::session::{PageSource, Session};
use crate::store::{NoRound, Store};

/// Why a round ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum RoundError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// Before there was a request.
    #[error(transparent)]
    First(ConnectionError),
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    #[error(transparent)]
    Fill(#[from] FillError),
    #[error(transparent)]
    No(#[from] NoRound),
    #[error("image-cache is stopping")]
    Stopping,
    #[error(transparent)]
    Unserved(#[from] Unserved),
    #[error("an operator dropped its session")]
    Dropped,
}

impl RoundError {
    /// Whether the peer never began a round.
    fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Admission(_)
                | Self::No(_)
                | Self::First(_)
                | Self::Fill(FillError::Get)
                | Self::Unserved(_)
        )
    }
}

pub async fn serve(
    criu: TcpStream,
    admission: Admission,
    (peer, port): (SocketAddr, u16),
    store: Arc<Store>,
    shutdown: Shutdown,
) {
    // CRIU waits for our answers; and a host that vanished must not hold its series.
    if let Err(e) = net::configure_link(&criu) {
        tracing::warn!(%peer, "cannot set the options of the socket; the round goes on without them: {e}");
    }
    let source = PageSource {
        host: peer.ip().to_canonical(),
        port,
    };
    let local = criu.local_addr().ok();
    let let_in = async {
        let criu = admission
            .page_server(criu, store.limits.ports.idle_timeout)
            .await?;
        may_send(peer, local).await?;
        Ok(criu)
    };
    let served = receive(let_in, source, &peer, &store, &shutdown).await;
    if let Err(e) = served {
        let why = format!("{}; the dump fails, its process goes on", chain(&e));
        match e.is_refusal() {
            true => admission.refused(&peer, &why),
            false => tracing::error!(%peer, "page server: {why}"),
        }
    }
}

/// Refuses a CRIU of this host that sends wrong pages. One of another host cannot be seen; there
/// image-proxy's script refuses the dump.
async fn may_send(peer: SocketAddr, local: Option<SocketAddr>) -> Result<(), Unserved> {
    let find = move || Some(Holder::find(peer, local?, &[], "criu")?.pid);
    let pid = tokio::task::spawn_blocking(find).await.ok().flatten();
    let options = options::of_peer(pid).await;
    options.unserved_round().map_or(Ok(()), Err)
}

/// Receives the round of a connection, when `let_in` has let it in.
pub async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    let_in: impl Future<Output = Result<S, RoundError>>,
    source: PageSource,
    peer: &SocketAddr,
    store: &Arc<Store>,
    shutdown: &Shutdown,
) -> Result<(), RoundError> {
    let idle = store.limits.ports.idle_timeout;
    let served = async {
        let accepted = Connection::accept(let_in.await?, idle).await;
        match accepted.map_err(RoundError::First)? {
            Some(mut criu) => {
                // The round has ended before the connection closes: the next one may follow.
                round(&mut criu, peer, source, store).await
            }
            None => Ok(()),
        }
    };
    tokio::select! {
        served = served => served,
        () = shutdown.forced.cancelled() => Err(RoundError::Stopping),
    }
}

/// Ends a round however it ends: what did not come to a merged CLOSE is no parent, nor is
/// what it was to replace, since the kernel's dirty bits count from this round on.
struct UnderWay<'a> {
    session: Arc<Session>,
    store: &'a Store,
    merged: bool,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if !self.merged {
            tracing::warn!(session = %self.session.name, "the series ends; the next round is a full one");
            // Before the round ends: no other round may begin in between.
            if !self.session.close_series() {
                self.store.remove(&self.session);
            }
        }
        self.session.direct_round_ends();
    }
}

async fn round<S: AsyncRead + AsyncWrite + Unpin>(
    criu: &mut Connection<S>,
    peer: &SocketAddr,
    source: PageSource,
    store: &Arc<Store>,
) -> Result<(), RoundError> {
    let first = match criu.peek().await.map_err(RoundError::First)? {
        Request::Open { id, .. } | Request::Parent(id) | Request::Add { id, .. } => id,
        Request::Get { .. } => return Err(FillError::Get.into()),
        // A dump without pages.
        Request::Close => return Ok(criu.answer(&0i32.to_le_bytes()).await?),
    };
    let session = store.open_pages(source, peer.to_string(), first)?;
    let mut under_way = UnderWay {
        session: session.clone(),
        store,
        merged: false,
    };
    tracing::info!(session = %session.name, %peer, "page server round begins");
    let began = Instant::now();
    // The page size of the source must be this host's, or restore could not map the pages.
    let page_bytes = rustix::param::page_size() as u64;
    let round = session.begin_round(page_bytes, &session.budget);
    let mut receiver = Receiver {
        session: &session,
        filler: RoundFiller::new(criu.layout(), round),
        criu,
    };
    tokio::select! {
        received = receiver.requests() => received?,
        () = session.taken_over.cancelled() => return Err(RoundError::Dropped),
    }
    let round = receiver.filler.finish()?;
    let bytes = round.pages() * page_bytes;
    let merged = session.merge_round(round, &session.budget);
    match &merged {
        Ok((pages, _)) => {
            under_way.merged = true;
            tracing::info!(
                session = %session.name, new = pages.new, replaced = pages.replaced,
                unchanged = pages.unchanged, dropped = pages.dropped, "page server round merged"
            );
            session.round_done(status::Round {
                snapshot: source.to_string(),
                new_pages: pages.new,
                replaced_pages: pages.replaced,
                unchanged_pages: pages.unchanged,
                dropped_pages: pages.dropped,
                bytes,
                seconds: began.elapsed().as_secs_f64(),
            });
        }
        Err(e) => tracing::error!(session = %session.name, "page server round refused: {e}"),
    }
    // Before the answer: the next round may follow it at once.
    drop(under_way);
    let status = if merged.is_ok() { 0i32 } else { -1 };
    // If CRIU does not hear it, its dump fails although the round is whole: it may be a parent.
    let answered = criu.answer(&status.to_le_bytes()).await;
    // Behind the answer: CRIU need not wait for memory to go back.
    drop(merged);
    Ok(answered?)
}

struct Receiver<'a, S> {
    criu: &'a mut Connection<S>,
    session: &'a Session,
    filler: RoundFiller,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Receiver<'_, S> {
    /// Takes everything until CLOSE: the pages of long entries straight to where they stay, all
    /// else by way of the buffer.
    async fn requests(&mut self) -> Result<(), RoundError> {
        loop {
            match self.take()? {
                Some(Request::Open { id, .. }) => {
                    let yes = u8::from(self.session.has_parent(id));
                    self.criu.answer(&[yes]).await?;
                    continue;
                }
                Some(Request::Parent(id)) => {
                    let yes = u32::from(self.session.has_parent(id));
                    self.criu.answer(&yes.to_le_bytes()).await?;
                    continue;
                }
                Some(_) => return Ok(()),
                None => {}
            }
            let n = match self.filler.straight(usize::MAX)? {
                Some(spare) => {
                    let idle = self.criu.idle();
                    let read = idle.bounds(self.criu.stream().read(spare)).await;
                    match read.map_err(ConnectionError::from)? {
                        0 => return Err(ConnectionError::Broken.into()),
                        n => n,
                    }
                }
                None => {
                    self.criu.read_more(self.filler.ask()).await?;
                    continue;
                }
            };
            self.filler.received(n)?;
        }
    }

    /// Takes what is in the buffer.
    fn take(&mut self) -> Result<Option<Request>, FillError> {
        let buffer = self.criu.buffer();
        let mut rest = &buffer[..];
        let request = self.filler.take(&mut rest);
        let taken = buffer.len() - rest.len();
        buffer.advance(taken);
        request
    }
}

#[cfg(test)]
mod tests;
