//! Descriptors that CRIU hands over with SCM_RIGHTS, and framed reads from its sockets.

use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use tokio::io::unix::AsyncFd;
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

/// A socket of CRIU's.
pub trait Socket: AsFd + Sync {
    /// Resolves when there may be something to read.
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Resolves when there may be room.
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send;
    /// Runs a call that reads, if there may be something.
    fn reading<T>(&self, call: impl FnMut() -> io::Result<T>) -> io::Result<T>;
}

impl Socket for UnixStream {
    fn readable(&self) -> impl Future<Output = io::Result<()>> + Send {
        UnixStream::readable(self)
    }

    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send {
        UnixStream::writable(self)
    }

    fn reading<T>(&self, call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.try_io(Interest::READABLE, call)
    }
}

/// A socket that wakes for what comes alone. tokio's own wakes as well when the peer has read an answer, as there is room
/// then: once for each answer, at the moment at which the peer goes on.
#[derive(Debug)]
pub struct Inbound(AsyncFd<StdStream>);

impl Inbound {
    /// To be called on the runtime that is to wait for it.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let stream = stream.into_std()?; // stays non-blocking
                                         // SAFETY: the AsyncFd owns the socket, which stays the same open descriptor until the AsyncFd is dropped;
                                         // nothing here replaces or closes it in between.
        let socket = unsafe { AsyncFd::register_with_interest(stream, Interest::READABLE) }?;
        Ok(Self(socket))
    }
}

impl AsFd for Inbound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl Socket for Inbound {
    async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(drop)
    }

    /// Answers are small, so this is for a peer that reads none.
    async fn writable(&self) -> io::Result<()> {
        let again = self.as_fd().try_clone_to_owned()?;
        // SAFETY: as in `new`; the descriptor is another one, so epoll takes it beside the first.
        let again = unsafe { AsyncFd::register_with_interest(again, Interest::WRITABLE) }?;
        again.writable().await.map(drop)
    }

    fn reading<T>(&self, mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        self.0.try_io(Interest::READABLE, |_| call())
    }
}

/// Reads one framed message body, exactly: the byte after it may carry a descriptor.
/// `None` is an end of file before the first byte.
///
/// Not cancel safe: cancelled, a part of the message is lost.
pub async fn read_message(stream: &impl Socket) -> Result<Option<Vec<u8>>, RequestError> {
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
async fn read_full(stream: &impl Socket, into: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < into.len() {
        let rest = &mut into[have..];
        let mut read = || {
            let flags = RecvFlags::DONTWAIT;
            Ok(rustix::net::recv(stream, &mut rest[..], flags)?.0)
        };
        match stream.reading(&mut read) {
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
pub async fn write_message(stream: &impl Socket, message: &[u8]) -> io::Result<()> {
    let mut rest = message;
    while !rest.is_empty() {
        match rustix::net::send(stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) => rest = &rest[n..],
            Err(Errno::AGAIN) => stream.writable().await?,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Makes the kernel tell the sender of every message ([`Received::sender`]): the processes
/// of a restore share one connection.
pub fn tell_senders(stream: impl AsFd) -> io::Result<()> {
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
    stream: &impl Socket,
) -> Result<(Handover, Option<i32>), RequestError> {
    loop {
        stream.readable().await?;
        match stream.reading(|| recv_now(stream.as_fd())) {
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
pub async fn hung_up(stream: &impl Socket) {
    while stream.readable().await.is_ok() {
        match stream.reading(|| peek(stream)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// The same, at once.
pub fn has_hung_up(stream: &UnixStream) -> bool {
    !matches!(peek(stream), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
}

fn peek(stream: impl AsFd) -> io::Result<usize> {
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
    use std::os::fd::AsRawFd as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt};

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

    /// What epoll watches this socket for, by any epoll of this process.
    fn watched_for(socket: impl AsFd) -> Vec<u32> {
        let number = socket.as_fd().as_raw_fd().to_string();
        let mut masks = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
            // Other tests close theirs meanwhile.
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
            for line in text.lines() {
                // `tfd: FD events: MASK data: ... ino:INODE ...`
                let words: Vec<&str> = line.split_ascii_whitespace().collect();
                if words.first() == Some(&"tfd:") && words.get(1) == Some(&number.as_str()) {
                    masks.push(u32::from_str_radix(words[3], 16).unwrap());
                }
            }
        }
        masks
    }

    /// The peer goes on then, and each wake-up takes its time.
    #[tokio::test]
    async fn a_peer_that_reads_an_answer_does_not_wake_us() {
        let (tokios, us) = UnixStream::pair().unwrap();
        let us = Inbound::new(us).unwrap();
        let out = u32::from(rustix::event::PollFlags::OUT.bits());
        let wakes = |mask: &u32| mask & out != 0;
        assert!(watched_for(&tokios).iter().any(wakes));
        let masks = watched_for(&us);
        assert!(!masks.is_empty() && !masks.iter().any(wakes), "{masks:x?}");
    }

    #[tokio::test]
    async fn an_answer_waits_for_a_peer_that_reads_late() {
        let (mut criu, us) = UnixStream::pair().unwrap();
        let us = Inbound::new(us).unwrap();
        let answer = vec![7; 4 << 20];
        let mut got = vec![0; answer.len()];
        let sent = async {
            let mut sent = std::pin::pin!(write_message(&us, &answer));
            // It is full.
            let waits = std::future::poll_fn(|cx| {
                std::task::Poll::Ready(sent.as_mut().poll(cx).is_pending())
            });
            assert!(waits.await);
            let (sent, read) = tokio::join!(sent, criu.read_exact(&mut got));
            sent.unwrap();
            read.unwrap();
        };
        sent.await;
        assert_eq!(got, answer);
        criu.write_all(b"\x02\0\0\0ab").await.unwrap();
        assert_eq!(read_message(&us).await.unwrap().unwrap(), b"ab");
        drop(criu);
        hung_up(&us).await;
        assert!(read_message(&us).await.unwrap().is_none());
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
        let said = crate::error_chain::chain(&said);
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
        let said = crate::error_chain::chain(&recv_handover(&us).await.unwrap_err());
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
