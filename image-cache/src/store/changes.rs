//! What wakes the readers that wait for an image or a session.

use tokio::sync::watch;

/// Tells waiting readers that something changed. They look again at what they wait for. One counter
/// for all is simple, and readers wait only before a restore begins.
#[derive(Debug)]
pub struct Changes(watch::Sender<u64>);

impl Default for Changes {
    fn default() -> Self {
        Self(watch::Sender::new(0))
    }
}

impl Changes {
    pub fn bump(&self) {
        // Without a waiting reader this is one atomic load: dumps do not pay for restores.
        if self.0.receiver_count() > 0 {
            self.0.send_modify(|n| *n = n.wrapping_add(1));
        }
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}
