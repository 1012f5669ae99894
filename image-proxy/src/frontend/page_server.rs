//! The page server: `criu pre-dump --page-server` and `dump --page-server` send their pages
//! here, and we pass them on over the link, to be merged into the store when the round is whole.
//!
//! CLOSE is answered with success only when the cache has merged the round: CRIU takes the
//! answer before its post-dump script, and fails the dump on any other (`page-xfer.c`).
//!
//! The way of a byte: CRIU's TCP connection -> (splice) -> a pipe -> (splice) -> the link.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use image_common::control::chain;
use image_common::criu::page_server::{
    detect, FirstHeader, Layout, PageServerError, PagemapId, Request, MIN_HEADER_BYTES,
};
use image_common::link::codec::{Dialect, Message, StreamNumber};
use image_common::status;
use rustix::pipe::{pipe_with, splice, PipeFlags, SpliceFlags};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;

use crate::link::Link;
use crate::proxy::{Active, Proxy, RunError};
use crate::run::Run;
use crate::writer::SendError;

/// Between requests CRIU may do anything; but its first one comes at once.
const FIRST_WITHIN: Duration = Duration::from_secs(10);

/// After a CLOSE in the shorter header, the rest of a longer one would be here.
const REST_WITHIN: Duration = Duration::from_millis(50);

const PIPE_BYTES: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Protocol(#[from] PageServerError),
    #[error("CRIU's connection to the page server")]
    Io(#[from] io::Error),
    #[error("CRIU closed its connection without CLOSE")]
    Broken,
    #[error("no request within {} s", FIRST_WITHIN.as_secs())]
    Slow,
    #[error("pages cannot be asked for here: this page server receives")]
    Get,
    #[error("{0}")]
    Link(String),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Run(#[from] RunError),
}

pub async fn serve(mut criu: TcpStream, proxy: Arc<Proxy>) {
    // Answers are a few bytes that CRIU waits for.
    let _ = criu.set_nodelay(true);
    let (layout, first) = match first_header(&mut criu).await {
        Ok(Some(first)) => first,
        Ok(None) => return tracing::debug!("page server: connected and left"),
        Err(e) => return tracing::error!("page server: {}", chain(&e)),
    };
    let active = match proxy
        .page_server_run(criu.peer_addr().ok(), criu.local_addr().ok())
        .await
    {
        Ok(active) => active,
        Err(e) => return tracing::error!("page server: {}", chain(&e)),
    };
    let Active { run, session } = &active;
    run.round_begins();
    let round = Round {
        criu,
        layout,
        active: &active,
        proxy: &proxy,
    };
    let outcome = round.run(first).await;
    run.round_ended(outcome.is_ok());
    if let Err(e) = outcome {
        let reason = format!("page server round: {}", chain(&e));
        tracing::error!(session = %session.name, snapshot = %run.snapshot, "{reason}");
        // What this round would have replaced, the next one must send anew.
        run.fail(&reason);
    } else if !run.state().gated {
        // Nothing follows of it: without the script the other images stay where they are.
        run.source_ended();
    }
}

/// The first request's header, and which layout it shows.
async fn first_header(criu: &mut TcpStream) -> Result<Option<(Layout, Vec<u8>)>, RoundError> {
    let mut header = vec![0; MIN_HEADER_BYTES];
    let read = tokio::time::timeout(FIRST_WITHIN, criu.read(&mut header));
    let n = read.await.map_err(|_| RoundError::Slow)??;
    if n == 0 {
        return Ok(None);
    }
    let rest = tokio::time::timeout(FIRST_WITHIN, criu.read_exact(&mut header[n..]));
    rest.await.map_err(|_| RoundError::Slow)??;
    let first = header.first_chunk().map(detect);
    let layout = match first.unwrap_or(Err(PageServerError::Layout))? {
        FirstHeader::Known(layout) => layout,
        FirstHeader::Close => {
            let mut more = [0; 8];
            let rest = tokio::time::timeout(REST_WITHIN, criu.read_exact(&mut more)).await;
            match rest {
                Ok(Ok(_)) => Layout::Bytes32,
                _ => Layout::Bytes24,
            }
        }
    };
    let missing = layout.header_bytes() - header.len();
    if missing > 0
        && !matches!(
            header.first_chunk().map(detect),
            Some(Ok(FirstHeader::Close))
        )
    {
        header.resize(layout.header_bytes(), 0);
        criu.read_exact(&mut header[MIN_HEADER_BYTES..]).await?;
    }
    header.resize(layout.header_bytes(), 0);
    Ok(Some((layout, header)))
}

struct Round<'a> {
    criu: TcpStream,
    layout: Layout,
    active: &'a Active,
    proxy: &'a Proxy,
}

impl Round<'_> {
    async fn run(mut self, first: Vec<u8>) -> Result<(), RoundError> {
        let Active { run, session } = self.active;
        let link = session.link().await.map_err(RoundError::Link)?;
        run.wait_for(|s| s.opened || s.failure().is_some()).await;
        let (stream, answered) = link.add_round();
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
        let mut header = first;
        let pipe = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(io::Error::from)?;
        image_common::fdpass::enlarge_pipe(&pipe.1, PIPE_BYTES);
        let copied = async {
            loop {
                match Request::decode(self.layout, &header)? {
                    Request::Open { id, answer } => {
                        self.open(&link, stream, &mut current, id).await;
                        ids.insert(id);
                        if answer {
                            self.criu
                                .write_all(&[u8::from(self.has_parent(id))])
                                .await?;
                        }
                    }
                    Request::Parent(id) => {
                        let yes = u32::from(self.has_parent(id));
                        self.criu.write_all(&yes.to_le_bytes()).await?;
                    }
                    Request::Add { id, entry } => {
                        if current != Some(id) {
                            // Old clients do not open (`page_server_add`).
                            self.open(&link, stream, &mut current, id).await;
                            ids.insert(id);
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
                self.next_header(&mut header, run).await?;
            }
        };
        let copied = tokio::select! {
            copied = copied => copied,
            () = link.failed() => Err(RoundError::Link(link.why())),
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
        self.criu.write_all(&status.to_le_bytes()).await?;
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

    async fn next_header(&mut self, header: &mut [u8], run: &Run) -> Result<(), RoundError> {
        let read = tokio::select! {
            read = self.criu.read_exact(header) => read,
            () = run.stopped() => {
                let state = run.state();
                return Err(RoundError::Link(state.failure().unwrap_or("the run ended").to_owned()));
            }
        };
        match read {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(RoundError::Broken),
            Err(e) => Err(e.into()),
        }
    }

    /// Passes `left` bytes of pages on.
    async fn pages(
        &self,
        link: &Link,
        stream: StreamNumber,
        pipe: &(OwnedFd, OwnedFd),
        mut left: u64,
    ) -> Result<(), RoundError> {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        while left > 0 {
            self.criu.readable().await?;
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(PIPE_BYTES);
            let moved = self.criu.try_io(Interest::READABLE, || {
                Ok(splice(self.criu.as_fd(), None, &pipe.1, None, want, flags)?)
            });
            let n = match moved {
                Ok(0) => return Err(RoundError::Broken),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e.into()),
            };
            left -= n as u64;
            let mut in_pipe = n;
            while in_pipe > 0 {
                let mut writer = link.writer().await;
                in_pipe -= writer.splice_frame(stream, pipe.0.as_fd(), in_pipe).await?;
            }
        }
        Ok(())
    }
}
