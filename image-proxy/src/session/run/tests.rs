use super::*;
use crate::session::state::Step;

fn failed(step: &Step) -> bool {
    matches!(step, Step::Done(Ended::Failed(_)))
}

#[tokio::test]
async fn the_next_image_waits_for_room_but_not_for_ever() {
    let id = SnapshotId::new("x").unwrap();
    let run = Run::new(SetNumber(1), id, Dialect::Stream, false, None, None);
    let name = |n: u32| ImageName::new(&format!("core-{n}.img")).unwrap();
    let begin = |n: u32| drop(run.image_begins(&name(n)));
    (1..OPEN_IMAGES).for_each(begin);
    let begun = std::time::Instant::now();
    run.has_room().await;
    assert!(begun.elapsed() < PATIENCE, "there is room for one");
    begin(OPEN_IMAGES);
    let ends = async {
        for n in 1..=OPEN_IMAGES / 2 {
            tokio::task::yield_now().await;
            run.image_ended(&name(n), 0, None);
        }
    };
    tokio::join!(run.has_room(), ends);
    assert_eq!(
        run.state().images.open,
        OPEN_IMAGES / 2,
        "it waited for these"
    );
    (0..OPEN_IMAGES).for_each(begin);
    let begun = std::time::Instant::now();
    run.has_room().await;
    assert!(begun.elapsed() >= PATIENCE, "nothing ended");
}

#[test]
fn the_first_failure_counts() {
    let id = SnapshotId::new("x").unwrap();
    let run = Run::new(SetNumber(1), id, Dialect::Stream, false, None, None);
    run.fail(Failure::link("first"));
    run.fail(Failure::link("second"));
    assert_eq!(run.state().failure(), Some(&Failure::link("first")));
    assert!(!run.is_active());
}

/// Whichever comes first decides: the other one is too late.
#[test]
fn a_run_that_failed_is_not_told_and_one_that_was_told_does_not_fail() {
    let run = || {
        let snapshot = SnapshotId::new("1").unwrap();
        Run::new(SetNumber(1), snapshot, Dialect::Stream, true, None, None)
    };
    let aborted = run();
    let why = Failure::operator("aborted by the operator");
    aborted.fail(why.clone());
    let told = aborted.tell(Told::default());
    assert_eq!(told, Err(why));
    assert!(failed(&aborted.state().next_step()));

    let early = run();
    assert!(
        early.tell(Told::default()).is_err(),
        "the cache does not hold it"
    );

    let told = run();
    told.prepares();
    told.prepare_answered(Ok(()));
    told.tell(Told::default()).unwrap();
    assert_eq!(told.state().next_step(), Step::Wait);
    told.fail(Failure::link("the link is lost"));
    let doubt = Step::Done(Ended::InDoubt(Failure::link("the link is lost")));
    assert_eq!(told.state().next_step(), doubt);
}

/// What held on the target may go at any moment. Before CRIU is told that fails the dump, and behind it nothing.
#[test]
fn what_held_and_is_gone_fails_a_dump_that_was_not_told() {
    let run = || {
        let snapshot = SnapshotId::new("1").unwrap();
        let run = Run::new(SetNumber(1), snapshot, Dialect::Stream, true, None, None);
        run.prepares_trial(CommitOn::Auto);
        run.in_trial();
        run.in_trial();
        assert_eq!(run.state().phase, Phase::Trial);
        run.holding();
        assert_eq!(run.state().phase, Phase::Holding);
        run
    };
    let gone = || Failure::peer("criu restore was killed");
    let early = run();
    early.trial_failed(gone());
    assert_eq!(early.tell(Told::default()), Err(gone()));
    assert!(failed(&early.state().next_step()));

    let told = run();
    told.tell(Told::default()).unwrap();
    told.trial_failed(gone());
    assert_eq!(told.state().next_step(), Step::Wait, "no failure, no doubt");
    told.committed();
    told.trial_failed(gone());
    assert_eq!(told.state().next_step(), Step::Done(Ended::Dump));
}
