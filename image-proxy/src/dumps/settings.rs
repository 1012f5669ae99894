//! What the command line says of all dumps.

use std::time::Duration;

use image_common::image::SessionName;

use crate::cli::{CommitOn, Parents};
use crate::link::connect::Target;

pub struct Settings {
    pub target: Target,
    pub session: Option<SessionName>,
    pub parents: Parents,
    pub commit_on: CommitOn,
    pub commit_timeout: Duration,
    /// Before the tasks are frozen.
    pub reserve_timeout: Duration,
}
