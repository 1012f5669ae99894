//! Nothing outlives the bench: every sample has a time limit, and however the program ends, its
//! directory goes and (by their parent death signal) its children go.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::process::tail;

/// The sample that runs, and until when it may.
type Current = Arc<Mutex<Option<(String, Instant)>>>;

pub struct Guard {
    current: Current,
}

impl Guard {
    /// Watches in the background. `dir` is removed when a limit passes or a signal comes.
    pub fn start(dir: PathBuf) -> Result<Self> {
        let current = Current::default();
        let watched = current.clone();
        // The runtime belongs to the thread; a failure to make it is known before it starts.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        std::thread::Builder::new()
            .name("guard".to_owned())
            .spawn(move || runtime.block_on(watch(watched, dir)))
            .context("starting the guard thread")?;
        Ok(Self { current })
    }

    /// Runs `work`; the whole program ends if it takes longer than `limit`, because whatever
    /// blocks (a pipe, a socket, a child) has no time limit of its own.
    pub fn within<T>(&self, what: &str, limit: Duration, work: impl FnOnce() -> T) -> T {
        *self.current.lock().expect("no holder panics") =
            Some((what.to_owned(), Instant::now() + limit));
        let done = work();
        *self.current.lock().expect("no holder panics") = None;
        done
    }
}

async fn watch(current: Current, dir: PathBuf) {
    use tokio::signal::unix::{signal, SignalKind};
    let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT can be handled");
    let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM can be handled");
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    loop {
        tokio::select! {
            _ = interrupt.recv() => leave(&dir, 130),
            _ = terminate.recv() => leave(&dir, 143),
            _ = tick.tick() => (),
        }
        let overdue = match &*current.lock().expect("no holder panics") {
            Some((what, until)) if Instant::now() > *until => Some(what.clone()),
            _ => None,
        };
        if let Some(what) = overdue {
            eprintln!("bench: {what} hangs: time limit passed");
            print_logs(&dir);
            leave(&dir, 1);
        }
    }
}

fn leave(dir: &std::path::Path, code: i32) -> ! {
    let _ = std::fs::remove_dir_all(dir);
    std::process::exit(code);
}

/// The last lines of every daemon's log below `dir`.
pub fn print_logs(dir: &std::path::Path) {
    let Ok(series) = std::fs::read_dir(dir) else {
        return;
    };
    for series in series.flatten() {
        for name in ["image-proxy.log", "image-cache.log", "criu.log"] {
            let text = tail(&series.path().join(name));
            if !text.is_empty() {
                eprintln!(
                    "--- {}/{name}\n{text}",
                    series.file_name().to_string_lossy()
                );
            }
        }
    }
}
