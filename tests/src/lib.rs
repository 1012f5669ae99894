//! End-to-end tests of the two daemons.

pub mod authority;
pub mod bins;
pub mod daemons;
pub mod fake;
pub mod guard;
pub mod hand;
#[path = "../examples/hostile/kinds.rs"]
pub mod hostile;
pub mod hosts;
pub mod link;
pub mod machine;
pub mod memory;
pub mod memory_group;
pub mod pair;
pub mod process;
pub mod real;
pub mod soak;
