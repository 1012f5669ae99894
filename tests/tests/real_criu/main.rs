//! Real CRIU moves real processes between two hosts, through both daemons, with `--stream` and
//! with image-proxy as action script. Needs root; takes a Debian root with CRIU below `target/`,
//! which the first run makes.

mod failures;
mod hold;
mod options;
mod orphaned;
mod page_server;
mod programs;
mod restarts;
mod restores;
mod sessions;
mod tls;
