//! The link into the store: one task per connection reads its frames, one per session sends the
//! answers.
//!
//! The way of a byte: the kernel's socket buffer -> the image's memory, by one `recv` into the
//! place where it stays. Only what was read together with a frame's header, and small images
//! as a whole, are copied once more.

mod answers;
mod connection;
pub mod decision;
mod ending;
mod failure;
mod further;
mod images;
mod messages;
mod prepared;
mod reassembly;
mod rounds;
mod session_links;
mod sets;
pub mod threads;
mod trial;

use std::sync::Arc;
use std::time::Duration;

use image_common::admission::quota::share;
use image_common::daemon::shutdown::Shutdown;
use image_common::error_chain::chain;
use image_common::link::codec::Message;
use image_common::link::handshake::{
    choose_version, Answer, HandshakeError, Hello, Place, Refusal,
};
use image_common::link::reader::{receive_hello, ReadError, ShakeError};
use image_common::link::resumable::{Claim, ResumableStream};
use image_common::link::VERSIONS;
use image_common::net::socket::Socket;
use image_common::net::DEAD_PEER;
use image_common::tasks;
use image_common::units::human_size;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, oneshot};
use tracing::Instrument;

use answers::{AnswerError, ANSWER_QUEUE};
use connection::Receiver;
use ending::Ending;
pub use failure::LinkFailure;
pub use session_links::refuse;
pub use session_links::Links;
use session_links::SessionLinks;

use crate::limits::Handshake;
use crate::store::session::{Opener, Session};
use crate::store::sockets::SessionSockets;
use crate::store::{NoSession, Store};

const SOFTWARE: &str = concat!("image-cache ", env!("CARGO_PKG_VERSION"));

/// Serves one connection from its handshake to its end.
pub async fn serve(
    mut stream: Socket,
    handshake: Handshake,
    peer: &str,
    store: Arc<Store>,
    sockets: Arc<dyn SessionSockets>,
    links: Arc<Links>,
    shutdown: Shutdown,
) -> Result<(), LinkFailure> {
    let within = store.limits.handshake_timeout;
    let hello = tokio::select! {
        hello = tokio::time::timeout(within, receive_hello(&mut stream)) => hello,
        () = handshake.cut() => return Err(LinkFailure::ShakeCut),
    };
    let hello = hello.map_err(|_| LinkFailure::ShakeTimeout(within))?;
    drop(handshake);
    let hello = match hello {
        Err(ShakeError::Protocol(e @ HandshakeError::Version { .. })) => {
            refuse(&mut stream, Refusal::Version, e.to_string()).await;
            return Err(ShakeError::Protocol(e).into());
        }
        other => other?,
    };
    // `decode` accepted the versions, so there is a common one.
    let version = choose_version(&hello.versions, &VERSIONS).unwrap_or(*VERSIONS.end());
    let patience = hello.patience.min(links.link_timeout);
    let welcome = |key, received| Answer::Welcome {
        version,
        key,
        received,
        patience,
        software: SOFTWARE.to_owned(),
    };
    if let Place::Resumes {
        connection,
        key,
        received,
        attempt,
    } = hello.place
    {
        let place = (connection, key, Claim { received, attempt });
        let welcome = |arrived| welcome(key, arrived);
        return links.resume(&hello, stream, place, welcome).await;
    }
    if let Place::Decides { key, set } = hello.place {
        let about = (version, key, set);
        return decision::serve(stream, &hello, about, &welcome(key, 0), &store).await;
    }
    if let Place::Joins { connection, key } = hello.place {
        let joined = match links.join(&hello, connection, key) {
            Ok(joined) => joined,
            Err(reason) => {
                refuse(&mut stream, Refusal::NoSession, reason.clone()).await;
                return Err(LinkFailure::Refused(reason));
            }
        };
        further::serve(stream, joined, &welcome(key, 0), store, shutdown).await;
        return Ok(());
    }
    let session = match open(&hello, peer, &store, &sockets, &links, &shutdown) {
        Ok(session) => Ending::new(&store, session),
        Err((why, reason)) => {
            refuse(&mut stream, why, reason.clone()).await;
            return Err(LinkFailure::Refused(reason));
        }
    };
    let span = tracing::info_span!("link", session = %session.name, %peer);
    let (answers, queue) = mpsc::channel(ANSWER_QUEUE);
    // Before the welcome: the further connections come as soon as the proxy has heard it.
    let longer = match patience.is_zero() {
        true => patience,
        // The proxy may have noticed later by so much.
        false => patience + DEAD_PEER,
    };
    let session_links = links.open(&hello, &session, answers, longer);
    let result = async {
        let connections = hello.connections;
        tracing::info!(
            version,
            connections,
            software = hello.software,
            "session begins"
        );
        stream
            .write_all(&welcome(session_links.key, 0).encode())
            .await
            .map_err(ReadError::Io)?;
        run(
            session_links.attach(0, stream),
            &session_links,
            queue,
            &store,
            &shutdown,
        )
        .await
    }
    .instrument(span.clone())
    .await;
    // Their tasks have left the store alone since `run` ended; now they close, too.
    drop(session_links);
    let _entered = span.enter();
    let reason = match &result {
        Ok(goodbye) if goodbye.is_empty() => "the source ended the session".to_owned(),
        Ok(goodbye) => format!("the source ended the session: {goodbye}"),
        Err(e) => chain(e),
    };
    session.end(&reason);
    sockets.reconcile(&store);
    tracing::info!(
        held = human_size(store.budget.used()),
        "session ends: {reason}"
    );
    result.map(drop)
}

fn open(
    hello: &Hello,
    peer: &str,
    store: &Arc<Store>,
    sockets: &Arc<dyn SessionSockets>,
    links: &Links,
    shutdown: &Shutdown,
) -> Result<Arc<Session>, (Refusal, String)> {
    if shutdown.requested.is_cancelled() {
        return Err((Refusal::Unavailable, "image-cache is stopping".to_owned()));
    }
    let most = share(store.limits.ports.max_connections);
    links
        .check_room(peer, hello.connections, most)
        .map_err(|reason| (Refusal::Unavailable, reason))?;
    let opener = Opener {
        proxy: hello.proxy,
        opening: match hello.place {
            Place::First { opening } => opening,
            Place::Joins { .. } | Place::Resumes { .. } | Place::Decides { .. } => 0,
        },
    };
    let session = store
        .open_session(hello.session.clone(), opener, peer.to_owned())
        .map_err(|e| match e {
            NoSession::Overtaken(_) => (Refusal::Overtaken, e.to_string()),
            NoSession::NameInUse(_) => (Refusal::SessionInUse, e.to_string()),
            NoSession::TooMany(_) => (Refusal::Unavailable, e.to_string()),
        })?;
    // Before the proxy is welcomed, so that the sockets are there as soon as a dump has succeeded.
    if let Err(why) = sockets.clone().open(store, &session.name) {
        let reason = format!("no sockets for session {}: {why}", session.name);
        store.disconnect(&session, &reason);
        return Err((Refusal::Unavailable, reason));
    }
    Ok(session)
}

/// Reads frames until the session ends; gives the proxy's farewell.
async fn run(
    wire: Arc<ResumableStream>,
    session_links: &SessionLinks,
    queue: mpsc::Receiver<Message>,
    store: &Arc<Store>,
    shutdown: &Shutdown,
) -> Result<String, LinkFailure> {
    let (unheard, gone) = oneshot::channel();
    let sending = answers::send(
        wire.clone(),
        queue,
        session_links.frame_format,
        session_links.patience,
    );
    let sending = async move {
        let _ = unheard.send(sending.await);
    };
    let sender = tasks::spawn("answering", sending, |_| {});
    let unheard = async {
        match gone.await {
            Ok(Ok(())) => std::future::pending().await,
            Ok(Err(AnswerError::Away)) => LinkFailure::Away(session_links.patience),
            Ok(Err(e)) => LinkFailure::Unheard(e),
            // It has not come to say anything.
            Err(_) => LinkFailure::Own(tasks::OWN_ERROR),
        }
    };
    let mut receiver = Receiver::new(
        session_links.reader(&wire),
        session_links,
        0,
        store,
        shutdown,
    );
    let result = tokio::select! {
        result = receiver.run() => result,
        failure = unheard => Err(failure),
        () = session_links.over.cancelled() => Err(session_links.failure()),
        () = shutdown.forced.cancelled() => Err(LinkFailure::Stopping),
        () = session_links.session.taken_over.cancelled() => Err(LinkFailure::Replaced),
        () = prepared::watch(&session_links.session, &wire, session_links.prepared_timeout) => unreachable!("it watches for ever"),
    };
    let unread = match &result {
        Ok(_) => !trial::decisions_are_read(store, &session_links.session).await,
        Err(_) => false,
    };
    // No connection touches a set any more when its session is judged by what is there.
    session_links.stop_readers().await;
    session_links.images.forget_all();
    // Best effort, and never instead of the error itself. An answer to the proxy's farewell
    // says that everything before it was heard.
    let reason = match &result {
        Ok(_) if unread => trial::UNREAD.to_owned(),
        result => result.as_ref().err().map_or_else(String::new, |e| chain(e)),
    };
    let _ = receiver.answers.try_send(Message::Goodbye { reason });
    drop(receiver);
    session_links.no_more_answers();
    // What is queued, e.g. that farewell, may still go out; a dead link ends this by itself.
    let _ = tokio::time::timeout(Duration::from_secs(1), sender).await;
    session_links.close(0);
    result
}
