//! The C library's heap.

/// All threads share one arena. A daemon with one thread that works has others for what may block, now and then: each would
/// get an arena of its own, of which nothing goes back. To be called before any thread exists.
pub fn share_one_arena() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it sets a number of the allocator's, and no other thread is there to look at it.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, 1);
    }
}
