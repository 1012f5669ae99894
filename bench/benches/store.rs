//! The page store: merging a round into 64 MiB of pages, and the flat set made of them. Only the
//! merge is timed, not how the pages came or how superseded ones go back.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{criterion_group, criterion_main, BatchSize, Criterion, Throughput};
use image_cache::store::memory::budget::Budget;
use image_cache::store::memory::segment::OwnedPiece;
use image_cache::store::page_rounds::{PageStore, Round, Superseded};
use image_common::criu::page_server::{Entry, PagemapId, PE_PARENT, PE_PRESENT};

const PAGE: u64 = 4096;
const BYTES: u64 = 64 << 20;
const PAGES: u64 = BYTES / PAGE;
const START: u64 = 0x1000_0000;
/// One page in so many is a new one: 1 %.
const EVERY: u8 = 100;

fn id() -> PagemapId {
    PagemapId::Task(100)
}

fn entry(page: u64, pages: u64, flags: u32) -> Entry {
    Entry::new(START + page * PAGE, pages, flags).expect("a valid entry")
}

/// A round of these entries, with bytes for those that are present.
fn round(entries: &[Entry], budget: &Arc<Budget>) -> Round {
    let page = [0x5a; 4096];
    let mut round = Round::new(PAGE, budget);
    round.open(id()).expect("a new pagemap");
    for entry in entries {
        round.add(id(), *entry).expect("in order");
        if entry.is_present() {
            for _ in 0..entry.pages {
                round.put(id(), &page).expect("room");
            }
        }
    }
    round
}

/// Entries of 16 pages, each behind the one before.
fn all() -> Vec<Entry> {
    let starts = (0..PAGES).step_by(16);
    starts.map(|page| entry(page, 16, PE_PRESENT)).collect()
}

/// Single pages far apart, and holes between them.
fn some() -> Vec<Entry> {
    let mut entries = Vec::new();
    for page in (0..PAGES).step_by(EVERY.into()) {
        entries.push(entry(page, 1, PE_PRESENT));
        let hole = (u64::from(EVERY) - 1).min(PAGES - page - 1);
        if hole > 0 {
            entries.push(entry(page + 1, hole, PE_PARENT));
        }
    }
    entries
}

fn merged(rounds: &[&[Entry]], budget: &Arc<Budget>) -> PageStore {
    let mut store = PageStore::new(PAGE, budget);
    for entries in rounds {
        drop(store.merge(round(entries, budget)).expect("a whole round"));
    }
    store
}

/// Its name, the rounds before, and the one that is merged.
type Case<'a> = (&'a str, &'a [&'a [Entry]], &'a [Entry]);

fn store(c: &mut Criterion) {
    let budget = Budget::new(u64::MAX);
    let (all, some) = (all(), some());
    let mut group = c.benchmark_group("store-64MiB");
    group.throughput(Throughput::Bytes(BYTES));
    let cases: [Case<'_>; 3] = [
        ("merge-all-new", &[], &all),
        ("merge-all-replaced", &[&all], &all),
        ("merge-1-percent-single-pages", &[&all], &some),
    ];
    for (name, before, now) in cases {
        group.bench_function(name, |b| {
            let ready = || (merged(before, &budget), round(now, &budget));
            // What is returned is dropped outside of the time.
            let merge = |(mut store, round): (PageStore, Round)| -> (PageStore, Superseded) {
                let (pages, superseded) = store.merge(round).expect("a whole round");
                black_box(pages);
                (store, superseded)
            };
            b.iter_batched(ready, merge, BatchSize::PerIteration);
        });
    }
    for (name, rounds) in [
        ("flatten", &[&all[..]][..]),
        ("flatten-after-1-percent", &[&all[..], &some[..]][..]),
    ] {
        group.bench_function(name, |b| {
            b.iter_batched(
                || merged(rounds, &budget),
                |store| black_box(store.flatten(OwnedPiece::share)),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = store
}
criterion_main!(benches);
