//! What the receiver asks of the frontends, which it does not know: the sockets of a session.

use std::sync::Arc;

use image_common::image::SessionName;

use crate::store::Store;

/// The sockets by which restores reach one session, in a directory of its own.
pub trait SessionSockets: Send + Sync {
    /// Makes the directory, and listens there. The error is for the proxy, and says why.
    fn open(self: Arc<Self>, store: &Arc<Store>, session: &SessionName) -> Result<(), String>;

    /// Closes the sockets of sessions that are gone.
    fn reconcile(&self, store: &Store);
}
