//! The server's end of a page server connection, for both daemons: its first request, and what
//! was read of the others. Their bytes are taken apart by [`crate::criu::requests`].
//!
//! CRIU sends a request of 24 or 32 bytes and its pages behind it. One `read` per request and
//! another per entry would be most of the work where the entries are single pages, so what
//! there is is read together. image-cache leaves a long entry's pages in the socket, to be received
//! to where they stay.

use std::io;
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::criu::page_server::{
    detect, FirstHeader, Layout, PageServerError, Request, MIN_HEADER_BYTES,
};
use crate::criu_io::idle::{Idle, IdleError};

/// Between requests CRIU may do anything; but its first one comes at once.
pub const FIRST_WITHIN: Duration = Duration::from_secs(10);

/// After a CLOSE in the shorter header, the rest of a longer one would be here.
const REST_WITHIN: Duration = Duration::from_millis(50);

/// Why a connection of the page server ended.
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

    /// The form of its requests.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The request at the front of the buffer, without taking it. Cancel safe.
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

    /// What was read and not taken.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Reads once, at most `ask` bytes, into the buffer. Cancel safe.
    pub async fn read_more(&mut self, ask: usize) -> Result<(), ConnectionError> {
        let idle = self.idle;
        match idle.bounds(self.read(ask)).await? {
            0 => Err(ConnectionError::Broken),
            _ => Ok(()),
        }
    }

    async fn read(&mut self, ask: usize) -> io::Result<usize> {
        self.buffer.reserve(ask);
        let mut limited = (&mut self.buffer).limit(ask);
        self.stream.read_buf(&mut limited).await
    }

    /// At least `wanted` bytes in the buffer, and no more; `false` if the connection ended before.
    async fn fill(&mut self, wanted: usize) -> io::Result<bool> {
        while self.buffer.len() < wanted {
            if self.read(wanted - self.buffer.len()).await? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes to CRIU, within the time that it may take.
    pub async fn answer(&mut self, bytes: &[u8]) -> Result<(), ConnectionError> {
        let idle = self.idle;
        Ok(idle.bounds(self.stream.write_all(bytes)).await?)
    }

    /// For callers that wait on [`Self::stream`] themselves.
    pub fn idle(&self) -> Idle {
        self.idle
    }

    /// For what is not in the buffer: that must be empty, or bytes come out of order.
    pub fn stream(&mut self) -> &mut S {
        debug_assert!(self.buffer.is_empty(), "the buffer comes first");
        &mut self.stream
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::page_server::PagemapId;
    use proptest::prelude::*;

    /// What a connection is taken for by its first bytes, sent in chunks.
    fn accepted(wire: &[u8], chunk: usize) -> Result<Option<(Layout, Request)>, ConnectionError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let (mut client, server) = tokio::io::duplex(chunk);
            let wire = wire.to_vec();
            let sent = tokio::spawn(async move {
                let _ = client.write_all(&wire).await;
            });
            let accepted = match Connection::accept(server, FIRST_WITHIN).await? {
                Some(mut connection) => {
                    let request = connection.peek().await?;
                    let length = connection.layout().header_bytes();
                    assert_eq!(connection.buffer().len(), length, "no more than is needed");
                    Some((connection.layout(), request))
                }
                None => None,
            };
            sent.await.unwrap();
            Ok(accepted)
        })
    }

    fn encoded(request: Request, layout: Layout) -> BytesMut {
        let mut wire = BytesMut::new();
        request.encode(layout, &mut wire);
        wire
    }

    const FIRST: [Request; 3] = [
        Request::Open {
            id: PagemapId::Task(7),
            answer: true,
        },
        Request::Parent(PagemapId::Shmem(1)),
        Request::Close,
    ];

    #[test]
    fn the_first_request_shows_the_layout_however_it_is_cut() {
        for layout in [Layout::Bytes24, Layout::Bytes32] {
            for request in FIRST {
                let wire = encoded(request, layout);
                for chunk in [1, 7, 100] {
                    let got = accepted(&wire, chunk).unwrap();
                    assert_eq!(got, Some((layout, request)));
                }
                // Where a CLOSE of the shorter layout ends, one of the longer may have been cut.
                for cut in (1..wire.len()).filter(|n| request != Request::Close || *n < 24) {
                    assert!(matches!(
                        accepted(&wire[..cut], 8),
                        Err(ConnectionError::Broken)
                    ));
                }
            }
        }
        assert!(accepted(&[], 8).unwrap().is_none());
    }

    proptest! {
        #[test]
        fn garbage_never_panics(wire in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = accepted(&wire, 100);
        }
    }
}
