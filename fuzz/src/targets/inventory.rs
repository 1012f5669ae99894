//! Inventory images: any bytes. One that is cut off is never a pre-dump, which nobody would keep, nor
//! a dump.

use image_common::criu::inventory::{is_cut, kind_of, SetKind};

pub fn run(image: &[u8]) {
    let kind = kind_of(image);
    if is_cut(image) {
        assert_eq!(kind, SetKind::Unclear);
    }
    if kind == SetKind::Unclear {
        return;
    }
    // It is known by its own bytes, not by those behind it, and not by a part of them.
    let length = u32::from_le_bytes(image[4..8].try_into().expect("four bytes")) as usize;
    assert_eq!(kind_of(&image[..8 + length]), kind);
    for cut in 0..8 + length {
        assert!(is_cut(&image[..cut]), "cut at {cut}");
    }
}
