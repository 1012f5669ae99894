//! One snapshot made of a `--remote` chain of three: a whole pre-dump of 64 MiB, and two snapshots
//! with 1 % of single pages each.

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{criterion_group, criterion_main, Criterion, Throughput};
use image_cache::store::image::{Image, ImageWriter, Slab};
use image_cache::store::memory::budget::Budget;
use image_cache::store::set::squash::{squash, Snapshot};
use image_common::image::ImageName;

const PAGE: u64 = 4096;
const BYTES: u64 = 64 << 20;
const PAGES: u64 = BYTES / PAGE;
const START: u64 = 0x1000_0000;
const PAGEMAP: &str = "pagemap-100.img";
const PE_PARENT: u8 = 1;
const PE_PRESENT: u8 = 4;

struct Dir(HashMap<String, Arc<Image>>);

impl Snapshot for Dir {
    fn image(&self, name: &str) -> Option<Arc<Image>> {
        self.0.get(name).cloned()
    }
}

fn image(name: &str, bytes: &[u8], budget: &Arc<Budget>) -> Arc<Image> {
    let name = ImageName::new(name).expect("a name");
    let slab = Arc::<Slab>::default();
    let mut writer = ImageWriter::new(name, None, None, slab, budget).expect("room");
    writer.put(bytes).expect("room");
    writer.finish(bytes.len() as u64).expect("all bytes")
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// By hand, because ours never writes holes: (first page, pages, flags).
fn pagemap(entries: &[(u64, u64, u8)]) -> Vec<u8> {
    let mut image = b"\x19\x43\x56\x54\x25\x40\x08\x56\x02\0\0\0\x08\x01".to_vec();
    for &(page, pages, flags) in entries {
        let mut body = Vec::new();
        for (field, value) in [
            (1, START + page * PAGE),
            (2, pages),
            (4, flags.into()),
            (5, pages),
        ] {
            varint(&mut body, field << 3);
            varint(&mut body, value);
        }
        image.extend(u32::try_from(body.len()).expect("short").to_le_bytes());
        image.extend(body);
    }
    image
}

fn snapshot(entries: &[(u64, u64, u8)], budget: &Arc<Budget>) -> Dir {
    let present = entries.iter().filter(|(.., flags)| *flags == PE_PRESENT);
    let bytes: u64 = present.map(|(_, pages, _)| pages * PAGE).sum();
    let pages = vec![0x5a; usize::try_from(bytes).expect("fits")];
    Dir(HashMap::from([
        (PAGEMAP.into(), image(PAGEMAP, &pagemap(entries), budget)),
        ("pages-1.img".into(), image("pages-1.img", &pages, budget)),
    ]))
}

/// A page in 100 from `first` on, holes between them.
fn some(first: u64) -> Vec<(u64, u64, u8)> {
    let mut entries = Vec::new();
    let mut at = 0;
    for page in (first..PAGES).step_by(100) {
        if at < page {
            entries.push((at, page - at, PE_PARENT));
        }
        entries.push((page, 1, PE_PRESENT));
        at = page + 1;
    }
    if at < PAGES {
        entries.push((at, PAGES - at, PE_PARENT));
    }
    entries
}

fn chain(c: &mut Criterion) {
    let budget = Budget::new(u64::MAX);
    let dirs = [&some(10), &some(60), &vec![(0, PAGES, PE_PRESENT)]]
        .map(|entries| snapshot(entries, &budget));
    let chain = dirs.each_ref().map(|dir| dir as &dyn Snapshot);
    let name = ImageName::new(PAGEMAP).expect("a name");
    let mut group = c.benchmark_group("squash-64MiB");
    group.throughput(Throughput::Bytes(BYTES));
    group.bench_function("chain-of-3-with-1-percent-each", |b| {
        b.iter(|| {
            let flat = squash(&name, &chain, &Arc::default(), &budget).expect("a whole chain");
            let flat = flat.expect("it has holes");
            assert_eq!(black_box(flat).pages.size(), BYTES);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = chain
}
criterion_main!(benches);
