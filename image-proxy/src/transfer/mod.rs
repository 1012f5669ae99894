//! Images on their way from CRIU to the link.

pub mod source;
