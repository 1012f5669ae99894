//! Descriptors that CRIU hands over with SCM_RIGHTS, and framed reads from its sockets.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::criu::frame::{self, MessageError};

/// What a CRIU did wrong on a socket of ours, or what went wrong with it.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("reading from CRIU's socket")]
    Io(#[from] io::Error),
    #[error("CRIU closed its socket in the middle of a message")]
    Truncated,
    #[error("bad message")]
    Message(#[from] MessageError),
    #[error("expected one descriptor with one zero byte, got {0} descriptors")]
    Descriptors(usize),
    #[error("expected a zero byte with the descriptor, got {0:#04x}")]
    Byte(u8),
    #[error("the descriptor is not the {0} end of a pipe")]
    NotAPipe(&'static str),
}

/// Reads one framed message body, exactly: the byte after it may carry a descriptor.
/// `None` is an end of file before the first byte.
///
/// Not cancel safe: cancelled, a part of the message is lost.
pub async fn read_message(stream: &UnixStream) -> Result<Option<Vec<u8>>, RequestError> {
    let mut prefix = [0u8; 4];
    match read_full(stream, &mut prefix).await? {
        0 => return Ok(None),
        4 => {}
        _ => return Err(RequestError::Truncated),
    }
    let mut body = vec![0u8; frame::body_length(prefix)?];
    match read_full(stream, &mut body).await? {
        n if n == body.len() => Ok(Some(body)),
        _ => Err(RequestError::Truncated),
    }
}

/// Fills `into`, unless the end comes first; gives how much there was.
async fn read_full(stream: &UnixStream, into: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < into.len() {
        match stream.try_read(&mut into[have..]) {
            Ok(0) => break,
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.readable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(have)
}

/// Sends one framed message, in one write unless the socket is full: CRIU takes a short read
/// as an error.
pub async fn write_message(stream: &UnixStream, message: &[u8]) -> io::Result<()> {
    let mut rest = message;
    while !rest.is_empty() {
        match stream.try_write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => stream.writable().await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Makes the kernel tell with every message who sent it ([`Received::sender`]): the processes
/// of a restore share one connection.
pub fn tell_senders(stream: &UnixStream) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_passcred(stream, true)?)
}

/// The byte after a request, and the descriptors that came with it.
#[derive(Debug)]
pub enum Handover {
    /// End of file: nothing follows.
    Eof,
    /// A byte without a descriptor: in the socket dialect the first byte of the image.
    Data(u8),
    /// One descriptor with one zero byte.
    Fd(OwnedFd),
}

/// Receives the one byte that may carry a descriptor. Two descriptors, or one with another
/// byte than CRIU's, are an error; they are closed.
///
/// Cancel safe: a byte is taken only in the poll that returns it.
pub async fn recv_handover(stream: &UnixStream) -> Result<Handover, RequestError> {
    Ok(recv_handover_from(stream).await?.0)
}

/// The same, with the pid of the process that sent it, if [`tell_senders`] was called.
pub async fn recv_handover_from(
    stream: &UnixStream,
) -> Result<(Handover, Option<i32>), RequestError> {
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || recv_now(stream.as_fd())) {
            Ok(mut got) => {
                let handover = match (got.fds.pop(), got.fds.is_empty()) {
                    _ if got.bytes == 0 => Handover::Eof,
                    (None, _) => Handover::Data(got.byte),
                    (Some(fd), true) if got.byte == 0 => Handover::Fd(fd),
                    (Some(_), true) => return Err(RequestError::Byte(got.byte)),
                    (Some(_), false) => {
                        return Err(RequestError::Descriptors(got.fds.len() + 1));
                    }
                };
                return Ok((handover, got.sender));
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // The peer closed while bytes of ours were unread, as an early close is seen here.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => {
                return Ok((Handover::Eof, None));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

struct Received {
    bytes: usize,
    byte: u8,
    fds: Vec<OwnedFd>,
    sender: Option<i32>,
}

fn recv_now(socket: BorrowedFd<'_>) -> io::Result<Received> {
    // Room for more than the one that is allowed, so that a second one is seen and closed;
    // beyond the room the kernel closes them and sets MSG_CTRUNC.
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0u8; 1];
    let mut iov = [io::IoSliceMut::new(&mut byte)];
    let got = rustix::net::recvmsg(socket, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut fds = Vec::new();
    let mut sender = None;
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(received) => fds.extend(received),
            RecvAncillaryMessage::ScmCredentials(who) => {
                sender = Some(who.pid.as_raw_nonzero().get());
            }
            _ => {}
        }
    }
    if got.flags.contains(ReturnFlags::CTRUNC) {
        return Err(cut(fds.len()));
    }
    Ok(Received {
        bytes: got.bytes,
        byte: byte[0],
        fds,
        sender,
    })
}

/// Room for descriptors; the sender of what has more is no CRIU.
const MAX_FDS: usize = 8;

/// The kernel has closed descriptors that it could not give us, after `given`: there was no room for so many, or this process
/// can have no more.
fn cut(given: usize) -> io::Error {
    if given >= MAX_FDS {
        let many =
            format!("more descriptors came at once ({MAX_FDS} and more) than CRIU ever sends");
        return io::Error::new(io::ErrorKind::InvalidData, many);
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.map_or_else(|| "no limit".to_owned(), |limit| limit.to_string());
    // The kernel does not say why. A process at its limit cannot make one of its own either.
    let full = match rustix::fs::open("/dev/null", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => "a security module refused it, or others were closed since",
        Err(_) => "there is still none",
    };
    io::Error::other(format!(
        "this process had no free descriptor for the one that came (its limit is {limit}; {full}): \
         raise the hard limit of open files (ulimit -Hn, LimitNOFILE=), or move fewer processes at once"
    ))
}

/// Resolves when the peer is gone, or speaks although it has nothing to say before it got its
/// answer: either way it is not answered.
pub async fn hung_up(stream: &UnixStream) {
    while stream.readable().await.is_ok() {
        match stream.try_io(Interest::READABLE, || peek(stream)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// The same, at once.
pub fn has_hung_up(stream: &UnixStream) -> bool {
    !matches!(peek(stream), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

fn peek(stream: &UnixStream) -> io::Result<usize> {
    let mut byte = [0u8; 1];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    Ok(rustix::net::recv(stream, &mut byte[..], flags)?.0)
}

/// Hands over a descriptor, as CRIU does: with one zero byte.
pub fn send_fd(to: impl AsFd, fd: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let byte = [io::IoSlice::new(&[0])];
    rustix::net::sendmsg(to, &byte, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Which end of a pipe CRIU should have given us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipeEnd {
    Read,
    Write,
}

/// Checks that `fd` is that end of a pipe and makes it non-blocking. CRIU holds only the
/// other end, whose flags are its own.
pub fn checked_pipe(fd: OwnedFd, end: PipeEnd) -> Result<OwnedFd, RequestError> {
    let wanted = match end {
        PipeEnd::Read => "read",
        PipeEnd::Write => "write",
    };
    let stat = rustix::fs::fstat(&fd).map_err(io::Error::from)?;
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(io::Error::from)?;
    let mode = flags & OFlags::RWMODE;
    let fits = match end {
        PipeEnd::Read => mode == OFlags::RDONLY || mode == OFlags::RDWR,
        PipeEnd::Write => mode == OFlags::WRONLY || mode == OFlags::RDWR,
    };
    // O_PATH descriptors report O_RDONLY but cannot be read.
    if FileType::from_raw_mode(stat.st_mode) != FileType::Fifo
        || !fits
        || flags.contains(OFlags::PATH)
    {
        return Err(RequestError::NotAPipe(wanted));
    }
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
    Ok(fd)
}

/// Asks for a larger pipe; a refusal (pipe-max-size, pipe-user-pages-soft) costs only speed.
pub fn enlarge_pipe(fd: impl AsFd, bytes: usize) {
    let _ = rustix::pipe::fcntl_setpipe_size(fd, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt;

    fn send_fds(to: &UnixStream, byte: u8, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = rustix::net::sendmsg(
            to.as_fd(),
            &[io::IoSlice::new(&[byte])],
            &mut control,
            SendFlags::empty(),
        );
        assert_eq!(sent, Ok(1));
    }

    #[tokio::test]
    async fn a_message_then_a_descriptor_at_every_split() {
        let framed = b"\x0f\0\0\0\x0a\x0dinventory.img";
        for split in 0..=framed.len() {
            let (mut criu, us) = UnixStream::pair().unwrap();
            let (reader, _writer) = rustix::pipe::pipe().unwrap();
            let sender = async {
                criu.write_all(&framed[..split]).await.unwrap();
                tokio::task::yield_now().await;
                criu.write_all(&framed[split..]).await.unwrap();
                send_fds(&criu, 0, &[reader.as_fd()]);
            };
            let receiver = async {
                let body = read_message(&us).await.unwrap().unwrap();
                assert_eq!(body, &framed[4..]);
                match recv_handover(&us).await.unwrap() {
                    Handover::Fd(fd) => checked_pipe(fd, PipeEnd::Read).map(drop).unwrap(),
                    other => panic!("{other:?}"),
                }
            };
            tokio::join!(sender, receiver);
        }
    }

    #[tokio::test]
    async fn eof_is_clean_only_between_messages() {
        for (bytes, clean) in [(&b""[..], true), (b"\x05", false), (b"\x05\0\0\0ab", false)] {
            let (mut criu, us) = UnixStream::pair().unwrap();
            criu.write_all(bytes).await.unwrap();
            drop(criu);
            match read_message(&us).await {
                Ok(None) => assert!(clean),
                Err(RequestError::Truncated) => assert!(!clean),
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_huge_length_is_refused_before_it_is_allocated() {
        let (mut criu, us) = UnixStream::pair().unwrap();
        criu.write_all(&[0xff; 4]).await.unwrap();
        assert!(matches!(
            read_message(&us).await,
            Err(RequestError::Message(MessageError::TooLong(u32::MAX)))
        ));
    }

    /// Only a process of its own can be without descriptors: this test runs itself once more.
    #[tokio::test]
    async fn no_free_descriptor_is_not_said_of_criu() {
        if std::env::var_os("NO_FREE_DESCRIPTOR").is_none() {
            let test = "fdpass::tests::no_free_descriptor_is_not_said_of_criu";
            let mut child = std::process::Command::new("sh");
            child.args(["-c", "ulimit -n 64; exec \"$@\"", "sh"]);
            child.arg(std::env::current_exe().unwrap());
            child.args(["--exact", test]).env("NO_FREE_DESCRIPTOR", "1");
            let output = child.output().unwrap();
            assert!(output.status.success(), "{output:?}");
            return;
        }
        let (criu, us) = UnixStream::pair().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        send_fds(&criu, 0, &[reader.as_fd()]);
        let mut all = Vec::new();
        while let Ok(fd) = reader.try_clone() {
            all.push(fd);
        }
        let said = recv_handover(&us).await.unwrap_err();
        let said = crate::control::chain(&said);
        assert!(
            said.contains("no free descriptor") && said.contains("its limit is 64"),
            "{said}"
        );
        assert!(said.contains("there is still none"), "{said}");
        drop(all);
        send_fds(&criu, 0, &[reader.as_fd()]);
        assert!(matches!(recv_handover(&us).await, Ok(Handover::Fd(_))));
    }

    #[tokio::test]
    async fn more_descriptors_than_there_is_room_for() {
        let (criu, us) = UnixStream::pair().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let many = [reader.as_fd(); 32];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        let zero = [io::IoSlice::new(&[0])];
        rustix::net::sendmsg(criu.as_fd(), &zero, &mut control, SendFlags::empty()).unwrap();
        let said = crate::control::chain(&recv_handover(&us).await.unwrap_err());
        assert!(said.contains("than CRIU ever sends"), "{said}");
    }

    #[tokio::test]
    async fn wrong_descriptors() {
        let (criu, us) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        send_fds(&criu, 0, &[reader.as_fd(), writer.as_fd()]);
        assert!(matches!(
            recv_handover(&us).await,
            Err(RequestError::Descriptors(2))
        ));
        send_fds(&criu, 7, &[reader.as_fd()]);
        assert!(matches!(
            recv_handover(&us).await,
            Err(RequestError::Byte(7))
        ));

        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(checked_pipe(null.into(), PipeEnd::Read).is_err());
        assert!(checked_pipe(writer, PipeEnd::Read).is_err());
        assert!(checked_pipe(reader, PipeEnd::Write).is_err());
    }
}
