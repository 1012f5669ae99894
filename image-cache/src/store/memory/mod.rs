//! The memory of images: where it comes from, how much there may be, and how it goes back.

pub mod arena;
pub mod budget;
pub mod heap;
pub mod host;
pub mod prefault;
pub mod region;
pub mod reservation;
pub mod reserved;
pub mod segment;
#[cfg(test)]
mod testing;
