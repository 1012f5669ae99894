//! The threads that receive. Each has a scheduler of its own, and a connection stays with the
//! one that it was given to.
//!
//! On the runtime of many threads that all else runs on, the thread that hears that a socket is readable
//! hands the next wait to another thread before it reads: a wake-up of another core for nearly
//! each `recv`, where the data come faster than that core wakes.

use std::future::Future;
use std::io;
use std::net::TcpStream as StdStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use image_common::tasks::caught;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Handle};
use tokio_util::task::TaskTracker;

/// Threads for connections. They live as long as the process.
pub struct Workers {
    handles: Vec<Handle>,
    next: AtomicUsize,
}

impl Workers {
    /// One per CPU.
    pub fn start() -> io::Result<Arc<Self>> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let handles = (0..count).map(|n| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let handle = runtime.handle().clone();
            std::thread::Builder::new()
                .name(format!("link-{n}"))
                .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
            Ok(handle)
        });
        Ok(Arc::new(Self {
            handles: handles.collect::<io::Result<_>>()?,
            next: AtomicUsize::new(0),
        }))
    }

    /// Serves a connection on the next of the threads.
    pub fn serve<F, T>(&self, stream: TcpStream, tasks: &TaskTracker, serve: F) -> io::Result<()>
    where
        F: FnOnce(TcpStream) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let n = self.next.fetch_add(1, Ordering::Relaxed) % self.handles.len();
        let stream: StdStream = stream.into_std()?;
        let task = async move {
            // Registers it with this thread's scheduler.
            match TcpStream::from_std(stream) {
                Ok(stream) => serve(stream).await,
                Err(e) => tracing::error!("cannot serve a connection: {e}"),
            }
        };
        // What the connection was about ends with what the task holds.
        let task = async { drop(caught("a connection", task).await) };
        tasks.spawn_on(task, &self.handles[n]);
        Ok(())
    }
}
