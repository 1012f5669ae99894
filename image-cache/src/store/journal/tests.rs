use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;

use super::record::*;
use super::*;
use crate::store::memory::arena::{Arena, Extent};

fn file() -> File {
    Arena::memfd().unwrap()
}

fn session(number: u64) -> SessionRecord {
    SessionRecord {
        number,
        name: format!("web-{number}"),
        key: u64::MAX - number,
        proxy: 7,
        opening: 1,
        peer: "10.0.0.1:5".to_owned(),
        began: 1_700_000_000,
    }
}

fn set(session: u64, number: u32, images: u32) -> SetRecord {
    let region = |n: u64| RegionRecord {
        extent: Extent {
            offset: n << 21,
            len: 1 << 20,
        },
        held: n % 2 == 1,
    };
    let file = |n: u32| FileRecord {
        name: format!("core-{n}.img"),
        digest: (n % 2 == 0).then_some((5000, 0x0102_0304)),
        pieces: vec![PieceRecord {
            region: n % 3,
            start: u64::from(n) * 5000,
            len: 5000,
        }],
    };
    SetRecord {
        session,
        number,
        snapshot: "dump".to_owned(),
        parent: (number > 1).then(|| number - 1),
        images,
        bytes: u64::from(images) * 5000,
        rounds: 0,
        digest: u64::MAX,
        regions: (0..3).map(region).collect(),
        files: (0..images).map(file).collect(),
        state: stands(1),
    }
}

fn stands(phase: u8) -> StateRecord {
    StateRecord {
        phase,
        dialect: 1,
        kind: 1,
        gated: true,
        lost: phase > 2,
        ..StateRecord::default()
    }
}

/// What another process finds.
fn found(file: &File) -> Kept {
    let (_, start) = anchor(file).unwrap();
    read(file, start).unwrap().0
}

fn kept(session: &SessionRecord, sets: &[SetRecord]) -> (u64, KeptSession) {
    let sets = sets.iter().map(|set| (set.number, set.clone()));
    let kept = KeptSession {
        session: session.clone(),
        restored: false,
        sets: sets.collect(),
    };
    (session.number, kept)
}

fn journal() -> (Arc<Journal>, File) {
    let file = file();
    let again = file.try_clone().unwrap();
    (Arc::new(Journal::new(file).unwrap()), again)
}

#[test]
fn what_is_noted_is_found() {
    let (journal, file) = journal();
    assert_eq!(found(&file), Kept::default());
    let ledgers = [1, 2, 3].map(|n| Ledger::new(&journal, session(n)));
    let mut sets = [set(1, 1, 3), set(1, 2, 0), set(2, 1, 100), set(3, 9, 1)];
    for (ledger, of) in [(0, 0), (0, 1), (1, 2), (2, 3)] {
        ledgers[ledger].set(sets[of].clone());
    }
    ledgers[0].stands(2, stands(2));
    ledgers[0].stands(2, stands(3));
    ledgers[0].stands(7, stands(3));
    ledgers[0].set_gone(1);
    ledgers[1].restored();
    ledgers[2].session_gone();
    ledgers[2].set(sets[3].clone());
    sets[1].state = stands(3);
    let expected = |file: &File| {
        let mut second = kept(&session(2), &sets[2..3]);
        second.1.restored = true;
        let all = [kept(&session(1), &sets[1..2]), second];
        assert_eq!(found(file).sessions, all.into_iter().collect());
        assert_eq!(found(file).faults, [""; 0]);
    };
    expected(&file);
    assert!(ledgers[0].keeps() && ledgers[1].keeps() && !ledgers[2].keeps());
    assert_eq!(journal.sets(), 2);
    // The same when it is written anew.
    journal.taken_over();
    expected(&file);
    ledgers[1].session_gone();
    ledgers[0].set_gone(2);
    assert_eq!(journal.sets(), 0);
    let none: Vec<_> = found(&file)
        .sessions
        .into_values()
        .map(|s| s.sets)
        .collect();
    assert_eq!(none, [BTreeMap::new()]);
}

#[test]
fn it_stays_short_and_gives_its_memory_back() {
    let (journal, file) = journal();
    let ledger = Ledger::new(&journal, session(1));
    let all = set(1, 1, 1000);
    ledger.set(all.clone());
    for n in 0..200_000u32 {
        ledger.stands(1, stands(if n % 2 == 0 { 2 } else { 1 }));
    }
    let bytes = file.metadata().unwrap().blocks() * 512;
    assert!(bytes < 2 << 20, "{bytes}");
    assert!(anchor(&file).unwrap().0 > 2, "it was written anew");
    let found = found(&file);
    assert_eq!(found.faults, [""; 0]);
    assert_eq!(found.sessions, [kept(&session(1), &[all])].into());
}

#[test]
fn a_torn_end_is_as_if_it_was_not_written() {
    let (journal, file) = journal();
    let ledger = Ledger::new(&journal, session(1));
    let first = set(1, 1, 3);
    ledger.set(first.clone());
    let whole = file.metadata().unwrap().len();
    ledger.set(set(1, 2, 200));
    let all = file.metadata().unwrap().len();
    for torn in (whole..all).step_by(7) {
        file.set_len(torn).unwrap();
        let found = found(&file);
        assert!(!found.has_gaps && found.faults.is_empty(), "{torn}");
        assert_eq!(
            found.sessions,
            [kept(&session(1), std::slice::from_ref(&first))].into()
        );
    }
    // Its end was allocated and not written.
    file.set_len(whole + 20).unwrap();
    file.set_len(all).unwrap();
    assert_eq!(found(&file).sessions.len(), 1);
}

/// A process that is killed while it writes the journal anew leaves what was before.
#[test]
fn a_takeover_that_breaks_off_changes_nothing() {
    let (journal, file) = journal();
    let ledger = Ledger::new(&journal, session(1));
    let sets = [set(1, 1, 30), set(1, 2, 40)];
    sets.iter().for_each(|set| ledger.set(set.clone()));
    drop((ledger, journal));
    let before = [kept(&session(1), &sets)].into();
    for _ in 0..3 {
        let (journal, kept) = Journal::from(file.try_clone().unwrap()).unwrap();
        assert_eq!(kept.sessions, before);
        let ledger = Ledger::new(&Arc::new(journal), session(5));
        ledger.set(set(5, 1, 5));
        assert_eq!(found(&file).sessions, before);
    }
    let (journal, _) = Journal::from(file.try_clone().unwrap()).unwrap();
    let journal = Arc::new(journal);
    let ledger = Ledger::new(&journal, session(5));
    ledger.set(set(5, 1, 5));
    journal.taken_over();
    assert_eq!(
        found(&file).sessions,
        [kept(&session(5), &[set(5, 1, 5)])].into()
    );
    let (_, kept) = Journal::from(file).unwrap();
    assert_eq!(kept.sessions.len(), 1);
}

#[test]
fn damage_in_the_middle_is_told_and_the_rest_is_kept() {
    let (journal, file) = journal();
    let ledger = Ledger::new(&journal, session(1));
    let sets = [set(1, 1, 3), set(1, 2, 4), set(1, 3, 5)];
    ledger.set(sets[0].clone());
    let from = file.metadata().unwrap().len();
    ledger.set(sets[1].clone());
    ledger.set(sets[2].clone());
    file.write_all_at(b"x", from + 20).unwrap();
    let found = found(&file);
    assert!(
        found.has_gaps && found.faults.len() == 1,
        "{:?}",
        found.faults
    );
    let left = [sets[0].clone(), sets[2].clone()];
    assert_eq!(found.sessions, [kept(&session(1), &left)].into());
}

#[test]
fn what_is_no_journal_is_refused() {
    assert!(matches!(Journal::from(file()), Err(BadJournal::Magic)));
    let (journal, file) = journal();
    let zeros = [0; 200];
    file.write_all_at(&zeros, 16).unwrap();
    drop(journal);
    assert!(matches!(Journal::from(file), Err(BadJournal::Anchor)));
}

/// Where nothing can be noted any more, nothing that is out of date is found.
#[test]
fn one_that_cannot_be_written_says_nothing() {
    let (journal, file) = journal();
    let ledger = Ledger::new(&journal, session(1));
    ledger.set(set(1, 1, 3));
    let mut state = journal.state();
    state.check(&journal.file, Err(io::ErrorKind::StorageFull.into()));
    drop(state);
    assert!(!ledger.keeps());
    ledger.set_gone(1);
    assert!(matches!(Journal::from(file), Err(BadJournal::Anchor)));
}

proptest! {
    #[test]
    fn records_are_what_they_were(
        numbers in any::<[u64; 4]>(), small in any::<[u32; 3]>(), text in ".{0,40}",
        state in any::<([u8; 4], [bool; 8])>(), images in 0..20u32, held in any::<bool>(),
    ) {
        let ([phase, dialect, kind, given], flags) = state;
        let state = StateRecord {
            phase, dialect, kind, given,
            gated: flags[0], gated_late: flags[1], followed: flags[2], in_doubt: flags[3],
            source_doubts: flags[4], decided: flags[5], taken: flags[6], lost: flags[7],
        };
        let mut of = set(numbers[0], small[0], images);
        of.snapshot = text.clone();
        of.parent = Some(small[1]).filter(|&n| n != 0);
        (of.bytes, of.digest, of.images, of.state) = (numbers[1], numbers[2], small[2], state);
        of.regions[0].held = held;
        for record in [
            Record::Session(SessionRecord {
                number: numbers[0], name: text.clone(), key: numbers[1], proxy: numbers[2],
                opening: numbers[3], peer: text, began: numbers[0],
            }),
            Record::Set(of),
            Record::State { session: numbers[0], number: small[0], state },
            Record::SetGone { session: numbers[0], number: small[0] },
            Record::SessionGone { session: numbers[0] },
            Record::Restored { session: numbers[0] },
        ] {
            let bytes = record.encode();
            prop_assert_eq!(Record::decode(&bytes), Ok(record));
            for cut in 0..bytes.len() {
                prop_assert!(Record::decode(&bytes[..cut]).is_err());
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 1..7u8) {
        let _ = Record::decode(&bytes);
        let mut record = vec![kind];
        record.extend(&bytes);
        let _ = Record::decode(&record);
    }

    /// Whatever is changed in a journal, it is read to its end, or refused.
    #[test]
    fn no_damage_panics(changes in proptest::collection::vec((0..9000u64, any::<u8>()), 1..20)) {
        let (journal, file) = journal();
        let ledger = Ledger::new(&journal, session(1));
        ledger.set(set(1, 1, 50));
        ledger.stands(1, stands(2));
        ledger.set(set(1, 2, 50));
        for (at, byte) in changes {
            file.write_all_at(&[byte], at).unwrap();
        }
        if let Ok((journal, kept)) = Journal::from(file) {
            prop_assert!(kept.sessions.len() <= 1 && kept.faults.len() < 20);
            journal.taken_over();
        }
    }
}
