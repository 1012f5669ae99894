//! A set in trial: tells the source how far the restore has come.

use std::sync::Arc;
use std::time::Duration;

use image_common::error_chain::chain;
use image_common::link::codec::{CommitOn, Message, SetNumber};
use image_common::tasks;
use tokio::sync::mpsc;

use crate::receiver::connection::Receiver;
use crate::receiver::failure::LinkFailure;
use crate::store::session::Session;
use crate::store::set::trial::Trial;
use crate::store::set::Set;
use crate::store::Store;

/// How often the source hears that the trial goes on. It takes a cache that is silent for longer for one that has not heard.
const BEAT: Duration = Duration::from_secs(2);

/// Nothing is decided by this: the source says it again.
const READ_WITHIN: Duration = Duration::from_secs(4);

/// What PREPARE_TRIAL says of a set.
pub struct Asked {
    pub images: u32,
    pub bytes: u64,
    pub digest: u64,
    pub on: CommitOn,
}

impl Receiver {
    /// Every image is here, the source says. It kills when a restore stands.
    pub async fn try_set(&mut self, number: SetNumber, asked: Asked) -> Result<(), LinkFailure> {
        let Asked {
            images,
            bytes,
            digest,
            on,
        } = asked;
        // What goes back as it is read cannot be read twice.
        let may_be_tried =
            !self.store.release_on_read && self.store.holding_restore_waits(&self.session);
        if on == CommitOn::Auto && !may_be_tried {
            return self.prepare(number, images, bytes, digest).await;
        }
        let set = self.session.set(number)?;
        if let Err(reason) = self.may_prepare(&set, digest) {
            return self.refuse_prepare(&set, reason).await;
        }
        if let Err(e) = set.begin_trial(images, bytes) {
            return self.refuse_prepare(&set, chain(&e)).await;
        }
        tracing::info!(snapshot = %set.snapshot, images, bytes, "in trial: every image is here, and a restore is to stand before the source kills");
        // A sender that is kept would make the end of the session wait.
        let answers = self.answers.downgrade();
        let (store, session) = (self.store.clone(), self.session.clone());
        let (broken, unwatched) = (set.clone(), store.clone());
        let follow = follow(store, session, set, on, answers);
        tasks::spawn("following a trial", follow, move |why| {
            broken.trial_over(broken.tried_by(), why);
            unwatched.changes.bump();
        });
        Ok(())
    }
}

async fn follow(
    store: Arc<Store>,
    session: Arc<Session>,
    set: Arc<Set>,
    on: CommitOn,
    answers: mpsc::WeakSender<Message>,
) {
    let say = async |message: Message| {
        if let Some(answers) = answers.upgrade() {
            let _ = answers.send(message).await;
        }
    };
    let number = set.number;
    let mut changes = store.changes.subscribe();
    let mut beat = tokio::time::interval(BEAT);
    let mut held = false;
    loop {
        changes.mark_unchanged();
        match set.trial() {
            Trial::Running { read } => {
                let waits =
                    read || on == CommitOn::Restored || store.holding_restore_waits(&session);
                if !waits {
                    set.trial_over(
                        None,
                        "the restore that waited on the target has left before it read anything",
                    );
                    continue;
                }
            }
            Trial::Holding if !held => {
                held = true;
                session.prepared.notify_one();
                say(Message::Holding { set: number }).await;
                continue;
            }
            Trial::Holding => {}
            Trial::Failed(reason) => {
                match held {
                    false => {
                        tracing::error!(snapshot = %set.snapshot, "the trial is over, so the source must not kill the process: {reason}")
                    }
                    true => tracing::error!(
                        snapshot = %set.snapshot,
                        "what was restored and held is gone: {reason}. The set is kept: when its source commits it, it can be restored again"
                    ),
                }
                return say(Message::TrialFailed {
                    set: number,
                    reason,
                })
                .await;
            }
            Trial::Decided => return,
        }
        tokio::select! {
            _ = changes.changed() => {}
            _ = beat.tick(), if !held => say(Message::Trial { set: number }).await,
        }
        if answers.strong_count() == 0 {
            return; // the session is over
        }
    }
}

/// The farewell to a source whose decision a script has not read yet.
pub const UNREAD: &str =
    "the action script of the restore that holds has not read the decision yet";

/// Waits until the scripts that hold have read what was decided. What a script has not read may never reach it, if this
/// image-cache ends: then the source has to say it once more. `false`: it has not, for as long as a source waits for a farewell.
pub async fn decisions_are_read(store: &Store, session: &Session) -> bool {
    let read = async {
        let mut changes = store.changes.subscribe();
        while session.sets().iter().any(|set| set.has_unread_decision()) {
            let _ = changes.changed().await;
        }
    };
    tokio::time::timeout(READ_WITHIN, read).await.is_ok()
}
