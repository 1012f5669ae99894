//! The order in which CRIU opens, fills, asks for and closes images: a dump and a restore of a whole set.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Mutex;

use super::content::{Content, Image, ImageSet, MISSING};
use super::remote::Remote;
use super::stream::{Capture, Serve};
use super::wire::Channel;

/// CRIU flushes a buffered image in pieces of this size, and reads ahead as much.
const BUFFER: usize = 4096;

/// Where images are dumped to.
pub trait Sink {
    fn create(&self, name: &str) -> io::Result<Channel>;
}

/// Where images are restored from. `None`: the daemon says that there is no such image.
pub trait Source: Sync {
    fn open(&self, name: &str) -> io::Result<Option<Channel>>;
}

impl Sink for Capture {
    fn create(&self, name: &str) -> io::Result<Channel> {
        Capture::create(self, name)
    }
}

impl Source for Serve {
    fn open(&self, name: &str) -> io::Result<Option<Channel>> {
        Serve::open(self, name)
    }
}

/// One snapshot of a `--remote` client.
pub struct Snapshot<'a>(pub &'a Remote, pub &'a str);

impl Sink for Snapshot<'_> {
    fn create(&self, name: &str) -> io::Result<Channel> {
        self.0.create(self.1, name)
    }
}

impl Source for Snapshot<'_> {
    fn open(&self, name: &str) -> io::Result<Option<Channel>> {
        match self.0.open_read(self.1, name)? {
            Ok(channel) => Ok(Some(channel)),
            Err(2) => Ok(None),
            Err(errno) => Err(io::Error::from_raw_os_error(errno.into())),
        }
    }
}

/// What a dump tells whoever watches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Half of this image's bytes are written.
    Half(&'a str),
    /// Every image is written and closed; the post-dump script would come now.
    Written,
}

/// Writes a set as a dump does: global images stay open, a pagemap and its pages are open together, the inventory is
/// opened last, and the global images are closed after it.
pub fn dump(sink: &dyn Sink, set: &ImageSet, watch: &mut dyn FnMut(Event)) -> io::Result<()> {
    let mut globals = Vec::new();
    let mut images = set.images.iter().peekable();
    while let Some(image) = images.next() {
        if image.global {
            let mut channel = sink.create(&image.name)?;
            let head = image.content.len().min(BUFFER as u64);
            image
                .content
                .send_range(&mut channel, 0, head / 2, BUFFER)?;
            watch(Event::Half(&image.name));
            image
                .content
                .send_range(&mut channel, head / 2, head, BUFFER)?;
            globals.push((image, channel, head));
        } else if image.name.starts_with("pagemap-") {
            let pages = images.next_if(|next| next.name.starts_with("pages-"));
            dump_memory(sink, image, pages, watch)?;
        } else {
            dump_one(sink, image, watch)?;
        }
    }
    for (image, mut channel, from) in globals {
        image
            .content
            .send_range(&mut channel, from, image.content.len(), BUFFER)?;
    }
    watch(Event::Written);
    Ok(())
}

fn dump_one(sink: &dyn Sink, image: &Image, watch: &mut dyn FnMut(Event)) -> io::Result<()> {
    let mut channel = sink.create(&image.name)?;
    let half = image.content.len() / 2;
    image.content.send_range(&mut channel, 0, half, BUFFER)?;
    watch(Event::Half(&image.name));
    image
        .content
        .send_range(&mut channel, half, image.content.len(), BUFFER)
}

fn dump_memory(
    sink: &dyn Sink,
    pagemap: &Image,
    pages: Option<&Image>,
    watch: &mut dyn FnMut(Event),
) -> io::Result<()> {
    let mut map_channel = sink.create(&pagemap.name)?;
    let Some(pages) = pages else {
        return pagemap.content.send(&mut map_channel);
    };
    let mut pages_channel = sink.create(&pages.name)?;
    // Alternate pieces; each side moves on only when the daemon took the other's.
    let (map_len, pages_len) = (pagemap.content.len(), pages.content.len());
    let rounds = map_len.div_ceil(BUFFER as u64).max(1);
    let per_round = pages_len.div_ceil(rounds);
    let mut told = false;
    for round in 0..rounds {
        let from = round * BUFFER as u64;
        let to = (from + BUFFER as u64).min(map_len);
        pagemap
            .content
            .send_range(&mut map_channel, from, to, BUFFER)?;
        let (from, to) = (round * per_round, ((round + 1) * per_round).min(pages_len));
        let middle = from.midpoint(to.max(from));
        pages
            .content
            .send_range(&mut pages_channel, from, middle, 64 * 1024)?;
        if !told && middle >= pages_len / 2 {
            watch(Event::Half(&pages.name));
            told = true;
        }
        pages
            .content
            .send_range(&mut pages_channel, middle, to, 64 * 1024)?;
    }
    Ok(())
}

/// What a restore got: every image that it asked for, `None` where there was none.
pub type Fetched = BTreeMap<String, Option<Vec<u8>>>;

/// Asks for these images and some that do not exist, in the order of a restore: the inventory first, ids while the
/// process tree is open, then two tasks at once, each of which opens pages before it has read its pagemap to the end.
pub fn fetch(source: &dyn Source, names: &[&str]) -> io::Result<Fetched> {
    let fetched = Mutex::new(Fetched::new());
    let put = |name: &str, bytes: Option<Vec<u8>>| {
        fetched
            .lock()
            .expect("no reader panics")
            .insert(name.to_owned(), bytes);
    };
    put("inventory.img", read_all(source, "inventory.img")?);
    let mut tree = source.open("pstree.img")?;
    for name in names.iter().filter(|name| name.starts_with("ids-")) {
        put(name, read_all(source, name)?);
    }
    put("pstree.img", tree.as_mut().map(drain).transpose()?);
    for name in MISSING.iter().filter(|name| !names.contains(name)) {
        put(name, read_all(source, name)?);
    }
    let pairs = memory_pairs(names);
    let others: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| {
            !name.starts_with("ids-") && !matches!(*name, "inventory.img" | "pstree.img")
        })
        .filter(|name| {
            !pairs
                .iter()
                .any(|(pagemap, pages)| name == pagemap || name == pages)
        })
        .collect();
    let task = |number: usize| -> io::Result<()> {
        for name in others.iter().skip(number).step_by(2) {
            put(name, read_all(source, name)?);
        }
        for (pagemap, pages) in pairs.iter().skip(number).step_by(2) {
            let (map_bytes, pages_bytes) = read_memory(source, pagemap, pages)?;
            put(pagemap, map_bytes);
            put(pages, pages_bytes);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| task(1));
        let first = task(0);
        other.join().expect("no task panics").and(first)
    })?;
    Ok(fetched.into_inner().expect("no reader panics"))
}

/// Pagemaps with the pages image that follows each, as [`dump`] wrote them.
fn memory_pairs<'a>(names: &[&'a str]) -> Vec<(&'a str, &'a str)> {
    names
        .windows(2)
        .filter(|pair| pair[0].starts_with("pagemap-") && pair[1].starts_with("pages-"))
        .map(|pair| (pair[0], pair[1]))
        .collect()
}

#[allow(
    clippy::type_complexity,
    reason = "two images, each of which may be missing"
)]
fn read_memory(
    source: &dyn Source,
    pagemap: &str,
    pages: &str,
) -> io::Result<(Option<Vec<u8>>, Option<Vec<u8>>)> {
    let Some(mut map_channel) = source.open(pagemap)? else {
        return Ok((None, read_all(source, pages)?));
    };
    let mut map_bytes = vec![0; BUFFER];
    let count = map_channel.read(&mut map_bytes)?;
    map_bytes.truncate(count);
    let mut pages_channel = source.open(pages)?;
    map_bytes.extend(drain(&mut map_channel)?);
    let pages_bytes = pages_channel.as_mut().map(drain).transpose()?;
    Ok((Some(map_bytes), pages_bytes))
}

fn drain(channel: &mut Channel) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    channel.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// One image, opened and read to its end.
pub fn read_all(source: &dyn Source, name: &str) -> io::Result<Option<Vec<u8>>> {
    source.open(name)?.as_mut().map(drain).transpose()
}

/// Whether a restore got exactly this set.
pub fn compare(fetched: &Fetched, set: &ImageSet) -> Result<(), String> {
    for image in &set.images {
        match fetched.get(&image.name) {
            Some(Some(bytes)) => {
                let check = image.content.check(&mut bytes.as_slice());
                check.map_err(|error| format!("{}: {error}", image.name))?;
            }
            Some(None) => return Err(format!("{}: \"no such image\"", image.name)),
            None => return Err(format!("{}: not asked for", image.name)),
        }
    }
    let extra = fetched
        .iter()
        .find(|(name, bytes)| bytes.is_some() && !set.images.iter().any(|i| i.name == **name));
    match extra {
        Some((name, _)) => Err(format!("{name}: exists, but was never dumped")),
        None => Ok(()),
    }
}

/// A whole restore that must get exactly `set`.
pub fn restore(source: &dyn Source, set: &ImageSet) -> Result<(), String> {
    let fetched = fetch(source, &set.names()).map_err(|error| error.to_string())?;
    compare(&fetched, set)
}

/// A `--stream` restore from its connect to its close.
pub fn restore_stream(dir: &std::path::Path, set: &ImageSet) -> Result<(), String> {
    let serve = Serve::connect(dir).map_err(|error| format!("connect: {error}"))?;
    restore(&serve, set)
}

/// A `--remote` restore from the list to FINISH.
pub fn restore_remote(client: &Remote, id: &str, set: &ImageSet) -> Result<(), String> {
    let list = client.list().map_err(|error| format!("list: {error}"))?;
    if !list.iter().any(|entry| entry == id) {
        return Err(format!("the list {list:?} lacks {id}"));
    }
    restore(&Snapshot(client, id), set)?;
    client
        .restore_finish()
        .map_err(|error| format!("FINISH: {error}"))
}

/// Asks for one image and compares it as it comes; for images that nobody wants to keep.
pub fn check_one(source: &dyn Source, name: &str, content: &Content) -> Result<(), String> {
    match source
        .open(name)
        .map_err(|error| format!("{name}: {error}"))?
    {
        Some(mut channel) => content
            .check(&mut channel)
            .map_err(|error| format!("{name}: {error}")),
        None => Err(format!("{name}: \"no such image\"")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    use super::*;
    use crate::fake::stream::{CAPTURE_SOCKET, SERVE_SOCKET};
    use crate::fake::wire;

    type Store = Arc<Mutex<HashMap<String, Vec<u8>>>>;

    /// The simplest streamer that the protocol text allows: a thread per image, everything in a map.
    fn streamer(dir: &std::path::Path, store: &Store) -> std::thread::JoinHandle<()> {
        let capture = UnixListener::bind(dir.join(CAPTURE_SOCKET)).unwrap();
        let serve = UnixListener::bind(dir.join(SERVE_SOCKET)).unwrap();
        let store = store.clone();
        std::thread::spawn(move || {
            let (socket, _) = capture.accept().unwrap();
            let mut readers = Vec::new();
            while let Some(message) = wire::read_frame(&socket).unwrap() {
                let name = wire::parse_one_string(&message).unwrap();
                let (mut channel, store) = (
                    Channel::new(wire::recv_fd(&socket).unwrap()).unwrap(),
                    store.clone(),
                );
                readers.push(std::thread::spawn(move || {
                    let bytes = drain(&mut channel).unwrap();
                    store.lock().unwrap().insert(name, bytes);
                }));
            }
            readers
                .into_iter()
                .for_each(|reader| reader.join().unwrap());
            let (socket, _) = serve.accept().unwrap();
            while let Some(message) = wire::read_frame(&socket).unwrap() {
                let bytes = store
                    .lock()
                    .unwrap()
                    .get(&wire::parse_one_string(&message).unwrap())
                    .cloned();
                wire::write_frame(&socket, &[8, u8::from(bytes.is_some())]).unwrap();
                if let Some(bytes) = bytes {
                    let mut channel = Channel::new(wire::recv_fd(&socket).unwrap()).unwrap();
                    std::thread::spawn(move || std::io::Write::write_all(&mut channel, &bytes));
                }
            }
        })
    }

    /// The fake can dump and restore through a streamer that is right, and notices one that is not.
    #[test]
    fn passes_through_an_honest_streamer_and_notices_a_lost_byte() {
        for spoil in [false, true] {
            let dir = crate::daemons::scratch();
            let store = Store::default();
            let thread = streamer(dir.path(), &store);
            let capture = Capture::connect(dir.path()).unwrap();
            let set = ImageSet::sample(1);
            let mut halves = 0;
            dump(&capture, &set, &mut |event| {
                halves += usize::from(event != Event::Written)
            })
            .unwrap();
            drop(capture);
            // One per image, but one for a pagemap with its pages.
            assert_eq!(halves, set.images.len() - 3);
            let serve = Serve::connect(dir.path()).unwrap();
            if spoil {
                serve.open("inventory.img").unwrap();
                store.lock().unwrap().get_mut("core-8.img").unwrap().pop();
            }
            let result = restore(&serve, &set);
            assert_eq!(result.is_err(), spoil, "{result:?}");
            drop(serve);
            thread.join().unwrap();
        }
    }
}
