//! A page server round that is being filled: a client's stream of requests and pages into the
//! page store. CRIU's own connection brings that stream ([`crate::page_server`]), or the link
//! ([`crate::receiver`]).

use image_common::criu::page_server::{Layout, PageServerError, PagemapId, Request};
use image_common::criu::requests::{Part, Requests, LONG_BYTES};

use crate::store::page_rounds::{PageError, Round};

/// Why a round cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    #[error(transparent)]
    Protocol(#[from] PageServerError),
    #[error(transparent)]
    Pages(#[from] PageError),
    #[error("pages cannot be asked for here: this page server receives")]
    Get,
    #[error("the round ends in the middle of an entry")]
    Part,
}

pub struct RoundFiller {
    requests: Requests,
    round: Round,
    current: Option<PagemapId>,
    entries: u64,
}

impl RoundFiller {
    pub fn new(layout: Layout, round: Round) -> Self {
        Self {
            requests: Requests::new(layout, round.page_bytes()),
            round,
            current: None,
            entries: 0,
        }
    }

    /// Takes what is at the front of `bytes`, all of it unless there is a request whose client
    /// waits for an answer: then that is given, and what follows is left. CLOSE is one.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Request>, FillError> {
        while let Some(part) = self.requests.next(bytes)? {
            match part {
                Part::Pages(pages) => {
                    if let Some(id) = self.current {
                        self.round.put(id, pages)?;
                    }
                }
                Part::Request(Request::Add { id, entry }) => {
                    if self.current != Some(id) {
                        // Old clients do not open (`page_server_add`).
                        self.open(id)?;
                    }
                    self.entries += 1;
                    self.round.add(id, entry)?;
                }
                Part::Request(request @ Request::Open { id, answer }) => {
                    self.open(id)?;
                    if answer {
                        return Ok(Some(request));
                    }
                }
                Part::Request(Request::Get { .. }) => return Err(FillError::Get),
                Part::Request(request @ (Request::Parent(_) | Request::Close)) => {
                    return Ok(Some(request));
                }
            }
        }
        Ok(None)
    }

    fn open(&mut self, id: PagemapId) -> Result<(), PageError> {
        self.current = Some(id);
        self.round.open(id)
    }

    /// Where the pages that come next stay, if they had better be received straight to there, at
    /// most `most` bytes. [`Self::received`] tells how many came.
    pub fn straight(&mut self, most: usize) -> Result<Option<&mut [u8]>, FillError> {
        let due = self.requests.due();
        if due < LONG_BYTES || self.round.prefers_copies() {
            return Ok(None);
        }
        let most = usize::try_from(due).map_or(most, |due| due.min(most));
        Ok(Some(self.round.spare(most)?))
    }

    /// So many bytes came into [`Self::straight`].
    pub fn received(&mut self, n: usize) -> Result<(), FillError> {
        self.requests.took(n);
        match self.current {
            Some(id) => Ok(self.round.filled(id, n)?),
            None => Ok(()),
        }
    }

    /// How much is worth reading at once.
    pub fn ask(&self) -> usize {
        self.requests.ask()
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }

    pub fn pages(&self) -> u64 {
        self.round.pages()
    }

    /// The round, if it is whole.
    pub fn finish(self) -> Result<Round, FillError> {
        match self.requests.is_between() {
            true => Ok(self.round),
            false => Err(FillError::Part),
        }
    }
}
