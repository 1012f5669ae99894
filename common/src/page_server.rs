//! The server's end of a page server connection: requests out of a byte stream, for both
//! daemons. What the bytes mean is in [`crate::criu::page_server`].
//!
//! CRIU sends a request of 24 or 32 bytes and its pages behind it. One `read` per request and
//! another per entry would be most of the work where the entries are single pages, so what
//! there is is read together, and pages that came with it are copied out of the buffer. A
//! long entry's pages are left in the socket, to be received or spliced to where they belong.

use std::io;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::criu::page_server::{
    detect, FirstHeader, Layout, PageServerError, Request, MIN_HEADER_BYTES,
};
use crate::idle::{Idle, IdleError};

/// What is read at once: some fifteen single pages with their headers.
const BUFFER_BYTES: usize = 64 << 10;

/// Behind an entry longer than this the next is likely to be long as well: then little more
/// than its header is read, so that its pages need not be copied out of the buffer.
const LONG_ENTRY_PAGES: u64 = 16;
const FEW_BYTES: usize = 128;

/// Pages of one entry that are not here yet: from so many bytes on they are left in the socket,
/// below it they are read together with the requests behind them.
pub const LONG_BYTES: u64 = 64 << 10;

/// Between requests CRIU may do anything; but its first one comes at once.
pub const FIRST_WITHIN: Duration = Duration::from_secs(10);

/// After a CLOSE in the shorter header, the rest of a longer one would be here.
const REST_WITHIN: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error(transparent)]
    Protocol(#[from] PageServerError),
    #[error(transparent)]
    Wait(#[from] IdleError),
    #[error("CRIU closed its connection without CLOSE")]
    Broken,
    #[error("no request within {0:?}")]
    Slow(Duration),
}

/// One CRIU's connection.
pub struct Connection<S> {
    stream: S,
    layout: Layout,
    buffer: BytesMut,
    /// How much is read at once.
    ask: usize,
    idle: Idle,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Waits for the first request, which shows the layout of all; `None` if nothing came.
    /// From then on nothing may come for `idle` at most, where it is CRIU's turn.
    pub async fn accept(stream: S, idle: Duration) -> Result<Option<Self>, ConnectionError> {
        let mut connection = Self {
            stream,
            layout: Layout::Bytes24,
            buffer: BytesMut::new(),
            ask: BUFFER_BYTES,
            idle: Idle(idle),
        };
        let within = FIRST_WITHIN.min(idle);
        let first = connection.fill(MIN_HEADER_BYTES);
        let first = tokio::time::timeout(within, first).await;
        let first = first.map_err(|_| ConnectionError::Slow(within))?;
        if !first.map_err(IdleError::Io)? {
            return match connection.buffer.is_empty() {
                true => Ok(None),
                false => Err(ConnectionError::Broken),
            };
        }
        let first = connection.buffer.first_chunk();
        connection.layout = match first.map_or(Err(PageServerError::Layout), detect)? {
            FirstHeader::Known(layout) => layout,
            FirstHeader::Close => {
                let rest = connection.fill(Layout::Bytes32.header_bytes());
                match tokio::time::timeout(REST_WITHIN, rest).await {
                    Ok(Ok(true)) => Layout::Bytes32,
                    _ => Layout::Bytes24,
                }
            }
        };
        Ok(Some(connection))
    }

    /// The next request, without taking it. Cancel safe.
    pub async fn peek(&mut self) -> Result<Request, ConnectionError> {
        let length = self.layout.header_bytes();
        let idle = self.idle;
        // The whole of it: a byte now and then is no request. Most are here already.
        let here = self.buffer.len() >= length || idle.bounds(self.fill(length)).await?;
        match here {
            true => Ok(Request::decode(self.layout, &self.buffer[..length])?),
            false => Err(ConnectionError::Broken),
        }
    }

    /// The next request. The pages of an entry that is present must be taken before the one
    /// after it. Cancel safe.
    pub async fn request(&mut self) -> Result<Request, ConnectionError> {
        let request = self.peek().await?;
        self.buffer.advance(self.layout.header_bytes());
        if let Request::Add { entry, .. } = request {
            if entry.is_present() {
                self.ask = match entry.pages > LONG_ENTRY_PAGES {
                    true => FEW_BYTES,
                    false => BUFFER_BYTES,
                };
            }
        }
        Ok(request)
    }

    /// Pages that are here already, at most `max` bytes of them.
    pub fn buffered(&mut self, max: usize) -> BytesMut {
        let n = self.buffer.len().min(max);
        self.buffer.split_to(n)
    }

    /// Reads more into the buffer, whatever there is. Cancel safe.
    pub async fn read_more(&mut self) -> Result<(), ConnectionError> {
        // What is left of a long entry is not long.
        self.ask = BUFFER_BYTES;
        let (idle, wanted) = (self.idle, self.buffer.len() + 1);
        match idle.bounds(self.fill(wanted)).await? {
            true => Ok(()),
            false => Err(ConnectionError::Broken),
        }
    }

    /// At least `wanted` bytes in the buffer; `false` if the connection ended before.
    async fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        while self.buffer.len() < wanted {
            let missing = self.ask.max(wanted) - self.buffer.len();
            self.buffer.reserve(missing);
            let mut limited = (&mut self.buffer).limit(missing);
            if self.stream.read_buf(&mut limited).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub async fn answer(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let idle = self.idle;
        Ok(idle.bounds(self.stream.write_all(bytes)).await?)
    }

    /// For those who wait on [`Self::stream`] themselves.
    pub fn idle(&self) -> Idle {
        self.idle
    }

    /// For pages that are not in the buffer: it must be empty, or they come out of order.
    pub fn stream(&mut self) -> &mut S {
        debug_assert!(self.buffer.is_empty(), "the buffer comes first");
        &mut self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::page_server::{Entry, PagemapId, PE_PARENT, PE_PRESENT};
    use proptest::prelude::*;

    /// Sends `wire` in chunks and gives the requests, each with its pages.
    fn received(wire: Vec<u8>, chunk: usize) -> Result<Vec<(Request, Vec<u8>)>, ConnectionError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (mut client, server) = tokio::io::duplex(chunk);
            let sent = tokio::spawn(async move {
                let _ = client.write_all(&wire).await;
            });
            let mut found = Vec::new();
            if let Some(mut connection) = Connection::accept(server, FIRST_WITHIN).await? {
                loop {
                    let request = connection.request().await?;
                    let mut pages = Vec::new();
                    if let Request::Add { entry, .. } = request {
                        let bytes = usize::try_from(entry.pages).unwrap() * 4096;
                        while entry.is_present() && pages.len() < bytes {
                            let got = connection.buffered(bytes - pages.len());
                            if got.is_empty() {
                                connection.read_more().await?;
                            }
                            pages.extend_from_slice(&got);
                        }
                    }
                    found.push((request, pages));
                    if request == Request::Close {
                        break;
                    }
                }
            }
            sent.await.unwrap();
            Ok(found)
        })
    }

    fn session(entries: &[(bool, u64)]) -> Vec<(Request, Vec<u8>)> {
        let id = PagemapId::Task(7);
        let open = Request::Open { id, answer: true };
        let mut requests = vec![(open, Vec::new())];
        let mut vaddr = 0x1000;
        for &(present, pages) in entries {
            let flags = if present { PE_PRESENT } else { PE_PARENT };
            let entry = Entry {
                vaddr,
                pages,
                flags,
            };
            let bytes = if present { pages * 4096 } else { 0 };
            let content = (0..bytes).map(|n| (vaddr + n).to_le_bytes()[1]).collect();
            requests.push((Request::Add { id, entry }, content));
            vaddr += pages * 4096;
        }
        requests.push((Request::Close, Vec::new()));
        requests
    }

    fn encoded(session: &[(Request, Vec<u8>)], layout: Layout) -> Vec<u8> {
        let mut wire = BytesMut::new();
        for (request, pages) in session {
            request.encode(layout, &mut wire);
            wire.extend_from_slice(pages);
        }
        wire.to_vec()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn any_chunking_gives_the_same_requests_and_any_cut_is_noticed(
            entries in proptest::collection::vec((any::<bool>(), 1..40u64), 0..12),
            chunk in 1..200_000usize,
            wide in any::<bool>(),
            cut in any::<proptest::sample::Index>(),
        ) {
            let layout = if wide { Layout::Bytes32 } else { Layout::Bytes24 };
            let session = session(&entries);
            let wire = encoded(&session, layout);
            let all = received(wire.clone(), chunk).unwrap();
            prop_assert!(all == session);
            match received(wire[..cut.index(wire.len())].to_vec(), chunk) {
                Ok(nothing) => prop_assert!(nothing.is_empty() && cut.index(wire.len()) == 0),
                Err(ConnectionError::Broken) => {}
                Err(e) => panic!("{e}"),
            }
        }

        #[test]
        fn garbage_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let _ = received(wire, 100);
        }
    }

    #[test]
    fn a_close_alone_in_either_header() {
        for layout in [Layout::Bytes24, Layout::Bytes32] {
            let wire = encoded(&[(Request::Close, Vec::new())], layout);
            assert_eq!(received(wire, 8).unwrap(), [(Request::Close, Vec::new())]);
        }
    }
}
