//! `pagemap-*.img`: which pages its `pages-<id>.img` holds (`images/pagemap.proto`).
//!
//! Layout: `u32` common magic, `u32` type magic, then `u32` length and a protobuf message
//! each: one head, any number of entries.

use prost::Message;

use crate::criu::image_file::{ImageError, Messages};
use crate::criu::page_server::{Entry, PageServerError, PE_PARENT, PE_PRESENT};

const COMMON_MAGIC: u32 = 0x5456_4319;
const PAGEMAP_MAGIC: u32 = 0x5608_4025;

#[derive(Clone, PartialEq, Message)]
struct PagemapHead {
    #[prost(uint32, optional, tag = "1")]
    pages_id: Option<u32>,
}

#[derive(Clone, PartialEq, Message)]
struct PagemapEntry {
    #[prost(uint64, optional, tag = "1")]
    vaddr: Option<u64>,
    /// The count until v4.1; 0 since, where field 5 has it.
    #[prost(uint32, optional, tag = "2")]
    compat_nr_pages: Option<u32>,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

/// Writes a pagemap image of present entries, sorted by address, as every CRIU can read it:
/// the count goes into both fields, because a reader until v4.1 knows only the old one.
pub fn encode(pages_id: u32, entries: impl IntoIterator<Item = (u64, u64)>) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(COMMON_MAGIC.to_le_bytes());
    out.extend(PAGEMAP_MAGIC.to_le_bytes());
    out.extend(super::frame::encode(&PagemapHead {
        pages_id: Some(pages_id),
    }));
    for (vaddr, pages) in entries {
        out.extend(super::frame::encode(&PagemapEntry {
            vaddr: Some(vaddr),
            // An entry of 2^32 pages (16 TiB) has no truth for this field.
            compat_nr_pages: Some(u32::try_from(pages).unwrap_or(0)),
            in_parent: None,
            flags: Some(PE_PRESENT),
            nr_pages: Some(pages),
        }));
    }
    out
}

/// What a whole pagemap image says about its pages image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub pages_id: u32,
    /// Pages in the pages image.
    pub present: u64,
}

/// Reads a pagemap image. `None` if it is not one, or is cut anywhere but between entries.
pub fn summarize(image: &[u8]) -> Option<Summary> {
    let (pages_id, entries) = entries(image)?;
    let mut present = entries.iter().filter(|e| e.is_present()).map(|e| e.pages);
    let present = present.try_fold(0u64, u64::checked_add)?;
    Some(Summary { pages_id, present })
}

/// The number of its pages image, and all entries, in the form of today's.
pub fn entries(image: &[u8]) -> Option<(u32, Vec<Entry>)> {
    let (magics, mut rest) = image.split_at_checked(8)?;
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| magics[at + i]));
    if (word(0), word(4)) != (COMMON_MAGIC, PAGEMAP_MAGIC) {
        return None;
    }
    let head = PagemapHead::decode(next_message(&mut rest)??).ok()?;
    let mut entries = Vec::new();
    while let Some(message) = next_message(&mut rest)? {
        let mut entry = PagemapEntry::decode(message).ok()?;
        // Both are required.
        (entry.compat_nr_pages, entry.vaddr) = (Some(entry.compat_nr_pages?), Some(entry.vaddr?));
        entries.push(entry.normalize().ok()?);
    }
    Some((head.pages_id?, entries))
}

/// Gives each entry of a pagemap image to `each`; the result is the number of its pages image. The
/// first error of `each` ends it. Holds one entry at a time.
pub fn walk<'a, E: From<ImageError>>(
    image: impl IntoIterator<Item = &'a [u8]>,
    mut each: impl FnMut(Entry) -> Result<(), E>,
) -> Result<u32, E> {
    let mut messages = Messages::open(image, PAGEMAP_MAGIC)?;
    let pages_id = pages_id_of(&mut messages)?;
    while let Some(message) = messages.message()? {
        let entry = PagemapEntry::decode(message).map_err(ImageError::from)?;
        match entry.normalize() {
            Ok(entry) => each(entry)?,
            // CRIU passes over it.
            Err(PageServerError::Range { pages: 0, .. }) => {}
            Err(PageServerError::Flags(_)) => return Err(ImageError::Foreign.into()),
            Err(_) => return Err(ImageError::Broken.into()),
        }
    }
    Ok(pages_id)
}

/// The number of the pages image that a pagemap image names.
pub fn pages_id<'a>(image: impl IntoIterator<Item = &'a [u8]>) -> Result<u32, ImageError> {
    pages_id_of(&mut Messages::open(image, PAGEMAP_MAGIC)?)
}

fn pages_id_of<'a>(
    messages: &mut Messages<'a, impl Iterator<Item = &'a [u8]>>,
) -> Result<u32, ImageError> {
    let head = messages.message()?.ok_or(ImageError::Cut)?;
    let head = PagemapHead::decode(head)?;
    head.pages_id.ok_or(ImageError::Broken)
}

impl PagemapEntry {
    /// In the form of today's.
    fn normalize(&self) -> Result<Entry, PageServerError> {
        // Written before there were flags: in the parent, or else present (`pagemap.c`).
        let flags = match (self.in_parent, self.flags) {
            (Some(true), flags) => flags.unwrap_or(0) | PE_PARENT,
            (_, Some(flags)) => flags,
            (_, None) => PE_PRESENT,
        };
        let compat = u64::from(self.compat_nr_pages.unwrap_or(0));
        let pages = self.nr_pages.unwrap_or(compat);
        Entry::new(self.vaddr.unwrap_or(0), pages, flags)
    }
}

/// `Some(None)` at the end of the image, `None` inside a message.
fn next_message<'a>(rest: &mut &'a [u8]) -> Option<Option<&'a [u8]>> {
    if rest.is_empty() {
        return Some(None);
    }
    let (length, tail) = rest.split_first_chunk()?;
    let (body, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
    *rest = tail;
    Some(Some(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of images.md: two present pages, v4.2 style.
    const EXAMPLE: &[u8] = b"\x19\x43\x56\x54\x25\x40\x08\x56\x02\0\0\0\x08\x01\
        \x0b\0\0\0\x08\x80\x80\x80\x02\x10\0\x20\x04\x28\x02";

    #[test]
    fn the_example() {
        let expected = Summary {
            pages_id: 1,
            present: 2,
        };
        assert_eq!(summarize(EXAMPLE), Some(expected));
    }

    #[test]
    fn golden_encoding() {
        // As the example, and the count also where older readers look for it.
        let mut expected = EXAMPLE.to_vec();
        let count = expected.len() - 5;
        expected[count] = 2;
        assert_eq!(encode(1, [(0x40_0000, 2)]), expected);
        let summary = Summary {
            pages_id: 7,
            present: 8,
        };
        assert_eq!(summarize(&encode(7, [(0, 3), (0x5000, 5)])), Some(summary));
    }

    #[test]
    fn old_style_entries() {
        let image = |entry: &[u8]| {
            let mut image = EXAMPLE[..14].to_vec();
            image.extend(u32::try_from(entry.len()).unwrap().to_le_bytes());
            image.extend(entry);
            summarize(&image).map(|s| s.present)
        };
        assert_eq!(image(b"\x08\x01\x10\x03"), Some(3), "no flags: present");
        assert_eq!(image(b"\x08\x01\x10\x03\x18\x01"), Some(0), "in the parent");
        assert_eq!(image(b"\x08\x01\x10\x03\x20\x01"), Some(0), "a hole");
        assert_eq!(image(b"\x08\x01"), None, "no count");
    }

    #[test]
    fn walking_gives_what_reading_gives() {
        let image = encode(7, [(0x1000, 3), (0x5000, 5)]);
        for piece in [1, 7, 1000] {
            let mut walked = Vec::new();
            let id = walk(image.chunks(piece), |entry| {
                walked.push(entry);
                Ok::<_, ImageError>(())
            });
            assert_eq!(Some((id.unwrap(), walked)), entries(&image));
        }
        assert_eq!(pages_id([&image[..]]), Ok(7));
        let cut = walk([&image[..image.len() - 1]], |_| Ok(()));
        assert_eq!(cut, Err(ImageError::Cut));
        let mut odd = EXAMPLE.to_vec();
        let flags = odd.len() - 3;
        odd[flags] = 8;
        assert_eq!(walk([&odd[..]], |_| Ok(())), Err(ImageError::Foreign));
    }

    #[test]
    fn a_cut_is_noticed_but_between_entries() {
        for cut in 0..EXAMPLE.len() {
            assert_eq!(
                summarize(&EXAMPLE[..cut]).is_some(),
                cut == 14,
                "cut at {cut}"
            );
        }
        assert_eq!(summarize(b"something else entirely"), None);
    }
}
