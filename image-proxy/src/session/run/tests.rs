use super::*;

fn state(dialect: Dialect, change: impl FnOnce(&mut State)) -> State {
    let mut state = State::new(dialect);
    change(&mut state);
    state
}

fn whole(s: &mut State, kind: SetKind) {
    (s.images, s.acked, s.inventory_ended) = (3, 3, true);
    (s.asked_at, s.stored) = (Some(3), Some(kind));
}

fn failed(step: &Step) -> bool {
    matches!(step, Step::Done(Ended::Failed(_)))
}

#[test]
fn completeness_is_asked_once_per_change() {
    let mut s = state(Dialect::Stream, |s| {
        (s.images, s.inventory_ended) = (3, true)
    });
    assert_eq!(s.next_step(), Step::AskComplete);
    s.asked_at = Some(3);
    assert_eq!(s.next_step(), Step::Wait);
    s.open = 1;
    assert_eq!(
        s.next_step(),
        Step::Wait,
        "the global images close after the inventory"
    );
    (s.open, s.images) = (0, 4);
    assert_eq!(s.next_step(), Step::AskComplete);
}

#[test]
fn a_run_without_inventory_fails_when_criu_is_gone_and_all_is_read() {
    for dialect in [Dialect::Stream, Dialect::RemotePipe] {
        let mut s = state(dialect, |s| (s.open, s.source_ended) = (1, true));
        assert_eq!(s.next_step(), Step::Wait);
        s.open = 0;
        assert!(failed(&s.next_step()));
    }
}

#[test]
fn a_pre_dump_of_memory_alone_is_for_the_cache_to_judge() {
    let gone = |s: &mut State| (s.images, s.source_ended) = (2, true);
    let mut s = state(Dialect::RemoteSocket, gone);
    assert_eq!(s.next_step(), Step::AskComplete);
    (s.asked_at, s.stored) = (Some(2), Some(SetKind::PreDump));
    assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
    s.others = 1;
    assert!(failed(&s.next_step()), "a dump that was cut off");
    assert!(failed(&state(Dialect::Stream, gone).next_step()));
}

#[test]
fn a_pre_dump_is_done_when_it_is_stored_gated_or_not() {
    for gated in [false, true] {
        let mut s = state(Dialect::RemotePipe, |s| whole(s, SetKind::PreDump));
        s.gated = gated;
        assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
    }
}

#[test]
fn a_gated_dump_needs_its_commit() {
    let mut s = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    s.gated = true;
    assert_eq!(s.next_step(), Step::Wait);
    let mut committed = s.clone();
    committed.commit = Commit::Told;
    assert_eq!(committed.next_step(), Step::Wait);
    committed.source_ended = true;
    assert_eq!(
        committed.next_step(),
        Step::Wait,
        "killed, and not confirmed"
    );
    let mut doubted = committed.clone();
    doubted.failed = Some("the link".to_owned());
    let doubt = Step::Done(Ended::InDoubt("the link".to_owned()));
    assert_eq!(doubted.next_step(), doubt);
    committed.commit = Commit::Committed;
    assert_eq!(committed.next_step(), Step::Done(Ended::Dump));
    s.source_ended = true;
    assert!(failed(&s.next_step()));
}

#[test]
fn an_ungated_dump_is_judged_by_the_end_of_its_criu() {
    let mut stream = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    assert_eq!(
        stream.next_step(),
        Step::Hold,
        "before CRIU can have killed"
    );
    stream.commit = Commit::Preparing;
    assert_eq!(stream.next_step(), Step::Wait);
    stream.commit = Commit::Prepared;
    assert_eq!(stream.next_step(), Step::Wait, "CRIU has not ended");
    let mut lost = stream.clone();
    lost.failed = Some("the link".to_owned());
    let doubt = Step::Done(Ended::InDoubt("the link".to_owned()));
    assert_eq!(lost.next_step(), doubt, "it kills all the same");
    stream.source_ended = true;

    let remote = state(Dialect::RemoteSocket, |s| whole(s, SetKind::Dump));
    let with = |change: fn(&mut State)| {
        let mut s = remote.clone();
        change(&mut s);
        s.next_step()
    };
    assert_eq!(with(|_| ()), Step::Wait);
    // FINISH comes after the kill.
    assert_eq!(with(|s| s.source_ended = true), Step::Judge);
    let mut remote = remote.clone();
    remote.finish = true;

    for mut run in [stream, remote] {
        assert_eq!(run.next_step(), Step::Judge);
        run.criu_end = Some(CriuEnd::Killed);
        assert_eq!(run.next_step(), Step::CloseSet);
        run.criu_end = Some(CriuEnd::Failed("exit status 1".to_owned()));
        assert!(failed(&run.next_step()));
        run.criu_end = Some(CriuEnd::InDoubt("signal 9".to_owned()));
        assert_eq!(run.next_step(), Step::Doubt("signal 9".to_owned()));
    }
}

#[test]
fn a_pre_dump_is_done_whatever_became_of_a_commit() {
    let mut s = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    s.commit = Commit::Refused("no".to_owned());
    s.stored = Some(SetKind::PreDump);
    assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
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
    assert_eq!(run.state().open, OPEN_IMAGES / 2, "it waited for these");
    (0..OPEN_IMAGES).for_each(begin);
    let begun = std::time::Instant::now();
    run.has_room().await;
    assert!(begun.elapsed() >= PATIENCE, "nothing ended");
}

#[test]
fn the_first_failure_counts() {
    let id = SnapshotId::new("x").unwrap();
    let run = Run::new(SetNumber(1), id, Dialect::Stream, false, None, None);
    run.fail("first");
    run.fail("second");
    assert_eq!(run.state().failure(), Some("first"));
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
    aborted.fail("aborted by the operator");
    let told = aborted.tell(Told::default());
    assert_eq!(told, Err("aborted by the operator".to_owned()));
    assert!(failed(&aborted.state().next_step()));

    let told = run();
    told.tell(Told::default()).unwrap();
    assert_eq!(told.state().next_step(), Step::Wait);
    told.fail("the link is lost");
    let doubt = Step::Done(Ended::InDoubt("the link is lost".to_owned()));
    assert_eq!(told.state().next_step(), doubt);
}

/// What the cache keeps of its answers has an end.
#[test]
fn so_many_images_wait_for_their_acknowledgement() {
    let mut s = state(Dialect::Stream, |s| s.images = UNANSWERED_IMAGES - 1);
    assert!(s.may_send_more());
    s.images += 1;
    assert!(!s.may_send_more());
    s.acked += 1;
    assert!(s.may_send_more());
}

/// Its CRIU kills without asking, so what is whole on the target is kept, whatever happens to the link, and whatever
/// the cache finds wrong with it.
#[test]
fn a_whole_dump_without_script_is_in_doubt_and_not_given_up() {
    let mut s = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    s.commit = Commit::Refused("private huge pages".to_owned());
    assert_eq!(s.next_step(), Step::Doubt("private huge pages".to_owned()));
    for commit in [Commit::No, Commit::Preparing, Commit::Prepared] {
        let mut lost = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
        (lost.commit, lost.failed) = (commit, Some("the link is lost".to_owned()));
        let doubt = Step::Done(Ended::InDoubt("the link is lost".to_owned()));
        assert_eq!(lost.next_step(), doubt);
        lost.gated = true;
        let gated = lost.next_step();
        assert!(failed(&gated), "its CRIU asks, and is told: {gated:?}");
    }
    let mut early = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    (early.asked_at, early.failed) = (None, Some("the link is lost".to_owned()));
    assert!(failed(&early.next_step()), "not all was sent");
}
