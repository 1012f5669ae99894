//! CRIU as a process of this host: its sockets, the descriptors that it passes, its images directory, its options. What
//! the bytes mean is in [`crate::criu`].

pub mod allowed_uids;
mod dir_lock;
pub mod fdpass;
pub mod idle;
pub mod images_dir;
pub mod left_over;
pub mod options;
pub mod page_server;
pub mod parents;
pub mod session_dirs;
pub mod socket_dir;
pub mod sockets;
