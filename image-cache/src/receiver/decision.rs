//! HELLO of kind 4: what the source says of a set whose session's link is gone.
//!
//! The cache hears it for a session that it has, connected or not. So does the script of a restore that holds, while no
//! image-cache runs.

use std::future::Future;
use std::sync::Arc;

use image_common::error_chain::chain;
use image_common::link::codec::{FrameFormat, Message, SetNumber};
use image_common::link::handshake::{Answer, Hello, Refusal};
use image_common::link::reader::{FrameReader, ReadError};
use image_common::link::TRIAL_VERSION;
use image_common::net::socket::Socket;
use tokio::io::AsyncWriteExt;

use crate::receiver::connection::unexpected;
use crate::receiver::failure::LinkFailure;
use crate::receiver::prepared;
use crate::receiver::session_links::refuse;
use crate::receiver::trial;
use crate::store::heard::Said;
use crate::store::session::Session;
use crate::store::set::Set;
use crate::store::Store;

/// What the source says of a set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Word {
    /// The process is dead there.
    Commit,
    /// The process goes on there.
    Abort(String),
    /// It does not know.
    Doubt(String),
}

/// Hears what the source says of `set`, and answers its farewell: with nothing if all was heard and done, else with what
/// `heard` said first. Before it says nothing, `done` does.
pub async fn hear(
    socket: Socket,
    format: FrameFormat,
    set: SetNumber,
    mut heard: impl FnMut(Word) -> Result<(), String>,
    done: impl Future<Output = Result<(), String>>,
) -> Result<(), LinkFailure> {
    let (read, mut write) = tokio::io::split(socket);
    let mut reader = FrameReader::new(read).with_format(format);
    let mut refused = None;
    while let Some(header) = reader.header().await? {
        let word = match reader.message(header).await? {
            Message::Commit { set: of } if of == set => Word::Commit,
            Message::SetAbort { set: of, reason } if of == set => Word::Abort(reason),
            Message::SetDoubt { set: of, reason } if of == set => Word::Doubt(reason),
            Message::Goodbye { .. } => {
                let reason = match refused {
                    Some(reason) => reason,
                    None => done.await.err().unwrap_or_default(),
                };
                let mut out = bytes::BytesMut::new();
                Message::Goodbye { reason }.encode_with(&mut out, format);
                write.write_all(&out).await.map_err(ReadError::Io)?;
                return Ok(write.shutdown().await.map_err(ReadError::Io)?);
            }
            other => return Err(unexpected(&other)),
        };
        if let Err(reason) = heard(word) {
            refused.get_or_insert(reason);
        }
    }
    Err(LinkFailure::Closed)
}

/// The session that a HELLO of kind 4 is about, if it is here.
fn known(
    store: &Store,
    hello: &Hello,
    key: u64,
    set: SetNumber,
) -> Option<(Arc<Session>, Arc<Set>)> {
    let session = store.of_key(key)?;
    let its = session.is_of_proxy(hello.proxy) && session.name == hello.session;
    let set = session.set(set).ok().filter(|_| its)?;
    Some((session, set))
}

/// Serves a connection that brings a decision.
pub async fn serve(
    mut stream: Socket,
    hello: &Hello,
    (version, key, number): (u16, u64, SetNumber),
    welcome: &Answer,
    store: &Arc<Store>,
) -> Result<(), LinkFailure> {
    let here = known(store, hello, key, number);
    let before = store.heard.of(key, number);
    if version < TRIAL_VERSION || (here.is_none() && before.is_none()) {
        // One text for all: a stranger learns nothing of what is here.
        let reason = format!("no session {} of this proxy is here", hello.session);
        refuse(&mut stream, Refusal::NoSession, reason.clone()).await;
        return Err(LinkFailure::Refused(reason));
    }
    let sent = stream.write_all(&welcome.encode()).await;
    sent.map_err(ReadError::Io)?;
    let heard = |word| {
        tracing::info!(session = %hello.session, set = number.0, "a decision comes by a connection of its own: {word:?}");
        match &here {
            Some((session, set)) => decide(store, session, set, &word),
            None => again(before, &word),
        }
    };
    let read = async {
        match &here {
            Some((session, _)) if !trial::decisions_are_read(store, session).await => {
                Err(trial::UNREAD.to_owned())
            }
            _ => Ok(()),
        }
    };
    hear(stream, hello.frame_format, number, heard, read).await
}

/// The source has said something of this set before, which has gone since.
fn again(before: Option<Said>, word: &Word) -> Result<(), String> {
    match (before, word) {
        (Some(Said::Commit), Word::Commit) | (Some(Said::Abort), Word::Abort(_)) => Ok(()),
        (Some(Said::Commit), _) => Err("the source has committed the set before".to_owned()),
        _ => Err("the source has given the set up before".to_owned()),
    }
}

fn decide(
    store: &Arc<Store>,
    session: &Arc<Session>,
    set: &Set,
    word: &Word,
) -> Result<(), String> {
    let done = match word {
        Word::Commit if set.is_committed() => Ok(()),
        Word::Commit => prepared::commit(store, session, set),
        Word::Abort(_) if set.is_aborted() => Ok(()),
        Word::Abort(reason) => prepared::given_up(store, session, set, reason, || {}),
        Word::Doubt(reason) => prepared::doubt(session, set, reason),
    };
    done.map_err(|e| chain(&e))?;
    match word {
        Word::Commit if set.is_aborted() => {
            return Err("the set is not here any more: an operator has dropped it".to_owned());
        }
        Word::Commit | Word::Abort(_) => {
            // Nothing of use comes by its link any more, if that is still waited for.
            session.taken_over.cancel();
            session.restart_clock();
            if !session.is_connected() && session.sets().iter().all(|s| s.is_aborted()) {
                store.remove(session);
            }
        }
        Word::Doubt(_) => {}
    }
    store.session_changes.bump();
    Ok(())
}

#[cfg(test)]
mod tests;
