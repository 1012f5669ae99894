//! An image that dump reads back from us (see [`crate::session::parent_images`]), on a pipe or on the socket.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use image_common::criu::dialect::{Carrier, Dialect};
use image_common::criu_io::fdpass::{checked_pipe, recv_handover, Handover, PipeEnd, RequestError};
use tokio::net::unix::pipe;
use tokio::net::UnixStream;

use crate::session::parent_images::ParentImage;

/// See `deliver` of image-cache's `frontend/remote.rs`: a wrong guess costs only this time.
const WAIT_KNOWN_PIPE: Duration = Duration::from_secs(5);
const WAIT_UNKNOWN: Duration = Duration::from_millis(200);

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

pub async fn deliver(
    stream: &UnixStream,
    kept: ParentImage,
    dialect: Dialect,
) -> Result<(), RequestError> {
    let wait = match dialect.carrier() {
        Carrier::Socket => Duration::ZERO,
        Carrier::Pipe => WAIT_KNOWN_PIPE,
        Carrier::Unknown => WAIT_UNKNOWN,
    };
    let on_socket = async {
        tokio::time::sleep(wait).await;
        write(&kept, || stream.writable(), |bytes| stream.try_write(bytes)).await?;
        socket2::SockRef::from(stream).shutdown(std::net::Shutdown::Write)?;
        std::future::pending().await
    };
    let handover = tokio::select! {
        biased;
        handover = recv_handover(stream) => handover?,
        failed = on_socket => return failed,
    };
    match handover {
        Handover::Fd(fd) => on_pipe(checked_pipe(fd, PipeEnd::Write)?, &kept).await,
        Handover::Eof => Ok(()),
        Handover::Data(byte) => Err(RequestError::Byte(byte)),
    }
}

async fn on_pipe(fd: OwnedFd, kept: &ParentImage) -> Result<(), RequestError> {
    let pipe = pipe::Sender::from_owned_fd(fd)?;
    Ok(write(kept, || pipe.writable(), |bytes| pipe.try_write(bytes)).await?)
}

/// Writes all of it, or as much as CRIU wants: it stops after the last page it needs.
async fn write<W, F>(
    kept: &ParentImage,
    writable: W,
    try_write: impl Fn(&[u8]) -> io::Result<usize>,
) -> io::Result<()>
where
    W: Fn() -> F,
    F: std::future::Future<Output = io::Result<()>>,
{
    let mut at: u64 = 0;
    loop {
        let next = match kept {
            ParentImage::Pagemap(bytes) => &bytes[usize::try_from(at).unwrap_or(bytes.len())..],
            ParentImage::PagesOf(length) => {
                let left = usize::try_from(length - at).unwrap_or(usize::MAX);
                &ZEROS[..left.min(ZEROS.len())]
            }
        };
        if next.is_empty() {
            return Ok(());
        }
        match try_write(next) {
            Ok(n) => at += n as u64,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => writable().await?,
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) => return Err(e),
        }
    }
}
