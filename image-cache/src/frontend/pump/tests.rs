use std::fs::File;
use std::io::Read;
use std::thread::JoinHandle;

use image_common::criu::dialect::Dialect;
use image_common::image::{ImageName, SnapshotId, INVENTORY};
use image_common::link::codec::SetNumber;
use proptest::prelude::*;
use rustix::pipe::{pipe_with, PipeFlags};

use super::*;
use crate::store::image::ImageWriter;
use crate::store::memory::budget::Budget;
use crate::store::memory::segment::Tail;
use crate::store::set::{RestoreId, Set};
use crate::store::{Policy, Store};

const FIRST: RestoreId = RestoreId(1);
const SECOND: RestoreId = RestoreId(2);

fn name(text: &str) -> ImageName {
    ImageName::new(text).unwrap()
}

/// Different in every page, and where it lies in the page.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| (n / 4096 * 31 + n % 251).to_le_bytes()[0])
        .collect()
}

/// A pipe as CRIU gives it: blocking at its end, not at ours.
fn new_pipe() -> (File, OwnedFd) {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    (reader.into(), writer)
}

/// Reads to the end with reads of these sizes, over and over.
fn reading(mut from: File, sizes: Vec<usize>) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = vec![0; sizes.iter().copied().max().unwrap()];
        for size in sizes.iter().cycle() {
            match from.read(&mut buffer[..*size]).unwrap() {
                0 => break,
                n => all.extend_from_slice(&buffer[..n]),
            }
        }
        all
    })
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    runtime.enable_all().build().unwrap().block_on(work)
}

/// An image of pieces of these lengths and of so many bytes between them, so that they begin
/// anywhere in a page.
fn scattered(layout: &[(usize, usize)], lend: bool) -> (Arc<Image>, Vec<u8>) {
    let total: usize = layout.iter().map(|(len, _)| len).sum();
    let room = total + layout.iter().map(|(_, gap)| gap).sum::<usize>();
    let (bytes, mut tail) = (pattern(total), Tail::new(room, 0).unwrap());
    let mut at = 0;
    let mut pieces = Vec::new();
    for &(len, gap) in layout {
        tail.spare()[..gap].fill(0xee);
        tail.advance(gap);
        tail.spare()[..len].copy_from_slice(&bytes[at..at + len]);
        // What is lent goes back by whole pages, so it may only be whole pages.
        pieces.push(match lend && gap % 4096 == 0 && len % 4096 == 0 {
            true => tail.advance_owned(len).lend(),
            false => tail.advance(len),
        });
        at += len;
    }
    let charge = Budget::new(1 << 30).charge(0).unwrap();
    (Image::of_pieces(name("pages-1.img"), pieces, charge), bytes)
}

/// A committed dump of one pages image and an inventory.
fn committed(pages: &[u8]) -> (Arc<Set>, Arc<Image>) {
    let store = Store::new(1 << 30, Policy::default());
    let session = store
        .open_session("s".parse().unwrap(), 1, "test".into())
        .unwrap();
    let snapshot = SnapshotId::new("/img").unwrap();
    let set = session
        .open_set(SetNumber(1), snapshot, None, true, Dialect::Stream)
        .unwrap();
    let inventory = b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01";
    for (image, bytes) in [("pages-1.img", pages), (INVENTORY, inventory)] {
        let opened = set.open_image(&name(image), None, false, &store.budget);
        let mut writer = opened.ok().unwrap();
        bytes
            .chunks(60_000)
            .for_each(|chunk| writer.put(chunk).unwrap());
        set.finish_image(writer, bytes.len() as u64).unwrap();
    }
    let total = (pages.len() + inventory.len()) as u64;
    set.complete(2, total).unwrap();
    set.prepare(2, total).unwrap();
    set.commit().unwrap();
    let image = match set.lookup(&name("pages-1.img"), None) {
        crate::store::set::Lookup::Ready(image) => image,
        _ => panic!("it is there"),
    };
    (set, image)
}

async fn serve(image: &Arc<Image>, fd: OwnedFd, taking: Option<&Taking>) -> Served {
    let mut sink = PipeSink::new(fd, image);
    pump(image, &mut sink, taking).await.unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Pieces of any length anywhere in their pages, read in any way: every byte, once.
    #[test]
    fn pieces_of_any_layout_arrive_whole(
        layout in proptest::collection::vec((1..40_000usize, 0..5000usize), 1..60),
        sizes in proptest::collection::vec(1..100_000usize, 1..5),
    ) {
        let (image, bytes) = scattered(&layout, false);
        let (reader, writer) = new_pipe();
        let reading = reading(reader, sizes);
        let served = block_on(serve(&image, writer, None));
        prop_assert_eq!(served, Served::Whole);
        prop_assert!(reading.join().unwrap() == bytes);
    }

    /// The writer gets ahead of the reader or falls behind it, in steps of any size.
    #[test]
    fn an_arriving_image_is_followed_by_reference(
        steps in proptest::collection::vec((1..150_000usize, any::<bool>()), 1..30),
        sizes in proptest::collection::vec(1..100_000usize, 1..5),
    ) {
        let total: usize = steps.iter().map(|s| s.0).sum();
        let bytes = pattern(total);
        let (reader, writer) = new_pipe();
        let reading = reading(reader, sizes);
        block_on(async {
            let budget = Budget::new(1 << 30);
            let opened = ImageWriter::new(name("pages-1.img"), None, None, Arc::default(), &budget);
            let mut source = opened.unwrap();
            let image = source.image().clone();
            let mut sink = PipeSink::new(writer, &image);
            assert!(sink.by_reference);
            let serving = tokio::spawn(async move {
                pump(&image, &mut sink, None).await.unwrap()
            });
            let mut at = 0;
            for &(step, pause) in &steps {
                source.put(&bytes[at..at + step]).unwrap();
                at += step;
                if pause {
                    tokio::task::yield_now().await;
                }
            }
            source.finish(total as u64).unwrap();
            assert_eq!(serving.await.unwrap(), Served::Whole);
        });
        prop_assert!(reading.join().unwrap() == bytes);
    }

    /// Memory that goes back while it is read, also what is still in the pipe.
    #[test]
    fn what_is_taken_along_arrives_whole(
        layout in proptest::collection::vec((1..20usize, 0..3usize), 1..60),
        sizes in proptest::collection::vec(1..100_000usize, 1..5),
    ) {
        let layout: Vec<_> = layout.iter().map(|(a, b)| (a * 4096, b * 4096)).collect();
        let (image, bytes) = scattered(&layout, true);
        let (set, _) = committed(&[]);
        let taking = set.to_be_taken(&image, FIRST).unwrap();
        let (reader, writer) = new_pipe();
        let reading = reading(reader, sizes);
        let served = block_on(serve(&image, writer, Some(&taking)));
        prop_assert_eq!(served, Served::Whole);
        prop_assert!(reading.join().unwrap() == bytes);
        prop_assert!(image.is_released());
    }
}

/// 64 KiB, and no more to be had: unprivileged users run out of `pipe-user-pages-soft`.
#[test]
fn a_pipe_that_stays_small_is_enough() {
    let (image, bytes) = scattered(&[(1_000_003, 77)], false);
    let (reader, writer) = new_pipe();
    let mut sink = PipeSink::new(writer, &image);
    let Pipe::Unwatched(fd) = &sink.pipe else {
        panic!("nothing was written")
    };
    rustix::pipe::fcntl_setpipe_size(fd, 4096).unwrap();
    let reading = reading(reader, vec![30_000]);
    let served = block_on(pump(&image, &mut sink, None)).unwrap();
    drop(sink);
    assert_eq!(served, Served::Whole);
    assert!(reading.join().unwrap() == bytes);
}

#[test]
fn a_reader_that_stops_ends_its_transfer_alone() {
    let (image, bytes) = scattered(&[(5 << 20, 1)], false);
    let (mut reader, writer) = new_pipe();
    let stops = std::thread::spawn(move || {
        let mut head = vec![0; 1_500_000];
        reader.read_exact(&mut head).unwrap();
        head
    });
    assert_eq!(block_on(serve(&image, writer, None)), Served::ClosedEarly);
    assert!(stops.join().unwrap()[..] == bytes[..1_500_000]);
    let (reader, writer) = new_pipe();
    let all = reading(reader, vec![1 << 20]);
    assert_eq!(block_on(serve(&image, writer, None)), Served::Whole);
    assert!(all.join().unwrap() == bytes);
}

/// CRIU reads some images with one `read` each and takes a short one as their end.
#[test]
fn an_image_that_criu_does_not_buffer_is_read_at_once() {
    let bytes = pattern(900_001);
    let budget = Budget::new(1 << 30);
    let opened = ImageWriter::new(name("pipes-data.img"), None, None, Arc::default(), &budget);
    let mut source = opened.unwrap();
    bytes
        .chunks(50_000)
        .for_each(|chunk| source.put(chunk).unwrap());
    let image = source.finish(bytes.len() as u64).unwrap();
    let (mut reader, writer) = new_pipe();
    // It must fit: nobody reads before it is over.
    assert_eq!(block_on(serve(&image, writer, None)), Served::Whole);
    let mut got = vec![0; bytes.len() + 1];
    assert_eq!(reader.read(&mut got).unwrap(), bytes.len());
    assert!(got[..bytes.len()] == bytes);
}

#[test]
fn one_restore_takes_a_set_and_all_others_are_told() {
    let bytes = pattern(8 << 20);
    let (set, image) = committed(&bytes);
    let taking = |restore| set.to_be_taken(&image, restore).unwrap();
    block_on(async {
        // It is in the middle when the other begins to take.
        let (mut late, writer) = new_pipe();
        let second = taking(SECOND);
        let mut other = Box::pin(serve(&image, writer, Some(&second)));
        let waits =
            std::future::poll_fn(|cx| std::task::Poll::Ready(other.as_mut().poll(cx).is_pending()));
        assert!(waits.await, "8 MiB do not fit into a pipe");

        let (reader, writer) = new_pipe();
        let reading = reading(reader, vec![1 << 20]);
        let first = taking(FIRST);
        assert_eq!(serve(&image, writer, Some(&first)).await, Served::Whole);
        assert!(reading.join().unwrap() == bytes);

        let mut got = Vec::new();
        let drain = std::thread::spawn(move || {
            late.read_to_end(&mut got).unwrap();
            got
        });
        assert_eq!(other.await, Served::Taken);
        let got = drain.join().unwrap();
        // What it held it may have sent; no byte of it is wrong.
        assert!(got[..] == bytes[..got.len()]);
    });
    let told = |image: &str, restore| set.lookup(&name(image), restore);
    use crate::store::set::Lookup;
    assert!(matches!(told(INVENTORY, Some(FIRST)), Lookup::Ready(_)));
    assert!(matches!(told("pages-1.img", Some(FIRST)), Lookup::Gone(_)));
    for restore in [None, Some(SECOND)] {
        assert!(matches!(told(INVENTORY, restore), Lookup::Gone(_)));
        assert!(matches!(told("absent.img", restore), Lookup::Gone(_)));
    }
    assert!(image.slice(0, 4096).is_none());
    assert!(!set.is_lost_with(SECOND) && set.is_only_copy());
    assert!(set.is_lost_with(FIRST) && !set.is_only_copy());
    assert!(matches!(told(INVENTORY, Some(FIRST)), Lookup::Gone(_)));
}

/// A restore that fails before it has read a piece leaves the whole set.
#[test]
fn what_was_not_read_is_not_taken() {
    let bytes = pattern(8 << 20);
    let (set, image) = committed(&bytes);
    let (reader, writer) = new_pipe();
    let taking = set.to_be_taken(&image, FIRST).unwrap();
    block_on(async {
        let mut serving = Box::pin(serve(&image, writer, Some(&taking)));
        let waits = std::future::poll_fn(|cx| {
            std::task::Poll::Ready(serving.as_mut().poll(cx).is_pending())
        });
        assert!(waits.await, "the pipe is full");
        drop(reader);
        assert_eq!(serving.await, Served::ClosedEarly);
    });
    assert!(!set.is_lost_with(FIRST) && set.why_taken().is_none());
    assert!(!image.is_released());
}

#[test]
fn only_pages_of_what_is_committed_may_be_taken() {
    let (set, image) = committed(&pattern(1 << 20));
    assert!(set.to_be_taken(&image, FIRST).is_some());
    let crate::store::set::Lookup::Ready(inventory) = set.lookup(&name(INVENTORY), None) else {
        panic!("it is there")
    };
    assert!(set.to_be_taken(&inventory, FIRST).is_none());
    // Nor by another restore than that which has the set.
    assert!(set.give(FIRST));
    assert!(set.to_be_taken(&image, SECOND).is_none() && set.to_be_taken(&image, FIRST).is_some());
    // Given up without a verdict it is for an operator to decide, who can.
    assert!(set.abandoned_by(FIRST) && set.is_in_doubt() && !set.abandoned_by(FIRST));
    set.release(false).unwrap();
    assert!(!set.is_in_doubt() && set.give(SECOND));
}
