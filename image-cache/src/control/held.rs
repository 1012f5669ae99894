//! The script of a restore that holds, and whose image-cache is gone: this one takes its place, and gives it the decision.
//!
//! Most often the images went with the other one. Then a session without any stands for the hold: it is in doubt until the
//! source or an operator decides, and goes with the script. If the set is here (`--keep-through-restart`), it belongs to
//! that restore from now on, and what becomes of it is followed.

use std::os::fd::AsFd;
use std::sync::Arc;

use image_common::control::hold::Held;
use image_common::control::{self, Answer, ControlError};
use image_common::criu_io::fdpass::hung_up;
use image_common::error_chain::chain;
use image_common::link::codec::SetNumber;
use image_common::procfs::pidfd;
use image_common::procfs::process::Process;
use rustix::process::geteuid;
use tokio::net::UnixStream;

use crate::control::descriptors::{handed_over, WITHIN};
use crate::frontend::verdict::{End, Peer, Restore, Restores};
use crate::store::heard::Said;
use crate::store::session::Session;
use crate::store::set::held::HoldEnd;
use crate::store::set::Set;
use crate::store::Store;

/// A session without images goes with the script that it stands for.
struct Standing<'a> {
    store: &'a Store,
    session: Arc<Session>,
    set: Arc<Set>,
    /// Its images are here.
    whole: bool,
    /// Another restore has them.
    taken: bool,
    /// What becomes of this one is followed here.
    restore: Option<Arc<Restore>>,
}

impl Drop for Standing<'_> {
    fn drop(&mut self) {
        if !self.whole {
            self.store.remove(&self.session);
        }
    }
}

/// Serves the script until there is a decision, or its end.
pub async fn serve(
    stream: &mut UnixStream,
    held: &Held,
    store: &Arc<Store>,
    restores: &Restores,
) -> Result<(), ControlError> {
    let standing = match take_over(stream, held, store, restores).await {
        Ok(standing) => standing,
        Err(reason) => {
            tracing::error!(
                session = held.session,
                id = held.id,
                "the script of a restore that holds is refused: {reason}"
            );
            return control::reply(stream, &Answer::Failed { reason }).await;
        }
    };
    // What comes behind it is the decision, which no time bounds.
    control::reply(stream, &Answer::Accepted { within_ms: 0 }).await?;
    let (session, set) = (&standing.session, &standing.set);
    let unread = set.script_holds();
    let images = match standing.whole {
        true => "its images are here",
        false => "its images were with an image-cache that is gone",
    };
    tracing::warn!(
        session = %session.name, id = %session.id, snapshot = %set.snapshot, peer = %session.peer,
        "a restore holds this set here, asleep; {images}. It waits for the source's decision. {}",
        session.advice()
    );
    let taken = async {
        match standing.taken {
            // It has what the source has killed, and nothing is lost with this one: the images are here.
            true => "another restore has the set, and this one must not run".to_owned(),
            false => std::future::pending().await,
        }
    };
    let end = tokio::select! {
        biased;
        reason = taken => HoldEnd::GiveUp(reason),
        end = end_of_hold(store, set) => end,
        () = hung_up(stream) => {
            tracing::warn!(session = %session.name, id = %session.id, "the script of the restore that held has ended");
            return Ok(());
        }
    };
    let answer = match end {
        HoldEnd::GoOn => {
            tracing::warn!(session = %session.name, id = %session.id, "the restore that held goes on");
            // From here on what it has built may run.
            if let Some(restore) = &standing.restore {
                restore.is_asleep(false);
            }
            Answer::Done
        }
        HoldEnd::GiveUp(reason) => {
            tracing::warn!(session = %session.name, id = %session.id, "the restore that held is given up: {reason}");
            Answer::Failed { reason }
        }
    };
    control::reply(stream, &answer).await?;
    // The source is not told that its decision was heard before the script has read it.
    hung_up(stream).await;
    drop(unread);
    Ok(())
}

async fn end_of_hold(store: &Store, set: &Set) -> HoldEnd {
    let mut changes = store.changes.subscribe();
    loop {
        if let Some(end) = set.end_of_hold() {
            return end;
        }
        // The sender lives in the store.
        let _ = changes.changed().await;
    }
}

async fn take_over<'a>(
    stream: &UnixStream,
    held: &Held,
    store: &'a Arc<Store>,
    restores: &Restores,
) -> Result<Standing<'a>, String> {
    // It brings a session, and knows its key. Users that may restore are not enough.
    let uid = stream.peer_cred().map_err(|e| e.to_string())?.uid();
    if uid != 0 && uid != geteuid().as_raw() {
        return Err(format!(
            "uid {uid} is neither root nor that of this image-cache"
        ));
    }
    let pidfd = tokio::time::timeout(WITHIN, handed_over(stream, "CRIU's pidfd"))
        .await
        .unwrap_or_else(|_| Err("CRIU's pidfd did not come".to_owned()))?;
    let (session, set, whole) = store.hold(held).map_err(|e| chain(&e))?;
    // It was heard before this script came, and is not said again.
    let given_up = store.heard.of(held.key, SetNumber(held.set)) == Some(Said::Abort);
    if !whole && given_up {
        let _ = set.abort("the source gave it up"); // it stands here for the hold alone
    }
    let mut standing = Standing {
        store,
        session,
        set,
        whole,
        taken: false,
        restore: None,
    };
    if !whole {
        return Ok(standing);
    }
    let (session, set) = (&standing.session, &standing.set);
    let again = pidfd.try_clone().map_err(|e| e.to_string())?;
    let peer = Peer {
        pid: pidfd::number_of(pidfd.as_fd()),
        pidfd: Some(again),
    };
    if let Some(restore) = restores.of_set(set, &peer) {
        // Its connection alone broke, perhaps before it could say that it holds. It listens now.
        set.holds(restore.id);
        standing.restore = Some(restore);
        return Ok(standing);
    }
    let criu = Process::of_pidfd(peer.pid.unwrap_or(0), pidfd);
    let restore = Restore::held(session.clone(), set.clone(), criu);
    if !set.give_to_holder(restore.id) {
        standing.taken = true;
        return Ok(standing);
    }
    restores.note(&restore, &peer);
    let store = store.clone();
    standing.restore = Some(restore.clone());
    tokio::spawn(async move {
        restore.conclude(&store, End::Exited).await;
    });
    Ok(standing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use image_common::control::{Request, RestoreStep};
    use image_common::criu_io::fdpass::send_fd;
    use image_common::link::session_id::SessionId;
    use rustix::process::{pidfd_open, Pid, PidfdFlags};
    use tokio::io::BufReader;

    use crate::frontend::verdict::Script;
    use crate::store::set::decision::tests::open;
    use crate::store::set::trial::Trial;
    use crate::store::set::RestoreId;
    use crate::store::Policy;

    /// For what comes at once, or never.
    const TOLD: Duration = Duration::from_secs(20);

    /// A set that came back with its images, in doubt; and the CRIU that holds a restore of it.
    struct Back {
        store: Arc<Store>,
        session: Arc<Session>,
        set: Arc<Set>,
        restores: Arc<Restores>,
        criu: Child,
    }

    impl Back {
        fn new() -> Self {
            Self::of_set("prepared", |back| {
                back.store.disconnect(&back.session, "its link is gone");
            })
        }

        fn of_set(stands: &str, then: impl FnOnce(&Self)) -> Self {
            let store = Store::new(1 << 24, Policy::default());
            let session = store.open_session("web".parse().unwrap(), 9, "10.0.0.1:5".to_owned());
            let session = session.unwrap();
            let set = open(&session, 3, stands);
            let criu = Command::new("sleep")
                .arg("600")
                .stdin(Stdio::null())
                .spawn();
            let back = Self {
                store,
                session,
                set,
                restores: Arc::default(),
                criu: criu.unwrap(),
            };
            then(&back);
            back
        }

        /// Its script asks; gives the connection, and what is served to it.
        async fn asks(&self) -> (BufReader<UnixStream>, tokio::task::JoinHandle<()>) {
            let (mut script, mut ours) = UnixStream::pair().unwrap();
            let held = Held {
                id: SessionId::of_key(self.session.key).to_string(),
                session: "web".to_owned(),
                snapshot: self.set.snapshot.to_string(),
                set: 3,
                key: self.session.key,
                proxy: 9,
                peer: "10.0.0.1:5".to_owned(),
            };
            let holding = Request::Holding(Box::new(held.clone()));
            control::request(&mut script, &holding).await.unwrap();
            let pidfd = pidfd_open(Pid::from_child(&self.criu), PidfdFlags::empty()).unwrap();
            send_fd(&script, pidfd.as_fd()).unwrap();
            let (store, restores) = (self.store.clone(), self.restores.clone());
            let served = tokio::spawn(async move {
                assert_eq!(control::receive(&mut ours).await.unwrap(), holding);
                serve(&mut ours, &held, &store, &restores).await.unwrap();
            });
            let mut script = BufReader::new(script);
            let first = control::next_answer(&mut script).await.unwrap();
            assert!(matches!(first, Answer::Accepted { .. }), "{first:?}");
            (script, served)
        }

        fn says(&self, step: RestoreStep) {
            let peer = Peer {
                pid: i32::try_from(self.criu.id()).ok(),
                pidfd: None,
            };
            let script = Script {
                holds: true,
                log: None,
            };
            self.restores.speaks(peer, 1, step, script).unwrap();
        }
    }

    impl Drop for Back {
        fn drop(&mut self) {
            self.criu.kill().unwrap();
            self.criu.wait().unwrap();
        }
    }

    /// The set is that restore's, and goes when it runs.
    #[tokio::test]
    async fn a_set_that_came_back_belongs_to_the_restore_that_holds_it() {
        let back = Back::new();
        let (mut script, served) = back.asks().await;
        assert!(back.set.is_in_doubt() && back.set.given_to().is_some());
        back.set.commit().unwrap();
        let answer = control::next_answer(&mut script).await.unwrap();
        assert_eq!(answer, Answer::Done);
        assert!(back.set.has_unread_decision());
        drop(script);
        served.await.unwrap();
        assert!(!back.set.has_unread_decision());
        assert!(
            !back.set.give(RestoreId(u64::MAX)),
            "no other restore has it"
        );
        back.says(RestoreStep::PostResume);
        let mut changes = back.store.session_changes.subscribe();
        while back.store.holds(&back.session) {
            changes.changed().await.unwrap();
        }
    }

    /// CRIU is killed, and it is not seen whether the tasks run: an operator decides.
    #[tokio::test]
    async fn a_criu_that_ends_behind_the_hold_leaves_doubt() {
        let mut back = Back::new();
        let (mut script, served) = back.asks().await;
        back.set.release(false).unwrap();
        let answer = control::next_answer(&mut script).await.unwrap();
        assert_eq!(answer, Answer::Done);
        drop(script);
        served.await.unwrap();
        back.criu.kill().unwrap();
        back.criu.wait().unwrap();
        let mut changes = back.store.changes.subscribe();
        while !back.set.is_in_doubt() {
            changes.changed().await.unwrap();
        }
        assert!(back.store.holds(&back.session));
    }

    /// Nothing of it has run.
    #[tokio::test]
    async fn a_criu_that_ends_in_the_hold_leaves_the_set_to_the_next() {
        let mut back = Back::new();
        let (script, served) = back.asks().await;
        back.criu.kill().unwrap();
        back.criu.wait().unwrap();
        drop(script);
        served.await.unwrap();
        let mut changes = back.store.changes.subscribe();
        while back.set.given_to().is_some() {
            changes.changed().await.unwrap();
        }
        back.set.commit().unwrap();
        assert!(back.set.is_restorable());
    }

    /// The source has committed it to an image-cache that went, and another restore was first.
    #[tokio::test]
    async fn a_hold_whose_set_another_restore_has_is_given_up() {
        let back = Back::new();
        back.set.commit().unwrap();
        assert!(back.set.give(RestoreId(u64::MAX)));
        let (mut script, served) = back.asks().await;
        let answer = control::next_answer(&mut script).await.unwrap();
        assert!(
            matches!(&answer, Answer::Failed { reason } if reason.contains("another restore")),
            "{answer:?}"
        );
        drop(script);
        served.await.unwrap();
        assert!(back.store.holds(&back.session));
    }

    /// The source was heard before the script came to this image-cache, and hears no more of it.
    #[tokio::test]
    async fn a_hold_whose_source_has_given_up_before_it_came_is_given_up() {
        let back = Back::new();
        // As by a connection that brings the decision.
        back.set.abort("the dump failed").unwrap();
        back.store
            .heard
            .note(back.session.key, SetNumber(3), Said::Abort);
        back.store.remove(&back.session);
        let (mut script, served) = back.asks().await;
        let answer = tokio::time::timeout(TOLD, control::next_answer(&mut script)).await;
        let answer = answer.expect("it holds for ever").unwrap();
        assert!(matches!(answer, Answer::Failed { .. }), "{answer:?}");
        drop(script);
        served.await.unwrap();
    }

    /// The connection broke before the script had said that it holds.
    #[tokio::test]
    async fn a_script_that_asks_again_in_a_trial_holds() {
        let back = Back::of_set("complete, script", |_| {});
        let (images, bytes) = back.set.received();
        back.set.begin_trial(images, bytes).unwrap();
        let criu = Process::open(i32::try_from(back.criu.id()).unwrap());
        let restore = Restore::new(back.session.clone(), back.set.clone(), criu);
        assert!(back.set.give(restore.id));
        let peer = Peer {
            pid: i32::try_from(back.criu.id()).ok(),
            pidfd: None,
        };
        back.restores.note(&restore, &peer);
        let (script, served) = back.asks().await;
        assert_eq!(back.set.trial(), Trial::Holding);
        drop(script);
        served.await.unwrap();
    }

    /// The connection of a script alone broke: the same restore has the set.
    #[tokio::test]
    async fn a_script_that_asks_again_is_the_same() {
        let back = Back::new();
        let (first, served) = back.asks().await;
        let given = back.set.given_to();
        drop(first);
        served.await.unwrap();
        let (mut again, served) = back.asks().await;
        assert_eq!(back.set.given_to(), given);
        back.set.drop_decided(false, "dropped").unwrap();
        let answer = control::next_answer(&mut again).await.unwrap();
        let reason = "dropped".to_owned();
        assert_eq!(answer, Answer::Failed { reason });
        drop(again);
        served.await.unwrap();
    }
}
