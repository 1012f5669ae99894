//! `streamer-capture.sock`: `criu dump --stream` and `pre-dump --stream`. One connection per
//! CRIU run; a request and a pipe per image, no answers.
//!
//! The only way to tell CRIU of an error is to close: its pipes, which makes its writes fail,
//! and this connection, which makes its next open fail.

use std::sync::Arc;

use image_common::criu::options::Unserved;
use image_common::criu::stream::{decode_request, CAPTURE_SOCKET};
use image_common::criu_io::fdpass::{
    checked_pipe, read_message, recv_handover, Handover, PipeEnd, RequestError,
};
use image_common::criu_io::options;
use image_common::error_chain::chain;
use image_common::image::{ImageName, SnapshotId};
use image_common::tasks;
use tokio::net::UnixStream;

use crate::dumps::{Proxy, RunError, StreamConnection};
use crate::failure::Failure;
use crate::session::criu::Criu;
use crate::session::run::Run;
use crate::session::send_image::send_image;
use crate::transfer::source::Source;

/// CRIU has no mode here: images are always written anew.
const O_WRONLY: u32 = 1;

#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error(transparent)]
    Request(#[from] RequestError),
    #[error("bad request: {0}")]
    Message(#[from] image_common::criu::frame::MessageError),
    #[error("CRIU sent no pipe for image {0}")]
    NoDescriptor(ImageName),
    #[error("cannot use the pipe of image {0}")]
    Pipe(ImageName, #[source] std::io::Error),
    #[error("CRIU opens image {0}, but its dump has failed or is over")]
    Over(ImageName),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("{0}; the dump fails, the process goes on")]
    Unserved(#[from] Unserved),
}

pub async fn serve(mut stream: UnixStream, proxy: Arc<Proxy>, snapshot: SnapshotId) {
    let connection = proxy.stream_connected(snapshot, Criu::of_peer(&stream));
    let served = requests(&mut stream, &proxy, &connection);
    match tasks::caught("a dump's connection", served).await {
        Ok(Ok(())) => {}
        Ok(Err(e)) => {
            tracing::error!(snapshot = %connection.snapshot, "{CAPTURE_SOCKET}: {}", chain(&e));
        }
        Err(panicked) => connection.fail(Failure::bug(panicked.to_string())),
    }
    drop(stream);
    proxy.stream_closed(&connection);
}

async fn requests(
    stream: &mut UnixStream,
    proxy: &Arc<Proxy>,
    connection: &StreamConnection,
) -> Result<(), StreamError> {
    // Its script refuses before the tasks are frozen. Without one CRIU asks for nothing before
    // that, and fails at its first image.
    let options = options::of_peer(connection.pid).await;
    if let Some(unserved) = options.unserved() {
        connection.fail(Failure::criu(unserved.to_string()));
        return Err(unserved.into());
    }
    while let Some(body) = next_request(stream, proxy, connection).await? {
        let name = decode_request(&body)?;
        let active = proxy.stream_run(connection).await?;
        active.run.after_dump(options.after_dump());
        if let Some(unserved) = options.unserved_without_script() {
            if !active.run.state().is_gated() {
                active.run.fail(Failure::criu(unserved.to_string()));
                return Err(unserved.into());
            }
        }
        if !active.run.takes_images() {
            return Err(StreamError::Over(name));
        }
        active.run.has_room().await;
        // Counted before anything is awaited, so that the run is never thought whole.
        let turn = active.run.image_begins(&name);
        let source = match receive_pipe(stream, &name, &active.run).await {
            Ok(source) => source,
            Err(e) => {
                active.run.image_dropped();
                active.run.fail(Failure::criu(chain(&e)));
                return Err(e);
            }
        };
        tokio::spawn(send_image(
            active.session,
            active.run,
            name,
            O_WRONLY,
            source,
            turn,
        ));
    }
    Ok(())
}

/// The next request; `None` at the end: CRIU has closed the connection, or the run has failed.
async fn next_request(
    stream: &mut UnixStream,
    proxy: &Arc<Proxy>,
    connection: &StreamConnection,
) -> Result<Option<Vec<u8>>, StreamError> {
    let failed = async {
        loop {
            match proxy.failure_of(connection).await {
                Some(_) => return,
                // Not begun, or ended well: CRIU keeps the connection until it exits.
                None => std::future::pending().await,
            }
        }
    };
    tokio::select! {
        // Nothing is lost if this is cut: the connection ends then.
        body = read_message(stream) => Ok(body?),
        () = failed => Ok(None),
    }
}

async fn receive_pipe(
    stream: &UnixStream,
    name: &ImageName,
    run: &Arc<Run>,
) -> Result<Source, StreamError> {
    match recv_handover(stream).await? {
        Handover::Fd(fd) => run
            .source(name, checked_pipe(fd, PipeEnd::Read)?)
            .map_err(|e| StreamError::Pipe(name.clone(), e)),
        Handover::Eof | Handover::Data(_) => Err(StreamError::NoDescriptor(name.clone())),
    }
}
