//! Which process has made a connection to the page server.

use std::net::SocketAddr;

use image_common::criu::options::Options;
use image_common::criu_io::options;
use image_common::procfs::open_dirs::OpenDirs;
use image_common::procfs::process::Process;
use image_common::procfs::tcp_peer::Holder;

use crate::session::criu::Criu;
use crate::session::lineage::Lineage;

/// A connection to the page server.
pub struct Client {
    /// Its process, if it can be found.
    pub criu: Criu,
    pub lineage: Lineage,
    /// Unknown, if the process cannot be found.
    pub options: Options,
}

impl Client {
    /// Finds the process that connected from `peer` to our `local` address; `likely` pids first.
    pub async fn find(
        peer: Option<SocketAddr>,
        local: Option<SocketAddr>,
        likely: Vec<i32>,
    ) -> Self {
        let address = peer.map(|peer| peer.ip().to_canonical());
        let find = move || {
            let holder = Holder::find(peer?, local?, &likely, "criu")?;
            let process = Process::open(holder.pid)?;
            let dirs = OpenDirs::of_process(holder.pid);
            // What was seen is the pidfd's process: that has the socket, and its pid was not
            // that of another process before or after.
            (holder.holds() && !process.has_exited()).then_some((process, dirs))
        };
        let found = tokio::task::spawn_blocking(find).await.ok().flatten();
        let Some((process, dirs)) = found else {
            tracing::debug!(
                ?peer,
                "page server: the process that connected is not to be seen"
            );
            return Self {
                criu: Criu::default(),
                lineage: Lineage::Unseen(address),
                options: Options::default(),
            };
        };
        tracing::debug!(pid = process.pid(), ?dirs, "page server: connection");
        let lineage = match dirs {
            OpenDirs::One(dir) => Lineage::Images(dir),
            OpenDirs::Several => Lineage::Unclear,
            OpenDirs::None => Lineage::Unseen(address),
        };
        let options = options::of_peer(Some(process.pid())).await;
        Self {
            criu: Criu {
                pid: Some(process.pid()),
                process: Some(process.into()),
            },
            lineage,
            options,
        }
    }
}
