//! A redis-server of the root's own package, and its client.

use anyhow::{ensure, Context, Result};

use super::lab::Host;
use super::{wait_until, SOON};

/// On a unix socket only: from Linux 6.16 on, the kernel refuses SO_PASSCRED to TCP sockets, and
/// CRIU 4.1.1 takes that for an error, so that it cannot dump any process with a TCP socket there
/// (criu/sockets.c, dump_socket_opts; mended in 4.2).
const SOCKET: &str = "/mnt/redis/redis.sock";

/// A redis-server that keeps everything in memory.
#[derive(Debug)]
pub struct Redis {
    /// Its pid, the same on every host.
    pub pid: i32,
}

impl Redis {
    /// Starts the server and waits until it answers.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn start(host: &Host) -> Result<Self> {
        host.sh("mkdir -p /mnt/redis")?;
        let pid = host.launch(&[
            "/usr/bin/redis-server",
            "--port",
            "0",
            "--unixsocket",
            SOCKET,
            "--dir",
            "/mnt/redis",
            "--logfile",
            "/mnt/redis/redis.log",
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "local",
        ])?;
        let redis = Self { pid };
        wait_until("redis-server answering", SOON, || {
            let answer = host.run(&["redis-cli", "-s", SOCKET, "ping"], SOON)?;
            Ok(answer.status.success() && answer.stdout.trim() == "PONG")
        })?;
        Ok(redis)
    }

    /// The server's answer to a command of a client on `host`.
    ///
    /// # Errors
    /// If the server cannot be reached or answers with an error.
    pub fn ask(&self, host: &Host, command: &[&str]) -> Result<String> {
        // -e: an error answer becomes an exit status.
        let mut argv = vec!["redis-cli", "-s", SOCKET, "-e"];
        argv.extend_from_slice(command);
        let answer = host.run(&argv, SOON)?.ok()?;
        Ok(answer.trim().to_owned())
    }

    /// Waits until the server has noticed that the last client has hung up: a connection to a
    /// process outside of the dumped tree would make the dump fail.
    ///
    /// # Errors
    /// If a client stays.
    pub fn wait_for_clients_to_leave(&self, host: &Host) -> Result<()> {
        wait_until("redis-server closing connections", SOON, || {
            Ok(!host.is_connected(SOCKET)?)
        })
    }

    /// A field of `INFO`.
    ///
    /// # Errors
    /// If the server does not answer or has no such field.
    pub fn info(&self, host: &Host, field: &str) -> Result<String> {
        let info = self.ask(host, &["info"])?;
        let value = info
            .lines()
            .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
            .with_context(|| format!("no {field} in INFO"))?;
        ensure!(!value.trim().is_empty(), "{field} is empty in INFO");
        Ok(value.trim().to_owned())
    }
}
