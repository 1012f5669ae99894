//! The heap after a session. 10,000 small images have names and entries in all threads' arenas, of which
//! the C library gives nothing back by itself.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// By then the last references to the session are gone.
const MOMENT: Duration = Duration::from_millis(200);

/// Gives unused heap back, a moment later and on a thread of its own: another dump may have frozen tasks.
pub fn trim_soon() {
    static EXPECTED: AtomicBool = AtomicBool::new(false);
    if EXPECTED.swap(true, Ordering::Relaxed) {
        return;
    }
    let thread = std::thread::Builder::new().name("trim".to_owned());
    let started = thread.spawn(|| {
        // A thread of its own, which has no tasks.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(MOMENT);
        EXPECTED.store(false, Ordering::Relaxed);
        #[cfg(target_env = "gnu")]
        // SAFETY: it takes the allocator's own locks, and touches only what is free.
        unsafe {
            libc::malloc_trim(0);
        }
    });
    if started.is_err() {
        EXPECTED.store(false, Ordering::Relaxed); // then it stays with us
    }
}
