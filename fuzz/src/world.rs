//! One runtime for all inputs, with one thread and a clock that stands still. The target is the only
//! one who moves it, so seconds of waiting cost nothing; and when a daemon should have let go of
//! everything, what it still has is seen: tasks, descriptors.

use std::cell::Cell;
use std::future::Future;
use std::sync::OnceLock;
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::yield_now;

thread_local! {
    static RUNTIME: Runtime = runtime();
    /// Whether some tasks may stay.
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Longer than anything in the daemons waits for a peer that is gone.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// Threads of the pool need real time; more pauses than these are a hang. They are counted, not timed:
/// who stops the fuzzer for a while makes no hang.
const MOST_PAUSES: u32 = 200_000;

/// Once, before the first input: what the daemons log is formatted as if somebody read it.
pub fn init() {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::DEBUG)
        .with_ansi(false)
        .without_time()
        .with_writer(|| Log)
        .init();
    // Every Rust program ignores SIGPIPE, but libFuzzer's main is C++.
    ignore_sigpipe();
}

/// If it is set, the daemons' log goes to standard error: for a look at what one input does.
const LOG_VARIABLE: &str = "IMAGE_FUZZ_LOG";

/// Where log lines go: mostly nowhere, after a look whether somebody's words would write lines of
/// their own.
struct Log;

impl std::io::Write for Log {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text = std::str::from_utf8(line).expect("a log line is text");
        let text = text.strip_suffix('\n').unwrap_or(text);
        let bad = text.chars().find(|c| c.is_control());
        assert!(bad.is_none(), "{bad:?} in a log line: {text:?}");
        static SHOWN: OnceLock<bool> = OnceLock::new();
        if *SHOWN.get_or_init(|| std::env::var_os(LOG_VARIABLE).is_some()) {
            eprintln!("{text}");
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is open.
fn links() -> Vec<std::path::PathBuf> {
    let fds = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    fds.flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .collect()
}

fn ignore_sigpipe() {
    // SAFETY: SIG_IGN is a valid disposition of SIGPIPE, and no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .max_blocking_threads(4)
        .build()
        .expect("a runtime")
}

/// Runs one input. When it is over, so must be every task that it began, and no descriptor may be
/// left.
pub fn run(input: impl Future<Output = ()>) {
    RUNTIME.with(|runtime| {
        let fds = descriptors();
        ALONE.set(false);
        runtime.block_on(async {
            input.await;
            ended().await;
        });
        // A thread of the pool that looks at processes may be at work.
        // It opens one file after the other: what counts is a moment at which none is left.
        let mut left = descriptors();
        for _ in 0..MOST_PAUSES {
            if left <= fds {
                break;
            }
            real_pause();
            left = descriptors();
        }
        assert!(
            left <= fds,
            "{left} descriptors are open, {fds} were: {:?}",
            links()
        );
    });
}

/// The same for what rightly waits for the end of a process that lives on: the parent of the fuzzer,
/// which is taken for CRIU. Its tasks go with a runtime of its own.
pub fn run_alone(input: impl Future<Output = ()>) {
    ALONE.set(true);
    let runtime = runtime();
    runtime.block_on(async {
        input.await;
        ended().await;
    });
    runtime.shutdown_background();
}

/// Lets everybody do what can be done now.
pub async fn turn() {
    for _ in 0..8 {
        yield_now().await;
    }
}

/// Lets time pass.
pub async fn pass(time: Duration) {
    let mut left = time;
    let mut step = Duration::from_millis(1);
    while !left.is_zero() {
        turn().await;
        let now = step.min(left);
        tokio::time::advance(now).await;
        left -= now;
        step *= 2;
    }
    turn().await;
}

/// Waits until every task has ended.
pub async fn ended() {
    ended_but(|| 0).await;
}

/// The same, but for so many that have a reason to go on.
pub async fn ended_but(some: impl Fn() -> usize) {
    let metrics = Handle::current().metrics();
    let (mut step, mut passed) = (Duration::from_millis(1), Duration::ZERO);
    let mut pauses = 0;
    loop {
        turn().await;
        let left = metrics.num_alive_tasks();
        if left <= some() || ALONE.get() && passed > LONGEST {
            return;
        }
        if passed > LONGEST {
            assert!(pauses < MOST_PAUSES, "{left} tasks never end");
            // A thread of the pool may be at work.
            real_pause();
            pauses += 1;
            continue;
        }
        tokio::time::advance(step).await;
        passed += step;
        step = (step * 2).min(Duration::from_secs(300));
    }
}

/// Waits for what another thread does, in real time.
pub async fn until(done: impl Fn() -> bool) {
    for _ in 0..MOST_PAUSES {
        turn().await;
        if done() {
            return;
        }
        real_pause();
    }
    panic!("it never ends");
}

/// Tokio's clock stands still here, so its own sleep would only move that.
#[allow(clippy::disallowed_methods)]
fn real_pause() {
    std::thread::sleep(Duration::from_micros(50));
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
