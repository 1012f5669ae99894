//! End-to-end tests of the two daemons.

pub mod authority;
pub mod bins;
pub mod daemons;
pub mod fake;
pub mod hand;
#[path = "../examples/hostile/kinds.rs"]
pub mod hostile;
pub mod link;
pub mod memory_group;
pub mod real;
