//! Memory, or a part of it, that goes back to the kernel with its owner: anonymous, or of an [`Arena`].

use std::io;
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};

pub use crate::store::memory::arena::HUGE_PAGE_BYTES;
use crate::store::memory::arena::{Arena, Extent, Mapped, Source};

/// Pages never written are never resident, so a region may be larger than what it will hold.
pub struct Region {
    map: Arc<Mapping>,
    start: usize,
    len: usize,
}

enum Mapping {
    Anonymous(MmapRaw),
    Shared(Mapped),
}

impl Mapping {
    fn as_mut_ptr(&self) -> *mut u8 {
        match self {
            Self::Anonymous(map) => map.as_mut_ptr(),
            Self::Shared(map) => map.as_mut_ptr(),
        }
    }
}

impl Region {
    /// New memory, which is zero.
    pub fn new(source: &Source, len: usize) -> io::Result<Self> {
        let map = match source {
            Source::Anonymous => Mapping::Anonymous(anonymous(len)?),
            Source::Arena(arena) => Mapping::Shared(arena.map(arena.take(len)?)?),
        };
        Ok(Self {
            map: Arc::new(map),
            start: 0,
            len,
        })
    }

    /// The same, beginning with a huge page also where the kernel does not see to that (Linux
    /// before 6.7), so that parts of it can go without taking one apart.
    pub fn aligned(source: &Source, len: usize) -> io::Result<Self> {
        if source.arena().is_some() && len >= HUGE_PAGE_BYTES {
            return Self::new(source, len);
        }
        let mut region = Self::new(source, len + HUGE_PAGE_BYTES)?;
        region.start = region.as_mut_ptr().align_offset(HUGE_PAGE_BYTES);
        region.len = len;
        Ok(region)
    }

    /// What an earlier process had there.
    pub fn again(arena: &Arc<Arena>, extent: Extent) -> io::Result<Self> {
        let map = arena.map(extent)?;
        let len = usize::try_from(extent.len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            map: Arc::new(Mapping::Shared(map)),
            start: 0,
            len,
        })
    }

    /// Where it is in its arena; `None`: it is in none.
    pub fn extent(&self) -> Option<Extent> {
        match &*self.map {
            Mapping::Anonymous(_) => None,
            Mapping::Shared(map) => Some(Extent {
                offset: map.extent().offset + self.start as u64,
                len: self.len as u64,
            }),
        }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn as_mut_ptr(&self) -> *mut u8 {
        // In the mapping, or at its end if it is empty.
        self.map.as_mut_ptr().wrapping_add(self.start)
    }

    /// Leaves the first `n` bytes, and gives the rest. Both go back by themselves, so `n` is whole
    /// pages, and had better be whole huge pages. Those of an arena must be.
    pub fn split_off(&mut self, n: usize) -> Self {
        debug_assert!(n % rustix::param::page_size() == 0);
        debug_assert!(n % HUGE_PAGE_BYTES == 0 || self.extent().is_none());
        let n = n.min(self.len);
        let rest = Self {
            map: self.map.clone(),
            start: self.start + n,
            len: self.len - n,
        };
        self.len = n;
        rest
    }

    /// Makes memory resident before it is written to. Changes no content. An error also from Linux
    /// before 5.14, which does not know it: then the writer faults its pages.
    pub fn populate(&self, start: usize, len: usize) -> io::Result<()> {
        debug_assert!(start + len <= self.len);
        let at = self.start + start;
        match &*self.map {
            Mapping::Anonymous(map) => map.advise_range(Advice::PopulateWrite, at, len),
            Mapping::Shared(map) => map.advise(rustix::mm::Advice::LinuxPopulateWrite, at, len),
        }
    }

    /// Gives whole pages back to the kernel. Of an arena: see there which these may be.
    ///
    /// # Safety
    ///
    /// Nothing needs the content of the range any more, or refers to it, and it is in the region.
    pub unsafe fn give_back(&self, start: usize, len: usize) {
        debug_assert!(start + len <= self.len);
        let at = self.start + start;
        let map = match &*self.map {
            Mapping::Anonymous(map) => map,
            Mapping::Shared(map) => return map.punch(at, len),
        };
        // SAFETY: the caller's.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, at, len) };
        if advised.is_err() {
            // With `--mlock` the memory is locked, which wants other words (Linux 5.18).
            let page = rustix::param::page_size();
            let begin = at / page * page;
            // In the mapping, as the mapping begins with a page and `at` is in it.
            let address = map.as_mut_ptr().wrapping_add(begin).cast();
            // SAFETY: the caller's.
            unsafe { libc::madvise(address, at + len - begin, libc::MADV_DONTNEED_LOCKED) };
        }
    }

    /// The content of anonymous memory is not wanted any more: huge pages of which that is a part are taken apart.
    ///
    /// # Safety
    ///
    /// As for [`Self::give_back`].
    pub unsafe fn split(&self, start: usize, len: usize) {
        debug_assert!(start + len <= self.len);
        if let Mapping::Anonymous(map) = &*self.map {
            let at = self.start + start;
            // Without it memory goes back later, and that is all.
            // SAFETY: the caller's.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::Free, at, len) };
        }
    }
}

fn anonymous(len: usize) -> io::Result<MmapRaw> {
    let map = MmapOptions::new().len(len).map_anon()?;
    if len >= HUGE_PAGE_BYTES {
        // Without huge pages it is slower, and that is all.
        let _ = map.advise(Advice::HugePage);
    }
    // What processes had in their memory must not end in a core file of ours.
    let _ = map.advise(Advice::DontDump);
    Ok(map.into())
}

impl Drop for Region {
    fn drop(&mut self) {
        // Alone, it goes with the mapping.
        if Arc::get_mut(&mut self.map).is_none() && !self.is_empty() {
            // SAFETY: the region is going, and with it all that referred to its bytes: types that
            // give out references borrow it or keep it alive (`segment.rs`). The other regions of the
            // mapping are disjoint from it.
            unsafe { self.give_back(0, self.len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resident(region: &Region) -> usize {
        let page = rustix::param::page_size();
        let mut pages = vec![0u8; region.len.div_ceil(page)];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let seen = unsafe {
            libc::mincore(
                region.as_mut_ptr().cast(),
                region.len,
                pages.as_mut_ptr().cast(),
            )
        };
        assert_eq!(seen, 0);
        pages.iter().filter(|&&page| page & 1 != 0).count() * page
    }

    #[test]
    fn a_part_goes_back_by_itself() {
        let mut first = Region::aligned(&Source::Anonymous, 8 << 20).unwrap();
        assert_eq!(first.as_mut_ptr().align_offset(HUGE_PAGE_BYTES), 0);
        first.populate(0, 8 << 20).unwrap();
        let mut second = first.split_off(2 << 20);
        let third = second.split_off(4 << 20);
        assert_eq!(
            (first.len(), second.len(), third.len()),
            (2 << 20, 4 << 20, 2 << 20)
        );
        let probe = Region {
            map: second.map.clone(),
            start: second.start,
            len: second.len,
        };
        assert_eq!(resident(&probe), 4 << 20);
        drop(second);
        assert_eq!(resident(&probe), 0);
        assert_eq!(resident(&first) + resident(&third), 4 << 20);
    }
}
