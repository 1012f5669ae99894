//! What the end-to-end tests of the two daemons, the bench, the soak run and the fuzzers share: the fake CRIU ([`fake`]),
//! the pair of daemons ([`daemons`]), a link that breaks ([`link`]), real CRIU between hosts ([`real`]), peers that mean no
//! good ([`hostile`]).

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
