use super::*;
use crate::session::phase::Event;

fn state(dialect: Dialect, change: impl FnOnce(&mut RunState)) -> RunState {
    let mut state = RunState::new(dialect, false);
    change(&mut state);
    state
}

fn gated(dialect: Dialect, change: impl FnOnce(&mut RunState)) -> RunState {
    let mut state = RunState::new(dialect, true);
    change(&mut state);
    state
}

fn whole(s: &mut RunState, kind: SetKind) {
    s.images = Images {
        sent: 3,
        acknowledged: 3,
        inventory: true,
        ..Images::default()
    };
    s.complete = Complete::Stored(3, kind);
}

fn failed(step: &Step) -> bool {
    matches!(step, Step::Done(Ended::Failed(_)))
}

fn doubt(reason: &str) -> Step {
    Step::Done(Ended::InDoubt(Failure::link(reason)))
}

fn on(state: &RunState, event: Event) -> RunState {
    let mut state = state.clone();
    state.phase = state.phase.after(event).expect("an event of this phase");
    state
}

fn fails(state: &RunState) -> RunState {
    on(state, Event::Fail(Failure::link("the link is lost")))
}

#[test]
fn completeness_is_asked_once_per_change() {
    let mut s = state(Dialect::Stream, |s| {
        (s.images.sent, s.images.inventory) = (3, true)
    });
    assert_eq!(s.next_step(), Step::AskComplete);
    s.complete = Complete::Asked(3);
    assert_eq!(s.next_step(), Step::Wait);
    s.images.open = 1;
    assert_eq!(
        s.next_step(),
        Step::Wait,
        "the global images close after the inventory"
    );
    (s.images.open, s.images.sent) = (0, 4);
    assert_eq!(s.next_step(), Step::AskComplete);
}

#[test]
fn what_the_cache_stored_unasked_is_no_answer() {
    let mut complete = Complete::NotAsked;
    complete.stored(SetKind::Dump);
    assert_eq!(complete, Complete::NotAsked);
    complete = Complete::Asked(3);
    complete.stored(SetKind::Dump);
    assert_eq!(complete, Complete::Stored(3, SetKind::Dump));
}

#[test]
fn a_run_without_inventory_fails_when_criu_is_gone_and_all_is_read() {
    for dialect in [Dialect::Stream, Dialect::RemotePipe] {
        let mut s = state(dialect, |s| (s.images.open, s.dumper) = (1, Dumper::Gone));
        assert_eq!(s.next_step(), Step::Wait);
        s.images.open = 0;
        assert!(failed(&s.next_step()));
    }
}

#[test]
fn a_pre_dump_of_memory_alone_is_for_the_cache_to_judge() {
    let gone = |s: &mut RunState| (s.images.sent, s.dumper) = (2, Dumper::Gone);
    let mut s = state(Dialect::RemoteSocket, gone);
    assert_eq!(s.next_step(), Step::AskComplete);
    s.complete = Complete::Stored(2, SetKind::PreDump);
    assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
    s.images.others = 1;
    assert!(failed(&s.next_step()), "a dump that was cut off");
    assert!(failed(&state(Dialect::Stream, gone).next_step()));
    let finished = |s: &mut RunState| (s.images.sent, s.dumper) = (2, Dumper::Finished);
    let s = state(Dialect::RemoteSocket, finished);
    assert!(failed(&s.next_step()), "such a CRIU does not say FINISH");
}

#[test]
fn a_pre_dump_is_done_when_it_is_stored_gated_or_not() {
    for begin in [false, true] {
        let mut s = RunState::new(Dialect::RemotePipe, begin);
        whole(&mut s, SetKind::PreDump);
        assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
    }
}

#[test]
fn a_gated_dump_needs_its_commit() {
    let mut s = gated(Dialect::Stream, |s| whole(s, SetKind::Dump));
    assert_eq!(s.next_step(), Step::Wait);
    let mut told = on(&on(&on(&s, Event::Prepare), Event::Prepared), Event::Tell);
    assert_eq!(told.next_step(), Step::Wait);
    told.dumper = Dumper::Gone;
    assert_eq!(told.next_step(), Step::Wait, "killed, and not confirmed");
    assert_eq!(fails(&told).next_step(), doubt("the link is lost"));
    let committed = on(&told, Event::Commit);
    assert_eq!(committed.next_step(), Step::Done(Ended::Dump));
    s.dumper = Dumper::Gone;
    assert!(failed(&s.next_step()));
}

#[test]
fn an_ungated_dump_is_judged_by_the_end_of_its_criu() {
    let stream = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    assert_eq!(
        stream.next_step(),
        Step::Hold,
        "before CRIU can have killed"
    );
    let preparing = on(&stream, Event::Prepare);
    assert_eq!(preparing.next_step(), Step::Wait);
    let mut stream = on(&preparing, Event::Prepared);
    assert_eq!(stream.next_step(), Step::Wait, "CRIU has not ended");
    let lost = fails(&stream);
    assert_eq!(
        lost.next_step(),
        doubt("the link is lost"),
        "it kills all the same"
    );
    stream.dumper = Dumper::Gone;

    let remote = state(Dialect::RemoteSocket, |s| whole(s, SetKind::Dump));
    assert_eq!(remote.next_step(), Step::Wait);
    // FINISH comes after the kill.
    for dumper in [Dumper::Gone, Dumper::Finished] {
        let mut remote = remote.clone();
        remote.dumper = dumper;
        assert_eq!(remote.next_step(), Step::Judge);
    }
    let mut remote = remote;
    remote.dumper = Dumper::Finished;

    for run in [stream, remote] {
        assert_eq!(run.next_step(), Step::Judge);
        let judged = |end| on(&run, Event::Judged(end)).next_step();
        assert_eq!(judged(CriuEnd::Killed), Step::CloseSet);
        assert!(failed(&judged(CriuEnd::Failed(Failure::criu(
            "exit status 1"
        )))));
        assert_eq!(
            judged(CriuEnd::InDoubt(Failure::criu("signal 9"))),
            Step::Doubt(Failure::criu("signal 9"))
        );
    }
}

#[test]
fn a_pre_dump_is_done_whatever_became_of_a_commit() {
    let s = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    let mut s = on(&on(&s, Event::Prepare), Event::Refused(Failure::peer("no")));
    s.complete.stored(SetKind::PreDump);
    assert_eq!(s.next_step(), Step::Done(Ended::PreDump));
}

/// What the cache keeps of its answers has an end.
#[test]
fn so_many_images_wait_for_their_acknowledgement() {
    let mut s = state(Dialect::Stream, |s| s.images.sent = UNANSWERED_IMAGES - 1);
    assert!(s.may_send_more());
    s.images.sent += 1;
    assert!(!s.may_send_more());
    s.images.acknowledged += 1;
    assert!(s.may_send_more());
}

/// Its CRIU kills without asking, so what is whole on the target is kept, whatever happens to the link, and whatever
/// the cache finds wrong with it.
#[test]
fn a_whole_dump_without_script_is_in_doubt_and_not_given_up() {
    let dump = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    let preparing = on(&dump, Event::Prepare);
    let refused = on(
        &preparing,
        Event::Refused(Failure::peer("private huge pages")),
    );
    assert_eq!(
        refused.next_step(),
        Step::Doubt(Failure::peer("private huge pages"))
    );
    let prepared = on(&preparing, Event::Prepared);
    for phase in [dump.clone(), preparing, prepared] {
        let mut lost = fails(&phase);
        assert_eq!(lost.next_step(), doubt("the link is lost"));
        lost.gate = Gate::Answered;
        let gated = lost.next_step();
        assert!(failed(&gated), "its CRIU asks, and is told: {gated:?}");
    }
    let mut early = dump;
    early.complete = Complete::NotAsked;
    assert!(failed(&fails(&early).next_step()), "not all was sent");
}

#[test]
fn the_operator_sees_what_a_run_does() {
    let doing = |s: &RunState| s.status(&SnapshotId::new("x").unwrap()).state;
    let sending = state(Dialect::Stream, |_| ());
    assert_eq!(doing(&sending), "sending");
    let complete = state(Dialect::Stream, |s| whole(s, SetKind::Dump));
    assert_eq!(doing(&complete), "complete");
    let preparing = on(&complete, Event::Prepare);
    assert_eq!(doing(&preparing), "preparing");
    let mut prepared = on(&preparing, Event::Prepared);
    assert_eq!(doing(&prepared), "waits for CRIU's end");
    prepared.gate = Gate::Answered;
    assert_eq!(doing(&prepared), "complete");
    let trial = on(&preparing, Event::Trial);
    assert_eq!(doing(&trial), "in trial on the target");
    let holding = on(&trial, Event::Holding);
    assert_eq!(doing(&holding), "restored and held on the target");
    let told = on(&prepared, Event::Tell);
    assert_eq!(doing(&told), "committed");
    assert_eq!(doing(&fails(&told)), "failed");
    assert_eq!(doing(&on(&told, Event::End(Ended::Dump))), "sent");
}
