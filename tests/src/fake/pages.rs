//! A fake `criu pre-dump --page-server` or `criu dump --page-server`, in a process of its own: what the page server can
//! know of a CRIU is its process and the directory that it has open.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::child::{stand_still, FakeCriu, Started};
use super::script;

pub const PAGE_BYTES: usize = 4096;

/// Where its one pagemap begins, and whose it is: the same in each process, as in containers.
pub const ADDRESS: u64 = 0x40_0000;
pub const TASK: u64 = 252;

const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const CLOSE: u32 = 0x1023;
const HOLE: u32 = 1;
const PRESENT: u32 = 4;

const LIMIT: Duration = Duration::from_secs(40);

/// One round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PageRound {
    pub port: u16,
    /// CRIU's `-D`. `None`: a client that has no directory open.
    pub images_dir: Option<PathBuf>,
    /// `--prev-images-dir`
    pub parent: Option<String>,
    /// The whole memory: what each page is filled with.
    pub memory: Vec<u64>,
    /// Which of its pages are sent if there is a parent.
    pub changed: Vec<usize>,
    pub dump: Option<Dump>,
    /// Stands still in the middle of the round.
    pub stop: bool,
    /// Goes away in the middle of the round.
    pub cut: bool,
}

/// What makes a dump of a round.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Dump {
    pub script: PathBuf,
    pub work_dir: PathBuf,
    /// The other images.
    pub files: PathBuf,
}

/// The bytes of such a memory.
pub fn bytes_of(memory: &[u64]) -> Vec<u8> {
    let pages = memory.iter().flat_map(|word| [*word; PAGE_BYTES / 8]);
    pages.flat_map(u64::to_le_bytes).collect()
}

fn request(command: u32, pages: u32, address: u64) -> Vec<u8> {
    let id = if command == CLOSE { 0 } else { TASK << 8 | 1 };
    let head = [command.to_le_bytes(), pages.to_le_bytes()].concat();
    [&head[..], &address.to_le_bytes(), &id.to_le_bytes()].concat()
}

impl PageRound {
    /// Starts it; `program` is the path of `fake-criu`. What it says at its end is whether it had a parent.
    pub fn spawn(&self, program: &str) -> FakeCriu {
        FakeCriu::start(program, "Pages", self)
    }

    /// The same as a CRIU that was started so.
    pub fn spawn_as(&self, program: &str, started: &Started) -> FakeCriu {
        FakeCriu::start_as(program, "Pages", self, started)
    }

    pub(super) fn run(&self) -> io::Result<bool> {
        // In CRIU's order, and open until the end.
        let _dir = self.images_dir.as_ref().map(File::open).transpose()?;
        if let (Some(dir), Some(parent)) = (&self.images_dir, &self.parent) {
            symlink(parent, dir.join("parent"))?;
        }
        self.script("pre-dump")?;
        let had_parent = self.send()?;
        if let (Some(dump), Some(dir)) = (&self.dump, &self.images_dir) {
            copy_files(&dump.files, dir)?;
        }
        self.script("post-dump")?;
        Ok(had_parent)
    }

    fn send(&self) -> io::Result<bool> {
        let mut server = TcpStream::connect(("127.0.0.1", self.port))?;
        server.set_read_timeout(Some(LIMIT))?;
        server.write_all(&request(PARENT, 0, 0))?;
        let mut word = [0; 4];
        server.read_exact(&mut word)?;
        server.write_all(&request(OPEN2, 0, 0))?;
        let mut byte = [0];
        server.read_exact(&mut byte)?;
        let has_parent = byte == [1];
        if u32::from_le_bytes(word) != u32::from(byte[0]) {
            return Err(io::Error::other("two answers to one question"));
        }
        for (n, fill) in self.memory.iter().enumerate() {
            if n == self.memory.len() / 2 {
                if self.stop {
                    stand_still("the round");
                }
                if self.cut {
                    return Ok(has_parent);
                }
            }
            let present = !has_parent || self.changed.contains(&n);
            let flags = if present { PRESENT } else { HOLE };
            let address = ADDRESS + (n * PAGE_BYTES) as u64;
            server.write_all(&request(ADD_F | flags << 16, 1, address))?;
            if present {
                server.write_all(&bytes_of(&[*fill]))?;
            }
        }
        server.write_all(&request(CLOSE, 0, 0))?;
        server.read_exact(&mut word)?;
        server.shutdown(Shutdown::Both)?;
        match i32::from_le_bytes(word) {
            0 => Ok(has_parent),
            status => Err(io::Error::other(format!("CLOSE: {status}"))),
        }
    }

    fn script(&self, action: &str) -> io::Result<()> {
        let (Some(dump), Some(dir)) = (&self.dump, &self.images_dir) else {
            return Ok(());
        };
        let result = script::run(&dump.script, action, dir, &dump.work_dir, LIMIT)?;
        match result.ok() {
            true => Ok(()),
            false => Err(io::Error::other(format!("{action}: {result:?}"))),
        }
    }
}

fn copy_files(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
