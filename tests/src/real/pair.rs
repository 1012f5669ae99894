//! Two hosts and the link between them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};

use anyhow::{ensure, Context, Result};

use super::job::Job;
use super::lab::{Host, Lab};
use super::{wait_until, Cache, Program, Proxy, SOON};
use crate::bins::workspace;

/// These addresses exist inside the pair's own network namespaces only.
const SOURCE_ADDRESS: &str = "10.77.0.1";
const TARGET_ADDRESS: &str = "10.77.0.2";

/// TLS with a host's certificate, where [`Pair::certify`] puts it.
pub const TLS: [&str; 7] = [
    "--tls",
    "--tls-cacert",
    "/run/tls/cacert.pem",
    "--tls-cert",
    "/run/tls/cert.pem",
    "--tls-key",
    "/run/tls/key.pem",
];

static AUTHORITY: OnceLock<PathBuf> = OnceLock::new();

/// Takes the certificates that `scripts/test-ca` has made there, where it cannot run: in a virtual machine.
pub fn use_authority(dir: PathBuf) {
    // A second call comes too late to matter.
    let _ = AUTHORITY.set(dir);
}

/// Two hosts joined by a veth pair.
pub struct Pair {
    /// Where programs are started and dumped; image-proxy runs here.
    pub source: Arc<Host>,
    /// Where they are restored; image-cache runs here.
    pub target: Arc<Host>,
    /// For more hosts.
    pub lab: Lab,
}

impl Pair {
    /// Makes both hosts and the link.
    ///
    /// # Errors
    /// If this machine cannot have them.
    pub fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let pair = Self {
            source: lab.host("source")?,
            target: lab.host("target")?,
            lab,
        };
        // Both ends are made in the hosts; the machine's own network is not touched.
        let mut link = Command::new("ip");
        link.args(["link", "add", "name", "eth0", "netns"])
            .arg(pair.source.init().to_string())
            .args(["type", "veth", "peer", "name", "eth0", "netns"])
            .arg(pair.target.init().to_string());
        Job::spawn(link, SOON)?
            .wait()?
            .ok()
            .context("making a veth pair")?;
        for (host, address) in [
            (&pair.source, SOURCE_ADDRESS),
            (&pair.target, TARGET_ADDRESS),
        ] {
            host.sh(&format!(
                "ip addr add {address}/30 dev eth0; ip link set eth0 up"
            ))?;
        }
        Ok(pair)
    }

    /// The source's address on the link.
    pub fn source_address(&self) -> &'static str {
        SOURCE_ADDRESS
    }

    /// The target's address on the link, where the cache normally is.
    pub fn cache_address(&self) -> &'static str {
        TARGET_ADDRESS
    }

    /// The cache on the target and the proxy on the source, both as plain as can be.
    ///
    /// # Errors
    /// If one of them does not come up.
    pub fn daemons(&self) -> Result<(Cache, Proxy)> {
        Ok((self.cache(&[])?, self.proxy(&[])?))
    }

    /// A cache on the target.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn cache(&self, options: &[&str]) -> Result<Cache> {
        Cache::start(&self.target, options)
    }

    /// A proxy on the source.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn proxy(&self, options: &[&str]) -> Result<Proxy> {
        Proxy::start(&self.source, TARGET_ADDRESS, options)
    }

    /// Gives each host a certificate of one authority: the source's names `source`, the target's what the proxy dials.
    ///
    /// # Errors
    /// If they cannot be made.
    pub fn certify(&self, target: &str) -> Result<()> {
        let hosts: [(&Host, &str); 2] = [(&self.source, "source"), (&self.target, target)];
        let made = tempfile::tempdir()?;
        let authority = match AUTHORITY.get() {
            Some(dir) => dir,
            None => {
                let output = Command::new(workspace().join("scripts/test-ca"))
                    .arg(made.path())
                    .args(hosts.map(|(_, name)| name))
                    .output()?;
                let errors = String::from_utf8_lossy(&output.stderr);
                ensure!(output.status.success(), "{errors}");
                made.path()
            }
        };
        for (host, name) in hosts {
            fs::create_dir(host.path("/run/tls"))?;
            let own = authority.join(name);
            for (from, to) in [
                (authority.join("cacert.pem"), "cacert.pem"),
                (own.join("cert.pem"), "cert.pem"),
                (own.join("key.pem"), "key.pem"),
            ] {
                fs::copy(from, host.path(&format!("/run/tls/{to}")))?;
            }
        }
        Ok(())
    }

    /// Takes the link down: packets vanish in both directions, nobody is told.
    ///
    /// # Errors
    /// If the link cannot be changed.
    pub fn cut(&self) -> Result<()> {
        self.source.sh("ip link set eth0 down").map(drop)
    }

    /// Takes the link up again.
    ///
    /// # Errors
    /// If the link cannot be changed.
    pub fn mend(&self) -> Result<()> {
        self.source.sh("ip link set eth0 up").map(drop)
    }

    /// Waits until so many bytes more have come over the link than `before`.
    ///
    /// # Errors
    /// If they do not come.
    pub fn wait_for_traffic(&self, before: u64, bytes: u64) -> Result<()> {
        wait_until("images flowing over the link", SOON, || {
            Ok(self.target.received_bytes()? >= before + bytes)
        })
    }

    /// The program lives on the source, counts on from where it was, and can report on itself.
    ///
    /// # Errors
    /// If it does not.
    pub fn unharmed_on_source(&self, program: &Program) -> Result<()> {
        ensure!(
            self.source.is_alive(program.pid)?,
            "the process is gone from the source"
        );
        ensure!(
            !self.target.is_alive(program.pid)?,
            "a copy runs on the target"
        );
        program
            .runs_on()
            .context("on the source, after a failed dump")?;
        program.report(&self.source).map(drop)
    }
}
