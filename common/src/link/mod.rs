//! The link: our own protocol between image-proxy (dials) and image-cache (listens).
//!
//! `docs/link-protocol.md` is the specification. In short: a handshake that agrees on the
//! version and names the session, then frames. A frame is a fixed header and a payload; image
//! data are frames too, so that many images share the connection without waiting for one
//! another, and a data frame's payload can go from a pipe into the socket and from the socket
//! into the store without being looked at.
//!
//! ```text
//! proxy                                   cache
//!   HELLO  versions, session        -->
//!                                   <--   WELCOME version, key   (or REFUSED reason, close)
//!   [HELLO key, connection 1, 2 ... -->   on further connections: image data alone
//!                                   <--   WELCOME]
//!   [RESERVE bytes                  -->   RESERVED bytes]
//!   SET_OPEN set, snapshot id       -->
//!   [SET_GATE]                      -->   [SET_GATED]
//!   IMAGE_OPEN stream, set, path    -->
//!   IMAGE_DATA stream, bytes  ...   -->
//!   IMAGE_END stream, size          -->   IMAGE_ACK stream, size
//!   SET_COMPLETE images, bytes      -->   SET_STORED kind
//!   PREPARE images, bytes           -->   PREPARED            (gated sets)
//!   PREPARE_TRIAL images, bytes     -->   TRIAL, HOLDING      (or PREPARED, or TRIAL_FAILED reason)
//!   COMMIT                          -->
//!   SET_CLOSE                       -->                      (ungated sets)
//!   GOODBYE                         -->
//! ```
//!
//! [`codec`] and [`handshake`] are bytes in, values out; [`phase`] is what may happen to a set
//! in which order; [`reader`] is the only part that does I/O, over anything that reads.

pub mod codec;
pub mod digest;
pub mod handshake;
pub mod phase;
pub mod reader;
pub mod resumable;
pub mod session_id;

/// Versions of the link protocol that this build speaks. No release speaks an older one, so
/// nothing is kept for them: version 1 had one connection for a session, in version 2 a session
/// ended with any of its connections, in version 3 each request to the page server was a frame, in
/// version 4 no memory was reserved before the freeze. Version 5 has the bytes of version 6, and other names for the
/// messages of the commit. Version 7 adds the trial ([`TRIAL_VERSION`]).
pub const VERSIONS: std::ops::RangeInclusive<u16> = 5..=7;

/// From this version on a set can be restored before the source kills, and a decision can come by a connection of its own.
pub const TRIAL_VERSION: u16 = 7;

/// Most connections of a session. Beyond a few a link gains nothing, and each costs the cache a
/// task and a socket.
pub const MAX_CONNECTIONS: u16 = 16;

/// Longest payload of an IMAGE_DATA frame. Long enough that a header costs nothing, short
/// enough that an image which waits for its turn waits for a millisecond.
pub const MAX_DATA_BYTES: u32 = 1 << 20;

/// Longest payload of every other frame: two names, or a reason.
pub const MAX_CONTROL_BYTES: u32 = 8 << 10;

/// Longest reason that travels; a longer one is cut at a character.
pub const MAX_REASON_BYTES: usize = 1024;
