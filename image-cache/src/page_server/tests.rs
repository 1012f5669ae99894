//! Whole sessions against a plain model: random rounds of several pagemaps, some of them cut
//! at a command or anywhere.

use super::*;
use crate::store::memory::segment::OwnedPiece;
use crate::store::page_rounds::MAP_BYTES;
use crate::store::Policy;
use bytes::BytesMut;
use image_common::criu::page_server::{Entry, Layout, PagemapId, PE_PARENT, PE_PRESENT};
use proptest::prelude::*;
use proptest::sample::Index;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
const IDS: [PagemapId; 3] = [
    PagemapId::Task(1),
    PagemapId::Task(70_000),
    PagemapId::Shmem(1),
];
const SOURCE: PageSource = PageSource {
    host: std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
    port: 27,
};

/// What fills each page, by pagemap and page number.
type Model = BTreeMap<PagemapId, BTreeMap<u64, u8>>;

/// Pages and the gap before them; whether they changed since the last round.
type EntryPlan = (u64, u64, bool);

#[derive(Debug, Clone)]
struct RoundPlan {
    /// One per id; the first is the root of the tree, others may be gone, or new.
    maps: [Option<Vec<EntryPlan>>; 3],
    fill: u8,
    wide: bool,
    cut: Cut,
}

#[derive(Debug, Clone)]
enum Cut {
    No,
    Command(Index),
    Byte(Index),
}

fn plans() -> impl Strategy<Value = Vec<RoundPlan>> {
    let entry = (0..3u64, 1..40u64, any::<bool>());
    let root = proptest::collection::vec(entry, 0..8);
    let map = proptest::option::weighted(0.8, root.clone());
    let cut = prop_oneof![
        4 => Just(Cut::No),
        1 => any::<Index>().prop_map(Cut::Command),
        1 => any::<Index>().prop_map(Cut::Byte),
    ];
    let round = ((root, map.clone(), map), 1..255u8, any::<bool>(), cut);
    let round = round.prop_map(|((root, child, shmem), fill, wide, cut)| RoundPlan {
        maps: [Some(root), child, shmem],
        fill,
        wide,
        cut,
    });
    proptest::collection::vec(round, 1..7)
}

/// As CRIU would send the round, knowing what `before` has: the bytes, where each command
/// begins, the answers, and what is there afterwards.
fn session(plan: &RoundPlan, before: &Model) -> (BytesMut, Vec<usize>, Vec<u8>, Model) {
    let layout = if plan.wide {
        Layout::Bytes32
    } else {
        Layout::Bytes24
    };
    let (mut wire, mut commands, mut answers) = (BytesMut::new(), Vec::new(), Vec::new());
    let mut after = Model::new();
    let mut send = |wire: &mut BytesMut, request: Request| {
        commands.push(wire.len());
        request.encode(layout, wire);
    };
    for (id, entries) in IDS.into_iter().zip(&plan.maps) {
        let Some(entries) = entries else { continue };
        send(&mut wire, Request::Open { id, answer: true });
        let parent = before.get(&id);
        answers.push(u8::from(parent.is_some()));
        let map = after.entry(id).or_default();
        let mut at = 0;
        for &(gap, pages, changed) in entries {
            at += gap;
            let known: Option<Vec<u8>> = (at..at + pages)
                .map(|page| parent.and_then(|p| p.get(&page)).copied())
                .collect();
            let hole = known.filter(|_| !changed);
            let flags = if hole.is_some() {
                PE_PARENT
            } else {
                PE_PRESENT
            };
            let vaddr = at * PAGE;
            let entry = Entry {
                vaddr,
                pages,
                flags,
            };
            send(&mut wire, Request::Add { id, entry });
            let fills = hole.clone().unwrap_or_else(|| {
                let fill = |n: u64| plan.fill.wrapping_add(n.to_le_bytes()[0]);
                (0..pages).map(fill).collect()
            });
            for (page, fill) in (at..).zip(fills) {
                map.insert(page, fill);
                if hole.is_none() {
                    wire.extend_from_slice(&[fill; PAGE_LEN]);
                }
            }
            at += pages;
        }
    }
    send(&mut wire, Request::Close);
    answers.extend([0; 4]);
    (wire, commands, answers, after)
}

/// Sends `wire` and closes; gives the answers.
async fn exchange(store: &Arc<Store>, wire: &[u8]) -> (Result<(), RoundError>, Vec<u8>) {
    let (criu, server) = tokio::io::duplex(1 << 20);
    let (mut answered, mut sending) = tokio::io::split(criu);
    let send = async move {
        let _ = sending.write_all(wire).await;
        let _ = sending.shutdown().await;
    };
    let serve = async {
        match Connection::accept(server, Duration::from_secs(10)).await? {
            Some(mut criu) => {
                let peer = ([127, 0, 0, 1], 5).into();
                round(&mut criu, &peer, SOURCE, store).await
            }
            None => Ok(()),
        }
    };
    let mut answers = Vec::new();
    let ((), served, read) = tokio::join!(send, serve, answered.read_to_end(&mut answers));
    read.unwrap();
    (served, answers)
}

fn check(store: &Arc<Store>, model: &Model) {
    let tasks = model.keys().filter_map(|id| id.task()).collect();
    let series = store.claim_pages(Some(SOURCE.host), &tasks).unwrap();
    let flat = series.take_pages().unwrap().flatten(OwnedPiece::share);
    assert_eq!(flat.len(), model.len());
    for ((id, pages), flat) in model.iter().zip(flat) {
        assert_eq!(flat.pagemap_name, id.image_name());
        let bytes: Vec<u8> = flat.pages.iter().flat_map(|p| p.iter().copied()).collect();
        let expected: Vec<u8> = pages.values().flat_map(|&b| [b; PAGE_LEN]).collect();
        assert!(bytes == expected, "{id:?}");
        let (_, entries) = image_common::criu::pagemap::entries(&flat.pagemap).unwrap();
        let named = entries
            .iter()
            .flat_map(|e| (0..e.pages).map(|n| e.vaddr / PAGE + n));
        assert!(named.eq(pages.keys().copied()), "{id:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn whole_rounds_merge_and_cut_ones_end_the_series(plans in plans()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let store = Store::new(1 << 30, Policy::default());
        let mut model = Model::new();
        // Of series that a cut has closed: they stay for a claim.
        let (mut closed, mut closed_maps) = (0, 0);
        for plan in &plans {
            let (wire, commands, answers, after) = session(plan, &model);
            let end = match plan.cut {
                Cut::No => wire.len(),
                Cut::Command(at) => commands[at.index(commands.len())],
                Cut::Byte(at) => at.index(wire.len()),
            };
            let (served, told) = runtime.block_on(exchange(&store, &wire[..end]));
            if end == wire.len() {
                served.unwrap();
                prop_assert_eq!(told, answers);
                model = after;
                let pages: usize = model.values().map(BTreeMap::len).sum();
                let maps = (closed_maps + model.len()) as u64 * MAP_BYTES;
                // And what is kept for the next round.
                let used = (store.budget.used() - maps) / PAGE;
                let (least, most) = (closed + pages, closed + pages + pages / 16);
                prop_assert!((least as u64..=most as u64).contains(&used), "{used}");
            } else {
                prop_assert!(end == 0 || served.is_err());
                prop_assert!(told.len() <= answers.len() - 4, "no status");
                prop_assert_eq!(&told[..], &answers[..told.len()]);
                // One whose first request did not come is not known to be of this series.
                let header = if plan.wide { 32 } else { 24 };
                if end >= header {
                    closed += model.values().map(BTreeMap::len).sum::<usize>();
                    closed_maps += model.len();
                    model.clear();
                    let maps = closed_maps as u64 * MAP_BYTES;
                    // The account of what the rounds did takes less than a page.
                    prop_assert_eq!((store.budget.used() - maps) / PAGE, closed as u64);
                }
            }
        }
        if !model.is_empty() {
            check(&store, &model);
        }
    }
}

#[tokio::test]
async fn two_at_once_with_equal_pids_are_told_apart_or_refused() {
    let store = Store::new(1 << 30, Policy::default());
    let id = IDS[0];
    let first = store.open_pages(SOURCE, "a".to_owned(), id).unwrap();
    let error = store.open_pages(SOURCE, "b".to_owned(), id).map(drop);
    assert!(error.unwrap_err().to_string().contains("pagemap-1.img"));
    let other_port = PageSource { port: 28, ..SOURCE };
    let second = store.open_pages(other_port, "b".to_owned(), id).unwrap();
    assert_ne!(first.number, second.number);
    first.direct_round_ends();
    let again = store.open_pages(SOURCE, "a".to_owned(), id).unwrap();
    assert_eq!(first.number, again.number);
}
