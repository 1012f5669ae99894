//! The link's frames and CRIU's pagemaps, encoded and decoded.

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use image_common::criu::pagemap;
use image_common::image::ImageName;
use image_common::link::codec::{Header, Message, SetNumber, StreamNumber, HEADER_BYTES};

/// What an image costs beside its bytes: open, a data header, end, and the acknowledgement.
fn messages() -> [Message; 3] {
    let stream = StreamNumber(7);
    let open = Message::ImageOpen {
        stream,
        set: SetNumber(1),
        path: ImageName::new("core-4711.img").expect("a name"),
        mode: 1,
        size: None,
    };
    let total = 4096;
    let end = Message::ImageEnd {
        stream,
        total,
        digest: 0,
    };
    [open, end, Message::ImageAck { stream, total }]
}

fn decode_header(frame: &[u8]) -> Header {
    let head = frame.first_chunk::<HEADER_BYTES>().expect("a header");
    Header::decode(head).expect("our own header")
}

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("codec");
    let messages = messages();
    let mut out = BytesMut::with_capacity(4096);
    group.throughput(Throughput::Elements(messages.len() as u64));
    group.bench_function("encode-image-messages", |b| {
        b.iter(|| {
            out.clear();
            messages.iter().for_each(|message| message.encode(&mut out));
            black_box(out.len())
        });
    });
    let encoded = messages.each_ref().map(|message| {
        let mut frame = BytesMut::new();
        message.encode(&mut frame);
        frame
    });
    group.bench_function("decode-image-messages", |b| {
        b.iter(|| {
            for frame in &encoded {
                let header = decode_header(frame);
                let message = Message::decode(header, &frame[HEADER_BYTES..]);
                black_box(message.expect("our own message"));
            }
        });
    });
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode-data-header", |b| {
        b.iter(|| {
            out.clear();
            Header::data(StreamNumber(7), black_box(3), 1 << 20).encode(&mut out);
            black_box(out.len())
        });
    });
    let mut header = BytesMut::new();
    Header::data(StreamNumber(7), 3, 1 << 20).encode(&mut header);
    group.bench_function("decode-data-header", |b| {
        b.iter(|| black_box(decode_header(black_box(&header)).as_data()));
    });
    group.finish();
}

/// As many entries as a task with 40,000 separate ranges has.
fn pagemaps(c: &mut Criterion) {
    const ENTRIES: u64 = 40_000;
    let entries = || (0..ENTRIES).map(|n| (0x1000_0000 + n * 0x8000, 1 + n % 7));
    let mut group = c.benchmark_group("pagemap");
    group.throughput(Throughput::Elements(ENTRIES));
    group.bench_function("encode", |b| {
        b.iter(|| black_box(pagemap::encode(1, entries())));
    });
    let image = pagemap::encode(1, entries());
    group.bench_function("entries", |b| {
        b.iter(|| black_box(pagemap::entries(&image).expect("our own pagemap")));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = frames, pagemaps
}
criterion_main!(benches);
