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
    let mut round = Round::new(PAGE, budget);
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

/// A plain model: address -> the byte that fills its page.
type Model = BTreeMap<u64, u8>;

/// (gap before, pages, whether it may be a hole) of each entry, and the fill of the round.
type RoundPlan = (Vec<(u64, u64, bool)>, u8);

fn run_plan(store: &mut PageStore, model: &mut Model, budget: &Arc<Budget>, plan: &RoundPlan) {
    let (entries, fill) = plan;
    let mut round = Round::new(PAGE, budget);
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
        round.add(TASK, entry).unwrap();
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
        if !hole {
            let bytes = vec![*fill; usize::try_from(pages).unwrap() * PAGE_LEN];
            round.put(TASK, &bytes).unwrap();
        }
        at += pages;
    }
    expected.dropped = model.len() as u64;
    assert_eq!(store.merge(round).unwrap().0, expected);
    *model = next;
    assert_eq!(budget.used(), model.len() as u64 * PAGE + MAP_BYTES);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn random_rounds_against_a_plain_model(
        rounds in proptest::collection::vec(
            (proptest::collection::vec((0..4u64, 1..6u64, any::<bool>()), 0..12), 1..255u8), 1..8),
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
