//! What the bench and the soak run do with a pair of daemons.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use rustix::process::Signal;

use crate::bins::bin;
use crate::daemons::{Options, Pair};
use crate::fake::fast::{Dialect, Work};
use crate::fake::script::Script;

const STOP: Duration = Duration::from_secs(10);
/// A commit waits for data in flight, which here is at most a second's worth.
const SCRIPT: Duration = Duration::from_secs(60);
const RELEASE: Duration = Duration::from_secs(15);

impl Options {
    /// For restores of this dialect.
    pub fn dialect(self, dialect: Dialect) -> Self {
        match dialect {
            Dialect::Stream => self,
            Dialect::RemotePipe => self.cache(&["--remote-dialect", "pipe"]),
            Dialect::RemoteSocket => self.cache(&["--remote-dialect", "socket"]),
        }
    }
}

impl Pair {
    /// Runs the action script as CRIU does, and returns how long it
    /// took from the start of the process to its successful exit.
    pub fn script(&self, action: &str) -> Result<Duration> {
        self.script_of(action, &self.source)
    }

    /// The pre-dump script of a process of `bytes`: none of it is frozen time.
    pub fn announce(&self, bytes: u64) -> Result<Duration> {
        let program = bin("image-proxy");
        let mut tree = Work::Tree { bytes }.spawn();
        tree.ready()?;
        let script = Script::new(&program, "pre-dump", &self.source, SCRIPT);
        script.run_beside(Some(tree.pid()))?.succeeded("pre-dump")
    }

    /// The same for a CRIU whose images directory is not the daemon's.
    pub fn script_of(&self, action: &str, images: &Path) -> Result<Duration> {
        let program = bin("image-proxy");
        let control = self.source.join("image-proxy-control.sock");
        let script = Script {
            control: (images != self.source).then_some(&control),
            ..Script::new(&program, action, images, SCRIPT)
        };
        let result = match action {
            "post-dump" => script.run(),
            _ => script.run_beside(None),
        };
        result?.succeeded(action)
    }

    /// Waits until the cache has given back the memory of a released set of `bytes`.
    pub fn wait_released(&self, bytes: u64) -> Result<()> {
        let limit = self.cache_rss_at_start + bytes / 8 + (16 << 20);
        let deadline = Instant::now() + RELEASE;
        loop {
            let rss = self.cache.vm("VmRSS")?;
            if rss <= limit {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{} MiB are still resident in image-cache {RELEASE:?} after the set was restored",
                rss >> 20
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops both. They must end cleanly, and no image may lie in their directories.
    pub fn stop(mut self) -> Result<()> {
        for (daemon, dir) in [
            (&mut self.proxy, &self.source),
            (&mut self.cache, &self.target),
        ] {
            daemon.signal(Signal::TERM);
            let status = daemon.wait_within(STOP)?;
            ensure!(
                status.success(),
                "{} ended with {status} after SIGTERM",
                daemon.name()
            );
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                ensure!(
                    !kind.is_file(),
                    "{} lies on the disk",
                    entry.path().display()
                );
                ensure!(
                    !kind.is_socket(),
                    "{} was left behind",
                    entry.path().display()
                );
            }
        }
        Ok(())
    }
}
