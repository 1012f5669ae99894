//! Inventory images: any bytes. One that is cut off is never a pre-dump, which nobody would keep, nor
//! a dump.

use image_common::criu::image_file::ImageError;
use image_common::criu::inventory::{is_cut, kind_of, SetKind};
use image_common::criu::{memfd, mm, nftables, pstree};

/// The other small images that image-cache reads before a commit: never a panic, and no more in memory than came.
fn read_as_task_images(bytes: &[u8]) {
    const MAGICS: [u32; 4] = [0x5027_3030, 0x5505_3847, 0x5749_2820, 0x4845_3499];
    for magic in MAGICS {
        let mut image = magic.to_le_bytes().to_vec();
        image.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        image.extend(bytes);
        for image in [&image[..], bytes] {
            let tasks = pstree::tasks(image.chunks(7)).unwrap_or_default();
            let pids: usize = tasks.iter().map(|task| 1 + task.threads.len()).sum();
            assert!(pids <= image.len());
            let _ = pstree::is_zombie(image.chunks(7));
            let mut vmas = 0;
            let _ = mm::vmas(image.chunks(7), |_| {
                vmas += 1;
                Ok::<_, ImageError>(())
            });
            assert!(vmas <= image.len());
            let _ = memfd::shmids(image.chunks(7), |_| Ok::<_, ImageError>(()));
        }
    }
    let _ = nftables::has_rules(bytes);
}

pub fn run(image: &[u8]) {
    read_as_task_images(image);
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
