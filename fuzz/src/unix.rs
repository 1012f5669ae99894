//! What comes over the unix sockets of both daemons: CRIUs and operators that say what the fuzzer's
//! bytes say, on several connections at once, and hand over pipes and other descriptors.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use e2e_tests::fake::wire::{framed, local_image_entry, one_string, send_fds_beside};
use image_common::control::hold::Held;
use image_common::control::{Request, RestoreStep, Restoring, ScriptRun};
use rustix::pipe::{pipe_with, PipeFlags};

use crate::cache::{filled, Cache, UNSERVED};
use crate::client::Client;
use crate::input::Input;
use crate::link::{content, NAMES, SNAPSHOTS};
use crate::proxy::Daemons;
use crate::world;

/// At once, of connections as of pipes.
const MOST: usize = 6;

/// Makes a connection to the daemon.
pub type Connect<'a> = &'a dyn Fn() -> UnixStream;

/// One message, as the bytes have it.
pub type Speak = fn(&mut Input<'_>) -> Vec<u8>;

/// Restores of sets of all kinds, from connections of one kind to image-cache.
pub fn restores(bytes: &[u8], connect: fn(&Cache) -> UnixStream, message: Speak) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let (cache, links) = filled(&mut input).await;
        let mut peers = Peers::default();
        let connect = || connect(&cache);
        peers.play(kind, &mut input, &connect, message).await;
        peers.check_unserved();
        drop(links);
        cache.end().await;
    });
}

/// Dumps, on connections of one kind to image-proxy, with an image-cache behind it.
pub fn dumps(bytes: &[u8], connect: fn(&Daemons) -> UnixStream, message: Speak) {
    let mut input = Input::new(bytes);
    world::run(async move {
        let kind = input.u8();
        let daemons = Daemons::start(&mut input).await;
        let mut peers = Peers::default();
        let connect = || connect(&daemons);
        peers.play(kind, &mut input, &connect, message).await;
        world::pass(Duration::from_secs(20)).await;
        daemons.check(&peers);
        daemons.end().await;
    });
}

struct Connection {
    client: Client,
    /// Bytes that were said on it, if its first message was a whole one: so long is that.
    said: Vec<u8>,
    message: Option<usize>,
}

/// Our end of a pipe whose other end a daemon has.
enum Pipe {
    /// The daemon reads.
    Into(File, Vec<u8>),
    /// The daemon writes.
    From(File),
}

/// All that one input does.
#[derive(Default)]
pub struct Peers {
    connections: Vec<Connection>,
    pipes: Vec<Pipe>,
    count: u8,
    /// What the daemon may take for an image: what was put into a pipe until it was closed, or said
    /// on a connection behind its message.
    pub offered: BTreeSet<Vec<u8>>,
    /// What daemons have put into pipes, and said.
    pub received: Vec<Vec<u8>>,
    /// Bytes were said that are no message: what a daemon takes for the beginning of an image is not
    /// known.
    pub unclear: bool,
}

/// A message of `--remote`, with its frame.
pub fn remote(input: &mut Input<'_>) -> Vec<u8> {
    let name = *input.pick(&NAMES);
    let snapshot = *input.pick(&SNAPSHOTS);
    let spelling = *input.pick(&["", "null"]);
    let message = match input.below(12) {
        0 | 1 => local_image_entry(b"parent", spelling.as_bytes(), 0x400),
        2 => local_image_entry(b"parent", spelling.as_bytes(), 0),
        3..=5 => local_image_entry(name.as_bytes(), snapshot.as_bytes(), 1),
        6 => local_image_entry(name.as_bytes(), snapshot.as_bytes(), 0x401),
        7 | 8 => local_image_entry(name.as_bytes(), snapshot.as_bytes(), 0),
        9 => local_image_entry(b"", b"", u32::from(input.u8() & 1)),
        10 => local_image_entry(b"DUMP_FINISH", b"null", 1),
        _ => local_image_entry(input.short(), input.short(), input.any()),
    };
    let push = message == local_image_entry(b"parent", spelling.as_bytes(), 0x400);
    let mut framed_message = framed(&message);
    if push && input.u8() < 240 {
        framed_message.extend(framed(&one_string(snapshot.as_bytes())));
    }
    framed_message
}

/// A message of `--stream`, with its frame.
pub fn stream(input: &mut Input<'_>) -> Vec<u8> {
    match input.u8() {
        0..=239 => framed(&one_string(input.pick(&NAMES).as_bytes())),
        _ => framed(&one_string(input.short())),
    }
}

/// A line to a control socket.
pub fn control(input: &mut Input<'_>) -> Vec<u8> {
    let session = match input.below(8) {
        0..=4 => "web".to_owned(),
        5 => "../web".to_owned(),
        6 => "web-2".to_owned(),
        _ => String::from_utf8_lossy(input.short()).into_owned(),
    };
    let parent = rustix::process::getppid().map_or(1, |pid| pid.as_raw_nonzero().get());
    let pid = |input: &mut Input<'_>| match input.below(4) {
        0 | 1 => parent,
        2 => i32::from(input.u8()),
        _ => input.any(),
    };
    let dir = |input: &mut Input<'_>| match input.below(3) {
        0 => None,
        1 => Some("/d1".to_owned()),
        _ => Some(String::from_utf8_lossy(input.short()).into_owned()),
    };
    let kind = input.below(11);
    let run = ScriptRun {
        criu_pid: pid(input),
        images_dir: dir(input),
        root_pid: (input.u8() & 1 != 0).then(|| pid(input)),
        expected_bytes: (input.u8() & 1 != 0).then(|| input.any()),
    };
    let request = match kind {
        0 => Request::Announce(run),
        1 => Request::Commit(run),
        2 => Request::Restoring(Restoring {
            step: match input.below(5) {
                0 => RestoreStep::PreStream,
                1 => RestoreStep::PreRestore,
                2 => RestoreStep::PostRestore,
                3 => RestoreStep::PreResume,
                _ => RestoreStep::PostResume,
            },
            criu_pid: run.criu_pid,
            holds: input.below(2) == 0,
            log: input.below(8) == 0,
            pidfd: input.below(8) == 0,
        }),
        3 => Request::Release {
            session,
            process_is_dead: input.u8() & 1 != 0,
        },
        4 => Request::Drop {
            session,
            process_lives: input.u8() & 1 != 0,
        },
        5 => Request::Abort {
            session,
            process_lives: input.u8() & 1 != 0,
        },
        6 => Request::Import {
            images_dir: dir(input).unwrap_or_default(),
            session: (input.u8() & 1 != 0).then_some(session),
        },
        7 => Request::Holds,
        8 => Request::YieldPort,
        9 => Request::Holding(Box::new(Held {
            id: "@000000000000".to_owned(),
            session,
            snapshot: dir(input).unwrap_or_default(),
            set: input.u8().into(),
            key: input.any(),
            proxy: input.any(),
            peer: "10.0.0.1:5".to_owned(),
        })),
        _ => Request::Status,
    };
    let mut line = serde_json::to_vec(&request).expect("as JSON");
    line.push(b'\n');
    line
}

impl Peers {
    /// What is left of the input: any bytes, if `kind` says so, else one thing after the other. Then
    /// all of them go.
    pub async fn play(
        &mut self,
        kind: u8,
        input: &mut Input<'_>,
        connect: Connect<'_>,
        message: Speak,
    ) {
        if kind % 4 == 3 {
            self.raw(input, connect).await;
        }
        while !input.is_empty() {
            self.step(input, connect, message).await;
        }
        self.end();
    }

    /// One thing, as the bytes have it.
    pub async fn step(&mut self, input: &mut Input<'_>, connect: Connect<'_>, message: Speak) {
        let op = input.u8();
        let at = usize::from(input.u8());
        match op % 16 {
            0..=4 => {
                // A message, on a connection that is there or, as CRIU does it, on a new one.
                if op & 16 == 0 || self.connections.is_empty() {
                    self.connect(connect);
                }
                let at = self.at(at);
                let mut bytes = message(input);
                let whole = input.u8() < 245;
                if !whole {
                    self.unclear = true;
                    let cut = input.below(256).min(bytes.len());
                    bytes.truncate(cut);
                }
                let connection = &mut self.connections[at];
                if connection.said.is_empty() && whole {
                    connection.message = Some(bytes.len());
                }
                connection.say(&bytes).await;
                if op & 32 != 0 {
                    world::turn().await;
                }
                if op & 64 != 0 {
                    self.hand_over(at, input);
                }
            }
            5 | 6 if !self.connections.is_empty() => {
                let at = self.at(at);
                self.hand_over(at, input);
            }
            7 if !self.connections.is_empty() => {
                let at = self.at(at);
                self.count = self.count.wrapping_add(1);
                let bytes = content(input, self.count);
                self.connections[at].say(&bytes).await;
            }
            8 if !self.connections.is_empty() => {
                let at = self.at(at);
                let bytes = input.short();
                self.unclear = true;
                self.connections[at].say(bytes).await;
            }
            9 if !self.connections.is_empty() => {
                let at = self.at(at);
                let connection = &self.connections[at];
                let _ = connection.client.socket.shutdown(std::net::Shutdown::Write);
            }
            10 if !self.connections.is_empty() => {
                let at = self.at(at);
                self.close(at);
            }
            11 | 12 if !self.pipes.is_empty() => {
                let at = at % self.pipes.len();
                match &mut self.pipes[at] {
                    Pipe::Into(file, said) => {
                        self.count = self.count.wrapping_add(1);
                        let bytes = content(input, self.count);
                        let n = file.write(&bytes).unwrap_or(0);
                        said.extend_from_slice(&bytes[..n]);
                    }
                    Pipe::From(file) => {
                        let mut buffer = vec![0; usize::from(input.any::<u16>())];
                        let n = file.read(&mut buffer).unwrap_or(0);
                        self.received.push(buffer[..n].to_vec());
                    }
                }
            }
            13 if !self.pipes.is_empty() => {
                let at = at % self.pipes.len();
                self.close_pipe(at);
            }
            14 => world::pass(Duration::from_millis(u64::from(input.u8()) * 100)).await,
            _ => {
                world::turn().await;
                for connection in &mut self.connections {
                    connection.client.hear();
                }
            }
        }
    }

    /// Any bytes on one connection, in pieces.
    pub async fn raw(&mut self, input: &mut Input<'_>, connect: Connect<'_>) {
        self.unclear = true;
        self.connect(connect);
        let piece = *input.pick(&[usize::MAX, 1, 4, 1000]);
        while !input.is_empty() {
            let bytes = input.bytes(piece);
            self.connections[0].say(bytes).await;
            world::turn().await;
        }
    }

    /// Whether nothing was given out that must not be.
    pub fn check_unserved(&self) {
        let has = |bytes: &Vec<u8>| bytes.windows(UNSERVED.len()).any(|w| w == UNSERVED);
        assert!(
            !self.received.iter().any(has),
            "what is not whole was served"
        );
    }

    fn at(&self, at: usize) -> usize {
        at % self.connections.len()
    }

    /// A new connection, the last one.
    fn connect(&mut self, connect: Connect<'_>) {
        if self.connections.len() >= MOST {
            self.close(0);
        }
        self.connections.push(Connection {
            client: Client::new(connect()),
            said: Vec::new(),
            message: None,
        });
    }

    /// A descriptor, or several, or none, with a byte.
    fn hand_over(&mut self, at: usize, input: &mut Input<'_>) {
        let kind = input.u8();
        let byte = if kind < 245 { 0 } else { input.u8() };
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (reader, writer) = pipe_with(flags).expect("a pipe");
        let mut given: Vec<OwnedFd> = Vec::new();
        match kind % 16 {
            0..=6 => {
                self.count = self.count.wrapping_add(1);
                let mut file = File::from(writer);
                let bytes = content(input, self.count);
                let n = file.write(&bytes).unwrap_or(0);
                self.keep(Pipe::Into(file, bytes[..n].to_vec()));
                given.push(reader);
                if kind & 16 != 0 {
                    self.close_pipe(self.pipes.len() - 1);
                }
            }
            7..=11 => {
                self.keep(Pipe::From(File::from(reader)));
                given.push(writer);
            }
            12 => given.extend([reader, writer]),
            13 => given.push(File::open("/dev/null").expect("it is there").into()),
            14 => given.push(File::open(IMAGES).expect("it is there").into()),
            _ => {}
        }
        let fds: Vec<BorrowedFd<'_>> = given.iter().map(AsFd::as_fd).collect();
        let connection = &mut self.connections[at];
        let sent = send_fds_beside(&connection.client.socket, byte, &fds);
        if sent.is_ok() {
            connection.said.push(byte);
        }
    }

    fn keep(&mut self, pipe: Pipe) {
        if self.pipes.len() >= MOST {
            self.close_pipe(0);
        }
        self.pipes.push(pipe);
    }

    fn close_pipe(&mut self, at: usize) {
        match self.pipes.remove(at) {
            Pipe::Into(_, said) => drop(self.offered.insert(said)),
            Pipe::From(file) => self.received.push(rest(&file)),
        }
    }

    fn close(&mut self, at: usize) {
        let mut connection = self.connections.remove(at);
        connection.client.hear();
        self.received.push(connection.client.heard);
        // The daemon may have closed before the message was said whole: nothing follows it then.
        let said = connection.said.len();
        if let Some(message) = connection.message.filter(|&message| message <= said) {
            self.offered.insert(connection.said.split_off(message));
        }
    }

    /// Whether `content` is something that was offered whole, or up to `parts` such things.
    pub fn offers(&self, content: &[u8], parts: u8) -> bool {
        content.is_empty()
            || parts > 0
                && self.offered.iter().any(|offered| {
                    let rest = content.strip_prefix(&offered[..]);
                    !offered.is_empty() && rest.is_some_and(|rest| self.offers(rest, parts - 1))
                })
    }

    /// All of them go, connections and pipes.
    pub fn end(&mut self) {
        while !self.connections.is_empty() {
            self.close(0);
        }
        while !self.pipes.is_empty() {
            self.close_pipe(0);
        }
    }
}

/// A directory with the images of a dump, and nothing that anybody writes to.
const IMAGES: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../tests/fixtures/stream-plain/images"
);

impl Connection {
    /// As much as the daemon takes now: it may be busy with something that another connection must
    /// bring.
    async fn say(&mut self, bytes: &[u8]) {
        match self.client.socket.write(bytes) {
            Ok(n) => self.said.extend_from_slice(&bytes[..n]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => world::turn().await,
            Err(_) => {}
        }
        self.client.hear();
    }
}

/// What is in a pipe.
fn rest(mut pipe: &File) -> Vec<u8> {
    let mut all = Vec::new();
    // The end, or that there is nothing now.
    let _ = pipe.read_to_end(&mut all);
    all
}
