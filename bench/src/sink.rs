//! The limit of any page server that keeps what it gets: two recv() per entry, each page straight
//! to its place in warm memory, and nothing else.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{bail, Context, Result};

use e2e_tests::fake::fast::space::Space;
use e2e_tests::memory::{Warm, PAGE};

pub struct Sink {
    space: Space,
    memory: Warm,
    listener: TcpListener,
}

impl Sink {
    pub fn new(pages: usize) -> Result<Self> {
        Ok(Self {
            space: Space::new(pages),
            memory: Warm::new(pages * PAGE, 0xff)?,
            listener: TcpListener::bind("127.0.0.1:0")?,
        })
    }

    pub fn port(&self) -> Result<u16> {
        Ok(self.listener.local_addr()?.port())
    }

    pub fn memory(&self) -> &[u8] {
        self.memory.bytes()
    }

    /// Serves one round, whose client is told whether there is a `parent`; gives this thread's CPU
    /// time.
    pub fn serve(&mut self, parent: bool) -> Result<Duration> {
        let before = thread_cpu()?;
        let (mut socket, _) = self.listener.accept()?;
        socket.set_nodelay(true)?;
        self.round(&mut socket, u8::from(parent))?;
        Ok(thread_cpu()?.saturating_sub(before))
    }

    fn round(&mut self, socket: &mut TcpStream, parent: u8) -> Result<()> {
        let mut header = [0; 24];
        loop {
            socket.read_exact(&mut header).context("a request")?;
            let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| header[at + n]));
            match (word(0) & 0xffff, word(0) >> 16) {
                (4, _) => socket.write_all(&[parent])?,
                (5, _) => socket.write_all(&u32::from(parent).to_le_bytes())?,
                (6, flags) if flags & 4 != 0 => {
                    let vaddr = u64::from(word(12)) << 32 | u64::from(word(8));
                    let at = self.place(vaddr).context("an address outside")?;
                    let len = word(4) as usize * PAGE;
                    socket.read_exact(&mut self.memory.bytes_mut()[at..at + len])?;
                }
                (6, _) => (),
                (0x1023, _) => return Ok(socket.write_all(&0u32.to_le_bytes())?),
                (cmd, _) => bail!("request {cmd:#x}"),
            }
        }
    }

    fn place(&self, vaddr: u64) -> Option<usize> {
        let regions = &self.space.regions;
        let next = regions.partition_point(|region| region.vaddr <= vaddr);
        let region = &regions[next.checked_sub(1)?];
        Some(region.first * PAGE + usize::try_from(vaddr - region.vaddr).ok()?)
    }
}

/// CPU time of this thread. The kernel brings it up to date when the thread sleeps.
fn thread_cpu() -> Result<Duration> {
    std::thread::sleep(Duration::from_millis(1));
    let text = std::fs::read_to_string("/proc/thread-self/schedstat")?;
    let nanos = text.split(' ').next().context("schedstat is empty")?;
    Ok(Duration::from_nanos(nanos.parse()?))
}
