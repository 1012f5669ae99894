//! A page server client's stream, cut anywhere: requests, and the pages behind them.
//!
//! Both daemons read it, and the link carries it as it came: what image-proxy got from CRIU is
//! what image-cache takes apart.

use crate::criu::page_server::{Layout, PageServerError, Request, MAX_HEADER_BYTES};

/// Pages of one entry that are not here yet: from so many bytes on they are left where they are,
/// to be received or moved to where they belong. Below it, to copy them is less work.
pub const LONG_BYTES: u64 = 64 << 10;

/// Worth reading at once between long entries: their headers. What is read of their pages
/// besides would be copied.
const FEW_BYTES: usize = 128;

/// Worth reading at once else: some thirty single pages with their headers.
const MANY_BYTES: usize = 128 << 10;

/// What is at the front of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Request(Request),
    /// Of the entry before, all or some.
    Pages(&'a [u8]),
}

/// Where in the stream its reader is.
#[derive(Debug)]
pub struct Requests {
    layout: Layout,
    page_bytes: u64,
    /// The begin of a header.
    head: [u8; MAX_HEADER_BYTES],
    have: usize,
    due: u64,
    /// The last entry with pages was a long one; the next is likely to be, too.
    long: bool,
    closed: bool,
}

impl Requests {
    pub fn new(layout: Layout, page_bytes: u64) -> Self {
        Self {
            layout,
            page_bytes,
            head: [0; MAX_HEADER_BYTES],
            have: 0,
            due: 0,
            long: false,
            closed: false,
        }
    }

    /// Takes the next part from the front of `bytes`; `None` when nothing is left of them, or
    /// only the begin of a header, which is remembered.
    ///
    /// # Errors
    /// No client sends that, or something came behind CLOSE. What follows means nothing then.
    pub fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Result<Option<Part<'a>>, PageServerError> {
        if bytes.is_empty() {
            return Ok(None);
        }
        if self.due > 0 {
            let n = usize::try_from(self.due).map_or(bytes.len(), |due| due.min(bytes.len()));
            let (pages, rest) = bytes.split_at(n);
            *bytes = rest;
            self.due -= n as u64;
            return Ok(Some(Part::Pages(pages)));
        }
        if self.closed {
            return Err(PageServerError::Closed);
        }
        let length = self.layout.header_bytes();
        let request = if self.have == 0 && bytes.len() >= length {
            let (header, rest) = bytes.split_at(length);
            *bytes = rest;
            Request::decode(self.layout, header)?
        } else {
            let n = bytes.len().min(length - self.have);
            let (some, rest) = bytes.split_at(n);
            *bytes = rest;
            self.head[self.have..self.have + n].copy_from_slice(some);
            self.have += n;
            if self.have < length {
                return Ok(None);
            }
            self.have = 0;
            Request::decode(self.layout, &self.head[..length])?
        };
        match request {
            Request::Add { entry, .. } if entry.is_present() => {
                // Checked by `Entry::new`: far below 2^64.
                self.due = entry.pages * self.page_bytes;
                self.long = self.due >= LONG_BYTES;
            }
            Request::Close => self.closed = true,
            _ => {}
        }
        Ok(Some(Part::Request(request)))
    }

    /// Bytes of pages that the last entry names and that have not come.
    pub fn due(&self) -> u64 {
        self.due
    }

    /// So many of them went another way.
    pub fn took(&mut self, n: usize) {
        debug_assert!(n as u64 <= self.due);
        self.due = self.due.saturating_sub(n as u64);
    }

    /// CLOSE came.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Neither a header nor an entry's pages are there in part.
    pub fn is_between(&self) -> bool {
        self.have == 0 && self.due == 0
    }

    /// How much is worth reading at once.
    pub fn ask(&self) -> usize {
        // What is due here is the short end of an entry, or a short one.
        match self.long && self.due == 0 {
            true => FEW_BYTES,
            false => MANY_BYTES,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::criu::page_server::{Entry, PagemapId, PE_PARENT, PE_PRESENT};
    use bytes::BytesMut;
    use proptest::prelude::*;

    const PAGE: usize = 4096;

    fn encode(entries: &[(bool, u64)], layout: Layout) -> (Vec<Request>, Vec<u8>, Vec<u8>) {
        let id = PagemapId::Task(7);
        let mut requests = vec![Request::Open { id, answer: true }];
        let mut vaddr = 0x1000;
        for &(present, pages) in entries {
            let flags = if present { PE_PRESENT } else { PE_PARENT };
            let entry = Entry::new(vaddr, pages, flags).unwrap();
            requests.push(Request::Add { id, entry });
            vaddr += pages * PAGE as u64;
        }
        requests.push(Request::Close);
        let (mut wire, mut all) = (BytesMut::new(), Vec::new());
        for request in &requests {
            request.encode(layout, &mut wire);
            if let Request::Add { entry, .. } = request {
                let bytes = usize::try_from(entry.pages).unwrap() * PAGE;
                let pages = (0..if entry.is_present() { bytes } else { 0 })
                    .map(|n| (n / 3 + wire.len()).to_le_bytes()[0]);
                let pages: Vec<u8> = pages.collect();
                wire.extend_from_slice(&pages);
                all.extend(pages);
            }
        }
        (requests, all, wire.to_vec())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// However the stream is cut, and whichever pages go another way.
        #[test]
        fn any_cut_gives_the_same(
            entries in proptest::collection::vec((any::<bool>(), 1..40u64), 0..10),
            wide in any::<bool>(),
            cuts in proptest::collection::vec(1..70_000usize, 1..20),
            aside in any::<bool>(),
        ) {
            let layout = if wide { Layout::Bytes32 } else { Layout::Bytes24 };
            let (requests, pages, wire) = encode(&entries, layout);
            let mut parser = Requests::new(layout, PAGE as u64);
            let (mut seen, mut got) = (Vec::new(), Vec::new());
            let mut rest = &wire[..];
            for cut in cuts.iter().cycle() {
                if rest.is_empty() {
                    break;
                }
                let n = rest.len().min(*cut);
                if aside && parser.due() > 0 {
                    let n = n.min(usize::try_from(parser.due()).unwrap());
                    got.extend_from_slice(&rest[..n]);
                    rest = &rest[n..];
                    parser.took(n);
                    continue;
                }
                let mut chunk = &rest[..n];
                rest = &rest[n..];
                while let Some(part) = parser.next(&mut chunk).unwrap() {
                    match part {
                        Part::Request(request) => seen.push(request),
                        Part::Pages(bytes) => got.extend_from_slice(bytes),
                    }
                }
                prop_assert!(chunk.is_empty());
            }
            prop_assert_eq!(seen, requests);
            prop_assert!(got == pages);
            prop_assert!(parser.is_closed() && parser.is_between());
            prop_assert_eq!(parser.next(&mut &[0][..]), Err(PageServerError::Closed));
        }

        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut parser = Requests::new(Layout::Bytes24, PAGE as u64);
            let mut rest = &bytes[..];
            while let Ok(Some(_)) = parser.next(&mut rest) {}
        }
    }

    #[test]
    fn behind_a_long_entry_little_is_read() {
        let (_, _, wire) = encode(&[(true, 16), (true, 1)], Layout::Bytes24);
        let mut parser = Requests::new(Layout::Bytes24, PAGE as u64);
        assert_eq!(parser.ask(), MANY_BYTES);
        let mut front = &wire[..48];
        while parser.next(&mut front).unwrap().is_some() {}
        assert_eq!(parser.due(), LONG_BYTES);
        parser.took(16 * PAGE);
        assert_eq!(parser.ask(), FEW_BYTES, "the next header");
        let mut front = &wire[48 + 16 * PAGE..][..24];
        while parser.next(&mut front).unwrap().is_some() {}
        assert_eq!(
            parser.ask(),
            MANY_BYTES,
            "a short entry with what follows it"
        );
    }
}
