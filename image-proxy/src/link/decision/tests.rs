use image_common::link::codec::FrameFormat;
use image_common::link::handshake::Refusal;
use image_common::link::VERSIONS;
use tokio::net::TcpListener;

use super::*;
use crate::link::testing::{listener, refuses, soon, Cache, KEY};

const SET: SetNumber = SetNumber(3);

async fn address(format: FrameFormat) -> (TcpListener, Address) {
    let (listener, target) = listener().await;
    let target = Target {
        frame_format: format,
        ..target
    };
    let address = Address {
        session: "web".parse().unwrap(),
        key: KEY,
        dial: Arc::new(Dial::new(
            &target.host,
            target.port,
            target.resolver.clone(),
        )),
        target,
    };
    (listener, address)
}

fn goodbye(reason: &str) -> Message {
    let reason = reason.to_owned();
    Message::Goodbye { reason }
}

/// What is brought, and what it comes to if the target answers this. `None`: it closes the connection.
async fn brought(decision: Decision, answer: Option<Message>) -> (Message, Result<(), Unheard>) {
    let (listener, address) = address(FrameFormat::Plain).await;
    let there = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut cache = Cache::welcomes(stream, *VERSIONS.end()).await;
        assert_eq!(cache.place, Place::Decides { key: KEY, set: SET });
        let heard = cache.hears().await.unwrap();
        assert_eq!(cache.hears().await, Some(goodbye("")));
        if let Some(answer) = answer {
            cache.says(&answer).await;
        }
        heard
    };
    soon(async { tokio::join!(there, address.bring(SET, &decision)) }).await
}

#[tokio::test]
async fn a_decision_is_brought_when_the_target_says_that_it_has_heard() {
    let (heard, brought_it) = brought(Decision::Commit, Some(goodbye(""))).await;
    assert_eq!(heard, Message::Commit { set: SET });
    brought_it.unwrap();
    let why = "no inventory".to_owned();
    let (heard, brought_it) = brought(Decision::Abort(why.clone()), Some(goodbye(""))).await;
    let reason = why;
    assert_eq!(heard, Message::SetAbort { set: SET, reason });
    brought_it.unwrap();
}

#[tokio::test]
async fn what_is_not_that_answer_leaves_it_unheard() {
    let (_, unheard) = brought(Decision::Commit, None).await;
    assert!(
        matches!(unheard, Err(Unheard::Closed { .. })),
        "{unheard:?}"
    );
    let (_, unheard) = brought(Decision::Commit, Some(goodbye("stopping"))).await;
    let said = |e: &Unheard| matches!(e, Unheard::Said { reason, .. } if reason == "stopping");
    assert!(unheard.as_ref().is_err_and(said), "{unheard:?}");
    let (_, unheard) = brought(Decision::Commit, Some(Message::Prepared { set: SET })).await;
    assert!(
        matches!(unheard, Err(Unheard::Broken { .. })),
        "{unheard:?}"
    );
}

#[tokio::test]
async fn a_target_that_does_not_know_the_session_has_not_heard() {
    let (listener, address) = address(FrameFormat::Plain).await;
    let there = async {
        let (stream, _) = listener.accept().await.unwrap();
        refuses(stream, Refusal::NoSession).await
    };
    let bringing = address.bring(SET, &Decision::Commit);
    let (place, unheard) = soon(async { tokio::join!(there, bringing) }).await;
    assert_eq!(place, Place::Decides { key: KEY, set: SET });
    let refused = |e: &Unheard| {
        let why = Refusal::NoSession;
        matches!(e, Unheard::Connect(ConnectError::Refused { why: w, .. }) if *w == why)
    };
    assert!(unheard.as_ref().is_err_and(refused), "{unheard:?}");
}

/// With `--checksum` its frames are those of the session.
#[tokio::test]
async fn its_frames_have_the_checksums_of_the_session() {
    let (listener, address) = address(FrameFormat::Checked).await;
    let there = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut cache = Cache::welcomes(stream, *VERSIONS.end()).await;
        assert_eq!(cache.hears().await, Some(Message::Commit { set: SET }));
        assert_eq!(cache.hears().await, Some(goodbye("")));
        cache.says(&goodbye("")).await;
    };
    let bringing = address.bring(SET, &Decision::Commit);
    soon(async { tokio::join!(there, bringing) })
        .await
        .1
        .unwrap();
}
