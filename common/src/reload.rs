//! What SIGHUP has read again. The daemon alone listens for the signal (`daemon/shutdown.rs`) and calls [`ask`]; whatever has
//! files to read again subscribes.

use std::sync::LazyLock;

use tokio::sync::watch;

/// Counts the signals. A signal is the process's, and so is this.
static ASKED: LazyLock<watch::Sender<u64>> = LazyLock::new(watch::Sender::default);

/// Changes with each SIGHUP from now on. Several that come at once may be one change.
pub fn subscribe() -> watch::Receiver<u64> {
    ASKED.subscribe()
}

/// Wakes the subscribers.
pub fn ask() {
    ASKED.send_modify(|n| *n += 1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_subscriber_is_woken() {
        ask();
        let (mut one, mut other) = (subscribe(), subscribe());
        assert!(!one.has_changed().unwrap(), "what was before counts not");
        ask();
        one.changed().await.unwrap();
        other.changed().await.unwrap();
    }
}
