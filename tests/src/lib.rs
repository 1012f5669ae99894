//! End-to-end tests of the two daemons.

pub mod bins;
pub mod daemons;
pub mod fake;
pub mod hand;
pub mod link;
pub mod real;
