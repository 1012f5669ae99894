use super::*;
use crate::criu::dialect::Dialect;
use crate::criu::inventory::SetKind;
use crate::criu::page_server::Layout;
use crate::image::{ImageName, SnapshotId};
use crate::link::MAX_REASON_BYTES;
use crate::link::{MAX_CONTROL_BYTES, MAX_DATA_BYTES};
use proptest::prelude::*;

fn snapshot(text: &str) -> SnapshotId {
    SnapshotId::new(text).unwrap()
}

/// One of each, with the bytes that `docs/link-protocol.md` promises.
fn golden() -> Vec<(Message, &'static str)> {
    let set = SetNumber(3);
    let stream = StreamNumber(0x0102);
    let reason = || "no".to_owned();
    vec![
        (
            Message::SetOpen {
                set,
                gated: true,
                dialect: Dialect::RemotePipe,
                parent: Some(SetNumber(2)),
                snapshot: snapshot("/i"),
            },
            "01000000 0c000000 03000000 00000000 01 04 0000 02000000 0200 2f69",
        ),
        (
            Message::SetDialect { set, dialect: Dialect::RemoteSocket },
            "02000000 01000000 03000000 00000000 03",
        ),
        (Message::SetGate { set }, "03000000 00000000 03000000 00000000"),
        (
            Message::SetComplete { set, images: 5, bytes: 4096 },
            "04000000 0c000000 03000000 00000000 05000000 0010000000000000",
        ),
        (
            Message::Prepare { set, images: 5, bytes: 4096, digest: 9 },
            "05000000 14000000 03000000 00000000 05000000 0010000000000000 0900000000000000",
        ),
        (
            Message::PrepareTrial { set, images: 5, bytes: 4096, digest: 9, on: CommitOn::Restored },
            "0a000000 15000000 03000000 00000000 05000000 0010000000000000 0900000000000000 02",
        ),
        (Message::Commit { set }, "06000000 00000000 03000000 00000000"),
        (Message::SetClose { set }, "07000000 00000000 03000000 00000000"),
        (
            Message::SetAbort { set, reason: reason() },
            "08000000 04000000 03000000 00000000 0200 6e6f",
        ),
        (
            Message::SetDoubt {
                set,
                reason: reason(),
            },
            "09000000 04000000 03000000 00000000 0200 6e6f",
        ),
        (
            Message::ImageOpen {
                stream,
                set,
                path: ImageName::new("a.img").unwrap(),
                mode: 0x401,
                size: None,
            },
            "10000000 17000000 02010000 00000000 03000000 01040000 ffffffffffffffff 0500 612e696d67",
        ),
        (
            Message::ImageEnd { stream, total: 1 << 40, digest: 7 },
            "12000000 0c000000 02010000 00000000 0000000000010000 07000000",
        ),
        (
            Message::Received { connection: 1, total: 1 << 32 },
            "21000000 08000000 01000000 00000000 0000000001000000",
        ),
        (
            Message::ImageAbort { stream, reason: reason() },
            "13000000 04000000 02010000 00000000 0200 6e6f",
        ),
        (
            Message::RoundOpen {
                stream,
                set,
                page_bytes: 4096,
                layout: Layout::Bytes32,
            },
            "14000000 09000000 02010000 00000000 03000000 00100000 02",
        ),
        (
            Message::RoundEnd {
                stream,
                entries: 3,
                pages: 2,
            },
            "17000000 10000000 02010000 00000000 0300000000000000 0200000000000000",
        ),
        (
            Message::RoundAck {
                stream,
                pages: RoundPages {
                    new: 1,
                    replaced: 2,
                    unchanged: 3,
                    dropped: 4,
                },
            },
            "52000000 20000000 02010000 00000000 0100000000000000 0200000000000000 0300000000000000 0400000000000000",
        ),
        (
            Message::Goodbye { reason: String::new() },
            "20000000 02000000 00000000 00000000 0000",
        ),
        (
            Message::Reserve { bytes: 1 << 30 },
            "22000000 08000000 00000000 00000000 0000004000000000",
        ),
        (
            Message::Reserved { bytes: 1 << 29 },
            "45000000 08000000 00000000 00000000 0000002000000000",
        ),
        (Message::SetGated { set }, "41000000 00000000 03000000 00000000"),
        (
            Message::SetStored { set, kind: SetKind::PreDump },
            "42000000 01000000 03000000 00000000 02",
        ),
        (Message::Prepared { set }, "43000000 00000000 03000000 00000000"),
        (
            Message::PrepareRefused { set, reason: reason() },
            "44000000 04000000 03000000 00000000 0200 6e6f",
        ),
        (Message::Trial { set }, "46000000 00000000 03000000 00000000"),
        (Message::Holding { set }, "47000000 00000000 03000000 00000000"),
        (
            Message::TrialFailed { set, reason: reason() },
            "48000000 04000000 03000000 00000000 0200 6e6f",
        ),
        (
            Message::ImageAck { stream, total: 7 },
            "50000000 08000000 02010000 00000000 0700000000000000",
        ),
        (
            Message::ImageRefused { stream, reason: reason() },
            "51000000 04000000 02010000 00000000 0200 6e6f",
        ),
    ]
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b' ').collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn encode(message: &Message) -> Vec<u8> {
    let mut out = BytesMut::new();
    message.encode(&mut out);
    out.to_vec()
}

fn decode(frame: &[u8]) -> Result<Message, LinkError> {
    let header = Header::decode(frame[..HEADER_BYTES].try_into().unwrap())?;
    Message::decode(header, &frame[HEADER_BYTES..])
}

#[test]
fn golden_bytes_of_every_message() {
    let all = golden();
    // Every type but IMAGE_DATA has its line here.
    assert_eq!(all.len(), kind::ALL.len() - 1);
    for (message, hex) in all {
        assert_eq!(encode(&message), unhex(hex), "{message:?}");
        assert_eq!(decode(&unhex(hex)), Ok(message));
    }
}

#[test]
fn golden_data_header() {
    let mut out = BytesMut::new();
    Header::data(StreamNumber(9), 0x0102, MAX_DATA_BYTES).encode(&mut out);
    assert_eq!(out.to_vec(), unhex("11000000 00001000 09000000 02010000"));
    let header = Header::decode(out[..].try_into().unwrap()).unwrap();
    assert_eq!(header.as_data(), Some(StreamNumber(9)));
    assert_eq!(header.sequence, 0x0102);
}

#[test]
fn every_truncated_or_extended_payload_is_refused() {
    for (message, _) in golden() {
        let frame = encode(&message);
        let header = Header::decode(frame[..HEADER_BYTES].try_into().unwrap()).unwrap();
        let payload = &frame[HEADER_BYTES..];
        for cut in 0..payload.len() {
            assert!(
                Message::decode(header, &payload[..cut]).is_err(),
                "{message:?} cut at {cut}"
            );
        }
        let mut longer = payload.to_vec();
        longer.push(0);
        assert!(
            Message::decode(header, &longer).is_err(),
            "{message:?} and a byte"
        );
    }
}

#[test]
fn headers_are_checked_before_anything_is_allocated() {
    let header = |kind: u8, flags: u8, reserved: u16, length: u32, last: u32| {
        let mut h = [0u8; HEADER_BYTES];
        h[0] = kind;
        h[1] = flags;
        h[2..4].copy_from_slice(&reserved.to_le_bytes());
        h[4..8].copy_from_slice(&length.to_le_bytes());
        h[12..16].copy_from_slice(&last.to_le_bytes());
        Header::decode(&h)
    };
    assert_eq!(header(0, 0, 0, 0, 0), Err(LinkError::UnknownType(0)));
    assert_eq!(header(0xff, 0, 0, 0, 0), Err(LinkError::UnknownType(0xff)));
    assert_eq!(header(0x06, 1, 0, 0, 0), Err(LinkError::Reserved(6)));
    assert_eq!(header(0x06, 0, 1, 0, 0), Err(LinkError::Reserved(6)));
    assert_eq!(header(0x06, 0, 0, 0, 1), Err(LinkError::Reserved(6)));
    assert_eq!(header(0x11, 1, 0, 1, 0), Err(LinkError::Reserved(0x11)));
    assert_eq!(header(0x11, 0, 1, 1, 0), Err(LinkError::Reserved(0x11)));
    // Only image data are numbered.
    assert!(header(0x11, 0, 0, 1, u32::MAX).is_ok());
    assert!(header(0x11, 0, 0, MAX_DATA_BYTES, 0).is_ok());
    assert!(matches!(
        header(0x11, 0, 0, MAX_DATA_BYTES + 1, 0),
        Err(LinkError::TooLong { .. })
    ));
    assert!(matches!(
        header(0x11, 0, 0, 0, 0),
        Err(LinkError::Short(0x11))
    ));
    assert!(matches!(
        header(0x08, 0, 0, MAX_CONTROL_BYTES + 1, 0),
        Err(LinkError::TooLong { .. })
    ));
}

#[test]
fn the_longest_names_fit_a_control_frame() {
    let message = Message::SetOpen {
        set: SetNumber(1),
        gated: false,
        dialect: Dialect::Stream,
        parent: None,
        snapshot: snapshot(&"s".repeat(SnapshotId::MAX_BYTES)),
    };
    assert_eq!(decode(&encode(&message)), Ok(message));
}

#[test]
fn a_reason_is_cut_and_made_printable() {
    let reason = format!("a\nb{}", "é".repeat(MAX_REASON_BYTES));
    let frame = encode(&Message::Goodbye { reason });
    match decode(&frame) {
        Ok(Message::Goodbye { reason }) => {
            assert!(reason.starts_with("a?bé") && reason.len() <= MAX_REASON_BYTES);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_paths_are_refused_by_the_decoder() {
    let good = encode(&Message::ImageOpen {
        stream: StreamNumber(1),
        set: SetNumber(1),
        path: ImageName::new("aaaaa").unwrap(),
        mode: 1,
        size: Some(1),
    });
    for bad in ["../ab", "a/bcd", "ab\0cd"] {
        let mut frame = good.clone();
        let at = frame.len() - 5;
        frame[at..].copy_from_slice(bad.as_bytes());
        assert!(
            matches!(decode(&frame), Err(LinkError::Name { .. })),
            "{bad:?}"
        );
    }
}

fn any_message() -> impl Strategy<Value = Message> {
    let set = any::<u32>().prop_map(SetNumber);
    let stream = any::<u32>().prop_map(StreamNumber);
    let dialect = prop_oneof![
        Just(Dialect::Stream),
        Just(Dialect::RemoteUnknown),
        Just(Dialect::RemoteSocket),
        Just(Dialect::RemotePipe)
    ];
    let size = prop_oneof![Just(None), (0..u64::MAX).prop_map(Some)];
    prop_oneof![
        (set.clone(), any::<bool>(), dialect, 0..5u32, "[!-~]{1,200}").prop_map(
            |(set, gated, dialect, parent, id)| Message::SetOpen {
                set,
                gated,
                dialect,
                parent: (parent > 0).then_some(SetNumber(parent)),
                snapshot: snapshot(&id),
            }
        ),
        (set.clone(), any::<u32>(), any::<u64>(), any::<u64>()).prop_map(
            |(set, images, bytes, digest)| Message::Prepare {
                set,
                images,
                bytes,
                digest,
            }
        ),
        (any::<u16>(), any::<u64>())
            .prop_map(|(connection, total)| Message::Received { connection, total }),
        (stream.clone(), set, "[a-z0-9.-]{3,255}", any::<u32>(), size).prop_map(
            |(stream, set, path, mode, size)| Message::ImageOpen {
                stream,
                set,
                path: ImageName::new(&path).unwrap_or_else(|_| ImageName::new("x").unwrap()),
                mode,
                size,
            }
        ),
        (stream.clone(), any::<u64>(), any::<u32>()).prop_map(|(stream, total, digest)| {
            Message::ImageEnd {
                stream,
                total,
                digest,
            }
        }),
        (stream, "[ -~]{0,300}")
            .prop_map(|(stream, reason)| Message::ImageRefused { stream, reason }),
    ]
}

proptest! {
    #[test]
    fn decode_undoes_encode(message in any_message()) {
        prop_assert_eq!(decode(&encode(&message)), Ok(message));
    }

    #[test]
    fn data_headers_keep_their_numbers(
        stream in any::<u32>(), sequence in any::<u32>(), length in 1..=MAX_DATA_BYTES,
    ) {
        let header = Header::data(StreamNumber(stream), sequence, length);
        let mut out = BytesMut::new();
        header.encode(&mut out);
        prop_assert_eq!(Header::decode(out[..].try_into().unwrap()), Ok(header));
        prop_assert_eq!(header.as_data(), Some(StreamNumber(stream)));
        prop_assert_eq!((header.sequence, header.length), (sequence, length));
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES..300)) {
        let _ = decode(&bytes);
    }
}

/// CRC-32C by the textbook, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}

#[test]
fn golden_checksums() {
    let set = SetNumber(3);
    let mut out = BytesMut::new();
    Message::SetDialect {
        set,
        dialect: Dialect::RemoteSocket,
    }
    .encode_with(&mut out, FrameFormat::Checked);
    let header = [2, 0, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(out[..16], header);
    assert_eq!(out[16..20], crc(&header).to_le_bytes());
    assert_eq!(out[20..24], crc(&[3]).to_le_bytes());
    assert_eq!(out[24..], [3]);
}
