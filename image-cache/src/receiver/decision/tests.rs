use super::*;

use std::time::Duration;

use bytes::BytesMut;
use image_common::link::handshake::Place;
use image_common::link::reader::greet;
use image_common::link::VERSIONS;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::store::set::decision::tests::open;
use crate::store::{Policy, Scope};

const PROXY: u64 = 1;
const SET: SetNumber = SetNumber(1);

struct Here {
    store: Arc<Store>,
    session: Arc<Session>,
    set: Arc<Set>,
}

impl Here {
    /// A session whose set stands so.
    fn with(stands: &str) -> Self {
        let store = Store::new(1 << 24, Policy::default());
        let session = store.open_session("web".parse().unwrap(), PROXY, "10.0.0.1:5".to_owned());
        let session = session.unwrap();
        let set = open(&session, SET.0, stands);
        Self {
            store,
            session,
            set,
        }
    }

    /// The same, whose link is gone.
    fn in_doubt() -> Self {
        let here = Self::with("prepared");
        here.store.disconnect(&here.session, "the link was cut");
        assert!(here.set.is_in_doubt());
        here
    }

    fn hello(&self) -> Hello {
        Hello {
            versions: VERSIONS,
            proxy: PROXY,
            place: Place::Decides {
                key: self.session.key,
                set: SET,
            },
            connections: 1,
            frame_format: FrameFormat::Plain,
            patience: Duration::ZERO,
            session: self.session.name.clone(),
            software: "test".to_owned(),
        }
    }

    /// Says this, and gives the answer to the farewell. `Err`: it was not welcome, or was not answered.
    async fn says(&self, hello: Hello, messages: &[Message]) -> Result<String, String> {
        let (ours, mut proxy) = UnixStream::pair().unwrap();
        let store = self.store.clone();
        let served = tokio::spawn(async move {
            let mut stream = Socket::Unix(ours);
            let hello = image_common::link::reader::receive_hello(&mut stream);
            let hello = hello.await.unwrap();
            let Place::Decides { key, set } = hello.place else {
                panic!("{hello:?}")
            };
            let version = *hello.versions.end();
            let welcome = Answer::Welcome {
                version,
                key,
                received: 0,
                patience: Duration::ZERO,
                software: "test".to_owned(),
            };
            serve(stream, &hello, (version, key, set), &welcome, &store).await
        });
        let answer = greet(&mut proxy, &hello).await.unwrap();
        let Answer::Welcome { .. } = answer else {
            assert!(served.await.unwrap().is_err());
            return Err(format!("{answer:?}"));
        };
        let mut out = BytesMut::new();
        for message in messages {
            message.encode(&mut out);
        }
        proxy.write_all(&out).await.unwrap();
        let _ = proxy.shutdown().await;
        let mut reader = FrameReader::new(proxy);
        let Some(header) = reader.header().await.unwrap() else {
            return Err(served.await.unwrap().unwrap_err().to_string());
        };
        let Message::Goodbye { reason } = reader.message(header).await.unwrap() else {
            panic!("no farewell");
        };
        assert_eq!(reader.header().await.unwrap(), None);
        served.await.unwrap().unwrap();
        Ok(reason)
    }

    async fn brings(&self, message: Message) -> Result<String, String> {
        let farewell = Message::Goodbye {
            reason: String::new(),
        };
        self.says(self.hello(), &[message, farewell]).await
    }
}

fn abort() -> Message {
    Message::SetAbort {
        set: SET,
        reason: "the dump failed".to_owned(),
    }
}

fn doubt() -> Message {
    Message::SetDoubt {
        set: SET,
        reason: "it cannot be seen".to_owned(),
    }
}

const COMMIT: Message = Message::Commit { set: SET };

#[tokio::test]
async fn a_late_commit_ends_the_doubt() {
    let here = Here::in_doubt();
    assert_eq!(here.brings(doubt()).await.unwrap(), "");
    assert!(here.set.is_in_doubt());
    for _ in 0..2 {
        // The answer may have been lost.
        assert_eq!(here.brings(COMMIT).await.unwrap(), "");
        assert!(here.set.is_restorable() && here.store.holds(&here.session));
    }
    assert!(!here.brings(abort()).await.unwrap().is_empty());
    assert!(here.set.is_restorable());
    // It was restored, and is not here any more.
    here.store.remove(&here.session);
    assert_eq!(here.brings(COMMIT).await.unwrap(), "");
    assert!(here.brings(abort()).await.unwrap().contains("committed"));
}

#[tokio::test]
async fn a_late_abort_gives_the_set_up() {
    let here = Here::in_doubt();
    for _ in 0..2 {
        assert_eq!(here.brings(abort()).await.unwrap(), "");
        assert!(here.set.is_aborted() && here.store.newest(&Scope::Any).is_empty());
    }
    assert!(here.brings(COMMIT).await.unwrap().contains("given"));
}

/// The link is thought to be there still, or to come back.
#[tokio::test]
async fn a_session_that_is_connected_hears_it_and_lets_go_of_its_link() {
    let here = Here::with("prepared");
    assert_eq!(here.brings(COMMIT).await.unwrap(), "");
    assert!(here.set.is_restorable() && here.session.taken_over.is_cancelled());
    here.store.disconnect(&here.session, "its link ended");
    assert!(here.set.is_restorable() && here.store.holds(&here.session));
    let here = Here::with("prepared");
    assert_eq!(here.brings(abort()).await.unwrap(), "");
    assert!(here.session.taken_over.is_cancelled());
    here.store.disconnect(&here.session, "its link ended");
    assert!(!here.store.holds(&here.session));
}

#[tokio::test]
async fn what_an_operator_has_decided_stays() {
    let here = Here::in_doubt();
    here.set.release(false).unwrap();
    assert!(here.brings(abort()).await.unwrap().contains("released"));
    assert!(here.set.is_restorable());
    assert_eq!(here.brings(COMMIT).await.unwrap(), "", "the same");
    let here = Here::in_doubt();
    here.set
        .drop_decided(false, "an operator dropped it")
        .unwrap();
    let said = here.brings(COMMIT).await.unwrap();
    assert!(said.contains("dropped"), "{said}");
    assert!(here.set.is_aborted());
}

#[tokio::test]
async fn strangers_are_refused() {
    let here = Here::in_doubt();
    let key = here.session.key;
    let at = |key, set| Place::Decides {
        key,
        set: SetNumber(set),
    };
    let hello = || here.hello();
    for other in [
        Hello {
            place: at(key + 1, 1),
            ..hello()
        },
        Hello {
            place: at(key, 2),
            ..hello()
        },
        Hello {
            proxy: PROXY + 1,
            ..hello()
        },
        Hello {
            session: "db".parse().unwrap(),
            ..hello()
        },
        Hello {
            versions: 5..=6,
            ..hello()
        },
    ] {
        let refused = here.says(other, &[COMMIT]).await.unwrap_err();
        assert!(
            refused.contains("NoSession") && refused.contains("of this proxy is here"),
            "{refused}"
        );
    }
    // What is not about that set, and what is not said to the end.
    let other = Message::Commit { set: SetNumber(2) };
    assert!(here
        .brings(other)
        .await
        .unwrap_err()
        .contains("does not send"));
    let cut = here.says(here.hello(), &[doubt()]).await.unwrap_err();
    assert!(cut.contains("closed"), "{cut}");
    assert!(here.set.is_in_doubt());
}

#[tokio::test]
async fn frames_with_checksums_are_answered_so() {
    let here = Here::in_doubt();
    let (ours, mut proxy) = UnixStream::pair().unwrap();
    let format = FrameFormat::with_checksums(true);
    let done = std::future::ready(Err("not yet".to_owned()));
    let heard = tokio::spawn(hear(Socket::Unix(ours), format, SET, |_| Ok(()), done));
    let mut out = BytesMut::new();
    COMMIT.encode_with(&mut out, format);
    let farewell = Message::Goodbye {
        reason: String::new(),
    };
    farewell.encode_with(&mut out, format);
    proxy.write_all(&out).await.unwrap();
    let mut answer = Vec::new();
    proxy.read_to_end(&mut answer).await.unwrap();
    heard.await.unwrap().unwrap();
    let mut reader = FrameReader::new(&answer[..]).with_format(format);
    let header = reader.header().await.unwrap().unwrap();
    let reason = "not yet".to_owned();
    assert_eq!(
        reader.message(header).await.unwrap(),
        Message::Goodbye { reason }
    );
    drop(here);
}
