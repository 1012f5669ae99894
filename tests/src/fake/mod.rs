//! A fake CRIU: it speaks to the daemons as the protocol texts say that CRIU does, with plain threads and blocking
//! calls, and is strict where CRIU is (a reply that needs two reads is an error).

pub mod child;
pub mod content;
pub mod fast;
pub mod hold;
pub mod job;
pub mod pages;
pub mod remote;
pub mod run;
pub mod scenario;
pub mod script;
pub mod stand_in;
pub mod stream;
pub mod wire;

pub use child::{FakeCriu, Started};
pub use content::{Content, ImageSet, MISSING};
pub use job::{DumpError, DumpJob, Protocol};
pub use pages::PageRound;
pub use remote::{Dialect, Remote, Spelling, DIALECTS};
pub use run::{fetch, restore, Fetched, Source};
pub use stand_in::StandIn;
pub use stream::{Capture, Serve};
