//! The page server: `criu pre-dump --page-server` and `dump --page-server` send their pages
//! here, and we pass them on over the link, to be merged into the store when the round is whole.
//!
//! CLOSE is answered with success only when the cache has merged the round: CRIU takes the
//! answer before its post-dump script, and fails the dump on any other (`page-xfer.c`).
//!
//! The way of a byte: CRIU's TCP connection -> (splice) -> a pipe -> (splice) -> the link.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use image_common::control::chain;
use image_common::criu::page_server::{PagemapId, Request};
use image_common::guard::Guard;
use image_common::link::codec::{Dialect, Message, StreamNumber};
use image_common::link::wire::Socket;
use image_common::link::MAX_DATA_BYTES;
use image_common::page_server::{Connection, ConnectionError, LONG_BYTES};
use image_common::{net, status};
use rustix::pipe::{pipe_with, splice, PipeFlags, SpliceFlags};
use tokio::net::TcpStream;

use crate::link::Link;
use crate::proxy::{Active, Proxy, RunError};
use crate::run::Run;
use crate::writer::SendError;

const PIPE_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error("splicing from CRIU's connection to the page server")]
    Io(#[from] io::Error),
    #[error("pages cannot be asked for here: this page server receives")]
    Get,
    #[error("more than {MAX_PAGEMAPS} pagemaps in one round")]
    TooMany,
    #[error("{0}")]
    Link(String),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Run(#[from] RunError),
}

/// More tasks, and pieces of shared memory, than a tree has; a bound for what a round makes us
/// remember.
const MAX_PAGEMAPS: usize = 64 << 10;

/// Serves a connection; nothing may come on it for `idle` at most.
pub async fn serve(criu: TcpStream, guard: Guard, idle: Duration, proxy: Arc<Proxy>) {
    let (Ok(peer), Ok(local)) = (criu.peer_addr(), criu.local_addr()) else {
        return tracing::debug!("page server: connected and left");
    };
    // CRIU waits for our answers; and a host that vanished must not hold its series.
    if let Err(e) = net::configure_link(&criu) {
        tracing::warn!(%peer, "socket options: {e}");
    }
    let refused = |e: &dyn std::error::Error| {
        let why = format!("{}; its dump fails, the process goes on", chain(e));
        guard.refused(&peer, &why);
    };
    let criu = match guard.page_server(criu, idle).await {
        Ok(criu) => criu,
        Err(e) => return refused(&e),
    };
    let criu = match Connection::accept(criu, idle).await {
        Ok(Some(criu)) => criu,
        Ok(None) => return tracing::debug!(%peer, "page server: connected and left"),
        Err(e) => return refused(&e),
    };
    receive(criu, (peer, local), proxy).await;
}

/// Serves a connection that was let in, from `peer` to our `local` address.
pub async fn receive(
    criu: Connection<Socket>,
    (peer, local): (SocketAddr, SocketAddr),
    proxy: Arc<Proxy>,
) {
    let fails = "the dump fails, its process goes on";
    let active = match proxy.page_server_run(Some(peer), Some(local)).await {
        Ok(active) => active,
        Err(e) => return tracing::error!(%peer, "page server: {}; {fails}", chain(&e)),
    };
    let Active { run, session } = &active;
    run.round_begins();
    let round = Round {
        criu,
        active: &active,
        proxy: &proxy,
    };
    let outcome = round.run().await;
    run.round_ended(outcome.is_ok());
    if let Err(e) = outcome {
        let reason = format!("page server round: {}", chain(&e));
        tracing::error!(session = %session.name, snapshot = %run.snapshot, %peer, "{reason}; {fails}");
        // What this round would have replaced, the next one must send anew.
        run.fail(&reason);
    } else if !run.state().gated {
        // Nothing follows of it: without the script the other images stay where they are.
        run.source_ended();
    }
}

fn remember(ids: &mut HashSet<PagemapId>, id: PagemapId) -> Result<(), RoundError> {
    ids.insert(id);
    match ids.len() > MAX_PAGEMAPS {
        true => Err(RoundError::TooMany),
        false => Ok(()),
    }
}

struct Round<'a> {
    criu: Connection<Socket>,
    active: &'a Active,
    proxy: &'a Proxy,
}

impl Round<'_> {
    async fn run(mut self) -> Result<(), RoundError> {
        let Active { run, session } = self.active;
        let link = session.link().await.map_err(RoundError::Link)?;
        run.wait_for(|s| s.opened || s.failure().is_some()).await;
        let (stream, mut answered) = link.add_round();
        // The page size of this host is that of its CRIU.
        let page_bytes = u32::try_from(rustix::param::page_size()).unwrap_or(4096);
        link.send(&Message::RoundOpen {
            stream,
            set: run.set,
            page_bytes,
        })
        .await;

        let began = Instant::now();
        let mut ids = HashSet::new();
        let mut current = None;
        let (mut entries, mut pages) = (0, 0);
        let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from)?;
        image_common::fdpass::enlarge_pipe(&pipe.1, PIPE_BYTES);
        let copied = async {
            loop {
                match self.request(run).await? {
                    Request::Open { id, answer } => {
                        self.open(&link, stream, &mut current, id).await;
                        remember(&mut ids, id)?;
                        if answer {
                            let yes = u8::from(self.has_parent(id));
                            self.criu.answer(&[yes]).await?;
                        }
                    }
                    Request::Parent(id) => {
                        let yes = u32::from(self.has_parent(id));
                        self.criu.answer(&yes.to_le_bytes()).await?;
                    }
                    Request::Add { id, entry } => {
                        if current != Some(id) {
                            // Old clients do not open (`page_server_add`).
                            self.open(&link, stream, &mut current, id).await;
                            remember(&mut ids, id)?;
                        }
                        link.send(&Message::RoundEntry { stream, entry }).await;
                        entries += 1;
                        if entry.is_present() {
                            pages += entry.pages;
                            let bytes = entry.pages * u64::from(page_bytes);
                            self.pages(&link, stream, &pipe, bytes).await?;
                        }
                    }
                    Request::Close => return Ok(()),
                    Request::Get { .. } => return Err(RoundError::Get),
                }
            }
        };
        let copied = tokio::select! {
            copied = copied => copied,
            () = link.failed() => Err(RoundError::Link(link.why())),
            // CRIU would send all of it, and hear that at its CLOSE.
            early = &mut answered => Err(RoundError::Link(match early {
                Ok(Err(refused)) => refused,
                Ok(Ok(_)) => "the cache acknowledged a round that goes on".to_owned(),
                Err(_) => link.why(),
            })),
        };
        if let Err(e) = copied {
            link.remove_round(stream);
            let reason = chain(&e);
            link.send(&Message::ImageAbort { stream, reason }).await;
            return Err(e);
        }
        let bytes = pages * u64::from(page_bytes);
        let merged = async {
            link.send_now(&Message::RoundEnd {
                stream,
                entries,
                pages,
            })
            .await?;
            answered.await.unwrap_or_else(|_| Err(link.why()))
        };
        let merged = tokio::time::timeout(self.proxy.settings.commit_timeout, merged)
            .await
            .unwrap_or_else(|_| Err("the cache did not acknowledge the pages in time".to_owned()));
        let status: i32 = match &merged {
            Ok(pages) => {
                tracing::info!(
                    session = %session.name, snapshot = %run.snapshot, new = pages.new,
                    replaced = pages.replaced, unchanged = pages.unchanged, "page server round merged"
                );
                let round = status::Round {
                    snapshot: run.snapshot.to_string(),
                    new_pages: pages.new,
                    replaced_pages: pages.replaced,
                    unchanged_pages: pages.unchanged,
                    dropped_pages: pages.dropped,
                    bytes,
                    seconds: began.elapsed().as_secs_f64(),
                };
                session.round_merged(ids, round);
                0
            }
            Err(_) => -1,
        };
        self.criu.answer(&status.to_le_bytes()).await?;
        merged.map(drop).map_err(RoundError::Link)
    }

    async fn open(
        &self,
        link: &Link,
        stream: StreamNumber,
        current: &mut Option<PagemapId>,
        id: PagemapId,
    ) {
        *current = Some(id);
        link.send(&Message::RoundMap { stream, id }).await;
    }

    fn has_parent(&self, id: PagemapId) -> bool {
        // A --stream dump that is told of a parent fails: it has no parent inventory.
        let streamed = self.active.run.state().dialect == Dialect::Stream;
        !streamed && self.active.session.has_parent(id)
    }

    async fn request(&mut self, run: &Run) -> Result<Request, RoundError> {
        tokio::select! {
            request = self.criu.request() => Ok(request?),
            () = run.stopped() => {
                let state = run.state();
                Err(RoundError::Link(state.failure().unwrap_or("the run ended").to_owned()))
            }
        }
    }

    /// Passes `left` bytes of pages on: what is in the buffer, and the pages of short entries,
    /// by copying; the rest of long ones by reference.
    async fn pages(
        &mut self,
        link: &Link,
        stream: StreamNumber,
        pipe: &(OwnedFd, OwnedFd),
        mut left: u64,
    ) -> Result<(), RoundError> {
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX);
            let here = self.criu.buffered(want.min(MAX_DATA_BYTES as usize));
            if !here.is_empty() {
                left -= here.len() as u64;
                let mut writer = link.writer().await;
                writer.put_data(stream, &here);
                if writer.is_full() {
                    writer.flush().await.map_err(SendError::Link)?;
                }
                continue;
            }
            if left < LONG_BYTES {
                self.criu.read_more().await?;
                continue;
            }
            let n = self.splice(pipe, want.min(PIPE_BYTES)).await?;
            left -= n as u64;
            let mut in_pipe = n;
            while in_pipe > 0 {
                let mut writer = link.writer().await;
                in_pipe -= writer.splice_frame(stream, pipe.0.as_fd(), in_pipe).await?;
            }
        }
        link.notify();
        Ok(())
    }

    /// Moves at most `want` bytes from CRIU's connection into the pipe.
    async fn splice(
        &mut self,
        pipe: &(OwnedFd, OwnedFd),
        want: usize,
    ) -> Result<usize, RoundError> {
        let idle = self.criu.idle();
        let criu = self.criu.stream();
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        loop {
            let readable = idle.bounds(criu.readable()).await;
            readable.map_err(ConnectionError::from)?;
            let moved =
                criu.try_read_with(|criu| Ok(splice(criu, None, &pipe.1, None, want, flags)?));
            match moved {
                Ok(0) => return Err(ConnectionError::Broken.into()),
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}
