//! `memfd.img`: the memory files of a dump (`images/memfd.proto`).

use prost::Message;

use crate::criu::image_file::{ImageError, Messages};

const MEMFD_MAGIC: u32 = 0x4845_3499;

#[derive(Clone, PartialEq, Message)]
struct MemfdInodeEntry {
    #[prost(uint32, optional, tag = "5")]
    shmid: Option<u32>,
}

/// Gives the number of each one's `pagemap-shmem-<number>.img` to `each`.
pub fn shmids<'a, E: From<ImageError>>(
    image: impl IntoIterator<Item = &'a [u8]>,
    mut each: impl FnMut(u32) -> Result<(), E>,
) -> Result<(), E> {
    let mut messages = Messages::open(image, MEMFD_MAGIC)?;
    while let Some(message) = messages.message()? {
        let entry = MemfdInodeEntry::decode(message).map_err(ImageError::from)?;
        each(entry.shmid.ok_or(ImageError::Broken)?)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_files() {
        let mut image = b"\x19\x43\x56\x54\x99\x34\x45\x48".to_vec();
        for shmid in [7, 9] {
            image.extend(b"\x06\0\0\0\x0a\x02ab\x28");
            image.push(shmid);
        }
        let mut found = Vec::new();
        let read = |found: &mut Vec<u32>, image: &[u8]| {
            shmids([image], |shmid| {
                found.push(shmid);
                Ok::<_, ImageError>(())
            })
        };
        assert_eq!(read(&mut found, &image), Ok(()));
        assert_eq!(found, [7, 9]);
        assert_eq!(read(&mut found, &image[..12]), Err(ImageError::Cut));
        assert_eq!(read(&mut found, b""), Err(ImageError::Cut));
    }
}
