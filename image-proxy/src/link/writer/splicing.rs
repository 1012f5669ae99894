//! Image data from a pipe into the socket, a frame at a time, by reference.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use bytes::BytesMut;
use image_common::link::codec::{Header, StreamNumber, HEADER_BYTES};
use image_common::link::MAX_DATA_BYTES;
use rustix::net::SendFlags;

use crate::link::retransmit::{TeeOutcome, COPIED_FRAME_BYTES};
use crate::link::writer::{SendError, Sent, Writer};

/// Copied at once of a frame that is otherwise spliced.
const COPY_BYTES: usize = 64 << 10;

impl Writer {
    /// Sends one data frame of `n` bytes from the pipe, but no more than [`MAX_DATA_BYTES`]. Not
    /// cancel safe: half a frame ends the link.
    pub async fn splice_frame(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        pipe: impl AsFd,
        n: usize,
    ) -> Result<Sent, SendError> {
        let pipe = pipe.as_fd();
        let most = self.sender.frame_bytes().unwrap_or(n);
        let length = u32::try_from(n.min(most))
            .unwrap_or(u32::MAX)
            .min(MAX_DATA_BYTES);
        if self.frames.format().is_checked() {
            return self.copy_frame(stream, sequence, pipe, length).await;
        }
        let mut left = length as usize;
        let copies = self.frames.len() + HEADER_BYTES;
        let space = self.sender.make_space(copies, left).await;
        space.map_err(SendError::Link)?;
        if self.sender.only_copies() {
            // What is copied anyhow goes with its header, in as much as one buffer has.
            let length = length.min(COPIED_FRAME_BYTES);
            return self.copy_frame(stream, sequence, pipe, length).await;
        }
        let header = Header::data(stream, sequence, length);
        self.frames.put_header(header);
        self.send_gathered(SendFlags::MORE)
            .await
            .map_err(SendError::Link)?;
        while left > 0 {
            // An error is within a frame, whose end the cache could not find any more.
            let teed = self.sender.tee(pipe, left).map_err(SendError::Link)?;
            left -= match teed {
                TeeOutcome::Kept(n) => {
                    let spliced = self.sender.splice(pipe, n).await;
                    match spliced.map_err(SendError::Link)? {
                        0 => n,
                        // What is kept is what was announced; what has gone out is as long.
                        missing => {
                            let padded = self.sender.pad(missing).await;
                            padded.map_err(SendError::Link)?;
                            return self.pad(left - n).await;
                        }
                    }
                }
                TeeOutcome::NoPipe => match self.copy_some(pipe, left).await? {
                    0 => return self.pad(left).await,
                    n => n,
                },
                TeeOutcome::Empty => return self.pad(left).await,
            };
        }
        Ok(Sent {
            bytes: length as usize,
            digest: None,
        })
    }

    /// The frame's length was sent already. So what is missing is filled, and the image then aborted.
    async fn pad(&mut self, left: usize) -> Result<Sent, SendError> {
        self.frames.put_padding(left);
        self.finish_frame().await.map_err(SendError::Link)?;
        Err(SendError::Stolen)
    }

    /// Reads and copies a frame: because its checksum comes before what it is about, or because there is no pipe to keep
    /// its pages in.
    async fn copy_frame(
        &mut self,
        stream: StreamNumber,
        sequence: u32,
        pipe: BorrowedFd<'_>,
        length: u32,
    ) -> Result<Sent, SendError> {
        let (format, length) = (self.frames.format(), length as usize);
        let copies = self.frames.len() + format.head_bytes() + length;
        let space = self.sender.make_space(copies, 0).await;
        space.map_err(SendError::Link)?;
        self.renew(length);
        let read = |out: &mut BytesMut| read_into(out, pipe, length);
        let read = self.frames.read_exactly(stream, sequence, length, read);
        let payload = read.map_err(SendError::Source)?;
        let digest = format.digest_of(payload.ok_or(SendError::Stolen)?);
        self.flush().await.map_err(SendError::Link)?;
        Ok(Sent {
            bytes: length,
            digest,
        })
    }

    /// Sends some bytes of a frame by copying them.
    async fn copy_some(&mut self, pipe: BorrowedFd<'_>, left: usize) -> Result<usize, SendError> {
        let read = |out: &mut BytesMut| read_into(out, pipe, left.min(COPY_BYTES));
        let n = self.frames.put_payload(read).map_err(SendError::Link)?;
        self.finish_frame().await.map_err(SendError::Link)?;
        Ok(n)
    }
}

/// Reads up to `n` bytes that are in the pipe to the end of `out`.
fn read_into(out: &mut BytesMut, pipe: BorrowedFd<'_>, n: usize) -> io::Result<usize> {
    let start = out.len();
    out.resize(start + n, 0);
    let mut done = 0;
    while done < n {
        match rustix::io::read(pipe, &mut out[start + done..]) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => break,
            Ok(more) => done += more,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                out.truncate(start);
                return Err(e.into());
            }
        }
    }
    out.truncate(start + done);
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::retransmit::RetransmitBuffer;
    use crate::link::writer::testing::{read, socket, writer, STREAM};
    use crate::pipe_budget::PipeBudget;
    use rustix::pipe::{pipe_with, PipeFlags};
    use std::time::Duration;

    /// Pages go by reference, are kept, and come again from where the other side stands.
    #[tokio::test]
    async fn pages_are_sent_again_from_any_byte() {
        let size = 300_000;
        let bytes: Vec<u8> = (0..size).map(|n: usize| n.to_le_bytes()[n % 2]).collect();
        for at in [0, 1, HEADER_BYTES, 70_000, size + HEADER_BYTES] {
            let (mut writer, wire, mut theirs) = writer(true);
            let (reader, into) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).unwrap();
            image_common::criu_io::fdpass::enlarge_pipe(&into, 1 << 20);
            assert_eq!(rustix::io::write(&into, &bytes).unwrap(), size);
            let (sent, got) = tokio::join!(
                writer.splice_frame(STREAM, 3, &reader, size),
                read(&mut theirs, HEADER_BYTES + size)
            );
            assert_eq!(sent.unwrap().bytes, size);
            assert!(got[HEADER_BYTES..] == bytes);
            for _ in 0..2 {
                wire.detach(io::ErrorKind::ConnectionReset.into());
                let (again, mut theirs) = socket();
                wire.attach(again, at as u64);
                let rest = got.len() - at;
                let (flushed, anew) = tokio::join!(writer.flush(), read(&mut theirs, rest));
                flushed.unwrap();
                assert!(anew == got[at..], "from {at}");
            }
            // What it has, it cannot want again.
            wire.detach(io::ErrorKind::ConnectionReset.into());
            let (again, _theirs) = socket();
            wire.attach(again, 0);
            if at > 0 {
                writer.flush().await.unwrap_err();
            }
        }
    }

    /// Pages that are kept in as many pipes as there are, in one, or in none: all of it arrives, and
    /// the writer does not wait for an acknowledgement that does not come.
    #[tokio::test]
    async fn few_pipes_or_none() {
        static FEW: [PipeBudget; 4] = [
            PipeBudget::new(0),
            PipeBudget::new(128 << 10),
            PipeBudget::new(512 << 10),
            PipeBudget::new(3 << 20),
        ];
        const FRAME: usize = 1 << 20;
        for (at, pipes) in FEW.iter().enumerate() {
            let (mut writer, wire, mut theirs) = writer(true);
            writer
                .sender
                .keep_in(RetransmitBuffer::with_pipes(16 << 20, pipes));
            let bytes: Vec<u8> = (0..=250).cycle().take(FRAME).collect();
            let sending = async {
                let mut sequence = 0;
                for _ in 0..20 {
                    let (from, into) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                    image_common::criu_io::fdpass::enlarge_pipe(&into, FRAME);
                    assert_eq!(rustix::io::write(&into, &bytes), Ok(FRAME));
                    // What is copied goes in shorter frames.
                    let mut left = FRAME;
                    while left > 0 {
                        let sent = writer.splice_frame(STREAM, sequence, &from, left);
                        left -= sent.await.unwrap().bytes;
                        sequence += 1;
                    }
                }
            };
            let receiving = async {
                // As image-cache acknowledges: at the end of a frame behind which nothing is there.
                let (mut total, mut told) = (0, 0);
                let (mut came, mut expected) = (0, 0);
                while came < 20 * FRAME {
                    let header = read(&mut theirs, HEADER_BYTES).await;
                    let header = Header::decode(header[..].try_into().unwrap()).unwrap();
                    assert_eq!(header.sequence, expected);
                    expected += 1;
                    let length = header.length as usize;
                    let frame = read(&mut theirs, length).await;
                    let at = came % FRAME;
                    assert!(frame[..] == bytes[at..at + length]);
                    came += length;
                    total += (HEADER_BYTES + length) as u64;
                    if total - told >= image_common::link::resumable::ACK_WAITING_BYTES {
                        told = total;
                        wire.acknowledge(total);
                    }
                }
            };
            let both = async { tokio::join!(sending, receiving) };
            let done = tokio::time::timeout(Duration::from_secs(60), both).await;
            assert!(done.is_ok(), "FEW[{at}]");
        }
    }
}
