//! Why a run, a round or a link does not go on.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use image_common::error_chain::chain;

/// The kind says where the cause is. The text is for the operator, and for CRIU's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// image-cache has refused something, or broke the link protocol.
    #[error(transparent)]
    Peer(Why),
    /// The link to image-cache cannot be made, or is lost.
    #[error(transparent)]
    Link(Why),
    /// There is not enough memory, or something takes too long.
    #[error(transparent)]
    Limit(Why),
    /// image-proxy or the session stops, or something else comes first.
    #[error(transparent)]
    Stopped(Why),
    /// CRIU, or its script: it ended too early, or does what image-proxy cannot serve.
    #[error(transparent)]
    Criu(Why),
    /// The operator has asked for it, or asks for what cannot be done.
    #[error(transparent)]
    Operator(Why),
    /// A fault of image-proxy, or of the host that it runs on.
    #[error(transparent)]
    Bug(Why),
}

/// What failed, and what caused that.
#[derive(Clone, thiserror::Error)]
#[error("{what}")]
pub struct Why {
    what: String,
    #[source]
    cause: Option<Arc<dyn Error + Send + Sync>>,
}

impl fmt::Debug for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", chain(self))
    }
}

/// Two failures that say the same are the same.
impl PartialEq for Why {
    fn eq(&self, other: &Self) -> bool {
        chain(self) == chain(other)
    }
}

impl Eq for Why {}

impl From<&str> for Why {
    fn from(what: &str) -> Self {
        what.to_owned().into()
    }
}

impl From<String> for Why {
    fn from(what: String) -> Self {
        Self { what, cause: None }
    }
}

impl Failure {
    pub fn peer(what: impl Into<Why>) -> Self {
        Self::Peer(what.into())
    }

    pub fn link(what: impl Into<Why>) -> Self {
        Self::Link(what.into())
    }

    pub fn limit(what: impl Into<Why>) -> Self {
        Self::Limit(what.into())
    }

    pub fn stopped(what: impl Into<Why>) -> Self {
        Self::Stopped(what.into())
    }

    pub fn criu(what: impl Into<Why>) -> Self {
        Self::Criu(what.into())
    }

    pub fn operator(what: impl Into<Why>) -> Self {
        Self::Operator(what.into())
    }

    pub fn bug(what: impl Into<Why>) -> Self {
        Self::Bug(what.into())
    }

    /// With what caused it.
    pub fn caused_by(mut self, cause: impl Error + Send + Sync + 'static) -> Self {
        self.why().cause = Some(Arc::new(cause));
        self
    }

    /// With what it is about in front.
    pub fn of(mut self, subject: impl fmt::Display) -> Self {
        let why = self.why();
        why.what = format!("{subject}: {}", why.what);
        self
    }

    fn why(&mut self) -> &mut Why {
        match self {
            Self::Peer(why)
            | Self::Link(why)
            | Self::Limit(why)
            | Self::Stopped(why)
            | Self::Criu(why)
            | Self::Operator(why)
            | Self::Bug(why) => why,
        }
    }

    /// All of it, in one line.
    pub fn text(&self) -> String {
        chain(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_what_failed_and_its_cause_once() {
        let broken = || std::io::Error::other("broken pipe");
        let failure = Failure::link("link to cache:7000 lost").caused_by(broken());
        assert_eq!(failure.text(), "link to cache:7000 lost: broken pipe");
        let image = failure.clone().of("image pages-1.img");
        assert_eq!(
            image.text(),
            "image pages-1.img: link to cache:7000 lost: broken pipe"
        );
        assert!(matches!(image, Failure::Link(_)));
        assert_eq!(
            failure,
            Failure::link("link to cache:7000 lost").caused_by(broken())
        );
        assert_ne!(
            failure,
            Failure::peer("link to cache:7000 lost").caused_by(broken())
        );
        assert!(Error::source(&failure).is_some());
    }
}
