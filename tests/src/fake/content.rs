//! What the fake CRIU puts into images: bytes that both ends can generate, so that an image of several GiB is
//! compared byte by byte without anybody keeping it, and a wrong byte is named by its offset.

use std::io::{self, Read, Write};
use std::sync::Arc;

/// Size of the pattern block. Each block of an image is the same random bytes with the block's number stamped on
/// its first eight, so filling a buffer is a `memcpy` (fast in debug builds too), yet no two blocks are equal.
const BLOCK: usize = 64 * 1024;

/// The bytes of one image.
#[derive(Clone)]
pub enum Content {
    Bytes(Arc<[u8]>),
    Pattern { block: Arc<[u8]>, len: u64 },
    Zeros(u64),
}

impl Content {
    pub fn bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Content::Bytes(bytes.into().into())
    }

    /// `len` bytes that depend on `seed` only.
    pub fn pattern(seed: u64, len: u64) -> Self {
        let size = usize::try_from(len).map_or(BLOCK, |len| len.min(BLOCK));
        let mut random = Random::new(seed);
        let mut block = vec![0; size];
        for piece in block.chunks_mut(8) {
            let bytes = random.next().to_le_bytes();
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
        Content::Pattern {
            block: block.into(),
            len,
        }
    }

    /// An `inventory.img` as a dump writes it; the run id (field 13) depends on `seed`.
    pub fn dump_inventory(seed: u64) -> Self {
        let mut bytes = b"\x16\x31\x31\x58\x16\0\0\0\x08\x02\x10\x01\x6a\x10".to_vec();
        bytes.extend(format!("{:016x}", Random::new(seed).next()).bytes());
        Content::bytes(bytes)
    }

    /// An `inventory.img` as a pre-dump writes it (recorded): such a set cannot be restored.
    pub fn pre_dump_inventory() -> Self {
        Content::bytes(*b"\x16\x31\x31\x58\x07\0\0\0\x08\x02\x40\xe0\xaa\xed\x0b")
    }

    pub fn len(&self) -> u64 {
        match self {
            Content::Bytes(bytes) => bytes.len() as u64,
            Content::Pattern { len, .. } | Content::Zeros(len) => *len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` with the bytes from `offset` on; returns how many there were.
    pub fn fill(&self, offset: u64, buffer: &mut [u8]) -> usize {
        let left = self.len().saturating_sub(offset);
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        let buffer = &mut buffer[..count];
        match self {
            Content::Bytes(bytes) => {
                let start = to_usize(offset);
                buffer.copy_from_slice(&bytes[start..start + count]);
            }
            Content::Zeros(_) => buffer.fill(0),
            Content::Pattern { block, .. } => fill_pattern(block, offset, buffer),
        }
        count
    }

    /// The whole content in memory; for small images.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut bytes = vec![0; to_usize(self.len())];
        self.fill(0, &mut bytes);
        bytes
    }

    /// Writes everything from `from` up to `to` in pieces of `piece` bytes.
    pub fn send_range(
        &self,
        out: &mut dyn Write,
        from: u64,
        to: u64,
        piece: usize,
    ) -> io::Result<()> {
        let mut buffer = vec![0; piece];
        let mut offset = from;
        while offset < to {
            let want = usize::try_from(to - offset).map_or(piece, |left| left.min(piece));
            let count = self.fill(offset, &mut buffer[..want]);
            if count == 0 {
                break;
            }
            out.write_all(&buffer[..count])?;
            offset += count as u64;
        }
        Ok(())
    }

    pub fn send(&self, out: &mut dyn Write) -> io::Result<()> {
        self.send_range(out, 0, self.len(), BLOCK)
    }

    /// Reads `from` to its end and compares; says where the first difference is.
    pub fn check(&self, from: &mut dyn Read) -> Result<(), String> {
        let mut seen = vec![0; BLOCK];
        let mut wanted = vec![0; BLOCK];
        let mut offset = 0u64;
        loop {
            let count = from
                .read(&mut seen)
                .map_err(|error| format!("read at byte {offset}: {error}"))?;
            if count == 0 {
                break;
            }
            let expected = self.fill(offset, &mut wanted[..count]);
            if expected < count {
                return Err(format!("longer than its {} bytes", self.len()));
            }
            if seen[..count] != wanted[..count] {
                let at = seen
                    .iter()
                    .zip(&wanted)
                    .position(|(a, b)| a != b)
                    .unwrap_or(0) as u64;
                return Err(format!("differs at byte {}", offset + at));
            }
            offset += count as u64;
        }
        if offset != self.len() {
            return Err(format!("ends after {offset} of {} bytes", self.len()));
        }
        Ok(())
    }
}

fn fill_pattern(block: &[u8], offset: u64, buffer: &mut [u8]) {
    let mut done = 0;
    while done < buffer.len() {
        let position = offset + done as u64;
        let number = position / BLOCK as u64;
        let within = to_usize(position % BLOCK as u64);
        let count = (buffer.len() - done).min(block.len() - within);
        let target = &mut buffer[done..done + count];
        target.copy_from_slice(&block[within..within + count]);
        if number > 0 {
            // The first block is as it was generated; the others differ from it in their first eight bytes.
            for (index, byte) in number.to_le_bytes().iter().enumerate() {
                if index >= within && index - within < count {
                    target[index - within] ^= byte;
                }
            }
        }
        done += count;
    }
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).expect("fits in memory")
}

/// SplitMix64: a few lines, the same on both ends and in every version, which is all that test data needs.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    #[allow(
        clippy::should_implement_trait,
        reason = "an endless generator, not an iterator"
    )]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }
}

/// One image of a set.
#[derive(Clone)]
pub struct Image {
    pub name: String,
    pub content: Content,
    /// Stays open from its first write until after `inventory.img`, like `files.img`.
    pub global: bool,
}

/// The images of one dump, in the order in which CRIU opens them; `inventory.img` is the last.
#[derive(Clone)]
pub struct ImageSet {
    pub images: Vec<Image>,
}

/// Images that a restore asks for and that a dump of our sample process does not write.
pub const MISSING: [&str; 4] = [
    "memfd.img",
    "remap-fpath.img",
    "cgroup.img",
    "pipes-data.img",
];

impl ImageSet {
    pub fn new(images: Vec<(&str, Content)>) -> Self {
        let images = images
            .into_iter()
            .map(|(name, content)| Image {
                name: name.into(),
                content,
                global: is_global(name),
            })
            .collect();
        ImageSet { images }
    }

    /// Two processes and a shared mapping: every size that has been somebody's bug (empty, one byte, page
    /// multiples, odd ones, a pagemap larger than a pipe plus CRIU's 4096 bytes of read-ahead).
    pub fn sample(seed: u64) -> Self {
        let sizes: [(&str, u64); 19] = [
            ("seccomp.img", 12),
            ("files.img", 5003),
            ("ids-7.img", 36),
            ("ids-8.img", 36),
            ("fdinfo-2.img", 44),
            ("pagemap-7.img", 70_003),
            ("pages-1.img", 40 * 4096),
            ("core-7.img", 1813),
            ("mm-7.img", 4097),
            ("pagemap-8.img", 16_384),
            ("pages-2.img", 0),
            ("core-8.img", 4096),
            ("mm-8.img", 489),
            ("fs-7.img", 18),
            ("tty-info.img", 8191),
            ("pagemap-shmem-9.img", 777),
            ("pages-3.img", 131_072),
            ("timens-0.img", 1),
            ("pstree.img", 26),
        ];
        let images = sizes
            .iter()
            .enumerate()
            .map(|(index, (name, len))| (*name, Content::pattern(seed * 1000 + index as u64, *len)))
            .chain([("inventory.img", Content::dump_inventory(seed))])
            .collect();
        ImageSet::new(images)
    }

    /// What `criu pre-dump` writes of the same process.
    pub fn pre_dump(seed: u64) -> Self {
        ImageSet::new(vec![
            ("pagemap-7.img", Content::pattern(seed + 1, 2000)),
            ("pages-1.img", Content::pattern(seed + 2, 300 * 4096)),
            ("inventory.img", Content::pre_dump_inventory()),
        ])
    }

    /// As many images as [`ImageSet::sample`], but small: for links that carry single bytes.
    pub fn small(seed: u64) -> Self {
        let mut set = ImageSet::sample(seed);
        for (index, image) in set.images.iter_mut().enumerate() {
            let len = image.content.len().min(1 + 97 * index as u64);
            if image.name == "inventory.img" {
                continue;
            }
            image.content = Content::pattern(seed * 1000 + index as u64, len);
        }
        set
    }

    pub fn names(&self) -> Vec<&str> {
        self.images
            .iter()
            .map(|image| image.name.as_str())
            .collect()
    }

    /// A dump of one process whose memory is `pages` bytes.
    pub fn with_pages(seed: u64, pages: u64) -> Self {
        ImageSet::new(vec![
            ("files.img", Content::pattern(seed + 1, 300)),
            ("pagemap-7.img", Content::pattern(seed + 2, 150)),
            ("pages-1.img", Content::pattern(seed + 3, pages)),
            ("core-7.img", Content::pattern(seed + 4, 1813)),
            ("mm-7.img", Content::pattern(seed + 5, 489)),
            ("pstree.img", Content::pattern(seed + 6, 26)),
            ("inventory.img", Content::dump_inventory(seed)),
        ])
    }

    pub fn get(&self, name: &str) -> &Content {
        let image = self.images.iter().find(|image| image.name == name);
        &image
            .unwrap_or_else(|| panic!("no image {name} in the set"))
            .content
    }

    pub fn total(&self) -> u64 {
        self.images.iter().map(|image| image.content.len()).sum()
    }
}

fn is_global(name: &str) -> bool {
    matches!(
        name,
        "files.img" | "seccomp.img" | "tty-info.img" | "tty-data.img" | "sk-queues.img"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_piece_of_a_pattern_is_the_same_as_in_the_whole() {
        let content = Content::pattern(7, 200_001);
        let whole = content.to_vec();
        let mut random = Random::new(1);
        for _ in 0..200 {
            let from = random.between(0, 200_001);
            let mut piece = vec![0; to_usize(random.between(0, 70_000))];
            let count = content.fill(from, &mut piece);
            assert_eq!(
                piece[..count],
                whole[to_usize(from)..to_usize(from) + count]
            );
        }
        assert_ne!(whole[..8], whole[BLOCK..BLOCK + 8]);
    }

    #[test]
    fn check_names_the_first_difference() {
        let content = Content::pattern(7, 100_000);
        let mut bytes = content.to_vec();
        assert_eq!(content.check(&mut bytes.as_slice()), Ok(()));
        assert_eq!(
            content.check(&mut &bytes[..99_999]),
            Err("ends after 99999 of 100000 bytes".into())
        );
        bytes[70_000] ^= 1;
        assert_eq!(
            content.check(&mut bytes.as_slice()),
            Err("differs at byte 70000".into())
        );
    }
}
