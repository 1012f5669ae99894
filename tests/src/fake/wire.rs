//! CRIU's bytes by hand: the framing, the few protobuf messages, and the descriptor hand-over. Written from the
//! protocol texts and not shared with the daemons, so that a mistake in theirs is not repeated here.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use rustix::pipe::PipeFlags;

/// No call of the fake CRIU waits longer than this: a hang in a daemon must fail a test, not stop the suite.
pub const LIMIT: Duration = Duration::from_secs(30);

pub const O_RDONLY: u32 = 0;
pub const O_WRONLY: u32 = 1;
pub const O_APPEND: u32 = 0x400;

pub fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(u8::try_from(value & 0x7f).expect("seven bits") | 0x80);
        value >>= 7;
    }
    out.push(u8::try_from(value).expect("seven bits"));
}

fn string(tag: u8, value: &[u8], out: &mut Vec<u8>) {
    out.push(tag);
    varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

/// `local_image_entry`, without its length.
pub fn local_image_entry(name: &[u8], snapshot_id: &[u8], open_mode: u32) -> Vec<u8> {
    let mut out = Vec::new();
    string(0x0a, name, &mut out);
    string(0x12, snapshot_id, &mut out);
    out.push(0x18);
    varint(open_mode.into(), &mut out);
    out
}

/// `snapshot_id_entry` and `img_streamer_request_entry` are the same bytes: field 1, a string.
pub fn one_string(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    string(0x0a, value, &mut out);
    out
}

/// The value of a message whose only field is number 1, a string.
pub fn parse_one_string(message: &[u8]) -> io::Result<String> {
    let bad = || protocol(format!("not a message with one string: {message:02x?}"));
    let (&tag, rest) = message.split_first().ok_or_else(bad)?;
    let (&len, text) = rest.split_first().ok_or_else(bad)?;
    if tag != 0x0a || len >= 0x80 || usize::from(len) != text.len() {
        return Err(bad());
    }
    String::from_utf8(text.to_vec()).map_err(|_| bad())
}

/// The value of a message whose only field is number 1, a small number (`error`, `exists`).
pub fn parse_one_number(message: &[u8]) -> io::Result<u8> {
    match message {
        [0x08, value] if *value < 0x80 => Ok(*value),
        _ => Err(protocol(format!(
            "not a message with one number: {message:02x?}"
        ))),
    }
}

pub fn framed(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("a message is short");
    let mut out = len.to_le_bytes().to_vec();
    out.extend_from_slice(message);
    out
}

/// Prefix and body with one system call, as CRIU's `writev`. Plain `write`, so that SIGPIPE does what it does to CRIU.
pub fn write_frame(socket: &UnixStream, message: &[u8]) -> io::Result<()> {
    let frame = framed(message);
    let count = rustix::io::write(socket, &frame)?;
    if count != frame.len() {
        return Err(protocol("short write of a frame".into()));
    }
    Ok(())
}

/// One `read(4)` and one `read(length)`; a short read is an error, exactly as in CRIU. `None` at the end of file.
pub fn read_frame(mut socket: &UnixStream) -> io::Result<Option<Vec<u8>>> {
    let mut prefix = [0; 4];
    match socket.read(&mut prefix)? {
        0 => return Ok(None),
        4 => {}
        count => {
            return Err(protocol(format!(
                "short read: {count} bytes of a frame's length"
            )))
        }
    }
    let len = u32::from_le_bytes(prefix) as usize;
    if len > 64 * 1024 {
        return Err(protocol(format!("a frame of {len} bytes")));
    }
    let mut message = vec![0; len];
    let count = if len == 0 {
        0
    } else {
        socket.read(&mut message)?
    };
    if count != len {
        return Err(protocol(format!(
            "short read: {count} of a frame's {len} bytes"
        )));
    }
    Ok(Some(message))
}

pub fn protocol(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// One zero byte with these descriptors beside it.
pub fn send_fds(socket: impl AsFd, fds: &[BorrowedFd]) -> io::Result<()> {
    send_fds_beside(socket, 0, fds)
}

/// The same with another byte, which no CRIU sends. Plain `sendmsg`, so that SIGPIPE does what it does to CRIU.
pub fn send_fds_beside(socket: impl AsFd, byte: u8, fds: &[BorrowedFd]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(protocol(
            "too many descriptors for the control buffer".into(),
        ));
    }
    let bytes = [byte];
    let bytes = [IoSlice::new(&bytes)];
    sendmsg(socket, &bytes, &mut control, SendFlags::empty())?;
    Ok(())
}

/// Receives what [`send_fds`] sends: one descriptor.
pub fn recv_fd(from: &UnixStream) -> io::Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut iov = [IoSliceMut::new(&mut byte)];
    let got = recvmsg(from, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    match (fd, got.bytes) {
        (Some(fd), _) => Ok(fd),
        (None, 0) => Err(io::ErrorKind::UnexpectedEof.into()),
        // The process that stands for CRIU says why it has none.
        (None, _) => Err(io::Error::from_raw_os_error(byte[0].into())),
    }
}

/// `(read end, write end)`, of the capacity that the kernel gives: CRIU changes nothing there.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?)
}

/// Every wait on it is limited, if there is a limit.
pub fn connect(path: &std::path::Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let socket = UnixStream::connect(path)?;
    if limit.is_some() {
        limit_waits(&socket, limit)?;
    }
    Ok(socket)
}

pub fn limit_waits(socket: &UnixStream, limit: Option<Duration>) -> io::Result<()> {
    socket.set_read_timeout(limit)?;
    socket.set_write_timeout(limit)
}

/// Our end of an image's way: a pipe or a socket, with every wait limited. The limit needs O_NONBLOCK on *our* end
/// only; the daemon's end has flags of its own and is as blocking as CRIU hands it over.
pub struct Channel {
    fd: OwnedFd,
    limit: Duration,
}

impl Channel {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Channel { fd, limit: LIMIT })
    }

    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    fn wait(&self, flags: PollFlags) -> io::Result<()> {
        if wait_for(self.fd.as_fd(), flags, self.limit)? {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the daemon neither moved data nor closed",
        ))
    }
}

/// Whether `fd` became ready (or broke) within the limit.
pub fn wait_for(fd: BorrowedFd, flags: PollFlags, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout =
            Timespec::try_from(left).map_err(|_| protocol("a limit of centuries".into()))?;
        match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timeout)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

impl Read for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(count) => return Ok(count),
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(&self.fd, bytes) {
                Ok(count) => return Ok(count),
                Err(rustix::io::Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference encodings of `criu-remote.md` section 1.
    #[test]
    fn encodes_what_criu_encodes() {
        assert_eq!(
            framed(&local_image_entry(b"inventory.img", b"/img/1", O_WRONLY)),
            b"\x19\0\0\0\x0a\x0dinventory.img\x12\x06/img/1\x18\x01"
        );
        assert_eq!(
            framed(&local_image_entry(b"parent", b"", O_APPEND)),
            b"\x0d\0\0\0\x0a\x06parent\x12\0\x18\x80\x08"
        );
        assert_eq!(framed(&one_string(b"/img/1")), b"\x08\0\0\0\x0a\x06/img/1");
        assert_eq!(
            framed(&local_image_entry(b"parent", b"", O_RDONLY)),
            b"\x0c\0\0\0\x0a\x06parent\x12\0\x18\0"
        );
        assert_eq!(
            framed(&local_image_entry(b"", b"", O_WRONLY)),
            b"\x06\0\0\0\x0a\0\x12\0\x18\x01"
        );
        assert_eq!(
            framed(&one_string(b"inventory.img")),
            b"\x0f\0\0\0\x0a\x0dinventory.img"
        );
    }

    #[test]
    fn answers_are_understood_and_others_refused() {
        assert_eq!(parse_one_number(&[8, 0]).unwrap(), 0);
        assert_eq!(parse_one_number(&[8, 2]).unwrap(), 2);
        assert!(parse_one_number(&[]).is_err());
        assert!(parse_one_number(&[8, 0x80]).is_err());
        assert_eq!(parse_one_string(b"\x0a\x06/img/1").unwrap(), "/img/1");
        assert!(parse_one_string(b"\x0a\x07/img/1").is_err());
    }

    /// The one thing that the fake must not forgive.
    #[test]
    fn a_split_frame_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"\x02\0\0\0").unwrap();
        let reader = std::thread::spawn(move || {
            ours.set_read_timeout(Some(LIMIT)).unwrap();
            read_frame(&ours)
        });
        theirs.write_all(b"\x08").unwrap();
        drop(theirs);
        assert!(reader
            .join()
            .unwrap()
            .unwrap_err()
            .to_string()
            .contains("short read"));
    }
}
