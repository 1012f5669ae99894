//! Requests to a page server, in both layouts of the header and in the forms of old clients: any
//! bytes, cut anywhere. What is read does not depend on the cuts, and what is accepted is the same
//! when it is encoded and decoded again.

use crate::input::Input;
use crate::world;
use bytes::BytesMut;
use image_common::criu::page_server::{detect, Layout, Request, MIN_HEADER_BYTES};
use image_common::criu::requests::{Part, Requests};
use image_common::criu_io::page_server::{Connection, FIRST_WITHIN};
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
        let accepted = Connection::accept(server, FIRST_WITHIN).await;
        let mut connection = match accepted {
            Ok(Some(connection)) => connection,
            Ok(None) => return (found, "nothing".to_owned()),
            Err(e) => return (found, format!("{e:?}")),
        };
        let mut requests = Requests::new(connection.layout(), 1);
        loop {
            let bytes = connection.buffer().split();
            let mut rest = &bytes[..];
            loop {
                match requests.next(&mut rest) {
                    Ok(Some(Part::Request(request))) => found.push((request, Vec::new())),
                    Ok(Some(Part::Pages(pages))) => {
                        let (_, of) = found.last_mut().expect("pages are behind an entry");
                        of.extend_from_slice(pages);
                    }
                    Ok(None) => break,
                    Err(e) => return (found, format!("{e:?}")),
                }
                if requests.is_closed() {
                    return (found, "closed".to_owned());
                }
            }
            if let Err(e) = connection.read_more(requests.ask()).await {
                return (found, format!("{e:?}"));
            }
        }
    });
    world::ended().await;
    reading.await.expect("it has ended")
}
