//! Memory is made ready a little ahead of the stream, on another core.
//!
//! A page that is written for the first time costs a fault and its zeroing: as much as a third
//! of what receiving it costs, and with small pages as much again. Both happen here, off the
//! receiver's path. If this thread does not keep up, the receiver faults for itself, and that
//! is all.

use std::sync::mpsc::{sync_channel, SyncSender};
use std::sync::{Arc, OnceLock, Weak};

/// How far ahead of the writer memory is ready: a socket buffer's worth, for this thread to be
/// scheduled in. Not more, so that it is still in the processor's caches when the data come.
const AHEAD_BYTES: usize = 4 << 20;

/// The next piece is asked for when the writer has come so much nearer.
const STEP_BYTES: usize = 2 << 20;

/// Made ready with one call; also the huge page.
const CALL_BYTES: usize = 2 << 20;

/// Segments below this are filled before this thread would wake.
const MIN_SEGMENT_BYTES: usize = 4 << 20;

/// Pieces asked for and not begun. More would come too late.
const QUEUE: usize = 64;

/// Memory that a writer fills from the front.
pub trait Filled: Send + Sync + 'static {
    fn capacity(&self) -> usize;
    /// Up to where it is filled.
    fn filled(&self) -> usize;
    /// Whether the writer is still there.
    fn has_writer(&self) -> bool;
    /// Makes a range resident.
    fn populate(&self, start: usize, len: usize);
}

struct Stretch {
    segment: Weak<dyn Filled>,
    from: usize,
    to: usize,
}

/// How far a segment has been asked for.
pub struct Prefault {
    upto: usize,
    before: usize,
}

impl Prefault {
    /// `before`: what came ahead of this segment. What ends soon has not come far, so no more is
    /// made ready than half of what came.
    pub fn new(before: usize) -> Self {
        Self { upto: 0, before }
    }

    /// Of a segment that is ready as a whole.
    pub fn ready(capacity: usize) -> Self {
        Self {
            upto: capacity,
            before: 0,
        }
    }

    /// Up to where memory may be ready.
    pub fn upto(&self) -> usize {
        self.upto
    }

    /// The writer has come to `filled`.
    pub fn advanced(&mut self, segment: &Arc<impl Filled>, filled: usize) {
        let capacity = segment.capacity();
        let ahead = AHEAD_BYTES.min(self.before.saturating_add(filled) / 2);
        let to = (filled + ahead) & !(CALL_BYTES - 1);
        let to = to.min(capacity);
        if capacity < MIN_SEGMENT_BYTES || (to < self.upto + STEP_BYTES && to < capacity) {
            return;
        }
        // The page that the writer is in is faulted by the writer.
        let from = self.upto.max(filled.next_multiple_of(CALL_BYTES));
        if from < to {
            let segment = Arc::downgrade(segment);
            // The thread lives as long as the process; without it this is slower, no more.
            let _ = jobs().try_send(Stretch { segment, from, to });
            self.upto = to;
        }
    }
}

fn jobs() -> &'static SyncSender<Stretch> {
    static JOBS: OnceLock<SyncSender<Stretch>> = OnceLock::new();
    JOBS.get_or_init(|| {
        let (jobs, queue) = sync_channel::<Stretch>(QUEUE);
        let thread = std::thread::Builder::new().name("prefault".to_owned());
        let started = thread.spawn(move || {
            for Stretch { segment, from, to } in queue {
                for start in (from..to).step_by(CALL_BYTES) {
                    // An image that has ended, or is gone, needs nothing; one that overtook us
                    // neither.
                    let Some(segment) = segment.upgrade().filter(|s| s.has_writer()) else {
                        break;
                    };
                    if segment.filled() < start {
                        segment.populate(start, CALL_BYTES.min(to - start));
                    }
                }
            }
        });
        if let Err(e) = started {
            tracing::warn!(
                "cannot start the thread that makes memory ready, so receiving is slower: {e}"
            );
        }
        jobs
    })
}
