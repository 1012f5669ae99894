//! `img-proxy.sock`: `criu dump --remote` and `pre-dump --remote`, every dialect. One
//! connection per operation.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use image_common::criu::dialect::{Carrier, Dialect};
use image_common::criu::frame::MessageError;
use image_common::criu::remote::{
    decode_snapshot_id, encode_reply, encode_snapshot_id, Request, PROXY_SOCKET,
};
use image_common::criu_io::fdpass::{
    checked_pipe, read_message, recv_handover, write_message, Handover, PipeEnd, RequestError,
};
use image_common::criu_io::options;
use image_common::criu_io::socket_dir::SocketDir;
use image_common::criu_io::sockets::{BindError, BoundSocket, Listener};
use image_common::error_chain::chain;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::Message;
use image_common::procfs::process::{peer_pid, Process};
use image_common::tasks;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::dumps::{Active, Proxy, RunError};
use crate::failure::Failure;
use crate::frontend::accept::accept;
use crate::frontend::remote_read_back;
use crate::session::arrival_order::{RemoteSockets, Ticket};
use crate::session::criu::Criu;
use crate::session::run::{Run, Turn};
use crate::session::send_image::send_image;
use crate::transfer::source::{drain_socket, Source};

/// A CRIU sends its header, and the id of a push, right after it connected.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// A CRIU whose process cannot be watched counts as gone after this long without an open
/// image; so does one that lives on after its dump (a test, a service).
const QUIET: Duration = Duration::from_secs(2);

const ENOENT: u32 = 2;
const EIO: u32 = 5;

#[derive(Debug, thiserror::Error)]
enum RemoteError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("bad request: {0}")]
    Message(#[from] MessageError),
    #[error("no request within {} s", HEADER_TIMEOUT.as_secs())]
    Slow,
    #[error("cannot answer CRIU")]
    Io(#[from] std::io::Error),
    #[error(
        "CRIU writes an image of snapshot {0}, which it has not announced: no push came before"
    )]
    NotPushed(SnapshotId),
    #[error("no snapshot id came with the push")]
    NoId,
    #[error("no pipe came with image {image} of snapshot {snapshot}, although this CRIU sent pipes before")]
    NoDescriptor {
        snapshot: SnapshotId,
        image: ImageName,
    },
    #[error("a restore has said FINISH to image-proxy: criu restore must use img-cache.sock of image-cache")]
    WrongSide,
    #[error("the dump of snapshot {snapshot} has failed")]
    Failed {
        snapshot: SnapshotId,
        #[source]
        reason: Failure,
    },
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Serves one connection, whose place in the order of arrival is `ticket`.
pub async fn serve(stream: Arc<UnixStream>, proxy: Arc<Proxy>, ticket: Ticket) {
    match operation(&stream, &proxy, ticket).await {
        Ok(Some(write)) => match Arc::into_inner(stream) {
            Some(stream) => {
                let run = write.active.run.clone();
                let writing = write.carry_out(stream, &proxy);
                if let Err(e) = tasks::caught("a dump's connection", writing).await {
                    run.fail(Failure::bug(e.to_string()));
                }
            }
            // A ticket's glance at it lasts no longer than a system call of this same thread.
            None => unreachable!("the connection has one owner"),
        },
        Ok(None) => {}
        Err(e) => {
            tracing::error!("{PROXY_SOCKET}: {}; CRIU gets an error", chain(&e));
            // For a read, silence would mean "error 0". For a write CRIU does not read it, but CRIU
            // must not be killed by SIGPIPE.
            let _ = write_message(&*stream, &encode_reply(EIO)).await;
            drain_socket(&stream).await;
        }
    }
}

/// An image that CRIU writes: what follows on its connection are data, or a pipe.
struct Write {
    active: Active,
    image: ImageName,
    mode: u32,
    turn: Turn,
}

async fn operation(
    stream: &UnixStream,
    proxy: &Arc<Proxy>,
    ticket: Ticket,
) -> Result<Option<Write>, RemoteError> {
    let body = tokio::time::timeout(HEADER_TIMEOUT, read_message(stream))
        .await
        .map_err(|_| RemoteError::Slow)??;
    let Some(body) = body else {
        tracing::debug!("{PROXY_SOCKET}: connected and left");
        return Ok(None);
    };
    match Request::decode(&body)? {
        Request::ListPush(spelling) => {
            let id = tokio::time::timeout(HEADER_TIMEOUT, read_message(stream))
                .await
                .map_err(|_| RemoteError::Slow)??;
            let id = decode_snapshot_id(&id.ok_or(RemoteError::NoId)?)?;
            // After what this CRIU, or the one before it, sent earlier.
            ticket.absorbs();
            ticket.turn().await;
            let criu = Criu::of_peer(stream);
            let pid = criu.pid;
            // At once, because a write need not wait for an answer.
            let Active { run, .. } = Box::pin(proxy.push(id, spelling, criu)).await?;
            // Boxed, as the future before: each image has a task with space for all of this.
            let options = Box::pin(options::of_peer(pid)).await;
            run.after_dump(options.after_dump());
            let without_script = || options.unserved_without_script();
            let unserved = match run.state().is_gated() {
                true => options.unserved(),
                false => options.unserved().or_else(without_script),
            };
            if let Some(unserved) = unserved {
                let snapshot = &run.snapshot;
                tracing::error!(%snapshot, "{unserved}; the dump fails, the process goes on");
                run.fail(Failure::criu(unserved.to_string()));
            }
            Ok(None)
        }
        Request::ListRead(_) => {
            // Pushes that were accepted earlier must be in the list.
            ticket.turn().await;
            drop(ticket);
            list(stream, proxy).await?;
            Ok(None)
        }
        Request::Write {
            snapshot,
            image,
            mode,
            ..
        } => {
            // Every CRIU pushes first; a run that a stray write could begin would
            // stand before real ones on the target.
            let active = proxy
                .remote_run_of_snapshot(peer_pid(stream), &snapshot)
                .ok_or(RemoteError::NotPushed(snapshot))?;
            // Counted before the ticket goes, so that the run is never thought whole.
            let turn = active.run.image_begins(&image);
            Ok(Some(Write {
                active,
                image,
                mode,
                turn,
            }))
        }
        Request::Read { snapshot, image } => {
            drop(ticket);
            match proxy.read_back(peer_pid(stream), &snapshot, &image) {
                Some(kept) => {
                    write_message(stream, &encode_reply(0)).await?;
                    let run = proxy.remote_run_of(peer_pid(stream));
                    let dialect = run.map_or(Dialect::RemoteUnknown, |a| a.run.state().dialect);
                    remote_read_back::deliver(stream, kept, dialect).await?;
                }
                None => write_message(stream, &encode_reply(ENOENT)).await?,
            }
            Ok(None)
        }
        Request::FinishDump => {
            ticket.absorbs();
            // Its own images first; another CRIU's push must not hold it up.
            proxy.arrival_order.settled().await;
            // CRIU sends it after success and failure alike; which it was, the images tell.
            if let Some(active) = proxy.remote_run_to_finish(peer_pid(stream)) {
                active.run.finish();
            }
            Ok(None)
        }
        Request::FinishRestore => Err(RemoteError::WrongSide),
    }
}

/// Answers a list read: the ids of the series, oldest first. A dump asks before it writes its
/// first image, so here a cache that is not there can still stop it.
async fn list(stream: &UnixStream, proxy: &Arc<Proxy>) -> Result<(), RemoteError> {
    let Some(Active { run, session }) = proxy.remote_run_of(peer_pid(stream)) else {
        return Ok(write_message(stream, &encode_reply(ENOENT)).await?);
    };
    let failed = |reason| RemoteError::Failed {
        snapshot: run.snapshot.clone(),
        reason,
    };
    session.link().await.map_err(failed)?;
    if let Some(reason) = run.state().failure() {
        return Err(failed(reason.clone()));
    }
    write_message(stream, &encode_reply(0)).await?;
    for id in session.snapshot_list() {
        write_message(stream, &encode_snapshot_id(id.as_str())).await?;
    }
    Ok(())
}

impl Write {
    async fn carry_out(self, stream: UnixStream, proxy: &Arc<Proxy>) {
        let Active { run, session } = self.active.clone();
        match self.source(stream).await {
            Ok(Some(source)) if run.takes_images() => {
                send_image(session, run, self.image, self.mode, source, self.turn).await;
            }
            Ok(Some(source)) => {
                // The run has failed (or is over): CRIU's write fails, or is drained.
                tracing::error!(snapshot = %run.snapshot, image = %self.image, "refused: the dump is over");
                run.image_dropped();
                let state = run.state();
                if !state.is_gated() && state.failure().is_some() {
                    proxy.arrival_order.veto(&run, &state);
                }
                source.drain().await;
            }
            Ok(None) => {
                // The socket dialect's zero-byte image.
                let empty = rustix::pipe::pipe()
                    .map_err(std::io::Error::from)
                    .and_then(|(reader, _)| Source::from_pipe(reader));
                match empty {
                    Ok(source) => {
                        send_image(session, run, self.image, self.mode, source, self.turn).await
                    }
                    Err(e) => self.failed(&RemoteError::Io(e)),
                }
            }
            Err(e) => self.failed(&e),
        }
    }

    fn failed(&self, error: &RemoteError) {
        let Active { run, .. } = &self.active;
        tracing::error!(snapshot = %run.snapshot, image = %self.image, "{}", chain(error));
        run.fail(Failure::criu(chain(error)).of(format!("image {}", self.image)));
        run.image_dropped();
    }

    /// Finds out the dialect by the first byte. `None`: the socket dialect, and no data.
    async fn source(&self, stream: UnixStream) -> Result<Option<Source>, RemoteError> {
        let run = &self.active.run;
        let handover = tokio::select! {
            handover = recv_handover(&stream) => handover?,
            () = run.stopped() => {
                // Whatever comes now is too late; and CRIU must not die of SIGPIPE.
                tokio::spawn(async move { drain_socket(&stream).await });
                let failure = run.state().failure().cloned();
                let reason = failure.unwrap_or_else(|| Failure::stopped("it is over"));
                return Err(RemoteError::Failed { snapshot: run.snapshot.clone(), reason });
            }
        };
        match handover {
            Handover::Fd(fd) => {
                self.dialect(Dialect::RemotePipe);
                let fd = checked_pipe(fd, PipeEnd::Read)?;
                Ok(Some(run.source(&self.image, fd)?))
            }
            Handover::Data(_) | Handover::Eof
                if self.active.run.state().dialect.carrier() == Carrier::Pipe =>
            {
                Err(RemoteError::NoDescriptor {
                    snapshot: self.active.run.snapshot.clone(),
                    image: self.image.clone(),
                })
            }
            Handover::Data(first) => {
                self.dialect(Dialect::RemoteSocket);
                Ok(Some(Source::from_socket(stream, first)?))
            }
            Handover::Eof => Ok(None),
        }
    }

    /// The cache wants to know, for the restore of the same CRIU.
    fn dialect(&self, dialect: Dialect) {
        let Active { run, session } = self.active.clone();
        if run.uses_dialect(dialect) {
            tokio::spawn(async move {
                if let Ok(link) = session.link().await {
                    run.wait_for(|s| s.opened || s.is_decided()).await;
                    link.send(&Message::SetDialect {
                        set: run.set,
                        dialect,
                    })
                    .await;
                }
            });
        }
    }
}

/// The listening sockets, which can be closed for a while.
pub struct Sockets {
    dirs: Vec<SocketDir>,
    proxy: Arc<Proxy>,
    listening: Mutex<Vec<Listening>>,
}

struct Listening {
    _socket: BoundSocket,
    listener: Option<Arc<Listener>>,
    stop: CancellationToken,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Sockets {
    pub fn open(dirs: Vec<SocketDir>, proxy: Arc<Proxy>) -> Result<Arc<Self>, BindError> {
        let sockets = Arc::new(Self {
            dirs,
            proxy: proxy.clone(),
            listening: Mutex::default(),
        });
        sockets.listen()?;
        proxy.arrival_order.serves(sockets.clone());
        Ok(sockets)
    }

    fn listening(&self) -> std::sync::MutexGuard<'_, Vec<Listening>> {
        self.listening
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self) -> Result<(), BindError> {
        let mut all = Vec::new();
        for dir in &self.dirs {
            let (socket, listener) = BoundSocket::bind(dir, PROXY_SOCKET)?;
            let listener = Arc::new(listener);
            let stop = CancellationToken::new();
            let proxy = self.proxy.clone();
            tokio::spawn(accept(listener.clone(), stop.clone(), move |connection| {
                // Taken here, in the order of arrival, and not in the connection's task.
                let connection = Arc::new(connection);
                let ticket = proxy.arrival_order.ticket(&connection);
                serve(connection, proxy.clone(), ticket)
            }));
            all.push(Listening {
                _socket: socket,
                listener: Some(listener),
                stop,
            });
        }
        *self.listening() = all;
        Ok(())
    }

    /// Removes the socket files.
    pub fn close(&self) {
        self.listening().clear();
    }

    async fn listen_when_gone(self: Arc<Self>, run: Arc<Run>, criu: Option<Process>) {
        let exited = async {
            match criu {
                Some(criu) => criu.exited().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = exited => {}
            () = quiet(&run) => {}
        }
        if let Err(e) = self.listen() {
            tracing::error!("{PROXY_SOCKET}: cannot listen again: {}; restart image-proxy before the next --remote dump", chain(&e));
        }
    }
}

impl RemoteSockets for Sockets {
    fn have_backlog(&self) -> bool {
        let listening = self.listening();
        let mut open = listening.iter().filter_map(|l| l.listener.as_ref());
        open.any(|l| l.has_backlog())
    }

    /// Closes the listening sockets, whose files stay: CRIU's next connect gets ECONNREFUSED,
    /// an error that fails its dump (a missing file would be taken for a missing image). Opens
    /// them again when that CRIU is gone.
    fn refuse_until_gone(self: Arc<Self>, run: &Arc<Run>) {
        let criu = run.pid.and_then(Process::open);
        let listeners: Vec<_> = {
            let mut listening = self.listening();
            listening
                .iter_mut()
                .filter_map(|l| l.listener.take().map(|x| (x, l.stop.clone())))
                .collect()
        };
        if listeners.is_empty() {
            return; // refusing already
        }
        tracing::warn!(snapshot = %run.snapshot, "{PROXY_SOCKET}: refusing connections until CRIU exits, so that its failed dump ends");
        for (listener, stop) in listeners {
            // From now on connect() says ECONNREFUSED; what is connected already can be accepted.
            listener.refuse();
            stop.cancel();
        }
        let listens = self.clone();
        let listening = self.listen_when_gone(run.clone(), criu);
        tasks::spawn("listening again", listening, move |_| {
            if let Err(e) = listens.listen() {
                tracing::error!("{PROXY_SOCKET}: cannot listen again: {}; restart image-proxy before the next --remote dump", chain(&e));
            }
        });
    }
}

/// Resolves when the run had no open image for a while.
async fn quiet(run: &Run) {
    loop {
        run.wait_for(|s| s.images.open == 0).await;
        let busy = run.wait_for(|s| s.images.open > 0);
        if tokio::time::timeout(QUIET, busy).await.is_err() {
            return;
        }
    }
}
