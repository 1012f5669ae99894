//! image-proxy's end of a link: a session over one or more connections that says what the fuzzer's
//! bytes say, a little wrong now and then, and remembers what it said. So it can tell what may be
//! in the cache at the end: nothing but images that were sent whole.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::BytesMut;
use image_cache::store::set::{Lookup, Set};
use image_cache::store::{Scope, Store};
use image_common::criu::dialect::Dialect;
use image_common::criu::inventory::SetKind;
use image_common::criu::page_server::{
    Entry, Layout, PagemapId, Request, PE_LAZY, PE_PARENT, PE_PRESENT,
};
use image_common::criu::pagemap;
use image_common::image::{ImageName, SnapshotId};
use image_common::link::codec::{
    CommitOn, FrameFormat, Header, Message, RoundPages, SetNumber, StreamNumber, HEADER_BYTES,
};
use image_common::link::digest::{of_image, Digest};
use image_common::link::handshake::{body_length, Answer, Hello, Place, HEAD_BYTES};

use crate::client::Client;
use crate::input::Input;
use crate::world;

/// Of a pre-dump and of a dump (`remote-2018-incremental`).
pub const PRE_DUMP: &[u8] = b"\x16\x31\x31\x58\x07\0\0\0\x08\x02\x40\xe0\xaa\xed\x0b";
pub const DUMP: &[u8] = b"\x16\x31\x31\x58\x24\0\0\0\x08\x02\x10\x01\x1a\x18\x08\x01\x10\x01\x18\x01\x20\x01\x28\x01\x30\x03\x38\x04\x40\x05\x48\x06\x50\x02\x58\x07\x60\x01\x20\x01\x28\x01\x30\x00";

pub const NAMES: [&str; 12] = [
    "inventory.img",
    "pages-1.img",
    "pagemap-7.img",
    "mm-7.img",
    "core-7.img",
    "pstree.img",
    "pages-2.img",
    "pagemap-8.img",
    "mm-8.img",
    "pagemap-shmem-3.img",
    "tmpfs-1.tar.gz",
    "\u{fe}\u{2028} %s.img",
];

pub const SNAPSHOTS: [&str; 4] = ["/d1", "../d2", "-/no parent/1", "\u{e9}/ "];

const SESSIONS: [&str; 3] = ["web", "a.b_c-1", "0"];

pub fn snapshot(input: &mut Input<'_>) -> SnapshotId {
    SnapshotId::new(input.pick::<&str>(&SNAPSHOTS)).expect("an id")
}

pub fn image(input: &mut Input<'_>) -> ImageName {
    ImageName::new(input.pick::<&str>(&NAMES)).expect("a name")
}

pub fn dialect(input: &mut Input<'_>) -> Dialect {
    *input.pick(&Dialect::ALL)
}

pub fn pagemap_id(input: &mut Input<'_>) -> PagemapId {
    match input.u8() {
        n @ 0..=127 => PagemapId::Task(u64::from(n % 3) + 7),
        n @ 128..=239 => PagemapId::Shmem(u64::from(n % 3)),
        n @ 240..=247 => PagemapId::Task(input.any::<u64>().wrapping_add(n.into())),
        _ => PagemapId::Shmem(input.any()),
    }
}

pub fn entry(input: &mut Input<'_>) -> Entry {
    let flags = *input.pick(&[
        PE_PRESENT,
        PE_PRESENT,
        PE_PARENT,
        PE_LAZY,
        PE_PRESENT | PE_LAZY,
        PE_PRESENT | PE_PARENT,
        0,
    ]);
    let vaddr = match input.u8() {
        255 => input.any(),
        n => u64::from(n) << 12,
    };
    let pages = match input.u8() {
        255 => input.any(),
        n => u64::from(n % 20),
    };
    Entry {
        vaddr,
        pages,
        flags,
    }
}

/// What an image may be made of, so that the cache's own readers have something to read.
pub fn content(input: &mut Input<'_>, count: u8) -> Vec<u8> {
    let kind = input.u8();
    match kind % 8 {
        0 => DUMP.to_vec(),
        1 => PRE_DUMP.to_vec(),
        2 => {
            let n = input.below(6);
            let mut at = 0;
            let entries: Vec<_> = (0..n)
                .map(|_| {
                    let (gap, pages) = (u64::from(input.u8()), u64::from(input.u8() % 4));
                    at += gap << 12;
                    let entry = (at, pages);
                    at += pages << 12;
                    entry
                })
                .collect();
            pagemap::encode(u32::from(input.u8() % 3), entries)
        }
        3 => vec![count; 4096 * (1 + input.below(3))],
        // Beyond what goes to the shared segment.
        4 => vec![count; (64 << 10) + input.below(256)],
        5 => input.short().to_vec(),
        _ => vec![count; 1 + input.below(200)],
    }
}

/// A message that only image-cache sends, or that is not at its place.
pub fn of_the_cache(input: &mut Input<'_>) -> Message {
    let set = SetNumber(input.u8().into());
    let stream = StreamNumber(input.u8().into());
    let total = input.any();
    let reason = String::from_utf8_lossy(input.short()).replace(char::is_control, "?");
    match input.below(12) {
        0 => Message::SetGated { set },
        1 => Message::SetStored {
            set,
            kind: SetKind::Dump,
        },
        2 => Message::Prepared { set },
        3 => Message::PrepareRefused { set, reason },
        4 => Message::ImageAck { stream, total },
        5 => Message::ImageRefused { stream, reason },
        6 => Message::RoundAck {
            stream,
            pages: RoundPages::default(),
        },
        7 => Message::Reserved { bytes: total },
        8 => Message::Trial { set },
        9 => Message::Holding { set },
        10 => Message::TrialFailed { set, reason },
        _ => Message::Goodbye { reason },
    }
}

pub fn encode(message: &Message, format: FrameFormat) -> BytesMut {
    let mut out = BytesMut::new();
    message.encode_with(&mut out, format);
    out
}

fn layout_of(stream: u32) -> Layout {
    match stream % 2 {
        0 => Layout::Bytes24,
        _ => Layout::Bytes32,
    }
}

pub fn data_frame(stream: u32, sequence: u32, payload: &[u8], format: FrameFormat) -> BytesMut {
    let mut out = BytesMut::new();
    let length = u32::try_from(payload.len()).expect("a short frame");
    Header::data(StreamNumber(stream), sequence, length).encode(&mut out);
    out.resize(format.head_bytes(), 0);
    out.extend_from_slice(payload);
    debug_assert!(out.len() >= HEADER_BYTES);
    format.seal(&mut out);
    out
}

/// One connection of the session.
#[derive(Default)]
struct Connection {
    client: Option<Client>,
    /// All that was said on it, over all its sockets.
    said: Vec<u8>,
    /// Bytes of the answers on sockets that are gone.
    heard: u64,
}

#[derive(Default)]
struct SetSaid {
    gated: bool,
    images: u32,
    bytes: u64,
    digest: u64,
    confirmed: bool,
    closed: bool,
    complete: bool,
    /// Some of its images are made by the cache, of rounds.
    rounds: bool,
}

#[derive(Default)]
struct StreamSaid {
    /// Set, name, and whether it continues the image of that name.
    opened: Vec<(u32, ImageName, bool)>,
    frames: Vec<(u32, Vec<u8>)>,
    next: u32,
    sent: u64,
    digest: Digest,
    totals: BTreeSet<u64>,
}

/// Of a session of one connection.
pub fn hello(format: FrameFormat) -> Hello {
    Hello {
        versions: image_common::link::VERSIONS,
        proxy: 1,
        place: Place::First { opening: 0 },
        connections: 1,
        frame_format: format,
        patience: Duration::from_secs(20),
        session: SESSIONS[0].parse().expect("a name"),
        software: "fuzz".to_owned(),
    }
}

pub struct Session {
    hello: Hello,
    connections: Vec<Connection>,
    key: u64,
    attempt: u16,
    format: FrameFormat,
    sets: BTreeMap<u32, SetSaid>,
    streams: BTreeMap<u32, StreamSaid>,
    rounds: BTreeMap<u32, (u64, u64)>,
    frames: u8,
    reserved: bool,
    /// An operator has decided something.
    pub released: bool,
    /// Bytes were said that are no message of ours: what they made is not known.
    pub unclear: bool,
}

impl Session {
    /// Opens a session with the socket of a new connection.
    pub async fn begin(input: &mut Input<'_>, socket: UnixStream) -> Self {
        let bits = input.u8();
        let format = FrameFormat::with_checksums(bits & 1 != 0);
        let connections = [1, 1, 2, 3][usize::from(bits >> 1 & 3)];
        let hello = Hello {
            proxy: u64::from(bits >> 3 & 1),
            connections,
            patience: Duration::from_secs(if bits & 16 != 0 { 0 } else { 20 }),
            session: SESSIONS[usize::from(bits >> 5) % 3]
                .parse()
                .expect("a name"),
            ..hello(format)
        };
        let mut session = Self {
            connections: (0..connections).map(|_| Connection::default()).collect(),
            hello,
            key: 0,
            attempt: 0,
            format,
            sets: BTreeMap::new(),
            streams: BTreeMap::new(),
            rounds: BTreeMap::new(),
            frames: 0,
            reserved: false,
            released: false,
            unclear: false,
        };
        session.greet(0, Place::First { opening: 0 }, socket).await;
        session
    }

    /// A socket for a connection, with its handshake.
    async fn greet(&mut self, number: usize, place: Place, socket: UnixStream) {
        let hello = Hello {
            place,
            ..self.hello.clone()
        };
        let mut client = Client::new(socket);
        client.say(&hello.encode()).await;
        if !client.wait_for(HEAD_BYTES).await {
            return;
        }
        let head: [u8; HEAD_BYTES] = client.heard[..HEAD_BYTES].try_into().expect("as long");
        let length = HEAD_BYTES + body_length(&head).expect("a head of the cache");
        assert!(client.wait_for(length).await, "half an answer");
        let body = &client.heard[HEAD_BYTES..length];
        let answer = Answer::decode(&head, body, &hello.versions).expect("an answer");
        client.heard.drain(..length);
        let Answer::Welcome { key, received, .. } = answer else {
            return;
        };
        self.key = key;
        let connection = &mut self.connections[number];
        let rest = usize::try_from(received).unwrap_or(usize::MAX);
        let rest = connection.said.get(rest..);
        let rest = rest.expect("it has more than was said").to_vec();
        client.say(&rest).await;
        connection.client = Some(client);
    }

    async fn say(&mut self, number: usize, bytes: &[u8]) {
        let number = number % self.connections.len();
        let connection = &mut self.connections[number];
        connection.said.extend_from_slice(bytes);
        if let Some(client) = &mut connection.client {
            client.say(bytes).await;
        }
    }

    /// What CRIU says to image-proxy's page server, which passes it on; now and then in two frames.
    async fn say_requests(&mut self, stream: u32, request: &Request, pages: &[u8]) {
        let mut bytes = BytesMut::new();
        request.encode(layout_of(stream), &mut bytes);
        let border = bytes.len() + pages.len() % 3;
        bytes.extend_from_slice(pages);
        for part in [
            &bytes[..border.min(bytes.len())],
            &bytes[border.min(bytes.len())..],
        ] {
            if !part.is_empty() {
                let frame = data_frame(stream, 0, part, self.format);
                self.say(0, &frame).await;
            }
        }
    }

    async fn tell(&mut self, message: &Message) {
        self.say(0, &encode(message, self.format)).await;
    }

    /// The connection breaks.
    fn cut(&mut self, number: usize) {
        let connection = &mut self.connections[number];
        if let Some(mut client) = connection.client.take() {
            client.hear();
            connection.heard += client.heard.len() as u64;
        }
    }

    /// One thing, as the bytes have it. `connect` makes a new connection to the same cache.
    pub async fn step(&mut self, input: &mut Input<'_>, connect: &dyn Fn() -> UnixStream) {
        let op = input.u8();
        let set = u32::from(input.u8() % 4);
        let number = SetNumber(set);
        let reason = || "\u{9b}2J \u{0} reason".to_owned();
        match op % 32 {
            0 => {
                let parent = input.u8() % 4;
                let (gated, dialect) = (input.u8() & 1 != 0, dialect(input));
                let said = self.sets.entry(set).or_default();
                said.gated |= gated;
                self.tell(&Message::SetOpen {
                    set: number,
                    gated,
                    dialect,
                    parent: (parent != 0).then_some(SetNumber(parent.into())),
                    snapshot: snapshot(input),
                })
                .await;
            }
            1..=3 => {
                let stream = u32::from(input.u8() % 6);
                let path = image(input);
                let mode = if input.u8() > 200 { 0x401 } else { 1 };
                let said = self.streams.entry(stream).or_default();
                said.opened.push((set, path.clone(), mode != 1));
                (said.next, said.sent, said.digest) = (0, 0, Digest::default());
                let size = (input.u8() > 240).then(|| u64::from(input.u8()));
                self.tell(&Message::ImageOpen {
                    stream: StreamNumber(stream),
                    set: number,
                    path,
                    mode,
                    size,
                })
                .await;
            }
            4..=8 => {
                let stream = u32::from(input.u8() % 6);
                let way = usize::from(input.u8());
                self.frames = self.frames.wrapping_add(1);
                let payload = content(input, self.frames);
                let said = self.streams.entry(stream).or_default();
                let sequence = input.about(said.next.into());
                let sequence = u32::try_from(sequence & 0xffff_ffff).expect("32 bits");
                if payload.is_empty() {
                    return;
                }
                said.frames.push((sequence, payload.clone()));
                said.next = said.next.wrapping_add(1);
                said.sent += payload.len() as u64;
                said.digest.then(Digest::of(&payload));
                let frame = data_frame(stream, sequence, &payload, self.format);
                self.say(way, &frame).await;
            }
            9..=11 => {
                let stream = u32::from(input.u8() % 6);
                let said = self.streams.entry(stream).or_default();
                let total = input.about(said.sent);
                said.totals.insert(total);
                let digest = said.digest.crc();
                if let Some((set, name, _)) = said.opened.last() {
                    let set = self.sets.entry(*set).or_default();
                    set.images += 1;
                    set.bytes = set.bytes.wrapping_add(total);
                    if self.format.is_checked() {
                        let image = of_image(name.as_str(), total, digest);
                        set.digest = set.digest.wrapping_add(image);
                    }
                }
                self.tell(&Message::ImageEnd {
                    stream: StreamNumber(stream),
                    total,
                    digest: if self.format.is_checked() { digest } else { 0 },
                })
                .await;
            }
            12 => {
                let stream = StreamNumber(u32::from(input.u8() % 6));
                let reason = reason();
                self.tell(&Message::ImageAbort { stream, reason }).await;
            }
            13 | 14 => {
                let said = self.sets.entry(set).or_default();
                said.complete = true;
                let (images, bytes) = (said.images, input.about(said.bytes));
                self.tell(&Message::SetComplete {
                    set: number,
                    images,
                    bytes,
                })
                .await;
            }
            15 => {
                let said = self.sets.entry(set).or_default();
                let (images, digest) = (said.images, said.digest);
                let bytes = input.about(said.bytes);
                let trial = |on| Message::PrepareTrial {
                    set: number,
                    images,
                    bytes,
                    digest,
                    on,
                };
                let message = match input.u8() % 4 {
                    0 => trial(CommitOn::Auto),
                    1 => trial(CommitOn::Restored),
                    _ => Message::Prepare {
                        set: number,
                        images,
                        bytes,
                        digest,
                    },
                };
                self.tell(&message).await;
            }
            16 => {
                self.sets.entry(set).or_default().confirmed = true;
                self.tell(&Message::Commit { set: number }).await;
            }
            17 => {
                self.sets.entry(set).or_default().closed = true;
                self.tell(&Message::SetClose { set: number }).await;
            }
            18 => match input.u8() % 5 {
                0 => {
                    let reason = reason();
                    self.tell(&Message::SetAbort {
                        set: number,
                        reason,
                    })
                    .await;
                }
                1 => {
                    let reason = reason();
                    self.tell(&Message::SetDoubt {
                        set: number,
                        reason,
                    })
                    .await;
                }
                2 => {
                    self.sets.entry(set).or_default().gated = true;
                    self.tell(&Message::SetGate { set: number }).await;
                }
                3 if !self.reserved => {
                    self.reserved = true;
                    let bytes = input.any();
                    self.tell(&Message::Reserve { bytes }).await;
                }
                _ => {
                    let dialect = dialect(input);
                    self.tell(&Message::SetDialect {
                        set: number,
                        dialect,
                    })
                    .await;
                }
            },
            19 => {
                let stream = u32::from(input.u8() % 6);
                self.rounds.insert(stream, (0, 0));
                self.sets.entry(set).or_default().rounds = true;
                let page_bytes = if input.u8() > 250 { 65536 } else { 4096 };
                self.tell(&Message::RoundOpen {
                    stream: StreamNumber(stream),
                    set: number,
                    page_bytes,
                    layout: layout_of(stream),
                })
                .await;
            }
            20 => {
                let stream = u32::from(input.u8() % 6);
                let id = pagemap_id(input);
                let answer = input.u8() % 2 == 0;
                self.say_requests(stream, &Request::Open { id, answer }, &[])
                    .await;
            }
            21 | 22 => {
                let stream = u32::from(input.u8() % 6);
                let (id, entry) = (pagemap_id(input), entry(input));
                let (entries, pages) = self.rounds.entry(stream).or_default();
                *entries += 1;
                if entry.is_present() {
                    *pages = pages.wrapping_add(entry.pages);
                }
                let mut bytes = Vec::new();
                if entry.is_present() && (1..100).contains(&entry.pages) && input.u8() < 250 {
                    self.frames = self.frames.wrapping_add(1);
                    bytes = vec![self.frames; usize::try_from(entry.pages).expect("few") << 12];
                }
                self.say_requests(stream, &Request::Add { id, entry }, &bytes)
                    .await;
            }
            23 => {
                let stream = u32::from(input.u8() % 6);
                let (entries, pages) = self.rounds.get(&stream).copied().unwrap_or_default();
                let entries = input.about(entries);
                self.tell(&Message::RoundEnd {
                    stream: StreamNumber(stream),
                    entries,
                    pages,
                })
                .await;
            }
            24 => {
                let message = match input.u8() {
                    0..=127 => of_the_cache(input),
                    _ => Message::Received {
                        connection: input.u8().into(),
                        total: input.any(),
                    },
                };
                self.tell(&message).await;
            }
            25 => {
                self.unclear = true;
                let way = usize::from(input.u8());
                let bytes = input.short();
                self.say(way, bytes).await;
            }
            26 => {
                let number = input.below(self.connections.len());
                self.cut(number);
            }
            27 | 28 => {
                let number = input.below(self.connections.len());
                let said = !self.connections[number].said.is_empty();
                let (connection, key) =
                    (u16::try_from(number).expect("few"), input.about(self.key));
                self.cut(number);
                let heard = self.connections[number].heard;
                // Op 28 numbers its attempts, 27 does not.
                self.attempt += u16::from(op == 28);
                let set = SetNumber(1 + u32::from(input.u8() % 4));
                let place = match (op, number) {
                    (28, 1..) if !said => Place::Decides { key, set },
                    (27, 1..) if !said => Place::Joins { connection, key },
                    _ => Place::Resumes {
                        connection,
                        key,
                        received: input.about(heard),
                        attempt: if op == 28 { self.attempt } else { 0 },
                    },
                };
                self.greet(number, place, connect()).await;
            }
            29 => world::turn().await,
            30 => world::pass(Duration::from_secs(input.u8().into())).await,
            _ => {
                for connection in &mut self.connections {
                    if let Some(client) = &mut connection.client {
                        client.hear();
                        client.heard.clear();
                    }
                }
            }
        }
    }

    /// All connections close.
    pub fn end(&mut self) {
        for number in 0..self.connections.len() {
            self.cut(number);
        }
    }

    /// Whether the store has, of what can be read, nothing but what was sent whole and may be.
    pub fn check(&self, store: &Store) {
        if self.unclear {
            return;
        }
        for session in store.newest(&Scope::Any) {
            for set in session.sets() {
                self.check_set(&set);
            }
        }
    }

    fn check_set(&self, set: &Set) {
        let number = set.number.0;
        let said = self.sets.get(&number).expect("a set that nobody opened");
        let held_back = said.gated && !said.confirmed && !self.released;
        assert!(
            !set.is_final_dump() || !held_back,
            "set {number} may be restored, and the source did not confirm"
        );
        for name in NAMES {
            let name = ImageName::new(name).expect("a name");
            let Lookup::Ready(image) = set.lookup(&name, None) else {
                continue;
            };
            assert!(
                !held_back || !name.is_inventory() || set.is_pre_dump(),
                "the inventory of set {number} is served before its commit"
            );
            let made = said.rounds && (name.is_pages() || name.is_pagemap());
            if !image.is_complete() || made {
                continue;
            }
            assert!(
                self.is_whole(number, &name, &image.head(usize::MAX), 3),
                "{name} of set {number} was not sent like this"
            );
        }
    }

    /// Whether an image of this name and content was sent to its end.
    fn is_whole(&self, set: u32, name: &ImageName, content: &[u8], parts: u8) -> bool {
        let of_name = |s: &&StreamSaid| {
            s.opened
                .iter()
                .any(|(in_set, opened, _)| *in_set == set && opened == name)
        };
        self.streams.values().filter(of_name).any(|stream| {
            let appends = stream.opened.iter().any(|(_, _, append)| *append);
            stream.totals.iter().any(|&total| {
                let total = usize::try_from(total).unwrap_or(usize::MAX);
                let Some(before) = content.len().checked_sub(total) else {
                    return false;
                };
                let (before, part) = content.split_at(before);
                let base = before.is_empty()
                    || appends && parts > 0 && self.is_whole(set, name, before, parts - 1);
                base && made_of(part, &stream.frames, 0)
            })
        })
    }
}

/// Whether `content` is the frames 0, 1, 2 ...
fn made_of(content: &[u8], frames: &[(u32, Vec<u8>)], next: u32) -> bool {
    content.is_empty()
        || frames
            .iter()
            .filter(|(sequence, bytes)| *sequence == next && content.starts_with(bytes))
            .any(|(_, bytes)| made_of(&content[bytes.len()..], frames, next.wrapping_add(1)))
}
