//! Tasks whose panic is not silent. A task that ends in a panic takes with it what it was to do: another task waits for that,
//! and would wait for ever. So a panic is caught here, logged (by the hook of [`crate::log`]), and what must follow of it is done.

use std::any::Any;
use std::future::{poll_fn, Future};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::Instrument;

/// After a panic an essential task begins again, and not faster than this.
const AGAIN: Duration = Duration::from_millis(100);

/// What waits for a task hears this when it panicked.
pub const OWN_ERROR: &str = "a bug in this program (a panic; its log says where)";

/// A task, or a part of one, has panicked.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {OWN_ERROR}: {text}")]
pub struct Panicked {
    what: &'static str,
    text: String,
}

/// What a panic says.
pub fn text_of(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no text")
}

/// Runs `task`; its panic becomes an error. What the panic left half done is dropped.
pub fn caught<T>(
    what: &'static str,
    task: impl Future<Output = T>,
) -> impl Future<Output = Result<T, Panicked>> {
    // Boxed: what is handed to an `async fn` and pinned there takes its space twice.
    let mut task = Box::pin(task);
    let polled = poll_fn(move |context| {
        // What the task shares with others is behind locks that are taken also when poisoned, and is whole between
        // any two statements; the task itself is not polled again.
        match catch_unwind(AssertUnwindSafe(|| task.as_mut().poll(context))) {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(value)) => Poll::Ready(Ok(value)),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    });
    async move {
        polled.await.map_err(|panic| {
            let text = text_of(&*panic).to_owned();
            tracing::error!("{what} ended in a panic: {text}");
            Panicked { what, text }
        })
    }
}

/// Spawns `task`. If it panics, `failed` is called with the reason: to tell those that wait for it.
pub fn spawn<T, F>(what: &'static str, task: T, failed: F) -> JoinHandle<()>
where
    T: Future<Output = ()> + Send + 'static,
    F: FnOnce(&str) + Send + 'static,
{
    let watched = async move {
        if let Err(panicked) = caught(what, task).await {
            failed(&panicked.to_string());
        }
    };
    tokio::spawn(watched.in_current_span())
}

/// Runs what `task` gives, to its end. Without it the daemon is of no use, so after a panic it begins again.
pub async fn lasting<T, F>(what: &'static str, mut task: F)
where
    T: Future<Output = ()>,
    F: FnMut() -> T,
{
    while caught(what, task()).await.is_err() {
        tracing::error!("{what} starts again");
        tokio::time::sleep(AGAIN).await;
    }
}

/// Spawns [`lasting`].
pub fn spawn_lasting<T, F>(what: &'static str, task: F) -> JoinHandle<()>
where
    T: Future<Output = ()> + Send + 'static,
    F: FnMut() -> T + Send + 'static,
{
    tokio::spawn(lasting(what, task).in_current_span())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn who_waits_is_told_of_a_panic() {
        let heard = Arc::new(Mutex::new(String::new()));
        let told = heard.clone();
        let task = async {
            tokio::task::yield_now().await;
            panic!("on purpose, {}", 7);
        };
        let failed = move |why: &str| why.clone_into(&mut told.lock().unwrap());
        spawn("a sender", task, failed).await.unwrap();
        let heard = heard.lock().unwrap();
        assert!(
            heard.starts_with("a sender: ") && heard.ends_with("on purpose, 7"),
            "{heard}"
        );
    }

    #[tokio::test]
    async fn a_task_that_ends_well_tells_nobody() {
        let failed = |why: &str| panic!("{why}");
        spawn("well", async {}, failed).await.unwrap();
        assert_eq!(caught("well", async { 7 }).await.unwrap(), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn an_essential_task_begins_again_after_a_panic() {
        let begun = Arc::new(AtomicUsize::new(0));
        let counts = begun.clone();
        let task = move || {
            let nth = counts.fetch_add(1, Ordering::Relaxed);
            async move { assert!(nth >= 3, "on purpose") }
        };
        spawn_lasting("accepting", task).await.unwrap();
        assert_eq!(begun.load(Ordering::Relaxed), 4);
    }
}
