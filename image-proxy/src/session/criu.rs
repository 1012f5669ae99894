//! The CRIU process behind a run.

use std::sync::Arc;

use image_common::procfs::process::{peer_pid, Process};
use tokio::net::UnixStream;

/// The process of a run: its pid if the kernel told it, and a handle if it was still there.
#[derive(Debug, Clone, Default)]
pub struct Criu {
    pub pid: Option<i32>,
    pub process: Option<Arc<Process>>,
}

impl Criu {
    /// That has connected.
    pub fn of_peer(stream: &UnixStream) -> Self {
        let process = Process::of_peer(stream);
        Self {
            pid: peer_pid(stream),
            process: process.map(|process| Arc::new(process.with_status())),
        }
    }

    pub fn of(pid: Option<i32>) -> Self {
        let process = pid.and_then(Process::open);
        let process = process.map(|process| Arc::new(process.with_status()));
        Self { pid, process }
    }
}
