//! The commit with a trial as a model (docs/commit.md, "restored"): a restore stands on the target and holds, and only then the
//! source kills. Everything that can happen to it: each daemon, script and CRIU dies at each point, a daemon is stopped, the
//! link is cut and does not come back, a message comes twice, a restore fails before and behind the hold, image-cache is
//! started again with and without `--keep-through-restart`, a second restore comes. All states are visited, up to three faults.
//!
//! What tells the source that its CRIU has killed is the matter of `commit_model.rs`: here it is one flag. A link that is resumed
//! is one that is slow. What is slow or stopped, of a script or a CRIU, is one whose next step comes late.
//!
//! Each [`Rules`] field that is not as in [`RULES`] is a design that fails; the tests at the end show how.

mod decisions;
mod faults;
mod source;
mod state;
mod target;
mod wrong;

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};

use crate::state::{Rules, State, Step, FIRST, KEEPER, RULES};
use crate::wrong::{EARLY, FORGOTTEN, LOST, TWO};

/// All that can happen next, by name. A name that begins with FAULT is one; what begins with TIME is a time limit.
fn steps(state: &State, rules: Rules, all: &mut Vec<Step>) {
    all.clear();
    state.source(all);
    state.link(rules, all);
    state.cache(rules, all);
    state.restore(rules, all);
    state.late_decision(rules, all);
    state.operator(all);
    if state.faults < rules.faults {
        state.faults(rules, all);
    }
}

/// Quick also in a debug build.
#[derive(Default)]
struct Fast(u64);

impl Hasher for Fast {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(value.into());
    }

    fn write_isize(&mut self, value: isize) {
        self.write_u64(value as u64);
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    fn finish(&self) -> u64 {
        self.0.rotate_left(26)
    }
}

/// What was visited, the near states first.
struct Visited {
    states: Vec<(State, usize, &'static str)>,
    /// What is wrong with the last of them.
    wrong: Option<&'static str>,
}

impl Visited {
    /// The steps to the last state.
    fn way(&self) -> Vec<&'static str> {
        let (mut at, mut way) = (self.states.len() - 1, Vec::new());
        while at != 0 {
            let (_, before, name) = self.states[at];
            way.push(name);
            at = before;
        }
        way.reverse();
        way
    }

    /// All names of steps that lead to a new state.
    fn names(&self) -> HashSet<&'static str> {
        self.states.iter().map(|(_, _, name)| *name).collect()
    }
}

/// Visits all states, or those up to the first that is wrong in the way that is looked for.
fn explore(rules: Rules, looked_for: fn(&str) -> bool) -> Visited {
    let mut known: HashMap<State, (), BuildHasherDefault<Fast>> = HashMap::default();
    let mut states = vec![(FIRST, 0, "")];
    known.insert(FIRST, ());
    let (mut at, mut next) = (0, Vec::new());
    while let Some(&(state, ..)) = states.get(at) {
        steps(&state, rules, &mut next);
        let waits = |(name, _): &Step| name.starts_with("FAULT") || name.starts_with("TIME");
        let end = next.iter().all(waits);
        let wrong_end = || end.then(|| state.wrong_end(rules)).flatten();
        let wrong = state.wrong(rules).or_else(wrong_end);
        if wrong.is_some_and(looked_for) {
            states.truncate(at + 1);
            return Visited { states, wrong };
        }
        for &(name, next) in &next {
            let new = || states.push((next, at, name));
            known.entry(next).or_insert_with(new);
        }
        at += 1;
    }
    Visited {
        states,
        wrong: None,
    }
}

fn nothing_is_wrong(rules: Rules) -> Visited {
    let visited = explore(rules, |_| true);
    if let Some(what) = visited.wrong {
        panic!("{what}: {:#?} {:#?}", visited.way(), visited.states.last());
    }
    eprintln!("{} states", visited.states.len());
    assert!(visited.states.len() > 100_000, "the model does not move");
    visited
}

#[test]
fn never_lost_never_twice() {
    let names = nothing_is_wrong(RULES).names();
    assert!(names.len() > 60, "{} steps: {names:#?}", names.len());
}

/// With `--keep-through-restart` only the loss of a host loses the process.
#[test]
fn a_keeper_loses_nothing() {
    nothing_is_wrong(KEEPER);
}

/// The shortest way to what goes wrong with other rules, by name of its steps.
fn found(rules: Rules, looked_for: fn(&str) -> bool) -> Vec<&'static str> {
    let visited = explore(rules, looked_for);
    let what = visited.wrong.expect("a design that fails");
    let way = visited.way();
    eprintln!("{what}: {way:#?}");
    way
}

fn doubled(what: &str) -> bool {
    what == TWO
}

fn early(what: &str) -> bool {
    what == EARLY
}

fn lost(what: &str) -> bool {
    what == LOST
}

/// At `pre-resume` CRIU ignores the script, and its death lets the tasks run.
#[test]
fn held_at_pre_resume_it_runs_too_early() {
    let rules = Rules {
        at_post_restore: false,
        faults: 1,
        ..KEEPER
    };
    let way = found(rules, early);
    assert!(way.contains(&"FAULT the restore is killed, the tasks run"));
    // Without a fault, an abort is enough.
    let way = found(Rules { faults: 0, ..rules }, early);
    assert!(way.contains(&"CRIU goes on all the same"));
}

/// A restore without the script, or with one that cannot hold.
#[test]
fn tried_without_a_promise_it_runs_too_early() {
    let rules = Rules {
        holds_promised: false,
        faults: 0,
        ..KEEPER
    };
    let way = found(rules, early);
    assert!(way.contains(&"no script holds"));
}

/// TRIAL says that the cache lives. It is no promise.
#[test]
fn killed_before_it_stands_restored_it_is_lost() {
    let rules = Rules {
        waits_for_holding: false,
        faults: 1,
        ..KEEPER
    };
    found(rules, lost);
}

/// The script has to know to whom it listens before the source kills.
#[test]
fn said_before_the_script_is_told_it_is_lost() {
    let rules = Rules {
        told_before_holding: false,
        faults: 1,
        ..RULES
    };
    let way = found(rules, lost);
    assert_eq!(way.last(), Some(&"FAULT the cache dies"));
}

/// A restarted cache has the set, and does not know that a restore of it runs already.
#[test]
fn a_restart_that_forgets_the_restore_doubles() {
    let rules = Rules {
        journals_given: false,
        faults: 1,
        ..KEEPER
    };
    let way = found(rules, doubled);
    assert_eq!(way.last(), Some(&"a second restore runs"));
}

/// A script that is named twice runs twice, and then finds nothing to ask. For the rest an operator would be enough.
#[test]
fn without_word_of_the_first_script_a_second_one_loses_it() {
    let rules = Rules {
        leaves_word: false,
        faults: 1,
        ..RULES
    };
    let way = found(rules, lost);
    assert!(way.contains(&"CRIU runs the script again"));
    let keeper = Rules {
        leaves_word: false,
        faults: 2,
        ..KEEPER
    };
    assert_eq!(explore(keeper, |_| true).wrong, None);
}

/// GOODBYE, and then the death of the cache: no side is left that would tell the script.
#[test]
fn confirmed_at_once_a_decision_is_lost() {
    let rules = Rules {
        confirms_late: false,
        faults: 1,
        ..RULES
    };
    found(rules, |what| what == FORGOTTEN);
}

/// A connection that ends is not the end of the script.
#[test]
fn a_hold_is_not_over_with_its_connection() {
    let rules = Rules {
        sees_the_end: false,
        ..RULES
    };
    found(rules, doubled);
}
