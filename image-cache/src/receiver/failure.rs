//! Why a link ends.

use std::time::Duration;

use image_common::link::reader::{ReadError, ShakeError};

use crate::receiver::answers::AnswerError;
use crate::receiver::reassembly::ReassemblyError;
use crate::store::memory::budget::OutOfMemory;
use crate::store::session::SessionError;

/// Why a link ended that should not have.
#[derive(Debug, thiserror::Error)]
pub enum LinkFailure {
    #[error(transparent)]
    Shake(#[from] ShakeError),
    #[error("no handshake within {0:?}")]
    ShakeTimeout(Duration),
    #[error("no handshake yet, and others need the place: closed")]
    ShakeCut,
    #[error("{0}")]
    Refused(String),
    #[error("link lost")]
    Read(#[from] ReadError),
    #[error("the link was closed before the session ended")]
    Closed,
    #[error("the proxy broke the link protocol")]
    Session(#[source] SessionError),
    #[error("a set cannot be held")]
    Limit(#[source] OutOfMemory),
    #[error("the proxy broke the link protocol")]
    Reassembly(#[from] ReassemblyError),
    #[error("the proxy broke the link protocol: {0}")]
    Protocol(String),
    #[error("the proxy broke the link protocol: more than image data on connection {0}")]
    NotData(u16),
    #[error("connection {0} of the session")]
    Connection(u16, #[source] Box<LinkFailure>),
    #[error("the answers cannot be sent, so the session ends")]
    Answers,
    #[error("the proxy broke the link protocol")]
    Unheard(#[source] AnswerError),
    #[error("{0}")]
    Own(&'static str),
    #[error("link lost, and the proxy has not connected again within {0:?} to take its answers")]
    Away(Duration),
    #[error("image-cache is stopping")]
    Stopping,
    #[error("the proxy connected anew, or an operator has decided")]
    Replaced,
    #[error("an operator of the target has decided about the set: {0}")]
    Decided(&'static str),
}

impl From<SessionError> for LinkFailure {
    fn from(e: SessionError) -> Self {
        match e {
            SessionError::Limit(e) => Self::Limit(e),
            e => Self::Session(e),
        }
    }
}

impl LinkFailure {
    /// Whether the peer never got into a session.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Shake(_) | Self::ShakeTimeout(_) | Self::ShakeCut | Self::Refused(_)
        )
    }
}
