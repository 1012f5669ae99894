//! CRIU's bytes, encoded by hand: this must not share code with the daemons that it checks.
//!
//! Every message is a little-endian u32 length and one protobuf message. Field numbers and
//! examples are those of `criu-remote.md` and `criu-stream.md`.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{bail, ensure, Context, Result};
use rustix::net::{
    recvmsg, sendmsg, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

pub const O_RDONLY: u64 = 0;
pub const O_WRONLY: u64 = 1;
pub const O_APPEND: u64 = 0x400;

pub fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

pub fn number(out: &mut Vec<u8>, field: u64, value: u64) {
    varint(out, field << 3);
    varint(out, value);
}

fn text(out: &mut Vec<u8>, field: u64, value: &str) {
    varint(out, field << 3 | 2);
    varint(out, value.len() as u64);
    out.extend_from_slice(value.as_bytes());
}

pub fn framed(body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).expect("messages are short");
    [&len.to_le_bytes()[..], body].concat()
}

/// `img_streamer_request_entry`
pub fn stream_request(name: &str) -> Vec<u8> {
    let mut body = Vec::new();
    text(&mut body, 1, name);
    framed(&body)
}

/// `local_image_entry`
pub fn remote_request(name: &str, snapshot: &str, mode: u64) -> Vec<u8> {
    let mut body = Vec::new();
    text(&mut body, 1, name);
    text(&mut body, 2, snapshot);
    number(&mut body, 3, mode);
    framed(&body)
}

/// `snapshot_id_entry`
pub fn snapshot_id(id: &str) -> Vec<u8> {
    let mut body = Vec::new();
    text(&mut body, 1, id);
    framed(&body)
}

/// Reads one framed message as CRIU does: one read for the length, one for the body, and a short
/// read is an error. `None` at the end of the stream.
pub fn read_message(mut from: &UnixStream) -> Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    match from
        .read(&mut len)
        .context("reading the length of an answer")?
    {
        0 => return Ok(None),
        4 => (),
        n => bail!("an answer was split: {n} bytes of its length in one read"),
    }
    let len = u32::from_le_bytes(len);
    ensure!(len <= 8192, "an answer of {len} bytes");
    let mut body = vec![0; len as usize];
    let n = from.read(&mut body).context("reading an answer")?;
    ensure!(
        n == body.len(),
        "an answer was split: {n} of {len} bytes in one read"
    );
    Ok(Some(body))
}

/// The value of an answer with the one numeric field 1 (`exists`, `error`).
pub fn answer(body: &[u8]) -> Result<u8> {
    match body {
        [0x08, value] if *value < 0x80 => Ok(*value),
        other => bail!("not an answer of CRIU's: {other:02x?}"),
    }
}

/// The string of a `snapshot_id_entry`.
pub fn parse_snapshot_id(body: &[u8]) -> Result<&str> {
    match body {
        [0x0a, len, id @ ..] if usize::from(*len) == id.len() && *len < 0x80 => {
            Ok(std::str::from_utf8(id)?)
        }
        other => bail!("not a snapshot id: {other:02x?}"),
    }
}

pub fn send(mut to: &UnixStream, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).context("sending a request")
}

/// Hands over a descriptor: one zero byte with one SCM_RIGHTS message.
pub fn send_fd(to: impl AsFd, fd: BorrowedFd<'_>) -> Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    ensure!(
        control.push(SendAncillaryMessage::ScmRights(&fds)),
        "no room for a descriptor"
    );
    let n = sendmsg(to, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
        .context("handing over a descriptor")?;
    ensure!(n == 1, "the byte that carries a descriptor was not sent");
    Ok(())
}

/// Receives what [`send_fd`] sends.
pub fn recv_fd(from: &UnixStream) -> Result<OwnedFd> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        from,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds.next()
        .and_then(|mut fds| fds.next())
        .context("no descriptor came")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference encodings of the protocol texts.
    #[test]
    fn golden_bytes() {
        assert_eq!(
            stream_request("inventory.img"),
            b"\x0f\0\0\0\x0a\x0dinventory.img"
        );
        assert_eq!(
            remote_request("inventory.img", "/img/1", O_WRONLY),
            b"\x19\0\0\0\x0a\x0dinventory.img\x12\x06/img/1\x18\x01"
        );
        assert_eq!(
            remote_request("parent", "", O_APPEND),
            b"\x0d\0\0\0\x0a\x06parent\x12\0\x18\x80\x08"
        );
        assert_eq!(
            remote_request("parent", "", O_RDONLY),
            b"\x0c\0\0\0\x0a\x06parent\x12\0\x18\0"
        );
        assert_eq!(snapshot_id("/img/1"), b"\x08\0\0\0\x0a\x06/img/1");
        assert_eq!(
            remote_request("", "", O_WRONLY),
            b"\x06\0\0\0\x0a\0\x12\0\x18\x01"
        );
        assert_eq!(
            remote_request("", "", O_RDONLY),
            b"\x06\0\0\0\x0a\0\x12\0\x18\0"
        );
    }

    #[test]
    fn answers() {
        assert_eq!(answer(&[8, 0]).unwrap(), 0);
        assert_eq!(answer(&[8, 2]).unwrap(), 2);
        assert!(answer(&[]).is_err());
        assert!(answer(&[8, 0x80]).is_err());
        assert_eq!(parse_snapshot_id(b"\x0a\x06/img/1").unwrap(), "/img/1");
        assert!(parse_snapshot_id(b"\x0a\x07/img/1").is_err());
    }

    #[test]
    fn a_split_answer_is_an_error_as_it_is_for_criu() {
        let (a, b) = UnixStream::pair().unwrap();
        send(&a, &[2, 0, 0, 0, 8, 1]).unwrap();
        assert_eq!(read_message(&b).unwrap().unwrap(), [8, 1]);
        send(&a, &[2, 0, 0, 0, 8]).unwrap();
        assert!(read_message(&b).is_err());
        drop(a);
        assert!(read_message(&b).unwrap().is_none());
    }
}
