//! Memory that outlives this process: a file in memory (a memfd, or an unnamed file of a tmpfs), of which each region is a range.
//!
//! Another process, or systemd, holds its descriptor too (`--keep-through-restart`). So what is in it is there when
//! this process is not, and the next image-cache maps it again.
//!
//! A range is used once: no offset is ever given out twice, and what goes is punched out of the file, which is sparse. By
//! that the rule of [`super::segment`] holds, that memory which was ever readable is not written again: a pipe keeps the pages
//! that it refers to, and no page of the file is one of them any more.
//!
//! **Huge pages and holes.** The kernel takes a whole huge page out of the file as it is. Of a hole that covers a part of
//! one it first writes zeros into that part (`truncate_inode_partial_folio`), also where a pipe refers to the page. So a region
//! of huge pages has whole blocks of the file for itself, and of what was ever readable only whole blocks are
//! punched. A region of small pages refuses huge ones, so there a hole takes out whole pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// From so many bytes on a region asks for huge pages: 512 times fewer page faults while an
/// image arrives. Below it, the part of a huge page that stays unused would cost too much.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// All that there ever will be of it. The file is sparse, so this costs nothing.
const FILE_BYTES: u64 = 1 << 62;

const HUGE: u64 = HUGE_PAGE_BYTES as u64;

/// Where regions of memory come from.
#[derive(Debug, Clone, Default)]
pub enum Source {
    /// Memory of this process alone.
    #[default]
    Anonymous,
    Arena(Arc<Arena>),
}

impl Source {
    pub fn arena(&self) -> Option<&Arc<Arena>> {
        match self {
            Self::Anonymous => None,
            Self::Arena(arena) => Some(arena),
        }
    }
}

/// A range of an arena.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

impl Extent {
    /// What it takes of the file, if there can be such an extent: nothing else is in these pages, and of a large one not in
    /// these blocks.
    pub fn footprint(self) -> Option<Range<u64>> {
        let page = rustix::param::page_size() as u64;
        let unit = if self.len >= HUGE { HUGE } else { page };
        let end = self.offset.checked_add(self.len)?;
        let end = end.checked_next_multiple_of(unit)?;
        (self.len > 0 && self.offset % unit == 0 && end <= FILE_BYTES).then_some(self.offset..end)
    }
}

#[derive(Debug)]
pub struct Arena {
    file: File,
    huge: bool,
    free: Mutex<Free>,
}

/// What was never given out.
#[derive(Debug)]
struct Free {
    /// From here on, in blocks of the size of a huge page.
    next: u64,
    /// What is left of a block for regions of small pages.
    small: Range<u64>,
}

impl Free {
    fn blocks(&mut self, len: u64) -> io::Result<u64> {
        let offset = self.next;
        let len = len.checked_next_multiple_of(HUGE);
        let end = len.and_then(|len| offset.checked_add(len));
        let end = end.filter(|&end| end <= FILE_BYTES);
        self.next = end.ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(offset)
    }
}

impl Arena {
    /// A memfd, which no descriptor of it can make shorter.
    pub fn memfd() -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let name = "image-cache";
        let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
            // Linux before 6.3.
            Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
            other => other,
        };
        Ok(file?.into())
    }

    /// A new arena in an empty file of the kernel's memory.
    pub fn new(file: File) -> io::Result<Arc<Self>> {
        file.set_len(FILE_BYTES)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        // Not of a file of a tmpfs, which has none.
        let _ = rustix::fs::fcntl_add_seals(&file, seals);
        Self::from(file, 0)
    }

    /// The arena of an earlier process, of which everything from `next` on is unused.
    pub fn from(file: File, next: u64) -> io::Result<Arc<Self>> {
        if file.metadata()?.len() != FILE_BYTES {
            return Err(io::Error::other("it is not the file of an arena"));
        }
        let next = next
            .checked_next_multiple_of(HUGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Arc::new(Self {
            file,
            huge: has_huge_pages(),
            free: Mutex::new(Free { next, small: 0..0 }),
        }))
    }

    /// For the process that keeps it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A range that was never used.
    pub fn take(&self, len: usize) -> io::Result<Extent> {
        let len = len as u64;
        let page = rustix::param::page_size() as u64;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if len >= HUGE {
            let offset = free.blocks(len)?;
            return Ok(Extent { offset, len });
        }
        let size = len.next_multiple_of(page);
        if free.small.end - free.small.start < size {
            let offset = free.blocks(HUGE)?;
            free.small = offset..offset + HUGE;
        }
        let offset = free.small.start;
        free.small.start += size;
        Ok(Extent { offset, len })
    }

    /// Gives the memory of a range back, which is whole pages. See the head of this file for what may be in it.
    pub fn punch(&self, offset: u64, len: u64) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if let Err(e) = rustix::fs::fallocate(&self.file, flags, offset, len) {
            // A file system that cannot was not taken.
            tracing::error!("memory of {len} bytes does not go back to the kernel: {e}");
        }
    }

    /// Gives back all but these footprints.
    pub fn punch_all_but(&self, kept: &[Range<u64>]) {
        let mut kept = kept.to_vec();
        kept.sort_by_key(|range| range.start);
        let mut at = 0;
        for range in kept.iter().chain([&(FILE_BYTES..FILE_BYTES)]) {
            if range.start > at {
                self.punch(at, range.start - at);
            }
            at = at.max(range.end);
        }
    }

    /// Whether nothing of a range is a hole: what was received there is there.
    pub fn has_data(&self, offset: u64, len: u64) -> bool {
        let hole = rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(offset));
        let end = offset.checked_add(len);
        len == 0 || hole.is_ok_and(|hole| end.is_some_and(|end| hole >= end))
    }

    /// The end of what is in it.
    pub fn end_of_data(file: &File) -> io::Result<u64> {
        let mut at = 0;
        loop {
            match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
                Ok(data) => at = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(data))?,
                Err(rustix::io::Errno::NXIO) => return Ok(at),
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The memory that it takes.
    pub fn resident(&self) -> u64 {
        self.file
            .metadata()
            .map_or(0, |m| m.blocks().saturating_mul(512))
    }

    /// Maps a range of it.
    pub fn map(self: &Arc<Self>, extent: Extent) -> io::Result<Mapped> {
        let len = usize::try_from(extent.len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        if extent.footprint().is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let large = len >= HUGE_PAGE_BYTES;
        let start = match large {
            true => map_aligned(&self.file, extent.offset, len)?,
            false => map_anywhere(&self.file, extent.offset, len)?,
        };
        let mapped = Mapped {
            start,
            len,
            extent,
            arena: self.clone(),
        };
        let advice = match large && self.huge {
            true => Advice::LinuxHugepage,
            false => Advice::LinuxNoHugepage,
        };
        // Where the kernel has none, there is nothing to refuse.
        let _ = mapped.advise(advice, 0, len);
        // What processes had in their memory must not end in a core file of ours.
        let _ = mapped.advise(Advice::LinuxDontDump, 0, len);
        Ok(mapped)
    }
}

/// A mapped range of an arena, which goes back to the kernel with it.
#[derive(Debug)]
pub struct Mapped {
    start: NonNull<u8>,
    len: usize,
    extent: Extent,
    arena: Arc<Arena>,
}

// SAFETY: it is memory and a descriptor, of no thread more than of another. Its bytes are reached through `as_mut_ptr` alone, by
// the rules of `segment.rs`.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    pub fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Advice that changes no content.
    pub fn advise(&self, advice: Advice, start: usize, len: usize) -> io::Result<()> {
        debug_assert!(start + len <= self.len);
        let at = self.as_mut_ptr().wrapping_add(start);
        // SAFETY: the range is in the mapping, and no advice that is given here takes bytes away.
        Ok(unsafe { rustix::mm::madvise(at.cast(), len, advice) }?)
    }

    /// Gives the pages of a part back, the last as a whole.
    pub fn punch(&self, start: usize, len: usize) {
        debug_assert!(start + len <= self.len);
        let end = (start + len).next_multiple_of(rustix::param::page_size());
        self.arena
            .punch(self.extent.offset + start as u64, (end - start) as u64);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: it was mapped by `Arena::map` with this length, and what referred to it is gone with its owner.
        let _ = unsafe { rustix::mm::munmap(self.as_mut_ptr().cast(), self.len) };
        if let Some(whole) = self.extent.footprint() {
            self.arena.punch(whole.start, whole.end - whole.start);
        }
    }
}

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

fn map_anywhere(file: &File, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the kernel chooses an address that is free.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            len,
            READ_WRITE,
            MapFlags::SHARED,
            file,
            offset,
        )
    }?;
    NonNull::new(start.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// At an address where huge pages fit.
fn map_aligned(file: &File, offset: u64, len: usize) -> io::Result<NonNull<u8>> {
    let start = map_anywhere(file, offset, len)?;
    if start.as_ptr().align_offset(HUGE_PAGE_BYTES) == 0 {
        return Ok(start);
    }
    // SAFETY: it was mapped just now, and nothing has seen it.
    unsafe { rustix::mm::munmap(start.as_ptr().cast(), len) }?;
    let whole = len + HUGE_PAGE_BYTES;
    // SAFETY: the kernel chooses an address that is free.
    let reserved = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            whole,
            ProtFlags::empty(),
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )
    }?;
    let before = reserved.cast::<u8>().align_offset(HUGE_PAGE_BYTES);
    let aligned = reserved.cast::<u8>().wrapping_add(before);
    // SAFETY: [aligned, aligned + len) is in what was reserved just now, which nothing has seen.
    let start = unsafe {
        rustix::mm::mmap(
            aligned.cast(),
            len,
            READ_WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
            file,
            offset,
        )
    };
    let page = rustix::param::page_size();
    let end = (before + len).next_multiple_of(page);
    let edges = match start {
        Ok(_) => [0..before, end..whole],
        Err(_) => [0..whole, 0..0],
    };
    for edge in edges.into_iter().filter(|edge| !edge.is_empty()) {
        let at = reserved.cast::<u8>().wrapping_add(edge.start);
        // SAFETY: a part of what was reserved, in which nothing was mapped since.
        let _ = unsafe { rustix::mm::munmap(at.cast(), edge.len()) };
    }
    NonNull::new(start?.cast()).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

/// Whether the kernel's huge pages have the size that blocks have here. On a host with larger ones small pages are taken.
pub fn has_huge_pages() -> bool {
    let size = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size");
    size.is_ok_and(|size| size.trim() == HUGE.to_string())
}

/// A duplicate of a descriptor, e.g. for the next arena of a test.
#[cfg(test)]
pub fn again(arena: &Arena) -> File {
    arena.descriptor().try_clone_to_owned().unwrap().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_offset_is_given_out_twice() {
        let arena = Arena::new(Arena::memfd().unwrap()).unwrap();
        let mut taken: Vec<Range<u64>> = Vec::new();
        for len in [
            1,
            4096,
            5000,
            1 << 20,
            1 << 20,
            HUGE_PAGE_BYTES,
            1,
            (2 << 20) + 1,
            9,
        ] {
            let extent = arena.take(len).unwrap();
            let footprint = extent.footprint().unwrap();
            assert!(taken
                .iter()
                .all(|t| t.end <= footprint.start || t.start >= footprint.end));
            // A region of huge pages shares none with another.
            let blocks = |r: &Range<u64>| r.start / HUGE..r.end.div_ceil(HUGE);
            if len >= HUGE_PAGE_BYTES {
                let mine = blocks(&footprint);
                let shared = |t: &Range<u64>| blocks(t).any(|block| mine.contains(&block));
                assert!(!taken.iter().any(shared));
            }
            taken.push(footprint);
        }
        assert!(arena.take(1 << 62).is_err() && arena.take(4096).is_ok());
    }

    #[test]
    fn what_cannot_be_an_extent_is_none() {
        for (offset, len) in [
            (0, 0),
            (1, 1),
            (4096, 2 << 20),
            (u64::MAX - 4095, 1),
            (1 << 62, 1),
        ] {
            assert_eq!(Extent { offset, len }.footprint(), None, "{offset} {len}");
        }
        let extent = Extent {
            offset: HUGE,
            len: HUGE + 1,
        };
        assert_eq!(extent.footprint(), Some(HUGE..3 * HUGE));
        assert!(
            Arena::from(Arena::memfd().unwrap(), 0).is_err(),
            "an empty file"
        );
    }

    #[test]
    fn all_but_what_is_kept_goes() {
        let arena = Arena::new(Arena::memfd().unwrap()).unwrap();
        let mapped: Vec<Mapped> = (0..4)
            .map(|_| {
                let mapped = arena.map(arena.take(2 << 20).unwrap()).unwrap();
                mapped
                    .advise(Advice::LinuxPopulateWrite, 0, 2 << 20)
                    .unwrap();
                mapped
            })
            .collect();
        assert_eq!(arena.resident(), 8 << 20);
        arena.punch_all_but(&[2 * HUGE..3 * HUGE, HUGE..2 * HUGE]);
        assert_eq!(arena.resident(), 4 << 20);
        drop(mapped);
        assert_eq!(arena.resident(), 0);
    }

    /// No descriptor of it can take memory away below a mapping, or make it executable.
    #[test]
    fn a_memfd_is_sealed() {
        let arena = Arena::new(Arena::memfd().unwrap()).unwrap();
        assert!(arena.file.set_len(0).is_err());
    }
}
