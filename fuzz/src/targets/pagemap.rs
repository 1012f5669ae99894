//! Pagemap images: any bytes. What can be read is the same when its present entries are written
//! and read again.

use image_common::criu::image_file::ImageError;
use image_common::criu::page_server::Entry;
use image_common::criu::pagemap::{encode, entries, summarize, walk, Summary};

pub fn run(image: &[u8]) {
    let summary = summarize(image);
    // One by one, from pieces of any size.
    let mut walked = Vec::new();
    let piece = usize::from(image.first().copied().unwrap_or(0)) + 1;
    let id = walk(image.chunks(piece), |entry| {
        walked.push(entry);
        Ok::<_, ImageError>(())
    });
    if let Some(read) = entries(image) {
        assert_eq!((id, walked), (Ok(read.0), read.1));
    }
    let Some((pages_id, read)) = entries(image) else {
        assert_eq!(summary, None);
        return;
    };
    // An entry takes four bytes at least: what is in memory is bounded by what came.
    assert!(read.len() <= image.len() / 4);
    let present: Vec<_> = read.iter().filter(|e| e.is_present()).collect();
    let pages = present
        .iter()
        .map(|e| e.pages)
        .try_fold(0u64, u64::checked_add);
    let expected = pages.map(|present| Summary { pages_id, present });
    assert_eq!(summary, expected);
    let again = encode(pages_id, present.iter().map(|e| (e.vaddr, e.pages)));
    let (id, again) = entries(&again).expect("our own");
    let range = |e: &Entry| (e.vaddr, e.pages);
    assert!(id == pages_id && present.len() == again.len());
    assert!(present
        .iter()
        .zip(&again)
        .all(|(a, b)| range(a) == range(b)));
}
