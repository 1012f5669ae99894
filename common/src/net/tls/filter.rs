//! The filter between a plain socket and an encrypted connection, and the thread that it runs on.

use std::future::Future;
use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio_util::task::AbortOnDropHandle;

use super::error::TlsError;

/// Read from one side before it is written to the other; TLS itself works on 16 KiB.
const BUFFER_BYTES: usize = 64 << 10;

/// After our side has closed, how long the peer may take to.
const LINGER: Duration = Duration::from_secs(5);

/// The thread that encrypts, so that the tasks that move images do not wait for it. It lives as
/// long as the process.
pub fn thread() -> Result<Handle, TlsError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(TlsError::Thread)?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("tls".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))
        .map_err(TlsError::Thread)?;
    Ok(handle)
}

/// Runs the handshake and the filter behind it on the thread that encrypts.
pub async fn filtered<S>(
    encrypts: &Handle,
    handshake: impl Future<Output = Result<S, TlsError>> + Send + 'static,
) -> Result<UnixStream, TlsError>
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(TlsError::Handshake)?;
    for end in [&ours, &theirs] {
        end.set_nonblocking(true).map_err(TlsError::Handshake)?;
    }
    let shaken = AbortOnDropHandle::new(encrypts.spawn(async move {
        let secret = handshake.await?;
        let plain = UnixStream::from_std(theirs).map_err(TlsError::Handshake)?;
        tokio::spawn(filter(secret, plain));
        Ok(())
    }));
    let broken = |e: tokio::task::JoinError| TlsError::Handshake(io::Error::other(e));
    shaken.await.map_err(broken)??;
    UnixStream::from_std(ours).map_err(TlsError::Handshake)
}

/// Carries bytes both ways until one side has closed, and the other has had its time to.
async fn filter<S: AsyncRead + AsyncWrite>(secret: S, plain: UnixStream) {
    let (secret_read, mut secret_write) = tokio::io::split(secret);
    let (plain_read, plain_write) = plain.into_split();
    let out = async {
        carry(plain_read, &mut secret_write).await?;
        secret_write.shutdown().await
    };
    let back = carry(secret_read, plain_write);
    tokio::pin!(out, back);
    let ended = tokio::select! {
        ended = &mut back => match ended {
            // We have closed; what we said before that goes out all the same.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => linger(out).await,
            ended => ended,
        },
        ended = &mut out => match ended {
            Ok(()) => linger(back).await,
            Err(e) => Err(e),
        },
    };
    // The user of the connection logs that it broke; only this task knows why. A
    // peer that closes without TLS's own farewell is what a killed one looks like.
    match ended {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => tracing::debug!("TLS: {e}"),
        Err(e) => tracing::warn!("TLS connection lost: {e}"),
        Ok(()) => {}
    }
}

async fn linger(rest: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(LINGER, rest).await.unwrap_or(Ok(()))
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..n]).await?;
        // What TLS has encrypted and the network has not taken yet.
        to.flush().await?;
    }
}
