//! Other ways to move one large image, for comparison.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure, Context as _, Result};
use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::{memfd_create, sendfile, MemfdFlags};

use super::{gib_per_second, IMAGE};
use crate::raw::tcp_pair;
use crate::runner::{Context, Scenario};
use crate::table::{Group, RowSpec, Samples, Unit};
use e2e_tests::fake::fast::read_exactly;
use e2e_tests::memory::compare;
use e2e_tests::process::Process;

const START: Duration = Duration::from_secs(10);

fn row(key: &str, title: &str) -> Vec<RowSpec> {
    let row = RowSpec::new(Group::Peers, key, title, Unit::GibPerSecond);
    vec![row.beside("raw.tcp", "loopback TCP")]
}

/// Two socats, with large blocks: what a shell user would put between two unix sockets.
pub struct Socat;

impl Scenario for Socat {
    fn name(&self) -> String {
        "socat".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        row("socat", "socat: unix -> TCP -> unix")
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        let installed = Command::new("socat")
            .arg("-V")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if !installed.is_ok_and(|status| status.success()) {
            out.note("socat", "socat is not installed");
            return Ok(());
        }
        context.next_stamp();
        let dir = context.dir.join("socat");
        std::fs::create_dir_all(&dir)?;
        let (entry, exit) = (dir.join("in"), dir.join("out"));
        let _ = std::fs::remove_file(&exit);
        let listener = UnixListener::bind(&exit).context("listening behind socat")?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut target = socat(
            &format!("TCP-LISTEN:{port},bind=127.0.0.1"),
            &format!("UNIX-CONNECT:{}", exit.display()),
        )?;
        let mut source = socat(
            &format!("UNIX-LISTEN:{}", entry.display()),
            &format!("TCP:127.0.0.1:{port},retry=100,interval=0.05"),
        )?;
        let mut tx = connect_when_there(&entry)?;
        let mut rx = File::from(accept(&listener)?);

        let (src, dst) = (context.src.bytes(), context.dst.bytes_mut());
        let begin = Instant::now();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || tx.write_all(src));
            read_exactly(&mut rx, dst)?;
            writer
                .join()
                .expect("the writing thread does not panic")
                .context("writing to socat")
        })?;
        out.push("socat", gib_per_second(IMAGE, begin.elapsed()));
        compare("socat", dst, src)?;
        drop(rx);
        source.wait_within(START)?;
        target.wait_within(START)?;
        Ok(())
    }
}

fn socat(from: &str, to: &str) -> Result<Process> {
    let mut command = Command::new("socat");
    command.args(["-u", "-b", "262144", from, to]);
    Process::spawn("socat", command)
}

fn connect_when_there(path: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + START;
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => (),
            Err(e) => return Err(e).context("connecting to socat"),
        }
        ensure!(Instant::now() < deadline, "socat does not listen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn accept(listener: &UnixListener) -> Result<OwnedFd> {
    let limit = Timespec::try_from(START)?;
    if poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&limit))? == 0 {
        bail!("socat does not connect");
    }
    Ok(listener.accept()?.0.into())
}

/// Dump into a tmpfs, then copy the file over TCP into a tmpfs: what there is without a proxy.
/// A memfd is a file of the kernel's tmpfs that leaves nothing behind.
pub struct Tmpfs;

impl Scenario for Tmpfs {
    fn name(&self) -> String {
        "tmpfs".to_owned()
    }

    fn rows(&self) -> Vec<RowSpec> {
        row("tmpfs", "write to tmpfs, then that to a tmpfs over TCP")
    }

    fn sample(&mut self, context: &mut Context, out: &mut Samples) -> Result<()> {
        context.next_stamp();
        let (src, dst) = (context.src.bytes(), context.dst.bytes_mut());
        let file = || {
            memfd_create("bench", MemfdFlags::CLOEXEC)
                .map(File::from)
                .context("creating a memfd")
        };
        let (mut dumped, mut copied) = (file()?, file()?);
        let (tx, rx) = tcp_pair()?;

        let begin = Instant::now();
        dumped.write_all(src).context("writing to tmpfs")?;
        std::thread::scope(|scope| -> Result<()> {
            let dumped = &dumped;
            let sender = scope.spawn(move || -> Result<()> {
                let mut at = 0;
                while at < IMAGE {
                    let n = sendfile(&tx, dumped, Some(&mut at), 1 << 20).context("sendfile")?;
                    ensure!(n > 0, "the file is too short");
                }
                Ok(())
            });
            let mut rx = File::from(rx);
            let mut block = vec![0; 256 << 10];
            loop {
                match rx.read(&mut block)? {
                    0 => break,
                    n => copied.write_all(&block[..n]).context("writing to tmpfs")?,
                }
            }
            sender.join().expect("the sending thread does not panic")
        })?;
        out.push("tmpfs", gib_per_second(IMAGE, begin.elapsed()));

        std::io::Seek::rewind(&mut copied)?;
        read_exactly(&mut copied, dst).context("reading the copy")?;
        compare("tmpfs", dst, src)
    }
}
