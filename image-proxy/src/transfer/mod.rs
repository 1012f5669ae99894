//! Images on their way from CRIU to the link.

pub mod send_image;
pub mod source;
