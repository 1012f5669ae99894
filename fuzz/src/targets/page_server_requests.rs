//! Requests to a page server, in both layouts of the header and in the forms of old clients: any
//! bytes, cut anywhere. What is read does not depend on the cuts, and what is accepted is the same
//! when it is encoded and decoded again.

use crate::input::Input;
use crate::world;
use bytes::BytesMut;
use image_common::criu::page_server::{detect, Layout, Request, MIN_HEADER_BYTES};
use image_common::page_server::Connection;
use tokio::io::AsyncWriteExt;

pub fn run(bytes: &[u8]) {
    for layout in [Layout::Bytes24, Layout::Bytes32] {
        if let Some(header) = bytes.get(..layout.header_bytes()) {
            if let Ok(request) = Request::decode(layout, header) {
                let mut again = BytesMut::new();
                request.encode(layout, &mut again);
                assert_eq!(again.len(), layout.header_bytes());
                assert_eq!(Request::decode(layout, &again), Ok(request));
            }
        }
    }
    if let Some((first, _)) = bytes.split_first_chunk::<MIN_HEADER_BYTES>() {
        let _ = detect(first);
    }
    let mut input = Input::new(bytes);
    let piece = 1 + usize::from(input.any::<u16>());
    let wire = input.rest();
    world::run(async move {
        let whole = read(wire, usize::MAX >> 1).await;
        let pieces = read(wire, piece).await;
        // A CLOSE alone is the one whose length shows only by what follows in time.
        assert_eq!(whole, pieces);
    });
}

type Read = (Vec<(Request, Vec<u8>)>, String);

/// What a server reads of it. Entries have one byte per page here, which is as good as 4,096.
async fn read(wire: &[u8], piece: usize) -> Read {
    let (mut client, server) = tokio::io::duplex(piece.min(1 << 20));
    let wire = wire.to_vec();
    tokio::spawn(async move {
        let _ = client.write_all(&wire).await;
    });
    let reading = tokio::spawn(async move {
        let mut found = Vec::new();
        let mut connection = match Connection::accept(server).await {
            Ok(Some(connection)) => connection,
            Ok(None) => return (found, "nothing".to_owned()),
            Err(e) => return (found, format!("{e:?}")),
        };
        loop {
            let request = match connection.request().await {
                Ok(request) => request,
                Err(e) => return (found, format!("{e:?}")),
            };
            let mut pages = Vec::new();
            if let Request::Add { entry, .. } = request {
                let want = usize::try_from(entry.pages).unwrap_or(usize::MAX);
                while entry.is_present() && pages.len() < want {
                    let got = connection.buffered(want - pages.len());
                    if got.is_empty() {
                        if let Err(e) = connection.read_more().await {
                            return (found, format!("{e:?}"));
                        }
                    }
                    pages.extend_from_slice(&got);
                }
            }
            found.push((request, pages));
            if request == Request::Close {
                return (found, "closed".to_owned());
            }
        }
    });
    world::ended().await;
    reading.await.expect("it has ended")
}
