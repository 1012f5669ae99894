//! Which restore a set is given to.

/// Tells restores apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreId(pub u64);

impl RestoreId {
    /// A restore of an earlier image-cache: no restore of this one has its number.
    pub const EARLIER: Self = Self(u64::MAX);
}

/// Whether a restore can stand still before what it built runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Holds {
    #[default]
    No,
    /// By its command line its action script is image-cache, which has not spoken yet.
    Named,
    /// Its action script has said so.
    Promised,
}

/// The restore that asks for an image of a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reader {
    /// `None`: one that is still to begin.
    pub restore: Option<RestoreId>,
    pub holds: Holds,
}

impl From<Option<RestoreId>> for Reader {
    fn from(restore: Option<RestoreId>) -> Self {
        Self {
            restore,
            holds: Holds::No,
        }
    }
}

/// A set is given to one restore at a time (unless `--keep`): from its inventory, without which
/// nothing can be restored, until it is known what became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    No,
    To(RestoreId),
    /// Its CRIU has ended, and tasks of it are left.
    Left(RestoreId),
    /// It is over, and nothing tells whether what it restored runs.
    Doubt(RestoreId),
    Restored(RestoreId),
}

impl Given {
    pub fn is_under_way(self) -> bool {
        matches!(self, Self::To(_) | Self::Left(_))
    }

    pub fn is_in_doubt(self) -> bool {
        matches!(self, Self::Doubt(_))
    }

    pub fn to(self) -> Option<RestoreId> {
        match self {
            Self::No => None,
            Self::To(id) | Self::Left(id) | Self::Doubt(id) | Self::Restored(id) => Some(id),
        }
    }
}
