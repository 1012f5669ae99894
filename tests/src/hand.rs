//! The link spoken by hand, from `docs/link-protocol.md`: a proxy that may do anything.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::daemons::{Pair, SOON};

pub const PROXY: u64 = 77;

/// A connection to image-cache.
pub struct Hand(pub TcpStream);

/// What a HELLO says.
pub struct Hello<'a> {
    pub proxy: u64,
    pub key: u64,
    /// Of kind 1: the how manieth session it opens.
    pub received: u64,
    /// Of kind 3; 0: not numbered.
    pub attempt: u16,
    /// This connection, and how many there are.
    pub place: (u16, u16),
    /// 1 opens a session, 2 joins it, 3 resumes a connection, 4 brings a decision about set `received`.
    pub kind: u8,
    pub checksums: bool,
    pub patience_ms: u32,
    pub session: &'a str,
}

impl Default for Hello<'_> {
    fn default() -> Self {
        Hello {
            proxy: PROXY,
            key: 0,
            received: 0,
            attempt: 0,
            place: (0, 1),
            kind: 1,
            checksums: false,
            patience_ms: 0,
            session: "hand",
        }
    }
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend(u16::try_from(text.len()).expect("short").to_le_bytes());
    out.extend(text.as_bytes());
}

/// CRC-32C by the textbook, bit by bit.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc: u32, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 * (crc & 1))
        })
    })
}

impl Hello<'_> {
    pub fn bytes(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.proxy.to_le_bytes());
        body.extend(self.key.to_le_bytes());
        body.extend(self.received.to_le_bytes());
        body.extend(self.place.0.to_le_bytes());
        body.extend(self.place.1.to_le_bytes());
        body.extend([self.kind, u8::from(self.checksums)]);
        body.extend(self.attempt.to_le_bytes());
        body.extend(self.patience_ms.to_le_bytes());
        text(&mut body, self.session);
        text(&mut body, "by hand");
        let version: u16 = if self.kind == 4 { 7 } else { 5 };
        let mut hello = b"CRIULINK".to_vec();
        hello.extend(version.to_le_bytes());
        hello.extend(version.to_le_bytes());
        hello.extend(u32::try_from(body.len() + 4).expect("short").to_le_bytes());
        hello.extend(body);
        let check = crc(&hello);
        hello.extend(check.to_le_bytes());
        hello
    }
}

impl Hand {
    /// Says HELLO; gives the answer's code and body.
    pub fn hello(pair: &Pair, hello: &Hello) -> (Self, u16, Vec<u8>) {
        let address = ([127, 0, 0, 1], pair.port).into();
        Hand::greet(address, hello).expect("the cache listens, and answers")
    }

    /// The same with any image-cache.
    pub fn greet(address: SocketAddr, hello: &Hello) -> io::Result<(Self, u16, Vec<u8>)> {
        Hand::greet_on(TcpStream::connect(address)?, hello)
    }

    /// The same on a connection that was made before.
    pub fn greet_on(mut stream: TcpStream, hello: &Hello) -> io::Result<(Self, u16, Vec<u8>)> {
        stream.set_read_timeout(Some(SOON))?;
        stream.write_all(&hello.bytes())?;
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let length = u32::from_le_bytes(head[12..].try_into().expect("four"));
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body)?;
        let code = u16::from_le_bytes(head[10..12].try_into().expect("two"));
        Ok((Hand(stream), code, body))
    }

    /// A session over so many connections, and its key.
    pub fn session(pair: &Pair, connections: u16) -> (Self, u64) {
        let hello = Hello {
            place: (0, connections),
            ..Hello::default()
        };
        Hand::welcomed(pair, &hello)
    }

    /// A HELLO that is welcome, and the key of the session.
    ///
    /// # Panics
    /// If it is not.
    pub fn welcomed(pair: &Pair, hello: &Hello) -> (Self, u64) {
        let (hand, code, body) = Hand::hello(pair, hello);
        assert_eq!(code, 0, "welcome");
        (hand, number(&body[..8]))
    }

    pub fn join(pair: &Pair, key: u64, place: (u16, u16)) -> Self {
        let hello = Hello {
            key,
            place,
            kind: 2,
            ..Hello::default()
        };
        Hand::welcomed(pair, &hello).0
    }

    pub fn frame(&mut self, kind: u8, channel: u32, sequence: u32, payload: &[u8]) {
        let sent = self.try_frame(kind, channel, sequence, payload);
        sent.expect("sent");
    }

    /// For a connection that may have ended.
    pub fn try_frame(
        &mut self,
        kind: u8,
        channel: u32,
        sequence: u32,
        payload: &[u8],
    ) -> io::Result<()> {
        let mut frame = vec![kind, 0, 0, 0];
        frame.extend(u32::try_from(payload.len()).expect("short").to_le_bytes());
        frame.extend(channel.to_le_bytes());
        frame.extend(sequence.to_le_bytes());
        frame.extend(payload);
        self.0.write_all(&frame)
    }

    /// Opens set 1.
    pub fn open_set(&mut self) {
        self.open_set_as(1, false);
    }

    /// Opens a set with this number; a gated one is answered.
    pub fn open_set_as(&mut self, set: u32, gated: bool) {
        self.open_set_named(set, gated, "1");
    }

    pub fn open_set_named(&mut self, set: u32, gated: bool, snapshot: &str) {
        let mut payload = vec![u8::from(gated), 1, 0, 0, 0, 0, 0, 0];
        text(&mut payload, snapshot);
        self.frame(0x01, set, 0, &payload);
    }

    /// A frame of a set whose payload is a reason.
    pub fn says_why(&mut self, kind: u8, set: u32, reason: &str) {
        let mut payload = Vec::new();
        text(&mut payload, reason);
        self.frame(kind, set, 0, &payload);
    }

    pub fn open_image(&mut self, stream: u32, name: &str) {
        self.try_open_image(stream, name).expect("sent");
    }

    /// For a connection that may have ended.
    pub fn try_open_image(&mut self, stream: u32, name: &str) -> io::Result<()> {
        let mut payload = 1u32.to_le_bytes().to_vec();
        payload.extend(1u32.to_le_bytes());
        payload.extend(u64::MAX.to_le_bytes());
        text(&mut payload, name);
        self.try_frame(0x10, stream, 0, &payload)
    }

    pub fn end_image(&mut self, stream: u32, total: u64) {
        let mut payload = total.to_le_bytes().to_vec();
        payload.extend([0; 4]);
        self.frame(0x12, stream, 0, &payload);
    }

    /// The next frame that comes: type, channel, payload.
    pub fn next_frame(&mut self) -> (u8, u32, Vec<u8>) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).expect("a frame");
        let length = u32::from_le_bytes(head[4..8].try_into().expect("four"));
        let mut payload = vec![0; length as usize];
        self.0.read_exact(&mut payload).expect("its payload");
        let channel = u32::from_le_bytes(head[8..12].try_into().expect("four"));
        (head[0], channel, payload)
    }

    /// The cache ends the session and says why.
    pub fn expect_goodbye(&mut self, why: &str) {
        let (kind, _, payload) = self.next_frame();
        let said = String::from_utf8_lossy(&payload).into_owned();
        assert!(kind == 0x20 && said.contains(why), "{kind:#x} {said}");
        self.expect_closed();
    }

    pub fn expect_closed(&mut self) {
        // Reset counts: what we sent and nobody read makes it that.
        let read = self.0.read(&mut [0; 1]);
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
}

/// Eight bytes, little-endian.
pub fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().expect("eight"))
}
