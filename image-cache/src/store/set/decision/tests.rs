use std::sync::Arc;

use image_common::criu::dialect::Dialect;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::SetNumber;

use super::*;
use crate::store::changes::Changes;
use crate::store::memory::budget::Budget;
use crate::store::session::Session;
use crate::store::set::trial::AtHold;
use crate::store::set::RestoreId;
use crate::store::{Policy, Store};

/// Entries of an inventory that say what it is (`criu/inventory.rs`): magic, size, and an image version.
pub const INVENTORY: &[u8] = &[
    0x16, 0x31, 0x31, 0x58, 0x04, 0, 0, 0, 0x08, 0x02, 0x10, 0x01,
];

const STATES: [&str; 16] = [
    "receiving, script",
    "receiving",
    "complete, script",
    "complete, remote",
    "pre-dump",
    "prepared",
    "in doubt by the source",
    "in doubt by silence",
    "in doubt by the link",
    "in trial",
    "holding",
    "in doubt, holding",
    "after its hold",
    "committed",
    "released",
    "given up",
];

fn budget() -> Arc<Budget> {
    Budget::with(1 << 24, false)
}

fn changes() -> Arc<Changes> {
    Store::new(1 << 24, Policy::default()).changes.clone()
}

fn put(set: &Set, name: &str, bytes: &[u8]) {
    let name = ImageName::new(name).unwrap();
    let mut writer = set.open_image(&name, None, false, &budget()).unwrap();
    writer.put(bytes).unwrap();
    set.finish_image(writer, bytes.len() as u64).unwrap();
}

/// Whether a set in this state has a script, and how it came.
fn shape(state: &str) -> (bool, Dialect) {
    let gated = !matches!(state, "receiving" | "complete, remote" | "pre-dump");
    let dialect = match state {
        "complete, remote" | "pre-dump" => Dialect::RemotePipe,
        _ => Dialect::Stream,
    };
    (gated, dialect)
}

fn in_state(state: &str) -> Set {
    let (gated, dialect) = shape(state);
    let snapshot = SnapshotId::new("/d").unwrap();
    let set = Set::new(
        SetNumber(1),
        snapshot,
        None,
        gated,
        dialect,
        changes(),
        &budget(),
    )
    .unwrap();
    advance(&set, state);
    set
}

/// Brings a new set there.
pub fn advance(set: &Set, state: &str) {
    put(set, "inventory.img", INVENTORY);
    let whole = || {
        let (images, bytes) = set.received();
        set.complete(images, bytes).unwrap();
        (images, bytes)
    };
    let prepared = || {
        let (images, bytes) = whole();
        set.prepare(images, bytes).unwrap();
    };
    match state {
        "receiving, script" | "receiving" => {}
        "complete, script" | "complete, remote" => drop(whole()),
        "pre-dump" => {
            whole();
            set.state().kind = Some(SetKind::PreDump);
        }
        "prepared" => prepared(),
        "in doubt by the source" => {
            whole();
            assert_eq!(set.doubt().unwrap(), Doubted::InDoubt);
        }
        "in doubt by silence" => {
            prepared();
            assert!(set.doubt_silence() && !set.doubt_silence());
        }
        "in doubt by the link" => {
            prepared();
            set.link_lost("gone");
        }
        "in trial" | "holding" | "in doubt, holding" | "after its hold" => {
            let (images, bytes) = whole();
            set.begin_trial(images, bytes).unwrap();
            let restore = RestoreId(1);
            assert!(set.give(restore));
            if state != "in trial" {
                assert_eq!(set.at_hold(restore), AtHold::Hold);
                set.holds(restore);
            }
            match state {
                "in doubt, holding" => drop(set.link_lost("gone")),
                "after its hold" => assert!(set.trial_over(Some(restore), "killed")),
                _ => {}
            }
        }
        "committed" => {
            prepared();
            assert_eq!(set.commit().unwrap(), Committed::Committed);
        }
        "released" => {
            prepared();
            set.release(true).unwrap();
        }
        "given up" => set.abort("no more").unwrap(),
        other => panic!("{other}"),
    }
}

fn done(outcome: Result<(), impl std::fmt::Debug>) -> String {
    outcome.map_or_else(|why| format!("{why:?}"), |()| "done".to_owned())
}

/// Case adv11: in every state there is a command that works, and none that hits what the source may still decide unless
/// the operator says what they have seen.
#[test]
fn every_state_has_a_command() {
    let mut table = String::new();
    for state in STATES {
        let mut row = Vec::new();
        for word in [false, true] {
            row.push(done(in_state(state).release(word)));
            row.push(done(in_state(state).drop_decided(word, "dropped")));
        }
        assert!(row.iter().any(|cell| cell == "done"), "{state}: no command");
        table += &format!("{state}: {}\n", row.join(" "));
    }
    // release, drop, release --process-is-dead, drop --process-lives
    let expected = "\
receiving, script: NotWhole done NotWhole done
receiving: NotWhole NoScript NotWhole done
complete, script: NotWhole done NotWhole done
complete, remote: NotWhole NoScript NotWhole done
pre-dump: PreDump done PreDump done
prepared: SourceMaySay MayBeKilled done done
in doubt by the source: done done done done
in doubt by silence: done done done done
in doubt by the link: done done done done
in trial: InTrial done InTrial done
holding: SourceMaySay MayBeKilled done done
in doubt, holding: done done done done
after its hold: SourceMaySay MayBeKilled done done
committed: Restorable done Restorable done
released: Restorable done Restorable done
given up: GivenUp done GivenUp done
";
    assert_eq!(table, expected);
}

/// The source's word after the operator's: it ends a doubt, agrees with a release, and says what a wrong drop has done.
#[test]
fn what_the_source_says_after_a_decision() {
    for (state, decision, confirmed, doubted) in [
        ("prepared", "none", "Committed", "InDoubt"),
        ("in doubt by silence", "none", "DoubtEnded", "InDoubt"),
        ("in doubt by the source", "none", "DoubtEnded", "InDoubt"),
        ("holding", "none", "Committed", "InDoubt"),
        ("in doubt, holding", "none", "DoubtEnded", "InDoubt"),
        ("after its hold", "none", "Committed", "InDoubt"),
        ("holding", "release", "AlreadyReleased", "Decided"),
        ("holding", "drop", "GivenUp(\"dropped\")", "Decided"),
        (
            "in doubt, holding",
            "drop",
            "GivenUp(\"dropped\")",
            "Decided",
        ),
        ("prepared", "release", "AlreadyReleased", "Decided"),
        (
            "in doubt by silence",
            "release",
            "AlreadyReleased",
            "Decided",
        ),
        ("prepared", "drop", "GivenUp(\"dropped\")", "Decided"),
        (
            "in doubt by silence",
            "drop",
            "GivenUp(\"dropped\")",
            "Decided",
        ),
    ] {
        let decided = || {
            let set = in_state(state);
            match decision {
                "release" => set.release(true).unwrap(),
                "drop" => set.drop_decided(true, "dropped").unwrap(),
                _ => {}
            }
            assert_eq!(set.is_decided(), decision != "none");
            set
        };
        let set = decided();
        let said = format!("{:?}", set.commit().unwrap());
        assert_eq!(said, confirmed, "{state}, {decision}");
        assert!(!set.is_in_doubt() && !set.is_decided());
        assert_eq!(
            set.is_final_dump(),
            decision != "drop",
            "{state}, {decision}"
        );
        let set = decided();
        let said = format!("{:?}", set.doubt().unwrap());
        assert_eq!(said, doubted, "{state}, {decision}");
        assert_eq!(set.is_in_doubt(), decision == "none", "{state}, {decision}");
    }
    // The source confirms once: a second time is against the protocol.
    let set = in_state("released");
    set.commit().unwrap();
    assert!(set.commit().is_err());
}

/// A set in doubt is not served, and one whose doubt has ended is.
#[test]
fn a_confirmation_ends_the_doubt() {
    let set = in_state("in doubt by silence");
    let inventory = ImageName::new("inventory.img").unwrap();
    use crate::store::set::Lookup;
    assert!(matches!(set.lookup(&inventory, None), Lookup::Gone(_)));
    set.commit().unwrap();
    assert!(matches!(set.lookup(&inventory, None), Lookup::Ready(_)));
}

/// For the tests of `decide`: a set of a session, brought to a state.
pub fn open(session: &Session, number: u32, state: &str) -> Arc<Set> {
    let (gated, dialect) = shape(state);
    let snapshot = SnapshotId::new("/d").unwrap();
    let set = session.open_set(SetNumber(number), snapshot, None, gated, dialect);
    let set = set.unwrap();
    advance(&set, state);
    set
}
