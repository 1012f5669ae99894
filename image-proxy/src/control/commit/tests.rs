use image_common::criu::inventory::SetKind;
use image_common::image::ImageName;
use image_common::link::codec::SetNumber;
use image_common::link::VERSIONS;
use tokio::net::TcpStream;

use super::*;
use crate::link::answers::SetAnswers;
use crate::link::testing::{listener, soon, Cache};
use crate::session::criu::Criu;

const WITHIN: Duration = Duration::from_secs(60);

/// A dump with a script, whose images the cache has; and the cache's end of its link.
async fn stored(version: u16) -> (Arc<Session>, Arc<Run>, Cache<TcpStream>) {
    let (listener, target) = listener().await;
    let session = Session::start("web".parse().unwrap(), target, async {});
    let run = session.begin_stream("/img".parse().unwrap(), true, Criu::default());
    let (stream, _) = soon(listener.accept()).await.unwrap();
    let mut cache = soon(Cache::welcomes(stream, version)).await;
    assert!(matches!(cache.hears().await, Some(Message::SetOpen { .. })));
    let inventory = ImageName::new("inventory.img").unwrap();
    drop(run.image_begins(&inventory));
    run.image_ended(&inventory, 100, None);
    run.asks_complete();
    run.image_acknowledged();
    run.stored(SetKind::Dump);
    (session, run, cache)
}

/// Asks for the verdict with this option; gives it, and what the cache was asked. It answers this.
async fn asked(
    version: u16,
    on: cli::CommitOn,
    answers: &[fn(SetNumber) -> Message],
) -> (Result<Arc<Link>, Failure>, Message, Arc<Run>) {
    let (session, run, mut cache) = stored(version).await;
    let deadline = tokio::time::Instant::now() + WITHIN;
    let answering = async {
        let question = cache.hears().await.unwrap();
        for answer in answers {
            cache.says(&answer(run.set)).await;
        }
        question
    };
    let verdict = verdict(&session, &run, None, on, (deadline, WITHIN));
    let (verdict, question) = soon(async { tokio::join!(verdict, answering) }).await;
    (verdict, question, run)
}

fn trial_on(question: &Message) -> CommitOn {
    match question {
        Message::PrepareTrial {
            images: 1,
            bytes: 100,
            on,
            ..
        } => *on,
        other => panic!("{other:?}"),
    }
}

fn prepared(set: SetNumber) -> Message {
    Message::Prepared { set }
}

fn tried(set: SetNumber) -> Message {
    Message::Trial { set }
}

fn holding(set: SetNumber) -> Message {
    Message::Holding { set }
}

fn failed(set: SetNumber) -> Message {
    let reason = "criu restore has failed: Error (criu/files-reg.c:2031): Can't open file /x";
    let reason = reason.to_owned();
    Message::TrialFailed { set, reason }
}

/// No restore waits there: the cache holds the set, which is enough.
#[tokio::test]
async fn without_a_restore_that_waits_the_set_is_held() {
    let (verdict, question, run) = asked(7, cli::CommitOn::Auto, &[prepared]).await;
    assert_eq!(trial_on(&question), CommitOn::Auto);
    verdict.unwrap();
    assert_eq!(run.state().phase, Phase::Prepared);
}

#[tokio::test]
async fn the_source_waits_until_a_restore_holds() {
    for on in [cli::CommitOn::Auto, cli::CommitOn::Restored] {
        let answers: [fn(SetNumber) -> Message; 3] = [tried, tried, holding];
        let (verdict, question, run) = asked(7, on, &answers).await;
        let restored = trial_on(&question) == CommitOn::Restored;
        assert_eq!(restored, on == cli::CommitOn::Restored);
        verdict.unwrap();
        assert_eq!(run.state().phase, Phase::Holding);
        run.tell(Told::default()).unwrap();
    }
}

/// The script is told all that the target says of it.
#[tokio::test]
async fn a_restore_that_fails_fails_the_dump() {
    let (verdict, _, run) = asked(7, cli::CommitOn::Auto, &[tried, failed]).await;
    let why = verdict.map(drop).unwrap_err().text();
    let said = "Error (criu/files-reg.c:2031): Can't open file /x";
    assert!(why.ends_with(said), "{why}");
    assert!(run.tell(Told::default()).is_err());
}

/// A cache that has no answer to the question must not be taken for one that has restored.
#[tokio::test]
async fn prepared_is_not_restored() {
    let (verdict, ..) = asked(7, cli::CommitOn::Restored, &[prepared]).await;
    let why = verdict.map(drop).unwrap_err().text();
    assert!(why.contains("--commit-on restored"), "{why}");
}

#[tokio::test]
async fn held_is_the_order_of_before_and_so_is_auto_with_an_older_cache() {
    for (version, on) in [
        (*VERSIONS.end(), cli::CommitOn::Held),
        (6, cli::CommitOn::Held),
        (6, cli::CommitOn::Auto),
    ] {
        let (verdict, question, _) = asked(version, on, &[prepared]).await;
        assert!(matches!(question, Message::Prepare { .. }), "{question:?}");
        verdict.unwrap();
    }
}

#[tokio::test]
async fn an_older_cache_is_not_asked_to_restore() {
    let (session, run, _cache) = stored(6).await;
    let deadline = tokio::time::Instant::now() + WITHIN;
    let on = cli::CommitOn::Restored;
    let verdict = verdict(&session, &run, None, on, (deadline, WITHIN));
    let why = soon(verdict).await.map(drop).unwrap_err().text();
    for part in ["version 6", "--commit-on restored", "--commit-on auto"] {
        assert!(why.contains(part), "{part}: {why}");
    }
    assert_eq!(
        run.state().phase,
        Phase::Sending,
        "and was asked for nothing"
    );
}

/// A target that hangs in the trial fails the dump, and the reason says where it hung.
#[tokio::test]
async fn the_time_for_the_commit_covers_the_trial() {
    for (hangs_at, says) in [
        (None, "did not prepare"),
        (Some(tried as fn(SetNumber) -> Message), "did not stand"),
    ] {
        let (session, run, mut cache) = stored(7).await;
        let (over, deadline) = tokio::sync::oneshot::channel::<()>();
        let answering = async {
            cache.hears().await.unwrap();
            if let Some(answer) = hangs_at {
                cache.says(&answer(run.set)).await;
                run.wait_for(|s| s.phase == Phase::Trial).await;
            }
            over.send(()).unwrap();
        };
        let now = tokio::time::Instant::now;
        let holding = hold(&session, &run, None, cli::CommitOn::Auto);
        let waiting = async {
            tokio::select! {
                _ = holding => panic!("it hangs"),
                _ = deadline => {}
            }
        };
        soon(async { tokio::join!(waiting, answering) }).await;
        // As if all of the time had passed by now.
        let verdict = in_time(&run, (now(), WITHIN), std::future::pending());
        let why = verdict.await.map(drop).unwrap_err().text();
        assert!(
            why.contains(says) && why.contains("--commit-timeout"),
            "{why}"
        );
    }
}
