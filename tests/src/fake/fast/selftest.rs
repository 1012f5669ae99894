//! The fake CRIU against a little store of its own: each dialect carries a set there and back,
//! and bytes that changed or are missing on the way are noticed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;

use super::set::{ManySmall, OneTask};
use super::{Dialect, Dump, Restore};
use crate::fake::wire::{framed, read_frame, recv_fd, write_frame};
use crate::memory::{Body, Warm, PAGE};

/// Images by name, each with the thread that receives it.
#[derive(Default)]
struct Images(Mutex<HashMap<Vec<u8>, JoinHandle<Vec<u8>>>>, Condvar);
type Store = Arc<Images>;

impl Images {
    fn put(&self, name: &[u8], image: JoinHandle<Vec<u8>>) {
        self.0.lock().unwrap().insert(name.to_vec(), image);
        self.1.notify_all();
    }

    /// The whole image. As in the real thing, nothing is missing before the inventory, which is
    /// opened last, is there.
    fn take(&self, name: &[u8], harm: Harm) -> Option<Vec<u8>> {
        let complete = |images: &mut HashMap<Vec<u8>, _>| {
            images.contains_key(name) || images.contains_key(&b"inventory.img"[..])
        };
        let images = self.0.lock().unwrap();
        let wait = Duration::from_secs(20);
        let (mut images, _) = self
            .1
            .wait_timeout_while(images, wait, |images| !complete(images))
            .unwrap();
        let mut image = images.remove(name)?.join().unwrap();
        harm(name, &mut image);
        let copy = image.clone();
        images.insert(name.to_vec(), thread::spawn(move || copy));
        Some(image)
    }
}
/// What the store does to an image before it serves it.
type Harm = fn(&[u8], &mut Vec<u8>);

fn field(body: &[u8], n: u8) -> Option<&[u8]> {
    let mut rest = body;
    while let [tag, len, more @ ..] = rest {
        let (bytes, after) = if tag & 7 == 2 {
            more.split_at(usize::from(*len))
        } else {
            more.split_at(0)
        };
        if tag >> 3 == n {
            return Some(bytes);
        }
        rest = after;
    }
    None
}

fn drain(mut from: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut all = Vec::new();
        from.read_to_end(&mut all).unwrap();
        all
    })
}

/// Serves both ends of `dialect` in `dir` as long as the test runs.
fn serve(dialect: Dialect, dir: &Path, harm: Harm) {
    let store = Store::default();
    let names = match dialect {
        Dialect::Stream => ["streamer-capture.sock", "streamer-serve.sock"],
        _ => ["img-proxy.sock", "img-cache.sock"],
    };
    for (name, dumping) in names.into_iter().zip([true, false]) {
        let listener = UnixListener::bind(dir.join(name)).unwrap();
        let store = store.clone();
        thread::spawn(move || {
            for socket in listener.incoming() {
                let socket = socket.unwrap();
                // An error is the client's business: it sees the connection close.
                let _ = match dialect {
                    Dialect::Stream => stream(&socket, dumping, &store, harm),
                    _ => remote(socket, dialect, dumping, &store, harm),
                };
            }
        });
    }
}

fn stream(socket: &UnixStream, dumping: bool, store: &Store, harm: Harm) -> Result<()> {
    while let Some(request) = read_frame(socket)? {
        let name = field(&request, 1).unwrap().to_vec();
        if dumping {
            let image = drain(File::from(recv_fd(socket)?));
            store.put(&name, image);
        } else if let Some(image) = store.take(&name, harm) {
            write_frame(socket, &[8, 1])?;
            let mut to = File::from(recv_fd(socket)?);
            thread::spawn(move || to.write_all(&image));
        } else {
            write_frame(socket, &[8, 0])?;
        }
    }
    Ok(())
}

fn remote(
    socket: UnixStream,
    dialect: Dialect,
    dumping: bool,
    store: &Store,
    harm: Harm,
) -> Result<()> {
    let request = read_frame(&socket)?.unwrap();
    let (name, id) = (field(&request, 1).unwrap(), field(&request, 2).unwrap());
    let reading = request.ends_with(&[0x18, 0]);
    match (name, id, reading) {
        (b"", b"", _) => Ok(()),
        (b"parent", b"", true) => {
            let ids = store.take(b"ids", |_, _| ()).unwrap();
            write_frame(&socket, &[8, 0])?;
            Ok((&socket).write_all(&ids)?)
        }
        (b"parent", b"", false) => {
            let pushed = framed(&read_frame(&socket)?.unwrap());
            store.put(b"ids", thread::spawn(|| pushed));
            Ok(())
        }
        (_, _, true) => {
            assert!(!dumping);
            let Some(image) = store.take(name, harm) else {
                return Ok(write_frame(&socket, &[8, 2])?);
            };
            write_frame(&socket, &[8, 0])?;
            let mut to = match dialect {
                Dialect::RemoteSocket => File::from(std::os::fd::OwnedFd::from(socket)),
                _ => File::from(recv_fd(&socket)?),
            };
            thread::spawn(move || to.write_all(&image));
            Ok(())
        }
        (_, _, false) => {
            let name = name.to_vec();
            let image = match dialect {
                Dialect::RemoteSocket => drain(socket),
                _ => drain(File::from(recv_fd(&socket)?)),
            };
            store.put(&name, image);
            Ok(())
        }
    }
}

/// Dumps and restores one task of 300 pages; it repeats its 256 pages of memory.
fn round_trip(dialect: Dialect, harm: Harm) -> Result<()> {
    let dir = tempfile::tempdir().unwrap();
    serve(dialect, dir.path(), harm);
    let mut memory = Warm::source(256 * PAGE).unwrap();
    memory.stamp(1);
    let mut into = Warm::new(256 * PAGE, 0xff).unwrap();
    let task = OneTask {
        body: Body::new(memory.bytes(), 300 * PAGE as u64),
    };
    let mut criu = Dump::begin(dialect, dir.path(), "/a")?;
    task.dump(&mut criu)?;
    criu.finish()?;
    let mut criu = Restore::begin(dialect, dir.path(), "/a")?;
    task.restore(&mut criu, into.bytes_mut())?;
    task.check_last(into.bytes())?;
    criu.finish()
}

const ALL: [Dialect; 3] = [Dialect::Stream, Dialect::RemotePipe, Dialect::RemoteSocket];

#[test]
fn every_dialect_carries_a_set() {
    for dialect in ALL {
        round_trip(dialect, |_, _| ()).unwrap();
    }
}

#[test]
fn harm_on_the_way_is_noticed() {
    let harms: [(Harm, &str); 4] = [
        (
            |name, image| {
                if name == b"pages-1.img" {
                    image[290 * PAGE + 77] ^= 1
                }
            },
            "wrong bytes",
        ),
        (
            |name, image| {
                if name == b"pages-1.img" {
                    image[5 * PAGE] ^= 1
                }
            },
            "wrong bytes",
        ),
        (
            |name, image| {
                if name == b"pages-1.img" {
                    image.truncate(299 * PAGE)
                }
            },
            "ends after",
        ),
        (
            |name, image| {
                if name == b"pages-1.img" {
                    image.push(0)
                }
            },
            "longer",
        ),
    ];
    for dialect in ALL {
        for (harm, word) in harms {
            let error = format!("{:#}", round_trip(dialect, harm).unwrap_err());
            assert!(error.contains(word), "{dialect:?}: {error}");
        }
    }
}

#[test]
fn many_small_images_arrive_and_a_wrong_one_is_named() {
    for (harm, failure) in [
        ((|_, _| ()) as Harm, None),
        (
            |name, image| {
                if name == b"core-37.img" {
                    image[4000] ^= 1
                }
            },
            Some("core-37.img"),
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        serve(Dialect::RemotePipe, dir.path(), harm);
        let memory = Warm::source(50 * PAGE).unwrap();
        let set = ManySmall {
            count: 50,
            memory: memory.bytes(),
        };
        let mut criu = Dump::begin(Dialect::RemotePipe, dir.path(), "/a").unwrap();
        set.dump(&mut criu).unwrap();
        criu.finish().unwrap();
        let mut criu = Restore::begin(Dialect::RemotePipe, dir.path(), "/a").unwrap();
        let result = set.restore(&mut criu).map_err(|error| error.to_string());
        assert_eq!(result.is_err(), failure.is_some());
        assert!(failure.is_none_or(|name| result.unwrap_err().contains(name)));
    }
}
