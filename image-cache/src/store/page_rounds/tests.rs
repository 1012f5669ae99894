use super::*;
use image_common::criu::page_server::{Layout, Request, PE_LAZY, PE_PARENT, PE_PRESENT};
use proptest::prelude::*;
use std::collections::BTreeMap;

const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
const TASK: PagemapId = PagemapId::Task(252);

fn fixture(name: &str) -> Vec<u8> {
    let dir = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/page-server-incremental/"
    );
    let path = format!("{dir}{name}");
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Feeds a recorded session to the store; gives what the page server would answer.
fn feed(store: &mut PageStore, budget: &Arc<Budget>, mut bytes: &[u8]) -> Vec<u8> {
    let mut round = store.begin(budget);
    let mut answers = Vec::new();
    loop {
        let (header, rest) = bytes.split_at(24);
        bytes = rest;
        match Request::decode(Layout::Bytes24, header).unwrap() {
            Request::Open { id, .. } => {
                answers.push(u8::from(store.has(id)));
                round.open(id).unwrap();
            }
            Request::Parent(id) => answers.extend(u32::from(store.has(id)).to_le_bytes()),
            Request::Add { id, entry } => {
                round.add(id, entry).unwrap();
                if entry.is_present() {
                    let (pages, rest) =
                        bytes.split_at(usize::try_from(entry.pages * PAGE).unwrap());
                    round.put(id, pages).unwrap();
                    bytes = rest;
                }
            }
            Request::Close => {
                let _ = store.merge(round).unwrap();
                answers.extend([0; 4]);
                assert!(bytes.is_empty());
                return answers;
            }
            Request::Get { .. } => panic!("not from a sending client"),
        }
    }
}

#[test]
fn the_recorded_rounds_make_the_recorded_flat_set() {
    let budget = Budget::new(1 << 30);
    let mut store = PageStore::new(PAGE, &budget);
    for n in 1..=3 {
        let answers = feed(
            &mut store,
            &budget,
            &fixture(&format!("session-{n}.client-to-server.bin")),
        );
        assert_eq!(
            answers,
            fixture(&format!("session-{n}.server-to-client.bin")),
            "round {n}"
        );
    }
    let flat = store.flatten(OwnedPiece::share);
    assert_eq!(flat.len(), 1);
    assert_eq!(flat[0].pagemap_name, "pagemap-252.img");
    assert_eq!(flat[0].pages_name, "pages-65537.img");
    let pages: Vec<u8> = flat[0]
        .pages
        .iter()
        .flat_map(|p| p.iter().copied())
        .collect();
    assert!(pages == fixture("squashed/pages-65537.img"));
    // The recorded one has the count in one field only; ours in both.
    let recorded = pagemap::summarize(&fixture("squashed/pagemap-252.img"));
    assert_eq!(pagemap::summarize(&flat[0].pagemap), recorded);
}

#[test]
fn memory_goes_back_with_what_is_superseded() {
    let budget = Budget::new(1 << 30);
    let mut store = PageStore::new(PAGE, &budget);
    let all = Entry {
        vaddr: 0,
        pages: 256,
        flags: PE_PRESENT,
    };
    for fill in 0..10u8 {
        let mut round = Round::new(PAGE, &budget);
        round.open(TASK).unwrap();
        round.add(TASK, all).unwrap();
        round.put(TASK, &vec![fill; 256 * PAGE_LEN]).unwrap();
        let _ = store.merge(round).unwrap();
        assert_eq!(budget.used(), 256 * PAGE + MAP_BYTES, "round {fill}");
    }
    // A round without the process: nothing of it is needed any more.
    let (stats, _) = store.merge(Round::new(PAGE, &budget)).unwrap();
    assert_eq!(
        stats,
        RoundPages {
            dropped: 256,
            ..RoundPages::default()
        }
    );
    assert_eq!(budget.used(), 0);
}

#[test]
fn what_cannot_be_is_refused_and_changes_nothing() {
    let budget = Budget::new(1 << 30);
    let mut store = PageStore::new(PAGE, &budget);
    let entry = |page: u64, pages, flags| Entry {
        vaddr: page * PAGE,
        pages,
        flags,
    };
    let round = || Round::new(PAGE, &budget);

    let mut r = round();
    r.open(TASK).unwrap();
    r.add(TASK, entry(10, 2, PE_PRESENT)).unwrap();
    r.put(TASK, &[1; 2 * PAGE_LEN]).unwrap();
    assert!(matches!(
        r.add(TASK, entry(11, 1, PE_PRESENT)),
        Err(PageError::Order { .. })
    ));
    assert!(matches!(
        r.add(TASK, entry(20, 1, PE_LAZY)),
        Err(PageError::Lazy { .. })
    ));
    assert!(matches!(
        r.add(PagemapId::Task(1), entry(1, 1, 4)),
        Err(PageError::NotOpen { .. })
    ));
    let _ = store.merge(r).unwrap();

    let mut r = round();
    r.open(TASK).unwrap();
    r.add(TASK, entry(10, 3, PE_PARENT)).unwrap();
    match store.merge(r) {
        Err(PageError::Missing { vaddr, .. }) => assert_eq!(vaddr, 12 * PAGE),
        other => panic!("{other:?}"),
    }
    let mut r = round();
    r.open(TASK).unwrap();
    r.add(TASK, entry(10, 3, PE_PRESENT)).unwrap();
    r.put(TASK, &[2; PAGE_LEN + 1]).unwrap();
    assert!(
        matches!(
            r.add(TASK, entry(20, 1, PE_PRESENT)),
            Err(PageError::Size { .. })
        ),
        "an entry before the one before it is whole"
    );
    assert!(
        matches!(store.merge(r), Err(PageError::Size { .. })),
        "a round that broke off"
    );
    let mut r = round();
    r.open(TASK).unwrap();
    r.add(TASK, entry(10, 1, PE_PRESENT)).unwrap();
    assert!(matches!(
        r.put(TASK, &[2; PAGE_LEN + 1]),
        Err(PageError::Size { .. })
    ));
    drop(r);
    let mut r = round();
    r.open(TASK).unwrap();
    r.add(TASK, entry(10, 1, PE_PRESENT)).unwrap();
    r.put(TASK, &[2; PAGE_LEN - 1]).unwrap();
    assert!(matches!(r.open(PagemapId::Task(1)), Err(PageError::Part)));
    drop(r);

    assert_eq!(budget.used(), 2 * PAGE + MAP_BYTES);
    let flat = store.flatten(OwnedPiece::share);
    assert!(flat[0].pages.iter().flat_map(|p| p.iter()).all(|&b| b == 1));
}

fn present(page: u64, pages: u64) -> Entry {
    Entry {
        vaddr: page * PAGE,
        pages,
        flags: PE_PRESENT,
    }
}

/// An entry of pages full of `fill`, received where they stay or copied there.
fn bring(round: &mut Round, entry: Entry, fill: u8, in_place: bool) {
    round.add(TASK, entry).unwrap();
    let mut left = usize::try_from(entry.pages).unwrap() * PAGE_LEN;
    if !in_place {
        round.prefers_copies();
    }
    // Neither whole pages nor whole pieces come at once.
    while left > 0 {
        let n = left.min(9999);
        if in_place {
            let spare = round.spare(n).unwrap();
            let n = spare.len();
            spare.fill(fill);
            round.filled(TASK, n).unwrap();
            left -= n;
        } else {
            round.put(TASK, &vec![fill; n]).unwrap();
            left -= n;
        }
    }
}

/// A round of these entries alone, each with its fill.
fn merged(store: &mut PageStore, budget: &Arc<Budget>, entries: &[(Entry, u8)]) {
    let mut round = store.begin(budget);
    round.open(TASK).unwrap();
    for &(entry, fill) in entries {
        match fill {
            0 => round.add(TASK, entry).unwrap(),
            _ => bring(&mut round, entry, fill, true),
        }
    }
    let _ = store.merge(round).unwrap();
    is_sound(store, budget);
}

/// Where each piece of memory is.
fn addresses<'a>(pieces: impl Iterator<Item = &'a OwnedPiece>) -> Vec<(usize, usize)> {
    pieces.map(|p| (p.as_ptr() as usize, p.len())).collect()
}

/// What the store and its pool have is charged, is within its bound, and does not overlap.
fn is_sound(store: &PageStore, budget: &Arc<Budget>) {
    let runs = store.maps.values().flatten().map(|run| &run.memory);
    let mut all = addresses(runs.chain(store.pool.pieces()));
    let pooled: usize = store.pool.pieces().map(|piece| piece.len()).sum();
    assert!(pooled as u64 <= store.bytes() / pool::PART);
    let maps = store.maps.len() as u64 * MAP_BYTES;
    assert_eq!(budget.used(), store.bytes() + pooled as u64 + maps);
    all.sort_unstable();
    for pair in all.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
    }
}

#[test]
fn superseded_memory_is_used_again_within_its_bound() {
    let budget = Budget::new(1 << 30);
    let mut store = PageStore::new(PAGE, &budget);
    let hole = |page, pages| Entry {
        flags: PE_PARENT,
        ..present(page, pages)
    };
    merged(&mut store, &budget, &[(present(0, 1024), 1)]);
    assert_eq!(store.pool.pieces().count(), 0);
    // Single pages, and less than the bound: all of it is kept, and all is used.
    let single = |first: u64, fill| -> Vec<(Entry, u8)> {
        let pairs = (0..16).map(|n| n * 64 + first);
        let pairs = pairs.map(|at| [(hole(at - first, first), 0), (present(at, 1), fill)]);
        let rest = |at| (hole(at, 63 - first), 0);
        pairs
            .zip(0..)
            .flat_map(|(pair, n)| [pair[0], pair[1], rest(n * 64 + first + 1)])
            .collect()
    };
    merged(&mut store, &budget, &single(3, 2));
    let mut kept = addresses(store.pool.pieces());
    kept.sort_unstable();
    assert_eq!(kept.len(), 16);
    merged(&mut store, &budget, &single(5, 3));
    let all = store.maps[&TASK].iter();
    let mut used = addresses(all.filter(|run| run.memory[0] == 3).map(|run| &run.memory));
    used.sort_unstable();
    assert_eq!(used, kept);
    // More than the bound: what is kept are whole huge pages.
    let all = 16_384;
    for fill in 4..8 {
        merged(&mut store, &budget, &[(present(0, all), fill)]);
        let kept = budget.used() - all * PAGE;
        assert!(fill == 4 || kept >= all / pool::PART / 2 * PAGE, "{kept}");
    }
    // A long entry takes a long piece.
    let kept = addresses(store.pool.pieces());
    let before = budget.used();
    let mut round = store.begin(&budget);
    round.open(TASK).unwrap();
    bring(&mut round, present(0, 32), 8, true);
    let beside = MAP_BYTES + ENTRY_BYTES;
    assert_eq!(budget.used(), before + beside, "no page is new");
    let used = addresses(round.maps[&TASK].memory.iter());
    let within = |u: &(usize, usize)| kept.iter().any(|k| k.0 <= u.0 && u.0 + u.1 <= k.0 + k.1);
    assert!(used.iter().all(within));
    // It breaks off: what was there is as it was, and no memory is lost.
    drop(round);
    assert_eq!(budget.used(), all * PAGE + MAP_BYTES);
    is_sound(&store, &budget);
    let mut runs = store.maps[&TASK].iter();
    assert!(runs.all(|run| run.memory.iter().all(|&b| b == 7)));
    merged(&mut store, &budget, &[(present(0, 8), 9)]);
    let flat = store.flatten(OwnedPiece::share);
    assert!(flat[0].pages.iter().flat_map(|p| p.iter()).all(|&b| b == 9));
}

/// What the pool had goes back when the flat set is made: nobody can write to it then.
#[test]
fn a_flat_set_has_no_pool() {
    let budget = Budget::new(1 << 30);
    let mut store = PageStore::new(PAGE, &budget);
    let rest = Entry {
        flags: PE_PARENT,
        ..present(8, 248)
    };
    merged(&mut store, &budget, &[(present(0, 256), 2)]);
    merged(&mut store, &budget, &[(present(0, 8), 2), (rest, 0)]);
    assert_eq!(budget.used(), (256 + 8) * PAGE + MAP_BYTES);
    let flat = store.flatten(OwnedPiece::lend);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while budget.used() != 256 * PAGE {
        assert!(std::time::Instant::now() < deadline, "{}", budget.used());
        std::thread::yield_now();
    }
    assert!(flat[0].pages.iter().flat_map(|p| p.iter()).all(|&b| b == 2));
    drop(flat);
    assert_eq!(budget.used(), 0);
}

/// A plain model: address -> the byte that fills its page.
type Model = BTreeMap<u64, u8>;

/// (gap before, pages, whether it may be a hole) of each entry, the fill of the round, and
/// whether it is received in place.
type RoundPlan = (Vec<(u64, u64, bool)>, u8, bool);

fn run_plan(store: &mut PageStore, model: &mut Model, budget: &Arc<Budget>, plan: &RoundPlan) {
    let (entries, fill, in_place) = plan;
    let mut round = store.begin(budget);
    round.open(TASK).unwrap();
    let mut next = Model::new();
    let mut at = 0;
    let mut expected = RoundPages::default();
    for &(gap, pages, hole) in entries {
        at += gap;
        let range = at..at + pages;
        let hole = hole && range.clone().all(|p| model.contains_key(&p));
        let flags = if hole {
            PE_PARENT
        } else {
            PE_PRESENT | PE_LAZY
        };
        let entry = Entry {
            vaddr: at * PAGE,
            pages,
            flags,
        };
        match hole {
            true => round.add(TASK, entry).unwrap(),
            false => bring(&mut round, entry, *fill, *in_place),
        }
        for page in range {
            let known = model.remove(&page);
            match (hole, known) {
                (true, known) => next.insert(page, known.unwrap()),
                (false, _) => next.insert(page, *fill),
            };
            match (hole, known) {
                (true, _) => expected.unchanged += 1,
                (false, Some(_)) => expected.replaced += 1,
                (false, None) => expected.new += 1,
            }
        }
        at += pages;
    }
    expected.dropped = model.len() as u64;
    assert_eq!(store.merge(round).unwrap().0, expected);
    *model = next;
    assert_eq!(store.bytes(), model.len() as u64 * PAGE);
    is_sound(store, budget);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_rounds_against_a_plain_model(
        rounds in proptest::collection::vec(
            (
                proptest::collection::vec((0..4u64, prop_oneof![1..6u64, 1..60u64], any::<bool>()), 0..12),
                1..255u8,
                any::<bool>(),
            ),
            1..8,
        ),
    ) {
        let budget = Budget::new(1 << 30);
        let mut store = PageStore::new(PAGE, &budget);
        let mut model = Model::new();
        for plan in &rounds {
            run_plan(&mut store, &mut model, &budget, plan);
        }
        let flat = store.flatten(OwnedPiece::share).remove(0);
        let bytes: Vec<u8> = flat.pages.iter().flat_map(|p| p.iter().copied()).collect();
        let expected: Vec<u8> = model.values().flat_map(|&b| [b; PAGE_LEN]).collect();
        prop_assert!(bytes == expected);
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for &page in model.keys() {
            match runs.last_mut() {
                Some((start, n)) if *start + *n * PAGE == page * PAGE => *n += 1,
                _ => runs.push((page * PAGE, 1)),
            }
        }
        prop_assert_eq!(flat.pagemap, pagemap::encode(FIRST_PAGES_ID, runs));
    }
}
