//! Warm memory: the pages that the fake CRIU dumps and those that it restores into.
//!
//! All of it is faulted in before anything is timed. Every page of the source carries the number
//! of the sample in its first bytes, so bytes left over from an earlier sample cannot pass as
//! the bytes of this one.

use std::time::Instant;

use anyhow::{ensure, Context, Result};
use memmap2::MmapMut;

pub const PAGE: usize = 4096;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// Page-aligned anonymous memory with every page present.
pub struct Warm(MmapMut);

impl Warm {
    /// Memory whose pages are present and hold `fill`.
    pub fn new(len: usize, fill: u8) -> Result<Self> {
        let mut map = map(len)?;
        map.fill(fill);
        Ok(Self(map))
    }

    /// Memory without a page yet: they come as it is written.
    pub fn cold(len: usize) -> Result<Self> {
        Ok(Self(map(len)?))
    }

    /// The same in huge pages, where the kernel gives some.
    pub fn untouched(len: usize) -> Result<Self> {
        let map = map(len)?;
        // Without them it takes longer, and is a slower limit.
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self(map))
    }

    /// A copy in huge pages, where the kernel gives some.
    pub fn huge(bytes: &[u8]) -> Result<Self> {
        let mut huge = Self::untouched(bytes.len())?;
        huge.0.copy_from_slice(bytes);
        Ok(huge)
    }

    /// Touches as much free memory and gives it back; how long that took per GiB.
    ///
    /// A virtual machine that reports its free pages to its host loses them, and pays for each
    /// again when it is next touched: five times what zeroing costs, measured here. The raw
    /// limits are those of warm memory, so what is measured beside them must find such, too.
    pub fn refresh(len: usize) -> Result<f64> {
        let begin = Instant::now();
        // As the cache has it. Giving it back is not timed.
        let mut free = Self::untouched(len)?;
        free.0.fill(1);
        Ok(begin.elapsed().as_secs_f64() * GIB as f64 / len as f64)
    }

    /// A source: pseudo-random words (xorshift64, fixed seed), so that nothing below could
    /// compress or share its pages.
    pub fn source(len: usize) -> Result<Self> {
        let mut map = map(len)?;
        let mut x = 0x9e37_79b9_7f4a_7c15_u64;
        for word in map.chunks_exact_mut(8) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            word.copy_from_slice(&x.to_ne_bytes());
        }
        Ok(Self(map))
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }

    /// Marks every page with `sample` and its own number. Only between samples: pages that were
    /// vmspliced belong to their pipe until they were read.
    pub fn stamp(&mut self, sample: u64) {
        for (n, page) in self.0.chunks_exact_mut(PAGE).enumerate() {
            mark(page, n, sample);
        }
    }

    /// The same for those of the first pages that are `dirty`: the others keep their older mark.
    pub fn stamp_dirty(&mut self, sample: u64, dirty: &[bool]) {
        let pages = self.0.chunks_exact_mut(PAGE).enumerate().zip(dirty);
        for ((n, page), _) in pages.filter(|(_, dirty)| **dirty) {
            mark(page, n, sample);
        }
    }
}

fn mark(page: &mut [u8], number: usize, sample: u64) {
    page[..8].copy_from_slice(&sample.to_ne_bytes());
    page[8..16].copy_from_slice(&(number as u64).to_ne_bytes());
}

/// A fork (each start of a script) would copy the page tables of all of this, and write-protect
/// it: tens of milliseconds, and a fault per page in the sample that follows. A real CRIU is a small
/// process when it forks, so children get none of it.
fn map(len: usize) -> Result<MmapMut> {
    let map = MmapMut::map_anon(len).with_context(|| format!("mapping {len} bytes"))?;
    map.advise(memmap2::Advice::DontFork)
        .context("keeping memory from children")?;
    Ok(map)
}

/// An image of `len` bytes made from `memory` alone: larger images repeat it. The period of the
/// repetition is no power of two, so chunks that changed places do not go unnoticed.
#[derive(Clone, Copy)]
pub struct Body<'a> {
    memory: &'a [u8],
    pub len: u64,
}

impl<'a> Body<'a> {
    pub fn new(memory: &'a [u8], len: u64) -> Self {
        let period = if len <= memory.len() as u64 {
            memory.len()
        } else {
            memory.len() - 17 * PAGE
        };
        Self {
            memory: &memory[..period],
            len,
        }
    }

    /// The contiguous bytes from `offset` on, up to the next repetition or the end.
    pub fn at(&self, offset: u64) -> &'a [u8] {
        let period = self.memory.len() as u64;
        let start = offset % period;
        let end = period.min(start + (self.len - offset));
        // Both are at most the length of a slice.
        #[allow(clippy::cast_possible_truncation)]
        &self.memory[start as usize..end as usize]
    }
}

/// Fails with the first offset at which `got` differs from `want`.
pub fn compare(what: &str, got: &[u8], want: &[u8]) -> Result<()> {
    ensure!(
        got.len() == want.len(),
        "{what}: {} bytes arrived instead of {}",
        got.len(),
        want.len()
    );
    if got == want {
        return Ok(());
    }
    let at = got
        .iter()
        .zip(want)
        .position(|(a, b)| a != b)
        .unwrap_or(got.len());
    anyhow::bail!("{what}: wrong bytes from offset {at:#x} on");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_body_repeats_with_an_odd_period() {
        let mut memory = Warm::source(64 * PAGE).unwrap();
        memory.stamp(7);
        let body = Body::new(memory.bytes(), 200 * PAGE as u64);
        let mut all = Vec::new();
        while (all.len() as u64) < body.len {
            all.extend_from_slice(body.at(all.len() as u64));
        }
        assert_eq!(all.len(), 200 * PAGE);
        assert_eq!(all[47 * PAGE..48 * PAGE], memory.bytes()[..PAGE]);
        assert_eq!(all[..16], [7u64.to_ne_bytes(), 0u64.to_ne_bytes()].concat());
    }

    #[test]
    fn a_body_within_the_memory_is_the_memory() {
        let memory = Warm::source(8 * PAGE).unwrap();
        assert_eq!(
            Body::new(memory.bytes(), 8 * PAGE as u64).at(0),
            memory.bytes()
        );
        assert_eq!(
            Body::new(memory.bytes(), 100).at(40),
            &memory.bytes()[40..100]
        );
    }

    #[test]
    fn compare_names_the_offset() {
        let (mut a, b) = (vec![0u8; 100], vec![0u8; 100]);
        compare("x", &a, &b).unwrap();
        a[33] = 1;
        let text = compare("x", &a, &b).unwrap_err().to_string();
        assert!(text.contains("0x21"), "{text}");
        assert!(compare("x", &a[..50], &b).is_err());
    }
}
