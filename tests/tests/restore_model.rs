//! The verdict on a restore as a model (docs/architecture.md, "Did the restore succeed?"): two restores of one set that is
//! not kept, and everything that can happen to each: CRIU fails at each step, is killed at each step, its tasks are killed
//! or left; image-cache looks late, and sees all, no exit status, or nothing of it at all (another pid namespace); with and
//! without the script. With the script a restore may also come before the source has killed: it holds at `post-restore` until
//! that is known. All states are visited.
//!
//! It models what CRIU does (`restore_root_task` in `cr-restore.c`) and what image-cache concludes
//! (`image-cache/src/frontend/verdict.rs`), not their code; the code is driven through the same situations by `restores.rs`
//! and, with real CRIU, by `real_criu/restores.rs`.

use std::collections::{HashSet, VecDeque};

/// How far CRIU has come. It is killed, or fails, between any two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Step {
    /// Waits for the inventory.
    Asks,
    /// Has read what the tree is, and has run `pre-restore`.
    Begun,
    /// Its tasks are there, and wait in CRIU's code.
    Built,
    /// At `post-restore`: the script has asked, and has no answer.
    Holds,
    /// Has run `post-restore`.
    PostRestore,
    /// The tasks stand at their last system call: if CRIU dies, they run.
    Caught,
    /// Has run `pre-resume`.
    PreResume,
    /// Is detached from the first task, and not from all.
    Detaches,
    /// The tasks run.
    Detached,
    /// Has closed its connection.
    Closed,
    /// Has run `post-resume`.
    PostResume,
}

use Step::{
    Asks, Begun, Built, Caught, Closed, Detached, Detaches, Holds, PostRestore, PostResume,
    PreResume,
};

const STEPS: [Step; 11] = [
    Asks,
    Begun,
    Built,
    Holds,
    PostRestore,
    Caught,
    PreResume,
    Detaches,
    Detached,
    Closed,
    PostResume,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Criu {
    At(Step),
    /// By itself: 0 if it came to its end. What it says last.
    Exited {
        success: bool,
        said: Step,
    },
    Killed {
        said: Step,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Tasks {
    None,
    /// In CRIU's code.
    Wait,
    Run,
    /// They never ran.
    Dead,
    /// They ran, and have ended since.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Verdict {
    Open,
    Restored,
    Failed,
    Doubt,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Restore {
    criu: Criu,
    tasks: Tasks,
    verdict: Verdict,
}

/// What image-cache can see of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Sees {
    script: bool,
    /// CRIU and its tasks are in a pid namespace that it sees into.
    pids: bool,
    status: bool,
}

/// What has become of the process on the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    /// Frozen, and the set in trial.
    Waits,
    Killed,
    /// It goes on there, and the set is given up.
    GoesOn,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    source: Source,
    restores: [Restore; 2],
    /// Which one has the set.
    given: Option<usize>,
    released: bool,
}

fn step_after(step: Step) -> Option<Step> {
    let at = STEPS.iter().position(|s| *s == step)?;
    STEPS.get(at + 1).copied()
}

fn tasks_at(step: Step) -> Tasks {
    match step {
        Asks | Begun => Tasks::None,
        Built | Holds | PostRestore | Caught | PreResume => Tasks::Wait,
        Detaches | Detached | Closed | PostResume => Tasks::Run,
    }
}

/// What a restore and its surroundings do next.
fn moves(restore: Restore, may_begin: bool, source: Source) -> Vec<Restore> {
    let mut next = Vec::new();
    let with = |criu, tasks| Restore {
        criu,
        tasks,
        ..restore
    };
    if let Criu::At(step) = restore.criu {
        match step_after(step) {
            // The script has its answer when the source has killed; if that does not, it fails, as below.
            Some(PostRestore) if source != Source::Killed => {}
            Some(after) if after != Begun || may_begin => {
                // Tasks that run may end at any moment.
                let tasks = match restore.tasks {
                    Tasks::Ended => Tasks::Ended,
                    _ => tasks_at(after),
                };
                next.push(with(Criu::At(after), tasks));
            }
            Some(_) => {}
            None => {
                let end = Criu::Exited {
                    success: true,
                    said: step,
                };
                next.push(with(end, restore.tasks));
            }
        }
        // Behind the detaching nothing fails.
        if step < Detached {
            let killed = match restore.tasks {
                Tasks::None => Tasks::None,
                // It had not come to be: all are not detached.
                _ => Tasks::Dead,
            };
            let end = Criu::Exited {
                success: false,
                said: step,
            };
            next.push(with(end, killed));
        }
        // From the last system call on the kernel lets them go when CRIU dies.
        let left = match restore.tasks {
            Tasks::Wait if step >= Caught => Tasks::Run,
            tasks => tasks,
        };
        next.push(with(Criu::Killed { said: step }, left));
    }
    match restore.tasks {
        Tasks::Wait => next.push(with(restore.criu, Tasks::Dead)),
        // Before the detaching is over they are not the process yet.
        Tasks::Run if !matches!(restore.criu, Criu::At(Detaches)) => {
            next.push(with(restore.criu, Tasks::Ended));
        }
        _ => {}
    }
    next
}

/// The last thing that a script had to say.
fn said(step: Step) -> Step {
    // At `post-restore` image-cache has answered, too.
    let spoken = [Begun, PostRestore, PreResume, PostResume];
    let said = spoken.into_iter().rev().find(|s| *s <= step);
    said.unwrap_or(Asks)
}

/// What image-cache concludes at this moment.
fn verdict(restore: Restore, sees: Sees) -> Verdict {
    let (status, at) = match restore.criu {
        // A CRIU that goes on behind its closed connection has detached.
        Criu::At(step) if sees.script && step == PostResume => return Verdict::Restored,
        Criu::At(step) if sees.pids && step >= Closed => return Verdict::Restored,
        Criu::At(_) => return Verdict::Open,
        Criu::Exited { success, said } => (Some(success), said),
        Criu::Killed { said } => (None, said),
    };
    let said = said(at);
    if sees.script && said == PostResume {
        return Verdict::Restored;
    }
    if at < Begun {
        return Verdict::Failed; // it had not read anything
    }
    let unbuilt = sees.script && said < PostRestore;
    if !sees.pids {
        return match unbuilt {
            true => Verdict::Failed,
            false => Verdict::Doubt,
        };
    }
    let status = status.filter(|_| sees.status);
    if status == Some(true) {
        return Verdict::Restored;
    }
    match restore.tasks {
        Tasks::Run => Verdict::Restored,
        Tasks::Wait => Verdict::Open, // until they end
        Tasks::None => Verdict::Failed,
        Tasks::Dead | Tasks::Ended => match unbuilt || status == Some(false) {
            true => Verdict::Failed,
            false => Verdict::Doubt,
        },
    }
}

fn successors(state: State, sees: Sees, rule: Rule) -> Vec<State> {
    let mut next = Vec::new();
    if state.source == Source::Waits {
        next.extend([Source::Killed, Source::GoesOn].map(|source| State { source, ..state }));
    }
    for n in [0, 1] {
        let restore = state.restores[n];
        // A trial has one restore, and no second one if that fails.
        let tried = state.restores.iter().any(|r| r.verdict != Verdict::Open);
        let offered = match state.source {
            Source::Waits => !tried,
            Source::Killed => true,
            Source::GoesOn => false,
        };
        let free = state.given.is_none() && !state.released && offered;
        for moved in moves(restore, free, state.source) {
            let mut after = state;
            after.restores[n] = moved;
            if moved.criu == Criu::At(Begun) {
                after.given = Some(n);
            }
            next.push(after);
        }
        // image-cache looks, now or later.
        if restore.verdict == Verdict::Open && state.given == Some(n) {
            let seen = rule(restore, sees);
            let mut after = state;
            after.restores[n].verdict = seen;
            match seen {
                Verdict::Open => continue,
                Verdict::Restored => after.released = true,
                Verdict::Failed => after.given = None,
                Verdict::Doubt => {}
            }
            next.push(after);
        }
    }
    next
}

/// It runs, or has run: it is the process.
fn has_run(restore: &Restore) -> bool {
    matches!(restore.tasks, Tasks::Run | Tasks::Ended)
        && !matches!(restore.criu, Criu::At(Detaches))
}

/// What must never be.
fn wrong(state: State) -> Option<&'static str> {
    let ran = |r: &&Restore| has_run(r);
    if state.restores.iter().filter(ran).count() > 1 {
        return Some("doubled");
    }
    if state.source != Source::Killed && state.restores.iter().any(has_run) {
        return Some("runs on both hosts");
    }
    if state.released && !state.restores.iter().any(has_run) {
        return Some("the only copy is gone");
    }
    let offered = |r: &Restore| r.verdict == Verdict::Failed && has_run(r);
    state.restores.iter().any(offered).then_some("offered")
}

type Rule = fn(Restore, Sees) -> Verdict;

/// All states, and how many of them are in doubt; or the first that is wrong.
fn visit(sees: Sees, rule: Rule) -> Result<(usize, usize), String> {
    let first = Restore {
        criu: Criu::At(Asks),
        tasks: Tasks::None,
        verdict: Verdict::Open,
    };
    let first = State {
        source: match sees.script {
            true => Source::Waits,
            false => Source::Killed,
        },
        restores: [first; 2],
        given: None,
        released: false,
    };
    let (mut seen, mut queue) = (HashSet::from([first]), VecDeque::from([first]));
    let mut doubts = 0;
    while let Some(state) = queue.pop_front() {
        if let Some(what) = wrong(state) {
            return Err(format!("{what}: {state:?} {sees:?}"));
        }
        let doubt = |r: &Restore| r.verdict == Verdict::Doubt;
        doubts += usize::from(state.restores.iter().any(doubt));
        for next in successors(state, sees, rule) {
            if seen.insert(next) {
                queue.push_back(next);
            }
        }
    }
    Ok((seen.len(), doubts))
}

/// All that image-cache can be able to see.
fn all() -> impl Iterator<Item = Sees> {
    (0..8_u8).map(|bits| Sees {
        script: bits & 1 != 0,
        pids: bits & 2 != 0,
        status: bits & 4 != 0,
    })
}

#[test]
fn no_process_is_doubled_and_no_set_is_lost() {
    for sees in all() {
        let (states, doubts) = visit(sees, verdict).unwrap_or_else(|wrong| panic!("{wrong}"));
        eprintln!("{sees:?}: {states} states, {doubts} in doubt");
        assert!(states > 200, "{sees:?}");
    }
}

/// Where the script speaks and CRIU is seen, nothing but a death of all that could tell is in doubt.
#[test]
fn an_end_of_criu_by_itself_leaves_no_doubt() {
    for sees in all().filter(|sees| sees.pids && sees.status) {
        for step in STEPS {
            for success in [true, false] {
                for tasks in [
                    Tasks::None,
                    Tasks::Wait,
                    Tasks::Run,
                    Tasks::Dead,
                    Tasks::Ended,
                ] {
                    let criu = Criu::Exited {
                        success,
                        said: step,
                    };
                    let verdict = verdict(
                        Restore {
                            criu,
                            tasks,
                            verdict: Verdict::Open,
                        },
                        sees,
                    );
                    assert_ne!(verdict, Verdict::Doubt, "{step:?} {success} {tasks:?}");
                }
            }
        }
    }
}

/// A restore that was only held has not run, whatever became of its CRIU and its tasks.
#[test]
fn a_hold_that_ends_leaves_no_doubt() {
    for sees in all().filter(|sees| sees.script) {
        let ends = [
            (Criu::Killed { said: Holds }, Tasks::Dead),
            (
                Criu::Exited {
                    success: false,
                    said: Holds,
                },
                Tasks::Dead,
            ),
        ];
        for (criu, tasks) in ends {
            let restore = Restore {
                criu,
                tasks,
                verdict: Verdict::Open,
            };
            assert_eq!(verdict(restore, sees), Verdict::Failed, "{restore:?}");
        }
    }
}

/// The model finds what this is about, if the rules are those of before.
#[test]
fn the_model_finds_what_was_wrong() {
    let pre_resume: Rule = |restore, sees| match restore.criu {
        Criu::Exited { said: step, .. } if sees.script && said(step) == PreResume => {
            Verdict::Restored
        }
        _ => verdict(restore, sees),
    };
    let offered: Rule = |restore, sees| match verdict(restore, sees) {
        Verdict::Doubt => Verdict::Failed,
        verdict => verdict,
    };
    let while_it_lasts: Rule = |restore, sees| match verdict(restore, sees) {
        Verdict::Open => Verdict::Failed,
        verdict => verdict,
    };
    for (rule, what) in [
        (pre_resume, "the only copy is gone"),
        (offered, "offered"),
        (while_it_lasts, "offered"),
    ] {
        let found: Vec<String> = all().filter_map(|sees| visit(sees, rule).err()).collect();
        assert!(
            found.iter().any(|wrong| wrong.starts_with(what)),
            "{what}: {found:?}"
        );
    }
}
