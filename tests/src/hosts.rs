//! Two hosts on this machine: network namespaces joined by a veth, where every TCP connection
//! from the first to the second may carry only so much.
//!
//! The limit is per connection because each local port of the first host has an HTB class of
//! its own, and the host has no more ports than classes. (`fq maxrate` would say the same in one
//! line, where the kernel has it.) A process in each namespace keeps it; they die with the
//! bench, and the namespaces with them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rustix::thread::{move_into_link_name_space, LinkNameSpaceType};

use crate::fake::wire::pipe;
use crate::process::Process;

pub const TARGET: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
/// Ports of the source host, and classes.
const FIRST_PORT: u16 = 40_000;
const PORTS: u16 = 64;
const SETUP: Duration = Duration::from_secs(10);

/// A network namespace with its keeper.
pub struct Host {
    _keeper: Process,
    pub namespace: String,
}

pub struct Hosts {
    pub source: Host,
    pub target: Host,
}

impl Host {
    fn start(name: &str) -> Result<Self> {
        let (ready, says) = pipe()?;
        let mut command = Command::new("unshare");
        command
            .args([
                "--net",
                "sh",
                "-c",
                "ip link set lo up && echo && exec sleep 3600",
            ])
            .stdout(Stdio::from(says));
        let keeper = Process::spawn(name, command)?;
        let mut line = [0];
        let n = File::from(ready).read(&mut line)?;
        ensure!(n == 1, "no network namespace: is this root?");
        Ok(Self {
            namespace: format!("/proc/{}/ns/net", keeper.id()),
            _keeper: keeper,
        })
    }

    /// The words before a command that is to run on this host.
    pub fn by(&self) -> Vec<String> {
        let namespace = format!("--net={}", self.namespace);
        vec!["nsenter".to_owned(), namespace, "--".to_owned()]
    }

    /// A command that will run on this host.
    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let by = self.by();
        let mut command = Command::new(&by[0]);
        command.args(&by[1..]).arg(program);
        command
    }

    fn run(&self, script: &str) -> Result<()> {
        let mut command = self.command("sh");
        command.args(["-euc", script]);
        let status = Process::spawn("network setup", command)?.wait_within(SETUP)?;
        ensure!(status.success(), "network setup: {status}");
        Ok(())
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(Path::new(&self.namespace), work)
    }
}

/// Runs `work` in a thread that is in this network namespace.
///
/// # Errors
/// If it cannot get there, or as `work`.
///
/// # Panics
/// If `work` does.
pub fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(namespace)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let kind = LinkNameSpaceType::Network;
            move_into_link_name_space(namespace.as_fd(), Some(kind)).context("setns")?;
            work()
        });
        thread.join().expect("no panic")
    })
}

impl Hosts {
    /// With `bits` per second for each connection.
    pub fn start(bits: u64) -> Result<Self> {
        let hosts = Self {
            source: Host::start("source host")?,
            target: Host::start("target host")?,
        };
        let peer = hosts.target.namespace.split('/').nth(2).context("a pid")?;
        let last = FIRST_PORT + PORTS - 1;
        let mut script = format!(
            "ip link add link0 type veth peer name link0 netns {peer}
             ip address add {SOURCE}/24 dev link0
             ip link set link0 up
             echo {FIRST_PORT} {last} > /proc/sys/net/ipv4/ip_local_port_range
             tc qdisc add dev link0 root handle 1: htb\n"
        );
        for n in 1..=PORTS {
            let port = FIRST_PORT + n - 1;
            script += &format!(
                "tc class add dev link0 parent 1: classid 1:{n:x} htb rate {bits} burst 128k quantum 60000
                 tc filter add dev link0 parent 1: protocol ip u32 match ip sport {port} 0xffff flowid 1:{n:x}\n"
            );
        }
        hosts.source.run(&script)?;
        hosts.target.run(&format!(
            "ip address add {TARGET}/24 dev link0; ip link set link0 up"
        ))?;
        Ok(hosts)
    }

    /// Bytes per second of so many plain connections at once, each carrying all of `src`.
    pub fn raw(&self, connections: usize, src: &[u8]) -> Result<f64> {
        let listener = self.target.inside(|| Ok(TcpListener::bind((TARGET, 0))?))?;
        let address = SocketAddr::from((TARGET, listener.local_addr()?.port()));
        let senders = self.source.inside(|| {
            let connect = |_| Ok(TcpStream::connect(address)?);
            (0..connections).map(connect).collect::<Result<Vec<_>>>()
        })?;
        let receivers = (0..connections)
            .map(|_| Ok(listener.accept()?.0))
            .collect::<Result<Vec<_>>>()?;
        let begin = Instant::now();
        std::thread::scope(|scope| {
            for mut sender in senders {
                scope.spawn(move || sender.write_all(src));
            }
            let readers: Vec<_> = receivers
                .into_iter()
                .map(|from| scope.spawn(move || read_to_end(from)))
                .collect();
            for reader in readers {
                let got = reader.join().expect("no panic")?;
                ensure!(got == src.len(), "{got} bytes came of {}", src.len());
            }
            Ok(())
        })?;
        Ok((src.len() * connections) as f64 / begin.elapsed().as_secs_f64())
    }
}

fn read_to_end(mut from: TcpStream) -> Result<usize> {
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(total),
            n => total += n,
        }
    }
}
