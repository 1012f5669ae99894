//! The client of CRIU's page server, as `criu/page-xfer.c` of 4.1 has it: headers of 24 bytes, a
//! corked socket, pages by reference from memory into a pipe and from there into the socket.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;

use anyhow::{ensure, Context, Result};
use rustix::net::sockopt::{set_tcp_cork, set_tcp_nodelay};
use rustix::pipe::{fcntl_setpipe_size, splice, vmsplice, IoSliceRaw, SpliceFlags};

use super::space::Entry;
use crate::fake::wire;
use crate::memory::PAGE;

const OPEN2: u32 = 4;
const PARENT: u32 = 5;
const ADD_F: u32 = 6;
const CLOSE: u32 = 0x1023;

const PE_PARENT: u32 = 1;
/// PE_LAZY | PE_PRESENT: how dump marks private memory that it sends
pub const PE_SENT: u32 = 6;

/// Pages that a pipe takes.
const PIPE_PAGES: usize = 256;

/// The process whose pages are sent, in the rounds of the bench.
pub const PID: u64 = 100;

/// Type 1: the pagemap of a task.
const fn dst_id(pid: u64) -> u64 {
    pid << 8 | 1
}

/// One round: connect, open, entries, close.
pub struct PageClient {
    socket: TcpStream,
    pipe: (OwnedFd, OwnedFd),
    dst_id: u64,
    /// Flags of an entry whose pages are sent.
    sent: u32,
}

impl PageClient {
    /// `sent`: the flags of an entry whose pages are sent.
    pub fn connect(port: u16, pid: u64, sent: u32) -> Result<Self> {
        let socket =
            TcpStream::connect(("127.0.0.1", port)).context("connecting to the page server")?;
        set_tcp_cork(&socket, true)?;
        let pipe = wire::pipe()?;
        let got = fcntl_setpipe_size(&pipe.1, PIPE_PAGES * PAGE).context("enlarging a pipe")?;
        ensure!(got >= PIPE_PAGES * PAGE, "a pipe of {got} bytes only");
        let dst_id = dst_id(pid);
        Ok(Self {
            socket,
            pipe,
            dst_id,
            sent,
        })
    }

    /// Opens the pagemap, after the question that pre-dump asks before; whether there is a parent.
    pub fn open(&mut self) -> Result<bool> {
        self.request(PARENT, 0, 0, self.dst_id)?;
        let known = u32::from_le_bytes(self.answer().context("the answer to PARENT")?);
        self.request(OPEN2, 0, 0, self.dst_id)?;
        let [parent] = self.answer().context("the answer to OPEN2")?;
        ensure!(
            parent <= 1 && known == u32::from(parent),
            "PARENT says {known}, OPEN2 says {parent}"
        );
        Ok(parent == 1)
    }

    /// Sends the entries with their pages out of `memory`: as many as a pipe takes are put into
    /// it at once, then each is sent behind its header.
    pub fn send(&mut self, mut entries: &[Entry], memory: &[u8]) -> Result<()> {
        while !entries.is_empty() {
            let mut pages = 0;
            let fits = entries.iter().take_while(|entry| {
                pages += entry.memory.map_or(0, |_| entry.pages);
                pages <= PIPE_PAGES
            });
            let (now, later) = entries.split_at(fits.count());
            ensure!(!now.is_empty(), "an entry is longer than the pipe");
            self.fill(now, memory)?;
            for entry in now {
                self.add(entry)?;
            }
            entries = later;
        }
        Ok(())
    }

    /// CLOSE, whose answer must be 0. The connection ends when this is dropped.
    pub fn close(&mut self) -> Result<()> {
        self.request(CLOSE, 0, 0, 0)?;
        // answer() pushes it. CRIU does not: it lies in the corked socket for up to 200 ms, whoever the
        // server is. That would hide what is measured.
        let status = i32::from_le_bytes(self.answer().context("the answer to CLOSE")?);
        ensure!(status == 0, "the round is refused: status {status}");
        Ok(())
    }

    fn fill(&self, entries: &[Entry], memory: &[u8]) -> Result<()> {
        let of = |entry: &Entry| {
            let start = entry.memory? * PAGE;
            Some(&memory[start..start + entry.pages * PAGE])
        };
        let parts: Vec<_> = entries
            .iter()
            .filter_map(of)
            .map(IoSliceRaw::from_slice)
            .collect();
        let bytes: usize = entries.iter().filter_map(of).map(<[u8]>::len).sum();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the slices are valid readable memory for the length of the call. Afterwards the
        // pipe holds references to its pages, which the kernel only reads.
        let moved = unsafe { vmsplice(&self.pipe.1, &parts, SpliceFlags::GIFT) }
            .context("vmsplice into a page pipe")?;
        ensure!(moved == bytes, "vmsplice took {moved} of {bytes} bytes");
        Ok(())
    }

    fn add(&mut self, entry: &Entry) -> Result<()> {
        let flags = entry.memory.map_or(PE_PARENT, |_| self.sent);
        self.request(flags << 16 | ADD_F, entry.pages, entry.vaddr, self.dst_id)?;
        let mut left = entry.memory.map_or(0, |_| entry.pages * PAGE);
        while left > 0 {
            let n = splice(
                &self.pipe.0,
                None,
                &self.socket,
                None,
                left,
                SpliceFlags::MOVE,
            )
            .context("splicing pages to the page server")?;
            ensure!(n > 0, "the page pipe is empty");
            left -= n;
        }
        Ok(())
    }

    fn request(&mut self, cmd: u32, pages: usize, vaddr: u64, dst_id: u64) -> Result<()> {
        let header = header(cmd, u32::try_from(pages)?, vaddr, dst_id);
        self.socket.write_all(&header).context("sending a request")
    }

    /// Sends what is corked.
    pub fn push(&self) -> Result<()> {
        Ok(set_tcp_nodelay(&self.socket, true)?)
    }

    fn answer<const N: usize>(&mut self) -> Result<[u8; N]> {
        self.push()?;
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// `struct page_server_iov` until 4.1.
fn header(cmd: u32, pages: u32, vaddr: u64, dst_id: u64) -> [u8; 24] {
    let mut out = [0; 24];
    out[..4].copy_from_slice(&cmd.to_le_bytes());
    out[4..8].copy_from_slice(&pages.to_le_bytes());
    out[8..16].copy_from_slice(&vaddr.to_le_bytes());
    out[16..].copy_from_slice(&dst_id.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::fast::space::{Dirty, Space};
    use crate::memory::Warm;
    use std::net::TcpListener;

    #[test]
    fn golden_header() {
        // Section 7 of page-server.md: two present pages of pid 100.
        assert_eq!(
            header(4 << 16 | ADD_F, 2, 0x40_0000, dst_id(PID)),
            *b"\x06\0\x04\0\x02\0\0\0\0\0\x40\0\0\0\0\0\x01\x64\0\0\0\0\0\0"
        );
    }

    /// A server that answers and keeps what it got.
    fn serve(listener: &TcpListener, status: i32) -> Vec<u8> {
        let (mut socket, _) = listener.accept().unwrap();
        let mut all = vec![0; 24];
        socket.read_exact(&mut all).unwrap();
        socket.write_all(&1u32.to_le_bytes()).unwrap();
        socket.read_exact(&mut all).unwrap();
        socket.write_all(&[1]).unwrap();
        all.clear();
        loop {
            let start = all.len();
            all.resize(start + 24, 0);
            socket.read_exact(&mut all[start..]).unwrap();
            let word = |at: usize| u32::from_le_bytes(all[at..at + 4].try_into().unwrap());
            let (cmd, pages) = (word(start), word(start + 4) as usize);
            if cmd & 0xffff == CLOSE {
                all.truncate(start);
                socket.write_all(&status.to_le_bytes()).unwrap();
                return all;
            }
            if cmd >> 16 & 4 != 0 {
                let start = all.len();
                all.resize(start + pages * PAGE, 0);
                socket.read_exact(&mut all[start..]).unwrap();
            }
        }
    }

    #[test]
    fn a_round_is_its_entries_with_their_pages() {
        let space = Space::new(3000);
        let mut memory = Warm::source(3000 * PAGE).unwrap();
        memory.stamp(5);
        for what in [Dirty::All, Dirty::Scattered(10)] {
            let entries = space.entries(&space.dirty(what, 3));
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = std::thread::spawn(move || serve(&listener, 0));
            let mut client = PageClient::connect(port, PID, PE_SENT).unwrap();
            assert!(client.open().unwrap());
            client.send(&entries, memory.bytes()).unwrap();
            client.close().unwrap();
            let mut want = Vec::new();
            for entry in &entries {
                let cmd = entry.memory.map_or(0x1_0006, |_| 0x6_0006);
                let pages = u32::try_from(entry.pages).unwrap();
                want.extend(header(cmd, pages, entry.vaddr, dst_id(PID)));
                if let Some(first) = entry.memory {
                    want.extend(&memory.bytes()[first * PAGE..(first + entry.pages) * PAGE]);
                }
            }
            assert!(server.join().unwrap() == want, "{what:?}");
        }
    }

    #[test]
    fn a_refused_round_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let server = std::thread::spawn(move || serve(&listener, -1));
        let mut client = PageClient::connect(port, PID, PE_SENT).unwrap();
        client.open().unwrap();
        assert!(client.close().unwrap_err().to_string().contains("refused"));
        server.join().unwrap();
    }
}
