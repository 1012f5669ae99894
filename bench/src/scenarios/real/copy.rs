//! A directory of images from one host's tmpfs to the other's, over one TCP connection of the
//! link between them: no protocol, no small writes, as fast as a copy of files can be.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{ensure, Context as _, Result};
use e2e_tests::hosts::inside;
use e2e_tests::real::{Host, Pair};
use rustix::fs::sendfile;

const BLOCK: usize = 256 << 10;

/// Copies `dir` of the source into `dir` of the target, which is there and empty.
pub fn directory(pair: &Pair, dir: &str) -> Result<()> {
    let (from, into) = (pair.source.path(dir), pair.target.path(dir));
    let files = list(&from)?;
    let listener = inside(&network(&pair.target), || {
        Ok(TcpListener::bind((pair.cache_address(), 0))?)
    })?;
    let address = listener.local_addr()?;
    let sender = inside(&network(&pair.source), || Ok(TcpStream::connect(address)?))?;
    let mut receiver = listener.accept()?.0;
    std::thread::scope(|scope| {
        let (from, sent) = (&from, &files);
        let sending = scope.spawn(move || {
            sent.iter()
                .try_for_each(|(name, bytes)| send(&from.join(name), *bytes, &sender))
        });
        let mut block = vec![0; BLOCK];
        for (name, bytes) in &files {
            receive(&mut receiver, &into.join(name), *bytes, &mut block)?;
        }
        sending.join().expect("the sending thread does not panic")
    })
}

/// The names and sizes. The receiver takes them from here; they would be another few packets.
fn list(dir: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        ensure!(entry.file_type()?.is_file(), "{entry:?} is no file");
        files.push((entry.file_name().into(), entry.metadata()?.len()));
    }
    Ok(files)
}

fn send(path: &Path, bytes: u64, to: &TcpStream) -> Result<()> {
    let file = File::open(path)?;
    let mut at = 0;
    while at < bytes {
        let n = sendfile(to, &file, Some(&mut at), 1 << 20).context("sendfile")?;
        ensure!(n > 0, "{} became shorter", path.display());
    }
    Ok(())
}

fn receive(from: &mut TcpStream, path: &Path, bytes: u64, block: &mut [u8]) -> Result<()> {
    let mut file = File::create_new(path)?;
    let mut left = bytes;
    while left > 0 {
        let want = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        let n = from.read(&mut block[..want])?;
        ensure!(n > 0, "the connection ended in {}", path.display());
        file.write_all(&block[..n]).context("writing to tmpfs")?;
        left -= n as u64;
    }
    Ok(())
}

/// The network namespace of a host.
fn network(host: &Host) -> PathBuf {
    format!("/proc/{}/ns/net", host.init()).into()
}
