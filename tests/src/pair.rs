//! A pair of fresh daemons on loopback.

use std::fs;

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{ensure, Result};
use rustix::process::Signal;

use crate::bins::bin;
use crate::fake::fast::{Dialect, Work};
use crate::fake::script::Script;
use crate::hosts::{self, Host, Hosts};
use crate::process::{start_daemon, Process};

const STOP: Duration = Duration::from_secs(10);
/// A commit waits for data in flight, which here is at most a second's worth.
const SCRIPT: Duration = Duration::from_secs(60);
const RELEASE: Duration = Duration::from_secs(15);

/// Which daemon is CRIU's page server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PagesAt {
    Proxy,
    /// CRIU's pages go straight to the target.
    Cache,
}

/// A port that is free now. It may be taken before it is used; then whoever wants it says so and
/// we fail.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Where a pair runs, and how.
#[derive(Default)]
pub struct Place<'a> {
    /// Not on loopback.
    hosts: Option<&'a Hosts>,
    proxy_options: Vec<String>,
    cache_options: Vec<String>,
    pages: Option<PagesAt>,
}

/// The arguments of an image-proxy whose image-cache is at `address` and `port`.
pub fn proxy_args(command: &mut Command, (address, port): (&str, u16), images: &Path) {
    command.args(["--address", address, "--port", &port.to_string()]);
    command.arg("--images-dir").arg(images);
}

impl<'a> Place<'a> {
    pub fn with_connections(count: u16) -> Self {
        Self {
            proxy_options: vec!["--connections".to_owned(), count.to_string()],
            ..Self::default()
        }
    }

    pub fn with_options(cache: &[String], proxy: &[impl ToString]) -> Self {
        Self {
            cache_options: cache.to_vec(),
            proxy_options: proxy.iter().map(ToString::to_string).collect(),
            ..Self::default()
        }
    }

    pub fn with_cache_option(option: &str) -> Self {
        Self {
            cache_options: vec![option.to_owned()],
            ..Self::default()
        }
    }

    pub fn with_page_server(at: PagesAt) -> Self {
        Self::default().and_page_server(at)
    }

    pub fn and_page_server(self, at: PagesAt) -> Self {
        Self {
            pages: Some(at),
            ..self
        }
    }

    pub fn on(self, hosts: &'a Hosts) -> Self {
        Self {
            hosts: Some(hosts),
            ..self
        }
    }
}

/// image-proxy and image-cache, connected over loopback.
pub struct Pair {
    pub proxy: Process,
    pub cache: Process,
    /// images directory of the dumping side
    pub src: PathBuf,
    /// images directory of the restoring side
    pub dst: PathBuf,
    /// of the page server; 0 without one
    pub pages_port: u16,
    /// of image-cache
    pub port: u16,
    script: PathBuf,
    pub cache_rss_at_start: u64,
}

impl Pair {
    /// Starts both below `dir`, which is created, and waits until their sockets accept.
    pub fn start(dir: &Path, dialect: Dialect) -> Result<Self> {
        Self::start_at(dir, dialect, &Place::default())
    }

    /// The same, somewhere else than on loopback, or with other options.
    pub fn start_at(dir: &Path, dialect: Dialect, place: &Place<'_>) -> Result<Self> {
        let (src, dst) = (dir.join("s"), dir.join("d"));
        fs::create_dir_all(&src)?;
        fs::create_dir_all(&dst)?;
        let longest = src.join("image-proxy-control.sock");
        ensure!(
            longest.as_os_str().len() < 100,
            "{} is too long for a socket",
            longest.display()
        );

        let cache_port = free_port()?;
        let port = cache_port.to_string();
        let pages_port = place.pages.map_or(Ok(0), |_| free_port())?;
        let page_server = |command: &mut Command, at| {
            if place.pages == Some(at) {
                command.args(["--page-server", &pages_port.to_string()]);
            }
        };
        let on = |host: Option<&Host>, program: &Path| match host {
            Some(host) => host.command(program),
            None => Command::new(program),
        };
        let address = place.hosts.map_or(Ipv4Addr::LOCALHOST, |_| hosts::TARGET);
        let address = address.to_string();
        let mut cache = on(place.hosts.map(|h| &h.target), &bin("image-cache"));
        cache
            .args(["--address", &address, "--port", &port, "--images-dir"])
            .arg(&dst)
            .args(&place.cache_options);
        match dialect {
            Dialect::Stream => (),
            Dialect::RemotePipe => _ = cache.args(["--remote-dialect", "pipe"]),
            Dialect::RemoteSocket => _ = cache.args(["--remote-dialect", "socket"]),
        }
        if place.hosts.is_some() {
            // Nobody but the other host can connect.
            cache.arg("--insecure-listen");
        }
        page_server(&mut cache, PagesAt::Cache);
        let cache = start_daemon("image-cache", cache, &dst, dir)?;
        let mut proxy = on(place.hosts.map(|h| &h.source), &bin("image-proxy"));
        proxy_args(&mut proxy, (&address, cache_port), &src);
        proxy.args(&place.proxy_options);
        page_server(&mut proxy, PagesAt::Proxy);
        let proxy = start_daemon("image-proxy", proxy, &src, dir)?;
        let cache_rss_at_start = cache.vm("VmRSS")?;
        Ok(Self {
            proxy,
            cache,
            src,
            dst,
            pages_port,
            port: cache_port,
            script: bin("image-proxy"),
            cache_rss_at_start,
        })
    }

    /// Runs the action script as CRIU does, and returns how long it
    /// took from the start of the process to its successful exit.
    pub fn script(&self, action: &str) -> Result<Duration> {
        self.script_of(action, &self.src)
    }

    /// The pre-dump script of a process of `bytes`: none of it is frozen time.
    pub fn announce(&self, bytes: u64) -> Result<Duration> {
        let mut tree = Work::Tree { bytes }.spawn();
        tree.ready()?;
        let script = Script::new(&self.script, "pre-dump", &self.src, SCRIPT);
        script.run_beside(Some(tree.pid()))?.succeeded("pre-dump")
    }

    /// The same for a CRIU whose images directory is not the daemon's.
    pub fn script_of(&self, action: &str, images: &Path) -> Result<Duration> {
        let control = self.src.join("image-proxy-control.sock");
        let script = Script {
            control: (images != self.src).then_some(&control),
            ..Script::new(&self.script, action, images, SCRIPT)
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
        for (daemon, dir) in [(&mut self.proxy, &self.src), (&mut self.cache, &self.dst)] {
            daemon.signal(Signal::TERM);
            let status = daemon.wait(STOP)?;
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
