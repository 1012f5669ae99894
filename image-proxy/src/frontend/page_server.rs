//! The page server: `criu pre-dump --page-server` and `dump --page-server` send their pages
//! here, and we pass them on over the link, to be merged into the store when the round is whole.
//!
//! CLOSE is answered with success only when the cache has merged the round: CRIU takes the
//! answer before its post-dump script, and fails the dump on any other (`page-xfer.c`).
//!
//! What CRIU sends goes on as it is, in frames of the round; we only read along, to answer and to
//! count. The way of a byte: CRIU's TCP connection -> (recv) -> a frame -> (send) -> the link. To
//! splice it from one connection into the other costs as much as the two copies, and to keep it
//! for a link that breaks (`tee`) half as much again (docs/performance.md).

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use image_common::admission::Admission;
use image_common::control::status;
use image_common::criu::page_server::{PageServerError, PagemapId, Request};
use image_common::criu::requests::{Part, Requests};
use image_common::criu_io::page_server::{Connection, ConnectionError};
use image_common::error_chain::chain;
use image_common::link::codec::{Message, StreamNumber};
use image_common::net;
use image_common::net::socket::Socket;
use image_common::tasks;
use tokio::net::TcpStream;

use crate::dumps::{Active, Proxy, RunError};
use crate::failure::Failure;
use crate::link::writer::SendError;
use crate::link::Link;

/// What is read at once and becomes a frame.
const READ_BYTES: usize = 128 << 10;

#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    #[error(transparent)]
    Protocol(#[from] PageServerError),
    #[error("reading from CRIU's connection to the page server")]
    Io(#[from] io::Error),
    #[error("CRIU asks this page server for pages, but it only receives them")]
    Get,
    #[error("more than {MAX_PAGEMAPS} pagemaps in one round")]
    TooMany,
    #[error(transparent)]
    Failed(#[from] Failure),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Own(tasks::Panicked),
}

impl RoundError {
    fn failure(self) -> Failure {
        match self {
            Self::Failed(failure) => failure,
            Self::Send(e @ (SendError::Source(_) | SendError::Stolen)) => Failure::criu(chain(&e)),
            Self::Send(e) => Failure::link(chain(&e)),
            Self::TooMany => Failure::limit(self.to_string()),
            Self::Own(e) => Failure::bug(e.to_string()),
            Self::Connection(_) | Self::Protocol(_) | Self::Io(_) | Self::Get => {
                Failure::criu(chain(&self))
            }
            Self::Run(e) => Failure::criu(chain(&e)),
        }
    }
}

/// More tasks, and pieces of shared memory, than a tree has; a bound for what a round makes us
/// remember.
const MAX_PAGEMAPS: usize = 64 << 10;

/// Serves a connection; nothing may come on it for `idle` at most.
pub async fn serve(criu: TcpStream, admission: Admission, idle: Duration, proxy: Arc<Proxy>) {
    let (Ok(peer), Ok(local)) = (criu.peer_addr(), criu.local_addr()) else {
        return tracing::debug!("page server: connected and left");
    };
    // CRIU waits for our answers; and a host that vanished must not hold its series.
    if let Err(e) = net::configure_link(&criu) {
        tracing::warn!(%peer, "cannot set socket options: {e}; the connection goes on without them");
    }
    let refused = |e: &dyn std::error::Error| {
        let why = format!("{}; its dump fails, the process goes on", chain(e));
        admission.refused(&peer, &why);
    };
    let criu = match admission.page_server(criu, idle).await {
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
        requests: Requests::new(criu.layout(), page_bytes().into()),
        seen: Seen::default(),
        criu,
        active: &active,
        proxy: &proxy,
    };
    let outcome = tasks::caught("a page server round", round.run()).await;
    let outcome = outcome.unwrap_or_else(|e| Err(RoundError::Own(e)));
    run.round_ended(outcome.is_ok());
    if let Err(e) = outcome {
        let failure = e.failure().of("page server round");
        tracing::error!(session = %session.name, snapshot = %run.snapshot, %peer, "{}; {fails}", failure.text());
        // What this round would have replaced, the next one must send anew.
        run.fail(failure);
    } else if !run.state().is_gated() {
        // Nothing follows of it: without the script the other images stay where they are.
        run.source_ended();
    }
}

struct Round<'a> {
    criu: Connection<Socket>,
    requests: Requests,
    seen: Seen,
    active: &'a Active,
    proxy: &'a Proxy,
}

impl Round<'_> {
    async fn run(mut self) -> Result<(), RoundError> {
        let Active { run, session } = self.active;
        let link = session.link().await.map_err(RoundError::Failed)?;
        run.wait_for(|s| s.opened || s.is_decided()).await;
        let (stream, mut answered) = link.add_round();
        let page_bytes = page_bytes();
        link.send(&Message::RoundOpen {
            stream,
            set: run.set,
            page_bytes,
            layout: self.criu.layout(),
        })
        .await;

        let began = Instant::now();
        let copied = tokio::select! {
            copied = self.copy(&link, stream) => copied,
            () = link.failed() => Err(RoundError::Failed(link.why())),
            // CRIU would send all of it, and hear that at its CLOSE.
            early = &mut answered => Err(RoundError::Failed(match early {
                Ok(Err(refused)) => refused,
                Ok(Ok(_)) => Failure::peer("image-cache acknowledged a round that has not ended"),
                Err(_) => link.why(),
            })),
        };
        if let Err(e) = copied {
            link.remove_round(stream);
            let reason = chain(&e);
            link.send(&Message::ImageAbort { stream, reason }).await;
            return Err(e);
        }
        let Seen {
            ids,
            entries,
            pages,
            ..
        } = std::mem::take(&mut self.seen);
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
        let within = self.proxy.settings.commit_timeout;
        let merged = tokio::time::timeout(within, merged)
            .await
            .unwrap_or_else(|_| {
                Err(Failure::limit(format!(
                    "image-cache did not merge the round within {within:?} (--commit-timeout)"
                )))
            });
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
        merged.map(drop).map_err(RoundError::Failed)
    }

    /// Passes everything until CLOSE on, as it comes.
    async fn copy(&mut self, link: &Link, stream: StreamNumber) -> Result<(), RoundError> {
        // What came with the first request.
        let first = self.criu.buffer().split();
        link.writer().await.put_data(stream, &first);
        let mut answers = self.look(&first)?;
        loop {
            if !answers.is_empty() {
                self.criu.answer(&answers).await?;
            }
            if self.requests.is_closed() {
                return Ok(());
            }
            answers = self.gather(link, stream).await?;
        }
    }

    /// Passes on whatever is here.
    async fn gather(&mut self, link: &Link, stream: StreamNumber) -> Result<Vec<u8>, RoundError> {
        loop {
            self.readable(link).await?;
            let mut writer = link.writer().await;
            if !writer.has_space(READ_BYTES) {
                writer.flush().await.map_err(SendError::Link)?;
            }
            let criu = self.criu.stream();
            match writer.gather_round(stream, READ_BYTES, criu)? {
                None => {}
                Some([]) => return Err(ConnectionError::Broken.into()),
                Some(bytes) => return self.look(bytes),
            }
        }
    }

    /// Takes note of what is passed on; gives the answers to it.
    fn look(&mut self, mut bytes: &[u8]) -> Result<Vec<u8>, RoundError> {
        let mut answers = Vec::new();
        while let Some(part) = self.requests.next(&mut bytes)? {
            match part {
                Part::Pages(_) | Part::Request(Request::Close) => {}
                Part::Request(Request::Open { id, answer }) => {
                    self.seen.map(id)?;
                    if answer {
                        answers.push(u8::from(self.has_parent(id)));
                    }
                }
                Part::Request(Request::Parent(id)) => {
                    let yes = u32::from(self.has_parent(id));
                    answers.extend(yes.to_le_bytes());
                }
                Part::Request(Request::Add { id, entry }) => {
                    self.seen.map(id)?;
                    self.seen.entries += 1;
                    if entry.is_present() {
                        self.seen.pages += entry.pages;
                    }
                }
                Part::Request(Request::Get { .. }) => return Err(RoundError::Get),
            }
        }
        Ok(answers)
    }

    fn has_parent(&self, id: PagemapId) -> bool {
        // A --stream dump that is told of a parent fails: it has no parent inventory.
        self.active.run.state().dialect.has_parents() && self.active.session.has_parent(id)
    }

    /// Waits until there may be something of CRIU's. What is gathered goes out meanwhile, and only
    /// then: a header shares its packet with the pages behind it.
    async fn readable(&mut self, link: &Link) -> Result<(), RoundError> {
        let run = &self.active.run;
        let (idle, criu) = (self.criu.idle(), self.criu.stream());
        tokio::select! {
            biased;
            readable = criu.readable() => return Ok(readable?),
            () = std::future::ready(()) => link.notify(),
        }
        tokio::select! {
            readable = idle.bounds(criu.readable()) => Ok(readable.map_err(ConnectionError::from)?),
            () = run.stopped() => {
                let state = run.state();
                let failure = state.failure().cloned();
                Err(RoundError::Failed(failure.unwrap_or_else(|| Failure::stopped("the run ended"))))
            }
        }
    }
}

/// What a round has had so far.
#[derive(Default)]
struct Seen {
    ids: HashSet<PagemapId>,
    last: Option<PagemapId>,
    entries: u64,
    pages: u64,
}

impl Seen {
    fn map(&mut self, id: PagemapId) -> Result<(), RoundError> {
        if self.last != Some(id) {
            self.last = Some(id);
            self.ids.insert(id);
        }
        match self.ids.len() > MAX_PAGEMAPS {
            true => Err(RoundError::TooMany),
            false => Ok(()),
        }
    }
}

/// The page size of this host is that of its CRIU.
fn page_bytes() -> u32 {
    u32::try_from(rustix::param::page_size()).unwrap_or(4096)
}
