//! A further connection of a session: image data alone, until the session ends.

use std::sync::Arc;

use image_common::daemon::shutdown::Shutdown;
use image_common::link::handshake::Answer;
use image_common::link::reader::ReadError;
use image_common::net::socket::Socket;
use image_common::tasks;
use tokio::io::AsyncWriteExt;

use crate::receiver::connection::Receiver;
use crate::receiver::failure::LinkFailure;
use crate::receiver::session_links::Joined;
use crate::store::Store;

/// Serves a further connection until its session ends.
pub async fn serve(
    mut socket: Socket,
    joined: Joined,
    welcome: &Answer,
    store: Arc<Store>,
    shutdown: Shutdown,
) {
    let Joined {
        links,
        connection,
        reads,
    } = joined;
    // Closed with the session, not before it: see `SessionLinks::closed`.
    let read = async {
        let sent = socket.write_all(&welcome.encode()).await;
        sent.map_err(ReadError::Io)?;
        let reader = links.reader(&links.attach(connection, socket));
        let mut receiver = Receiver::new(reader, &links, connection, &store, &shutdown);
        receiver.run_further().await
    };
    let result = tokio::select! {
        // A frame that is cut off here is of no session any more.
        () = links.over.cancelled() => Ok(()),
        result = tasks::caught("a further connection", read) => {
            result.unwrap_or(Err(LinkFailure::Own(tasks::OWN_ERROR)))
        }
    };
    if let Err(e) = result {
        links.fail(LinkFailure::Connection(connection, Box::new(e)));
    }
    drop(reads);
    links.closed.cancelled().await;
    links.close(connection);
}
