//! A server that does nothing but answer a `criu restore --stream` from memory: what is left between it and a restore
//! from tmpfs is CRIU's own, with any server.
//!
//! One thread reads requests with blocking calls and writes each image itself, as far as a pipe holds it; larger ones
//! have a thread each, because CRIU asks for pages while it still reads their pagemap.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{ensure, Context as _, Result};
use rustix::net::{recvmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

const SOCKET: &str = "streamer-serve.sock";
const DEFAULT_PIPE_BYTES: usize = 64 << 10;
const PIPE_BYTES: usize = 1 << 20;
/// A name is shorter, and a protobuf of it has its length in one byte.
const MAX_REQUEST: usize = 128;

/// Serves one restore.
pub struct Null {
    server: JoinHandle<Result<()>>,
}

impl Null {
    /// Reads the images of a directory and listens in it.
    pub fn start(dir: &Path) -> Result<Self> {
        let mut images = HashMap::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().into_encoded_bytes();
            images.insert(name, Arc::new(fs::read(entry.path())?));
        }
        let listener = UnixListener::bind(dir.join(SOCKET)).context("binding the null server")?;
        let server = thread::spawn(move || serve(&listener.accept()?.0, &images));
        Ok(Self { server })
    }

    /// Waits for the restore's end.
    pub fn end(self) -> Result<()> {
        let ended = self.server.join();
        ended.map_err(|_| anyhow::anyhow!("the null server panicked"))?
    }
}

fn serve(mut criu: &UnixStream, images: &HashMap<Vec<u8>, Arc<Vec<u8>>>) -> Result<()> {
    let mut writers = Vec::new();
    let spin = std::env::var_os("NULL_SPIN").is_some();
    let sock = criu;
    let wait = || {
        if spin {
            let mut b = [0u8; 1];
            let t = std::time::Instant::now();
            while t.elapsed().as_micros() < 100 {
                match rustix::net::recv(sock, &mut b[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
                    Err(_) => std::hint::spin_loop(),
                    _ => break,
                }
            }
        }
    };
    loop {
        let mut length = [0; 4];
        wait();
        match criu.read_exact(&mut length) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => break,
            read => read?,
        }
        let length = usize::try_from(u32::from_le_bytes(length))?;
        ensure!((2..MAX_REQUEST).contains(&length), "a long request");
        let mut request = vec![0; length];
        criu.read_exact(&mut request)?;
        // Field 1, its length, the name.
        let image = images.get(&request[2..]);
        criu.write_all(&[2, 0, 0, 0, 8, u8::from(image.is_some())])?;
        let Some(image) = image.cloned() else {
            continue;
        };
        wait();
        let pipe = descriptor(criu)?;
        let small = image.len() <= DEFAULT_PIPE_BYTES;
        if !small {
            // A refusal costs only speed.
            let _ = rustix::pipe::fcntl_setpipe_size(&pipe, PIPE_BYTES);
        }
        let mut pipe = File::from(pipe);
        let mut write = move || match pipe.write_all(&image) {
            // CRIU reads no further than it needs.
            Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(e),
            _ => Ok(()),
        };
        match small {
            true => write()?,
            false => writers.push(thread::spawn(write)),
        }
    }
    for writer in writers {
        writer.join().ok().context("a writer panicked")??;
    }
    Ok(())
}

fn descriptor(criu: &UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    recvmsg(criu, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let sent = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    sent.context("CRIU sent no descriptor")
}
