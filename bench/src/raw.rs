//! What the machine itself can do: the limits that the daemons' numbers stand beside.
//!
//! Each function moves `src` into `dst` (both warm, of one length) and returns how long it took.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{ensure, Context, Result};
use rustix::fs::{memfd_create, MemfdFlags};
use rustix::pipe::{fcntl_setpipe_size, splice, SpliceFlags};
use rustix::time::ClockId;

use e2e_tests::fake::fast::work::time_of;
use e2e_tests::fake::fast::{read_exactly, vmsplice_all};
use e2e_tests::fake::wire::{self, pipe};
use e2e_tests::memory::{Body, Warm, PAGE};

/// The largest pipe that an unprivileged process gets (`/proc/sys/fs/pipe-max-size` by default).
const PIPE_BYTES: usize = 1 << 20;
/// Bytes per write() to TCP; larger ones gain nothing.
const CHUNK: usize = 256 << 10;

pub fn memcpy(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let start = Instant::now();
    dst.copy_from_slice(src);
    // Keeps the copy from being optimised away.
    std::hint::black_box(&dst);
    Ok(start.elapsed())
}

pub fn pipe_write(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let (r, w) = big_pipe()?;
    timed(
        || File::from(w).write_all(src).context("writing to a pipe"),
        || read_exactly(&mut File::from(r), dst),
    )
}

pub fn pipe_vmsplice(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let (r, w) = big_pipe()?;
    timed(
        || vmsplice_all(w, src),
        || read_exactly(&mut File::from(r), dst),
    )
}

/// The same from huge pages, as image-cache has them: fewer pages to look up.
pub fn pipe_vmsplice_huge(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    pipe_vmsplice(Warm::huge(src)?.bytes(), dst)
}

pub fn unix(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let (mut tx, rx) = UnixStream::pair()?;
    timed(
        || {
            src.chunks(CHUNK)
                .try_for_each(|chunk| tx.write_all(chunk))
                .context("writing to a unix socket")
        },
        || read_exactly(&mut File::from(OwnedFd::from(rx)), dst),
    )
}

pub fn tcp(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let (mut tx, rx) = tcp_pair()?;
    timed(
        || {
            src.chunks(CHUNK)
                .try_for_each(|chunk| tx.write_all(chunk))
                .context("writing to TCP")
        },
        || read_exactly(&mut File::from(rx), dst),
    )
}

/// The shape of the dump side without any protocol: a pipe filled by reference, spliced into TCP,
/// received into warm memory.
pub fn pipe_splice_tcp(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let (r, w) = big_pipe()?;
    let (tx, rx) = tcp_pair()?;
    std::thread::scope(|scope| {
        let mover = scope.spawn(move || splice_to_end(r, tx));
        let took = timed(
            || vmsplice_all(w, src),
            || read_exactly(&mut File::from(rx), dst),
        )?;
        mover.join().expect("the splicing thread does not panic")?;
        Ok(took)
    })
}

/// The same into memory that nobody has touched, as a new image's is: huge pages, made ready by a
/// thread of their own, up to 4 MiB ahead of what is received.
pub fn pipe_splice_tcp_fresh(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    const STEP: usize = 2 << 20;
    const AHEAD: usize = 2 * STEP;
    let mut fresh = Warm::untouched(dst.len())?;
    let (begin, len) = (fresh.bytes().as_ptr() as usize, dst.len());
    let (r, w) = big_pipe()?;
    let (tx, rx) = tcp_pair()?;
    let (ask, asked) = std::sync::mpsc::sync_channel::<usize>(64);
    let took = std::thread::scope(|scope| -> Result<Duration> {
        let mover = scope.spawn(move || splice_to_end(r, tx));
        scope.spawn(move || {
            for at in asked {
                let n = STEP.min(len - at);
                // SAFETY: the range is within `fresh`, which outlives this scope; populating it
                // changes no byte of it.
                unsafe { libc::madvise((begin + at) as *mut _, n, libc::MADV_POPULATE_WRITE) };
            }
        });
        let into = fresh.bytes_mut();
        let took = timed(
            || vmsplice_all(w, src),
            move || {
                let mut rx = File::from(rx);
                for (n, part) in into.chunks_mut(STEP).enumerate() {
                    let at = n * STEP + AHEAD;
                    if at < len {
                        // Full, or over: then the reader faults for itself.
                        let _ = ask.try_send(at);
                    }
                    read_exactly(&mut rx, part)?;
                }
                Ok(())
            },
        )?;
        mover.join().expect("the splicing thread does not panic")?;
        Ok(took)
    })?;
    dst.copy_from_slice(fresh.bytes());
    Ok(took)
}

/// [`pipe_splice_tcp`] in `count` equal parts at once.
pub fn pipes_splice_tcp(src: &[u8], dst: &mut [u8], count: usize) -> Result<Duration> {
    let part = src.len() / count;
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let all: Vec<_> = src
            .chunks(part)
            .zip(dst.chunks_mut(part))
            .map(|(src, dst)| scope.spawn(|| pipe_splice_tcp(src, dst)))
            .collect();
        all.into_iter().try_for_each(|one| {
            let moved = one.join().expect("a moving thread does not panic");
            moved.map(drop)
        })
    })?;
    Ok(begin.elapsed())
}

/// What [`pipe_splice_tcp`] of a body costs who splices, and who receives: CPU time.
pub fn splice_tcp_cost(body: &Body<'_>, dst: &mut [u8]) -> Result<[Duration; 2]> {
    let (r, w) = big_pipe()?;
    let (tx, rx) = tcp_pair()?;
    std::thread::scope(|scope| {
        let mover = scope.spawn(move || {
            splice_to_end(r, tx)?;
            Ok::<_, anyhow::Error>(thread_cpu())
        });
        let writer = scope.spawn(move || {
            let mut at = 0;
            let w = &w;
            while at < body.len {
                let part = body.at(at);
                vmsplice_all(w.try_clone()?, part)?;
                at += part.len() as u64;
            }
            Ok::<_, anyhow::Error>(())
        });
        let before = thread_cpu();
        let (mut rx, mut left) = (File::from(rx), body.len);
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(dst.len());
            read_exactly(&mut rx, &mut dst[..n])?;
            left -= n as u64;
        }
        let received = thread_cpu() - before;
        writer.join().expect("the writing thread does not panic")?;
        let moved = mover.join().expect("the splicing thread does not panic")?;
        Ok([moved, received])
    })
}

/// CPU time that this thread has used.
fn thread_cpu() -> Duration {
    time_of(ClockId::ThreadCPUTime)
}

fn splice_to_end(from: OwnedFd, to: TcpStream) -> Result<()> {
    loop {
        let flags = SpliceFlags::MOVE | SpliceFlags::MORE;
        if splice(&from, None, &to, None, PIPE_BYTES, flags).context("splicing to TCP")? == 0 {
            return Ok(());
        }
    }
}

/// A file in the kernel's tmpfs, written before the time begins.
pub fn tmpfs_read(src: &[u8], dst: &mut [u8]) -> Result<Duration> {
    let file = memfd_create("bench", MemfdFlags::CLOEXEC).context("creating a memfd")?;
    let mut file = File::from(file);
    file.write_all(src).context("writing to tmpfs")?;
    file.rewind()?;
    let start = Instant::now();
    read_exactly(&mut file, dst)?;
    Ok(start.elapsed())
}

/// How long images were handed over, and the CPU time of who stood where the daemon does.
pub struct Handover {
    pub wall: Duration,
    pub cpu: Duration,
}

/// `count` images of one page handed over as `--stream` does at dump, to a reader that only reads.
pub fn handover_dump(src: &[u8], dst: &mut [u8], count: usize) -> Result<Handover> {
    let (criu, daemon) = UnixStream::pair()?;
    let mut cpu = Duration::ZERO;
    let wall = timed(
        move || {
            for page in src.chunks_exact(PAGE).take(count) {
                wire::write_frame(&criu, &wire::one_string(b"core-00000.img"))?;
                let (r, w) = pipe()?;
                wire::send_fds(&criu, &[r.as_fd()])?;
                drop(r);
                File::from(w).write_all(page)?;
            }
            Ok(())
        },
        || {
            let before = thread_cpu();
            for page in dst.chunks_exact_mut(PAGE).take(count) {
                wire::read_frame(&daemon)?.context("no request")?;
                let mut image = File::from(wire::recv_fd(&daemon)?);
                read_exactly(&mut image, page)?;
                ensure!(image.read(&mut [0])? == 0, "no end of image");
            }
            cpu = thread_cpu() - before;
            Ok(())
        },
    )?;
    Ok(Handover { wall, cpu })
}

/// The same for restore: request, answer, descriptor, one page; one image after the other.
pub fn handover_restore(src: &[u8], dst: &mut [u8], count: usize) -> Result<Handover> {
    let (criu, daemon) = UnixStream::pair()?;
    let mut cpu = Duration::ZERO;
    let spent = &mut cpu;
    let wall = timed(
        move || {
            let before = thread_cpu();
            for page in src.chunks_exact(PAGE).take(count) {
                wire::read_frame(&daemon)?.context("no request")?;
                wire::write_frame(&daemon, &[8, 1])?;
                File::from(wire::recv_fd(&daemon)?).write_all(page)?;
            }
            *spent = thread_cpu() - before;
            Ok(())
        },
        || {
            for page in dst.chunks_exact_mut(PAGE).take(count) {
                wire::write_frame(&criu, &wire::one_string(b"core-00000.img"))?;
                wire::read_frame(&criu)?.context("no answer")?;
                let (r, w) = pipe()?;
                wire::send_fds(&criu, &[w.as_fd()])?;
                drop(w);
                let mut image = File::from(r);
                read_exactly(&mut image, page)?;
                ensure!(image.read(&mut [0])? == 0, "no end of image");
            }
            Ok(())
        },
    )?;
    Ok(Handover { wall, cpu })
}

/// Runs `write` on a thread of its own and `read` here; the time until both are done.
fn timed(
    write: impl FnOnce() -> Result<()> + Send,
    read: impl FnOnce() -> Result<()>,
) -> Result<Duration> {
    std::thread::scope(|scope| {
        let start = Instant::now();
        let writer = scope.spawn(write);
        let read = read();
        writer.join().expect("the writing thread does not panic")?;
        read?;
        Ok(start.elapsed())
    })
}

fn big_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (r, w) = pipe()?;
    // Refused when the user's pipe pages are used up: then the limit is that of a smaller pipe.
    let _ = fcntl_setpipe_size(&w, PIPE_BYTES);
    Ok((r, w))
}

/// A connected pair on loopback: (sender, receiver).
pub fn tcp_pair() -> Result<(TcpStream, OwnedFd)> {
    let listener = TcpListener::bind("127.0.0.1:0").context("listening on loopback")?;
    let tx = TcpStream::connect(listener.local_addr()?).context("connecting on loopback")?;
    let (rx, _) = listener.accept()?;
    Ok((tx, rx.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    /// Every limit really moves the bytes that it is timed for.
    #[test]
    fn each_limit_moves_all_bytes() {
        let mut src = Warm::source(600 * PAGE).unwrap();
        src.stamp(3);
        type Move = fn(&[u8], &mut [u8]) -> Result<Duration>;
        let all: [(&str, Move); 12] = [
            ("memcpy", memcpy),
            ("pipe_write", pipe_write),
            ("pipe_vmsplice", pipe_vmsplice),
            ("pipe_vmsplice_huge", pipe_vmsplice_huge),
            ("unix", unix),
            ("tcp", tcp),
            ("pipe_splice_tcp", pipe_splice_tcp),
            ("pipe_splice_tcp_fresh", pipe_splice_tcp_fresh),
            ("pipes_splice_tcp", |s, d| pipes_splice_tcp(s, d, 4)),
            ("tmpfs_read", tmpfs_read),
            ("handover_dump", |s, d| Ok(handover_dump(s, d, 600)?.wall)),
            ("handover_restore", |s, d| {
                Ok(handover_restore(s, d, 600)?.wall)
            }),
        ];
        for (name, run) in all {
            let mut dst = Warm::new(600 * PAGE, 0xff).unwrap();
            run(src.bytes(), dst.bytes_mut()).unwrap();
            assert!(src.bytes() == dst.bytes(), "{name}");
        }
    }
}
