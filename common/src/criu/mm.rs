//! `mm-*.img`: the mappings of a task (`images/mm.proto`, `images/vma.proto`).
//!
//! Mappings are given one by one, as a list of them would take more memory than the image.

use bytes::Buf;
use prost::encoding::{decode_key, decode_varint, skip_field, DecodeContext, WireType};
use prost::Message;

use crate::criu::image_file::{ImageError, Messages};

const MM_MAGIC: u32 = 0x5749_2820;
/// `mm_entry.vmas`
const VMAS_FIELD: u32 = 14;

const MAP_HUGETLB: u32 = 0x4_0000;

// `criu/include/image.h`
const VMA_AREA_REGULAR: u32 = 1 << 0;
const VMA_FILE_PRIVATE: u32 = 1 << 6;
const VMA_ANON_SHARED: u32 = 1 << 8;
const VMA_ANON_PRIVATE: u32 = 1 << 9;
const VMA_AREA_SYSVIPC: u32 = 1 << 10;
const VMA_AREA_AIORING: u32 = 1 << 13;
const VMA_AREA_MEMFD: u32 = 1 << 14;
const VMA_AREA_SHSTK: u32 = 1 << 15;
const VMA_EXT_PLUGIN: u32 = 1 << 27;

/// One mapping.
#[derive(Clone, PartialEq, Message)]
pub struct Vma {
    #[prost(uint64, tag = "1")]
    pub start: u64,
    #[prost(uint64, tag = "2")]
    pub end: u64,
    #[prost(uint64, tag = "4")]
    pub shmid: u64,
    #[prost(uint32, tag = "6")]
    flags: u32,
    #[prost(uint32, tag = "7")]
    status: u32,
}

impl Vma {
    fn is(&self, status: u32) -> bool {
        self.status & status == status
    }

    /// Its pages are in the task's own pagemap (`vma_entry_is_private` in `vma.h`).
    pub fn is_private(&self) -> bool {
        let regular = self.is(VMA_AREA_REGULAR);
        let private = self.is(VMA_ANON_PRIVATE) || self.is(VMA_FILE_PRIVATE);
        (regular && private) || self.is(VMA_AREA_SHSTK) || self.is(VMA_AREA_AIORING)
    }

    /// Of huge pages, `MAP_HUGETLB`.
    pub fn is_hugetlb(&self) -> bool {
        self.flags & MAP_HUGETLB != 0
    }

    /// A plugin makes it.
    pub fn is_of_plugin(&self) -> bool {
        self.is(VMA_EXT_PLUGIN)
    }

    /// Memory that tasks share, `pagemap-shmem-<shmid>.img`. (A memfd's number is in `memfd.img`.)
    pub fn is_shared_memory(&self) -> bool {
        self.is(VMA_AREA_REGULAR) && self.is(VMA_ANON_SHARED) && !self.is(VMA_AREA_MEMFD)
    }

    /// Memory that tasks share and that nothing else names: `pagemap-shmem-<shmid>.img` has its
    /// pages. (That of a memfd or of System V has another owner.)
    pub fn is_anonymous_shared(&self) -> bool {
        self.is_shared_memory() && !self.is(VMA_AREA_SYSVIPC)
    }
}

/// Gives each mapping of an `mm-*.img` to `each`, in the order of the image, which is that of
/// addresses. The first error of `each` ends it.
pub fn vmas<'a, E: From<ImageError>>(
    image: impl IntoIterator<Item = &'a [u8]>,
    mut each: impl FnMut(Vma) -> Result<(), E>,
) -> Result<(), E> {
    let mut messages = Messages::open(image, MM_MAGIC)?;
    let mut mm = messages.message()?.ok_or(ImageError::Cut)?;
    while !mm.is_empty() {
        if let Some(vma) = next_vma(&mut mm).map_err(ImageError::from)? {
            each(vma.map_err(ImageError::from)?)?;
        }
    }
    Ok(())
}

/// One field of `mm_entry`; the inner one is a mapping.
fn next_vma(mm: &mut &[u8]) -> Result<Option<Result<Vma, prost::DecodeError>>, prost::DecodeError> {
    let (field, wire) = decode_key(mm)?;
    if (field, wire) != (VMAS_FIELD, WireType::LengthDelimited) {
        skip_field(wire, field, mm, DecodeContext::default())?;
        return Ok(None);
    }
    let length = usize::try_from(decode_varint(mm)?).unwrap_or(usize::MAX);
    match mm.get(..length) {
        Some(vma) => {
            mm.advance(length);
            Ok(Some(Vma::decode(vma)))
        }
        // The same error as any other.
        None => Ok(Some(Vma::decode(&[0xff][..]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(image: &[u8]) -> Result<Vec<Vma>, ImageError> {
        let mut found = Vec::new();
        vmas([image], |vma| {
            found.push(vma);
            Ok::<_, ImageError>(())
        })?;
        Ok(found)
    }

    fn recorded() -> Vec<u8> {
        let dir = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../tests/fixtures/stream-plain/images"
        );
        let mut files = std::fs::read_dir(dir).unwrap().map(|f| f.unwrap().path());
        let mm = files.find(|f| f.to_string_lossy().contains("/mm-"));
        std::fs::read(mm.unwrap()).unwrap()
    }

    #[test]
    fn the_recorded_mappings() {
        let vmas = read(&recorded()).unwrap();
        assert!(vmas.len() > 5, "{}", vmas.len());
        assert!(vmas.windows(2).all(|w| w[0].end <= w[1].start));
        assert!(vmas.iter().all(|v| v.end > v.start && !v.is_hugetlb()));
        assert!(vmas.iter().filter(|v| v.is_private()).count() > 3);
    }

    #[test]
    fn a_cut_is_noticed() {
        let whole = recorded();
        for cut in [0, 4, 8, 11, 12, 40, whole.len() - 1] {
            assert_eq!(read(&whole[..cut]), Err(ImageError::Cut), "cut at {cut}");
        }
        let mut liar = b"\x20\x28\x49\x57\x03\0\0\0".to_vec();
        liar.extend(b"\x72\x05\x08");
        assert_eq!(read(&liar), Err(ImageError::Broken));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut image = MM_MAGIC.to_le_bytes().to_vec();
            image.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
            image.extend(&bytes);
            let _ = read(&image);
        }
    }
}
