//! The messages, as values.

use crate::criu::dialect::Dialect;
use crate::criu::inventory::SetKind;
use crate::criu::page_server::Layout;
use crate::image::{ImageName, SnapshotId};

/// Number of a set within its connection; chosen by the proxy, never 0, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SetNumber(pub u32);

/// Number of an image transfer within its connection; chosen by the proxy, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamNumber(pub u32);

/// When the source kills, by the proxy's `--commit-on`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitOn {
    /// When a restore holds, if one waits that can; else when the cache holds the set.
    Auto,
    /// When a restore holds.
    Restored,
}

/// What a merged page server round did, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundPages {
    /// Came, and were not there before.
    pub new: u64,
    /// Came in the place of older ones.
    pub replaced: u64,
    /// Stayed as they were.
    pub unchanged: u64,
    /// No pagemap names them any more.
    pub dropped: u64,
}

/// Every message but image data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// proxy: a CRIU run begins to write a set.
    SetOpen {
        set: SetNumber,
        gated: bool,
        dialect: Dialect,
        /// The set whose pages this one may refer to.
        parent: Option<SetNumber>,
        snapshot: SnapshotId,
    },
    /// proxy: which dialect a RemoteUnknown set turned out to use.
    SetDialect { set: SetNumber, dialect: Dialect },
    /// proxy: hand out no inventory of this set before its commit.
    SetGate { set: SetNumber },
    /// proxy: the inventory ended and no image is open.
    SetComplete {
        set: SetNumber,
        images: u32,
        bytes: u64,
    },
    /// proxy: CRIU waits in its post-dump script, the tasks are frozen. Is it all there?
    Prepare {
        set: SetNumber,
        images: u32,
        bytes: u64,
        /// Of all its images, see [`crate::link::digest`]; 0 without checksums.
        digest: u64,
    },
    /// proxy: the same question, and a restore is to stand on the target before the source kills. From version 7 on.
    PrepareTrial {
        set: SetNumber,
        images: u32,
        bytes: u64,
        digest: u64,
        on: CommitOn,
    },
    /// proxy: the process is dead on the source; the set may be restored, and what was restored of it may run.
    Commit { set: SetNumber },
    /// proxy: an ungated set's CRIU has finished.
    SetClose { set: SetNumber },
    /// proxy: the set is complete, and whether its process was killed is not known.
    SetDoubt { set: SetNumber, reason: String },
    /// Either side: this set will not become whole.
    SetAbort { set: SetNumber, reason: String },

    /// proxy: an image begins.
    ImageOpen {
        stream: StreamNumber,
        set: SetNumber,
        path: ImageName,
        /// CRIU's open mode; O_APPEND (0x400) continues the image of that name.
        mode: u32,
        /// `None`: streamed, known at its end.
        size: Option<u64>,
    },
    /// proxy: the image is over; `total` bytes were sent for this stream.
    ImageEnd {
        stream: StreamNumber,
        total: u64,
        /// CRC-32C of those bytes; 0 without checksums.
        digest: u32,
    },
    /// proxy: the image will not be whole.
    ImageAbort {
        stream: StreamNumber,
        reason: String,
    },

    /// proxy: a page server round begins (one connection of a CRIU to the page server).
    /// What it sends follows as image data, byte by byte.
    RoundOpen {
        stream: StreamNumber,
        set: SetNumber,
        page_bytes: u32,
        /// Of the requests' headers.
        layout: Layout,
    },
    /// proxy: CRIU said CLOSE; so many entries, and pages that are present, were sent.
    RoundEnd {
        stream: StreamNumber,
        entries: u64,
        pages: u64,
    },

    /// Either side: this connection ends here on purpose. The cache answers it.
    Goodbye { reason: String },
    /// Either side: so many bytes of what you sent on this connection have arrived.
    Received { connection: u16, total: u64 },

    /// proxy: the session's first set will have about so many bytes; make memory ready for them.
    Reserve { bytes: u64 },
    /// cache: answers Reserve; so many are ready.
    Reserved { bytes: u64 },

    /// cache: answers a gated SetOpen and SetGate.
    SetGated { set: SetNumber },
    /// cache: answers SetComplete; every image of the set is held.
    SetStored { set: SetNumber, kind: SetKind },
    /// cache: the set is whole, and every image is in memory; it waits for COMMIT.
    Prepared { set: SetNumber },
    /// cache: the set cannot be prepared.
    PrepareRefused { set: SetNumber, reason: String },
    /// cache: answers PrepareTrial, and says so again as long as the trial lasts: a restore reads the set, or is to.
    Trial { set: SetNumber },
    /// cache: the set stands restored on the target. Its tasks are asleep and wait for COMMIT or SET_ABORT.
    Holding { set: SetNumber },
    /// cache: the restore failed, or what it restored is gone. Nothing of it runs, or ever will.
    TrialFailed { set: SetNumber, reason: String },
    /// cache: the image is whole and held.
    ImageAck { stream: StreamNumber, total: u64 },
    /// cache: the round is merged; what became of its pages.
    RoundAck {
        stream: StreamNumber,
        pages: RoundPages,
    },
    /// cache: the image, or round, cannot be held.
    ImageRefused {
        stream: StreamNumber,
        reason: String,
    },
}
