//! CRIU dumps into image-proxy: the unix sockets, one file per dialect. The frontends turn
//! requests into runs and images, and know nothing of the link.

pub mod accept;
pub mod images_dir;
pub mod page_server;
pub mod remote;
pub mod remote_read_back;
pub mod stream;
