//! What a new run waits for: that an earlier one of its series, or of its CRIU, is over.

use std::time::Duration;

use crate::failure::Failure;
use crate::session::run::Run;
use crate::session::state::RunState;

/// How long a new run waits for what an earlier one of the series still has under way.
pub const SETTLE: Duration = Duration::from_secs(10);

/// Waits until an earlier run is over, now that another one begins. Two CRIUs that both live
/// may dump beside each other; otherwise the earlier one cannot have anything left but what
/// is on its way to us.
pub async fn settle(earlier: &Run, next: Option<i32>) {
    if earlier.criu_may_live() && earlier.pid.is_some() && earlier.pid != next {
        return whole_ends(earlier).await;
    }
    earlier.followed();
    let under_way = earlier.wait_for(|s| s.has_ended() || (s.images.open == 0 && !s.is_whole()));
    let _ = tokio::time::timeout(SETTLE, under_way).await;
    // It may be one of those whose pre-dumps have no inventory.
    earlier.source_ended();
    let decided = earlier.wait_for(|s| s.is_decided());
    let _ = tokio::time::timeout(SETTLE, decided).await;
    if earlier.is_active() {
        let why = "another dump began before this one was whole";
        earlier.fail(Failure::stopped(why));
    }
    // Its session is put back for the next run, or closed, right after it ended.
    let ended = earlier.wait_for(|s| s.has_ended());
    let _ = tokio::time::timeout(SETTLE, ended).await;
    tokio::task::yield_now().await;
}

/// A CRIU that lives beside the next one. If it has written everything, it may be a pre-dump
/// whose acknowledgement is on its way: the next run joins its series.
async fn whole_ends(earlier: &Run) {
    /// How long its last bytes may be on their way through us.
    const LAST_BYTES: Duration = Duration::from_millis(250);
    let whole = earlier.wait_for(|s| s.is_whole() || s.has_ended());
    if tokio::time::timeout(LAST_BYTES, whole).await.is_ok() {
        let known = earlier.wait_for(|s| s.has_ended() || s.is_dump());
        let _ = tokio::time::timeout(SETTLE, known).await;
        tokio::task::yield_now().await;
    }
}

/// The same for `--stream`, where CRIU's last bytes, and the end of its connection, may still
/// be on their way through us when its successor has connected.
pub async fn settle_stream(earlier: &Run, next: Option<i32>) {
    /// How late the end of a connection can be seen of a process that goes on.
    const END_SEEN: Duration = Duration::from_millis(100);
    let over = RunState::has_ended;
    if earlier.criu_may_live() {
        if earlier.pid.is_some() && earlier.pid != next {
            return whole_ends(earlier).await;
        }
        let ends = earlier.wait_for(|s| s.has_ended() || s.dumper.is_done());
        if tokio::time::timeout(END_SEEN, ends).await.is_err() {
            return;
        }
    }
    let _ = tokio::time::timeout(SETTLE, earlier.wait_for(over)).await;
    tokio::task::yield_now().await;
}
