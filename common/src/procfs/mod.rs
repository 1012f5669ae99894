//! What the kernel tells of processes, sockets and memory: `/proc`, pidfds, netlink, control groups.

pub mod append_log;
pub mod dumped;
pub mod exit_status;
pub mod host_memory;
pub mod open_dirs;
pub mod pidfd;
pub mod process;
mod sock_diag;
pub mod tcp_peer;
pub mod tree_memory;
