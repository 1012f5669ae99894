//! The page server's requests (`criu/page-xfer.c`), as bytes and as values.
//!
//! A request is one `struct page_server_iov` in the byte order of CRIU's host, without magic
//! or version, and there are two layouts of it:
//!
//! ```text
//! until v4.1, 24 bytes    u32 cmd, u32 nr_pages,              u64 vaddr, u64 dst_id
//! since v4.2, 32 bytes    u32 cmd, u32 undefined, u64 nr_pages, u64 vaddr, u64 dst_id
//! ```

use bytes::{Buf, BufMut, BytesMut};

/// Flags of a pagemap entry, the same in images and on the wire.
pub const PE_PARENT: u32 = 1;
/// The pages stay on the source, for `--lazy-pages`.
pub const PE_LAZY: u32 = 2;
/// The pages are in the pages image, or follow on the wire.
pub const PE_PRESENT: u32 = 4;

/// The shorter header: enough to tell which one it is.
pub const MIN_HEADER_BYTES: usize = 24;
/// The longer one.
pub const MAX_HEADER_BYTES: usize = 32;

const PS_IOV_ADD: u32 = 1;
const PS_IOV_HOLE: u32 = 2;
const PS_IOV_OPEN: u32 = 3;
const PS_IOV_OPEN2: u32 = 4;
const PS_IOV_PARENT: u32 = 5;
const PS_IOV_ADD_F: u32 = 6;
const PS_IOV_GET: u32 = 7;
const PS_IOV_CLOSE: u32 = 0x1023;
const PS_IOV_FORCE_CLOSE: u32 = 0x1024;

/// Pages that one entry may have: 2^40 pages are 4 PiB, beyond any address space.
const MAX_PAGES: u64 = 1 << 40;

/// What a client sent that is no request of CRIU's page server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageServerError {
    #[error("unknown page server command {0:#x}")]
    Command(u32),
    #[error("unknown pagemap type {0}")]
    Type(u8),
    #[error("unknown pagemap flags {0:#x}")]
    Flags(u32),
    #[error("an entry of {pages} pages at {vaddr:#x} does not fit an address space")]
    Range { vaddr: u64, pages: u64 },
    #[error("the first request fits neither layout of the page server's header")]
    Layout,
    #[error("CRIU sent more after CLOSE")]
    Closed,
}

/// Which of the two headers a client sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// CRIU <= 4.1.
    Bytes24,
    /// CRIU >= 4.2.
    Bytes32,
}

impl Layout {
    /// Length of a request's header.
    pub fn header_bytes(self) -> usize {
        match self {
            Self::Bytes24 => MIN_HEADER_BYTES,
            Self::Bytes32 => MAX_HEADER_BYTES,
        }
    }
}

/// What the first 24 bytes of a sending client tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FirstHeader {
    Known(Layout),
    /// CLOSE, all else zero: a session without pagemaps, in either layout. If eight more bytes
    /// come it is the longer one.
    Close,
}

/// Tells the layout by the first request, which is OPEN2 or PARENT with an id, or CLOSE.
pub fn detect(first: &[u8; MIN_HEADER_BYTES]) -> Result<FirstHeader, PageServerError> {
    let mut words = &first[..];
    let cmd = words.get_u32_le() & 0xffff;
    let last = (&first[16..]).get_u64_le();
    match (cmd, last) {
        (PS_IOV_CLOSE | PS_IOV_FORCE_CLOSE, 0) => Ok(FirstHeader::Close),
        // In the longer header these bytes are `vaddr`, 0 in a first request; in the shorter
        // one `dst_id`, whose low byte is a type >= 1.
        (PS_IOV_OPEN | PS_IOV_OPEN2 | PS_IOV_PARENT, 0) => Ok(FirstHeader::Known(Layout::Bytes32)),
        (PS_IOV_OPEN | PS_IOV_OPEN2 | PS_IOV_PARENT, _) => Ok(FirstHeader::Known(Layout::Bytes24)),
        // Old clients' ADD and HOLE carry an id as well, and an address that may be anything:
        // only the shorter header ever came with them.
        (PS_IOV_ADD | PS_IOV_HOLE | PS_IOV_ADD_F, id) if id != 0 => {
            Ok(FirstHeader::Known(Layout::Bytes24))
        }
        _ => Err(PageServerError::Layout),
    }
}

/// Which pagemap: `pagemap-<id>.img` or `pagemap-shmem-<id>.img`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PagemapId {
    Task(u64),
    Shmem(u64),
}

impl PagemapId {
    fn decode(dst_id: u64) -> Result<Self, PageServerError> {
        let id = dst_id >> 8;
        // 1 and 2 today; the others are what clients sent before (`page-xfer.c`).
        match dst_id.to_le_bytes()[0] {
            1 | 10 | 11 | 16 | 17 => Ok(Self::Task(id)),
            2 | 27 | 28 | 29 | 32 | 33 | 34 => Ok(Self::Shmem(id)),
            other => Err(PageServerError::Type(other)),
        }
    }

    /// The id as CRIU puts it on the wire.
    pub fn dst_id(self) -> u64 {
        match self {
            Self::Task(id) => (id << 8) | 1,
            Self::Shmem(id) => (id << 8) | 2,
        }
    }

    /// The task that it is of, if it is not shared memory.
    pub fn task(self) -> Option<u64> {
        match self {
            Self::Task(id) => Some(id),
            Self::Shmem(_) => None,
        }
    }

    /// Name of its pagemap image.
    pub fn image_name(self) -> String {
        match self {
            Self::Task(id) => format!("pagemap-{id}.img"),
            Self::Shmem(id) => format!("pagemap-shmem-{id}.img"),
        }
    }
}

/// A run of pages in a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Address in the task, or offset in the segment, in bytes.
    pub vaddr: u64,
    pub pages: u64,
    /// PE_PARENT, PE_LAZY, PE_PRESENT.
    pub flags: u32,
}

impl Entry {
    /// Checks that the flags are known and that the range exists in some address space.
    pub fn new(vaddr: u64, pages: u64, flags: u32) -> Result<Self, PageServerError> {
        let known = PE_PARENT | PE_LAZY | PE_PRESENT;
        if flags == 0 || flags & !known != 0 {
            return Err(PageServerError::Flags(flags));
        }
        // With the largest page size there is.
        let fits = pages <= MAX_PAGES && vaddr.checked_add(pages << 16).is_some();
        match pages > 0 && fits {
            true => Ok(Self {
                vaddr,
                pages,
                flags,
            }),
            false => Err(PageServerError::Range { vaddr, pages }),
        }
    }

    /// Whether it has pages of its own.
    pub fn is_present(&self) -> bool {
        self.flags & PE_PRESENT != 0
    }

    /// Whether its pages are in a parent.
    pub fn is_hole(&self) -> bool {
        !self.is_present() && self.flags & PE_PARENT != 0
    }
}

/// A request of a sending client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Answered with one byte; without an answer in the old form.
    Open { id: PagemapId, answer: bool },
    /// Answered with four bytes.
    Parent(PagemapId),
    /// The pages follow if the entry is present.
    Add { id: PagemapId, entry: Entry },
    /// Answered with four bytes.
    Close,
    /// Of a lazy-pages client.
    Get { pid: u64, vaddr: u64, pages: u64 },
}

impl Request {
    /// Decodes one header of `layout.header_bytes()` bytes.
    pub fn decode(layout: Layout, mut header: &[u8]) -> Result<Self, PageServerError> {
        debug_assert_eq!(header.len(), layout.header_bytes());
        let cmd = header.get_u32_le();
        let pages = match layout {
            Layout::Bytes24 => u64::from(header.get_u32_le()),
            Layout::Bytes32 => {
                header.advance(4); // whatever was in CRIU's memory there
                header.get_u64_le()
            }
        };
        let vaddr = header.get_u64_le();
        let dst_id = header.get_u64_le();
        let add = |flags| {
            Ok(Self::Add {
                id: PagemapId::decode(dst_id)?,
                entry: Entry::new(vaddr, pages, flags)?,
            })
        };
        match cmd & 0xffff {
            PS_IOV_ADD => add(PE_PRESENT),
            PS_IOV_HOLE => add(PE_PARENT),
            PS_IOV_ADD_F => add(cmd >> 16),
            PS_IOV_OPEN => Ok(Self::Open {
                id: PagemapId::decode(dst_id)?,
                answer: false,
            }),
            PS_IOV_OPEN2 => Ok(Self::Open {
                id: PagemapId::decode(dst_id)?,
                answer: true,
            }),
            PS_IOV_PARENT => Ok(Self::Parent(PagemapId::decode(dst_id)?)),
            PS_IOV_GET => Ok(Self::Get {
                pid: dst_id,
                vaddr,
                pages,
            }),
            PS_IOV_CLOSE | PS_IOV_FORCE_CLOSE => Ok(Self::Close),
            _ => Err(PageServerError::Command(cmd)),
        }
    }

    /// As CRIU of that layout sends it.
    pub fn encode(&self, layout: Layout, out: &mut BytesMut) {
        let (cmd, pages, vaddr, dst_id) = match *self {
            Self::Open { id, answer } => (
                if answer { PS_IOV_OPEN2 } else { PS_IOV_OPEN },
                0,
                0,
                id.dst_id(),
            ),
            Self::Parent(id) => (PS_IOV_PARENT, 0, 0, id.dst_id()),
            Self::Add { id, entry } => (
                (entry.flags << 16) | PS_IOV_ADD_F,
                entry.pages,
                entry.vaddr,
                id.dst_id(),
            ),
            Self::Close => (PS_IOV_CLOSE, 0, 0, 0),
            Self::Get { pid, vaddr, pages } => (PS_IOV_GET, pages, vaddr, pid),
        };
        out.put_u32_le(cmd);
        match layout {
            // More than 2^32 pages were never sent by a CRIU with this header.
            Layout::Bytes24 => out.put_u32_le(u32::try_from(pages).unwrap_or(u32::MAX)),
            Layout::Bytes32 => {
                out.put_u32_le(0);
                out.put_u64_le(pages);
            }
        }
        out.put_u64_le(vaddr);
        out.put_u64_le(dst_id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn both(request: &Request) {
        for layout in [Layout::Bytes24, Layout::Bytes32] {
            let mut out = BytesMut::new();
            request.encode(layout, &mut out);
            assert_eq!(out.len(), layout.header_bytes());
            assert_eq!(Request::decode(layout, &out), Ok(*request));
        }
    }

    #[test]
    fn golden() {
        let mut out = BytesMut::new();
        let entry = Entry {
            vaddr: 0x400000,
            pages: 2,
            flags: PE_PRESENT,
        };
        let add = Request::Add {
            id: PagemapId::Task(100),
            entry,
        };
        add.encode(Layout::Bytes24, &mut out);
        assert_eq!(
            &out[..],
            b"\x06\0\x04\0\x02\0\0\0\0\0\x40\0\0\0\0\0\x01\x64\0\0\0\0\0\0"
        );
        let mut new = BytesMut::new();
        add.encode(Layout::Bytes32, &mut new);
        assert_eq!(
            &new[..],
            b"\x06\0\x04\0\0\0\0\0\x02\0\0\0\0\0\0\0\0\0\x40\0\0\0\0\0\x01\x64\0\0\0\0\0\0"
        );
        // The padding is undefined.
        new[4..8].fill(0xa5);
        assert_eq!(Request::decode(Layout::Bytes32, &new), Ok(add));
    }

    #[test]
    fn old_forms_and_types() {
        let decode = |cmd: u32, dst: u64| {
            let mut bytes = BytesMut::new();
            bytes.put_u32_le(cmd);
            bytes.put_u32_le(1);
            bytes.put_u64_le(0x1000);
            bytes.put_u64_le(dst);
            Request::decode(Layout::Bytes24, &bytes)
        };
        let flags = |r: Result<Request, _>| match r {
            Ok(Request::Add { entry, .. }) => entry.flags,
            other => panic!("{other:?}"),
        };
        assert_eq!(flags(decode(1, 0x101)), PE_PRESENT);
        assert_eq!(flags(decode(2, 0x101)), PE_PARENT);
        for task in [1, 10, 11, 16, 17] {
            let id = PagemapId::Task(7);
            assert_eq!(
                decode(3, (7 << 8) | task),
                Ok(Request::Open { id, answer: false })
            );
        }
        for shmem in [2, 27, 28, 29, 32, 33, 34] {
            assert_eq!(
                decode(5, (7 << 8) | shmem),
                Ok(Request::Parent(PagemapId::Shmem(7)))
            );
        }
        assert_eq!(decode(4, (7 << 8) | 3), Err(PageServerError::Type(3)));
        assert_eq!(decode(0x1024, 0), Ok(Request::Close));
        assert_eq!(decode(0x99, 0), Err(PageServerError::Command(0x99)));
        assert!(decode(0x0008_0006, 0x101).is_err(), "an unknown flag");
        assert!(decode(0x0000_0006, 0x101).is_err(), "no flag");
    }

    #[test]
    fn layouts_are_told_apart_by_the_first_request() {
        let first = [
            Request::Open {
                id: PagemapId::Task(252),
                answer: true,
            },
            Request::Parent(PagemapId::Shmem(3)),
        ];
        for request in first {
            for layout in [Layout::Bytes24, Layout::Bytes32] {
                let mut out = BytesMut::new();
                request.encode(layout, &mut out);
                if layout == Layout::Bytes32 {
                    out[4..8].fill(0xff);
                }
                let head = out[..24].try_into().unwrap();
                assert_eq!(detect(head), Ok(FirstHeader::Known(layout)), "{request:?}");
            }
        }
        let mut close = BytesMut::new();
        Request::Close.encode(Layout::Bytes24, &mut close);
        assert_eq!(
            detect(close[..].try_into().unwrap()),
            Ok(FirstHeader::Close)
        );
        assert_eq!(detect(&[0xff; 24]), Err(PageServerError::Layout));
    }

    #[test]
    fn impossible_ranges() {
        for (vaddr, pages) in [(0, 0), (u64::MAX - 4095, 1), (0, MAX_PAGES + 1)] {
            let entry = Entry {
                vaddr,
                pages,
                flags: PE_PRESENT,
            };
            let mut out = BytesMut::new();
            Request::Add {
                id: PagemapId::Task(1),
                entry,
            }
            .encode(Layout::Bytes32, &mut out);
            let decoded = Request::decode(Layout::Bytes32, &out);
            assert_eq!(decoded, Err(PageServerError::Range { vaddr, pages }));
        }
    }

    proptest! {
        #[test]
        fn requests_round_trip(id in 0..1u64 << 40, page in 0..1u64 << 36, pages in 1..1u64 << 30, flags in 1..8u32) {
            let entry = Entry { vaddr: page << 12, pages, flags };
            both(&Request::Add { id: PagemapId::Task(id), entry });
            both(&Request::Add { id: PagemapId::Shmem(id), entry });
            both(&Request::Get { pid: id, vaddr: page << 12, pages });
            both(&Request::Open { id: PagemapId::Task(id), answer: true });
        }

        #[test]
        fn arbitrary_headers_never_panic(bytes in proptest::array::uniform32(any::<u8>())) {
            let _ = detect(bytes[..24].try_into().unwrap());
            let _ = Request::decode(Layout::Bytes24, &bytes[..24]);
            let _ = Request::decode(Layout::Bytes32, &bytes);
        }
    }
}
