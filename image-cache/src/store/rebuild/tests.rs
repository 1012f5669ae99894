//! A store that is made again is what it was before its process was killed.

use std::fs::File;
use std::sync::Arc;

use image_common::criu::dialect::Dialect;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::SetNumber;
use proptest::prelude::*;

use crate::store::journal::{Journal, Kept};
use crate::store::memory::arena::{again, Arena, Source};
use crate::store::memory::host::Gauge;
use crate::store::session::{Opener, Session};
use crate::store::set::given::RestoreId;
use crate::store::set::{Lookup, Set};
use crate::store::{Policy, Scope, Store};

const MIB: usize = 1 << 20;

/// A store, and what outlives it.
struct Cache {
    store: Arc<Store>,
    arena: Arc<Arena>,
    journal: Arc<Journal>,
}

impl Cache {
    fn new(policy: Policy) -> Self {
        let arena = Arena::new(Arena::memfd().unwrap()).unwrap();
        let journal = Journal::new(Arena::memfd().unwrap()).unwrap();
        Self::of(policy, arena, journal)
    }

    fn of(policy: Policy, arena: Arc<Arena>, journal: Journal) -> Self {
        let memory = Source::Arena(arena.clone());
        let gauge = Gauge::below("/none");
        let store = Store::gauged(1 << 40, gauge, memory, policy);
        let journal = Arc::new(journal);
        store.keep_in(&journal);
        Self {
            store,
            arena,
            journal,
        }
    }

    /// As the process leaves it that is killed now: nothing of it goes back.
    fn killed(self) -> (File, File) {
        let journal = self.journal.descriptor().try_clone_to_owned().unwrap();
        let left = (again(&self.arena), journal.into());
        std::mem::forget(self);
        left
    }

    fn restarted(self, policy: Policy) -> Self {
        let (arena, journal) = self.killed();
        let (next, kept) = Self::takes_over(policy, arena, journal);
        next.store.rebuild(kept, &next.arena);
        next
    }

    fn takes_over(policy: Policy, arena: File, journal: File) -> (Self, Kept) {
        let (journal, kept) = Journal::from(journal).unwrap();
        let end = Arena::end_of_data(&arena).unwrap();
        let arena = Arena::from(arena, end).unwrap();
        (Self::of(policy, arena, journal), kept)
    }

    fn open(&self, name: &str) -> Arc<Session> {
        let opener = Opener {
            proxy: 9,
            opening: 3,
        };
        let opened = self
            .store
            .open_session(name.parse().unwrap(), opener, "10.0.0.1:5".into());
        opened.unwrap()
    }

    fn sessions(&self) -> Vec<Arc<Session>> {
        self.store.newest(&Scope::Any)
    }
}

fn open_set(session: &Session, number: u32, parent: Option<u32>, gated: bool) -> Arc<Set> {
    let snapshot = SnapshotId::new(&format!("dump-{number}")).unwrap();
    let (number, parent) = (SetNumber(number), parent.map(SetNumber));
    let opened = session.open_set(number, snapshot, parent, gated, Dialect::Stream);
    opened.unwrap()
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    let step = usize::from(seed) + 1;
    (0..len)
        .map(|i| {
            let i = i as u64;
            let [low, high, ..] = (i * step as u64).to_le_bytes();
            low ^ high.rotate_left(3) ^ seed
        })
        .collect()
}

fn put(session: &Session, set: &Set, name: &str, content: &[u8]) {
    let name = ImageName::new(name).unwrap();
    let mut writer = set.open_image(&name, None, false, &session.budget).unwrap();
    for part in content.chunks(300_000) {
        writer.put(part).unwrap();
    }
    set.digests
        .add(&name, content.len() as u64, crc32c::crc32c(content));
    set.finish_image(writer, content.len() as u64).unwrap();
}

/// Images of every size, the inventory last.
fn fill(session: &Session, set: &Set, seed: u8) -> Vec<(String, Vec<u8>)> {
    let mut all = vec![
        ("pages-1.img".to_owned(), bytes(seed, 5 * MIB + 123)),
        ("pages-2.img".to_owned(), bytes(seed ^ 1, 70_000)),
        ("empty.img".to_owned(), Vec::new()),
    ];
    all.extend((0..100).map(|n| (format!("core-{n}.img"), bytes(n ^ seed, 1000))));
    all.push(("inventory.img".to_owned(), b"no known CRIU".to_vec()));
    for (name, content) in &all {
        put(session, set, name, content);
    }
    all
}

fn complete(set: &Set) -> (u32, u64) {
    let (images, bytes) = set.received();
    set.complete(images, bytes).unwrap();
    (images, bytes)
}

fn prepare(set: &Set) {
    let (images, bytes) = complete(set);
    set.prepare(images, bytes).unwrap();
}

fn content(set: &Set, name: &str) -> Vec<u8> {
    set.image(name).unwrap().head(usize::MAX)
}

/// All that an operator sees, but for the age.
fn seen(session: &Session) -> String {
    let mut status = session.status();
    assert!(status.age_seconds < 60.0);
    status.age_seconds = 0.0;
    format!("{status:?}")
}

#[test]
fn a_committed_set_is_what_it_was() {
    let cache = Cache::new(Policy::default());
    let session = cache.open("web");
    let set = open_set(&session, 1, None, true);
    let images = fill(&session, &set, 3);
    prepare(&set);
    set.commit().unwrap();
    cache
        .store
        .disconnect(&session, "the source ended the session");
    let (before, key, used) = (seen(&session), session.key, cache.store.budget.used());
    assert!(set.is_kept_through_restart());

    let cache = cache.restarted(Policy::default());
    let [session] = &cache.sessions()[..] else {
        panic!("not one session")
    };
    assert_eq!(seen(session), before);
    assert!(session.key == key && session.is_of_proxy(9));
    let opener = session.opener();
    assert!(session.overtook(opener), "its own number is known");
    let set = session.set(SetNumber(1)).unwrap();
    assert!(set.is_restorable() && set.is_kept_through_restart());
    for (name, expected) in &images {
        assert!(content(&set, name) == *expected, "{name}");
    }
    let name = ImageName::new("none.img").unwrap();
    assert!(matches!(set.lookup(&name, None), Lookup::Missing));
    // The limit counts it as before, but for a few lists.
    let again = cache.store.budget.used();
    assert!(again.abs_diff(used) < 64 << 10, "{used} {again}");
    let resident = cache.arena.resident();
    assert!(resident < 6 * MIB as u64 + (1 << 20), "{resident}");
    cache.store.restored(session);
    assert_eq!(cache.journal.sets(), 0);
}

#[test]
fn all_memory_goes_back_when_it_was_restored() {
    let cache = Cache::new(Policy::default());
    let session = cache.open("web");
    let set = open_set(&session, 1, None, true);
    fill(&session, &set, 3);
    prepare(&set);
    set.commit().unwrap();
    drop((set, session));
    let cache = cache.restarted(Policy::default());
    let session = cache.sessions().remove(0);
    cache.store.restored(&session);
    drop(session);
    assert_eq!((cache.store.budget.used(), cache.arena.resident()), (0, 0));
}

/// Its script may have been told to go on while no image-cache ran: an operator who looks at the source alone would have two.
#[test]
fn a_set_that_a_restore_held_is_released_by_a_look_at_both_hosts() {
    let cache = Cache::new(Policy::default());
    let session = cache.open("web");
    let set = open_set(&session, 1, None, true);
    fill(&session, &set, 3);
    let (images, bytes) = complete(&set);
    set.begin_trial(images, bytes).unwrap();
    assert!(set.give(RestoreId(1)));
    set.holds(RestoreId(1));
    drop((set, session));
    let cache = cache.restarted(Policy::default());
    let session = cache.sessions().remove(0);
    let set = session.set(SetNumber(1)).unwrap();
    assert!(set.is_in_doubt() && !set.give(RestoreId(2)));
    let advice = session.advice();
    assert!(advice.contains("no restore of it runs here"), "{advice}");
    set.release(false).unwrap();
    assert!(set.give(RestoreId(2)));
}

/// What each set is after the restart of the cache that has its link.
#[test]
fn what_was_not_committed_is_in_doubt_or_gone() {
    let cache = Cache::new(Policy::default());
    for name in [
        "receiving",
        "complete",
        "prepared",
        "doubted",
        "ungated",
        "dropped",
    ] {
        let session = cache.open(name);
        let set = open_set(&session, 1, None, name != "ungated");
        fill(&session, &set, 1);
        match name {
            "receiving" => {}
            "complete" | "ungated" => drop(complete(&set)),
            "doubted" => {
                prepare(&set);
                set.doubt().unwrap();
            }
            "dropped" => {
                prepare(&set);
                set.drop_decided(true, "an operator dropped it").unwrap();
            }
            _ => prepare(&set),
        }
    }
    let cache = cache.restarted(Policy::default());
    let stands: Vec<_> = cache
        .sessions()
        .iter()
        .map(|s| (s.name.to_string(), s.stands().as_str()))
        .collect();
    let expected = [
        // CRIU kills without asking, and the inventory was whole.
        ("ungated", "to be restored"),
        ("doubted", "in doubt"),
        ("prepared", "in doubt"),
    ];
    let stands: Vec<_> = stands.iter().map(|(n, s)| (n.as_str(), *s)).collect();
    assert_eq!(stands, expected);
    // Each keeps about 5 MiB and a segment of small images.
    let resident = cache.arena.resident();
    assert!(resident < 3 * 7 * MIB as u64, "{resident}");
    // What an operator says holds.
    let prepared = cache.sessions()[2].set(SetNumber(1)).unwrap();
    prepared.release(false).unwrap();
    let cache = cache.restarted(Policy::default());
    let set = cache.sessions()[2].set(SetNumber(1)).unwrap();
    assert!(set.is_restorable() && set.is_decided());
}

#[test]
fn parents_come_with_their_dump() {
    let cache = Cache::new(Policy::default());
    let session = cache.open("web");
    for (number, seed) in (1..=3u32).zip(1u8..) {
        let parent = (number > 1).then(|| number - 1);
        let set = open_set(&session, number, parent, true);
        set.set_dialect(Dialect::RemotePipe);
        put(&session, &set, "pages-1.img", &bytes(seed, 100_000));
        put(&session, &set, "inventory.img", b"no known CRIU");
        match number {
            3 => prepare(&set),
            _ => drop(complete(&set)),
        }
    }
    session.set(SetNumber(3)).unwrap().commit().unwrap();
    // One that no dump needs.
    let other = cache.open("other");
    let set = open_set(&other, 1, None, true);
    fill(&other, &set, 1);
    complete(&set);
    let cache = cache.restarted(Policy::default());
    let [session] = &cache.sessions()[..] else {
        panic!("not one session")
    };
    let dump = session.set(SetNumber(3)).unwrap();
    let parents = session.parents(&dump);
    assert_eq!(parents.len(), 2);
    for (set, seed) in parents.iter().zip([2, 1]) {
        assert!(content(set, "pages-1.img") == bytes(seed, 100_000));
    }
}

/// The restore read from a process that is gone, and may have had everything.
#[test]
fn what_a_restore_had_is_in_doubt() {
    let cache = Cache::new(Policy::default());
    let mut named = Vec::new();
    for name in ["given", "kept", "taken"] {
        let session = cache.open(name);
        let set = open_set(&session, 1, None, true);
        fill(&session, &set, 1);
        prepare(&set);
        set.commit().unwrap();
        let id = RestoreId(5);
        if name != "kept" {
            assert!(set.give(id));
        }
        if name == "taken" {
            let pages = set.image("pages-1.img").unwrap();
            assert!(set.to_be_taken(&pages, id).unwrap().take());
        }
        named.push(session);
    }
    drop(named);
    let cache = cache.restarted(Policy::default());
    let stands = |at: usize| cache.sessions()[at].sets()[0].stands().as_str();
    assert_eq!(stands(2), "in doubt: a restore of it may run here");
    assert_eq!(stands(1), "ready to be restored");
    assert_eq!(stands(0), "lost with the restore that took its memory");
    let given = cache.sessions()[2].set(SetNumber(1)).unwrap();
    given.release(false).unwrap();
    assert!(given.is_restorable());
}

#[test]
fn what_is_restored_and_kept_stays_that() {
    let policy = Policy {
        keep: true,
        ..Policy::default()
    };
    let cache = Cache::new(policy);
    let session = cache.open("web");
    let set = open_set(&session, 1, None, true);
    fill(&session, &set, 1);
    prepare(&set);
    set.commit().unwrap();
    cache
        .store
        .disconnect(&session, "the source ended the session");
    cache.store.restored(&session);
    let cache = cache.restarted(policy).restarted(policy);
    assert_eq!(cache.sessions()[0].stands().as_str(), "restored, kept");
}

/// A set of page rounds: its pages lie scattered over segments, between others that are gone.
#[test]
fn pages_of_rounds_come_with_their_set() {
    use image_common::criu::page_server::{Entry, PagemapId};
    for lend in [false, true] {
        let policy = Policy {
            release_on_read: lend,
            ..Policy::default()
        };
        let cache = Cache::new(policy);
        let session = cache.open("web");
        let id = PagemapId::Task(4);
        let all = bytes(9, 6 * MIB);
        for round in 0..3u64 {
            let mut pages = session.begin_round(4096, &session.budget);
            pages.open(id).unwrap();
            // All pages, then each third one anew.
            let step = if round == 0 { 1 } else { 3 };
            let mut from = 0;
            let mut entries = Vec::new();
            for page in 0..all.len() as u64 / 4096 {
                let present = page % step == 0;
                entries.push((page * 4096, present));
            }
            for (vaddr, present) in entries {
                let entry = Entry {
                    vaddr,
                    pages: 1,
                    flags: if present { 4 } else { 1 },
                };
                pages.add(id, entry).unwrap();
                if present {
                    let at = usize::try_from(vaddr).unwrap();
                    pages.put(id, &all[at..at + 4096]).unwrap();
                    from += 1;
                }
            }
            assert!(from > 0);
            drop(session.merge_round(pages, &session.budget).unwrap());
        }
        let set = open_set(&session, 1, None, true);
        set.has_round();
        session.flatten_pages(&set, &session.budget, lend).unwrap();
        put(&session, &set, "inventory.img", b"no known CRIU");
        prepare(&set);
        set.commit().unwrap();
        let cache = cache.restarted(policy);
        let set = cache.sessions()[0].set(SetNumber(1)).unwrap();
        assert!(content(&set, "pages-65537.img") == all);
        let resident = cache.arena.resident();
        assert!(resident < 10 * MIB as u64, "{resident}");
    }
}

/// A journal that names memory which is not there, or another set's.
#[test]
fn what_cannot_be_is_refused_and_the_rest_is_kept() {
    let cache = Cache::new(Policy::default());
    for name in ["one", "two", "three"] {
        let session = cache.open(name);
        let set = open_set(&session, 1, None, true);
        fill(&session, &set, 1);
        prepare(&set);
        set.commit().unwrap();
    }
    let (arena, journal) = cache.killed();
    let (cache, mut kept) = Cache::takes_over(Policy::default(), arena, journal);
    let mut sessions = kept.sessions.values_mut();
    let (first, second) = (sessions.next().unwrap(), sessions.next().unwrap());
    let (first, second) = (&mut first.sets, &mut second.sets);
    let of_first = &first.get(&1).unwrap().regions;
    let (overlaps, offset) = (of_first.clone(), of_first[0].extent.offset);
    let second = second.get_mut(&1).unwrap();
    second.regions = overlaps;
    second.regions[0].extent.offset = offset + 4096;
    cache.store.rebuild(kept, &cache.arena);
    let names: Vec<_> = cache
        .sessions()
        .iter()
        .map(|s| s.name.to_string())
        .collect();
    assert_eq!(names, ["three", "one"]);

    // A hole where bytes were.
    let set = cache.sessions()[1].set(SetNumber(1)).unwrap();
    let place = set.image("pages-1.img").unwrap().places().unwrap()[0];
    cache.arena.punch(place.region.offset, 4096);
    drop(set);
    let cache = cache.restarted(Policy::default());
    let names: Vec<_> = cache
        .sessions()
        .iter()
        .map(|s| s.name.to_string())
        .collect();
    assert_eq!(names, ["three"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the records say, nothing panics, and what is made can be read.
    #[test]
    fn no_record_panics(changes in proptest::collection::vec((0..6u8, any::<u64>(), any::<u8>()), 1..8)) {
        let cache = Cache::new(Policy::default());
        let session = cache.open("web");
        let set = open_set(&session, 1, None, true);
        put(&session, &set, "pages-1.img", &bytes(1, 100_000));
        put(&session, &set, "inventory.img", b"no known CRIU");
        prepare(&set);
        set.commit().unwrap();
        drop((set, session));
        let (arena, journal) = cache.killed();
        let (cache, mut kept) = Cache::takes_over(Policy::default(), arena, journal);
        let record = kept.sessions.values_mut().next().unwrap().sets.get_mut(&1).unwrap();
        for (what, number, byte) in changes {
            let file = &mut record.files[usize::from(byte) % 2];
            let region = usize::from(byte) % record.regions.len();
            match what {
                0 => record.regions[region].extent.offset = number,
                1 => record.regions[region].extent.len = number >> 1,
                2 => file.pieces[0].start = number,
                3 => file.pieces[0].len = number,
                4 => file.pieces[0].region = u32::from(byte),
                _ => record.state.phase = byte % 8,
            }
        }
        for session in cache.store.rebuild(kept, &cache.arena) {
            for set in session.sets() {
                let _ = (set.status(), content(&set, "inventory.img").len());
            }
        }
    }
}
