//! The memory of images: where it comes from, how much there may be, and how it goes back.

pub mod budget;
pub(super) mod heap;
pub mod host;
pub mod prefault;
pub mod region;
pub mod reservation;
pub mod segment;
