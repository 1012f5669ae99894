//! What the cache answers about a set: the link hands it up to the run that sends the set.

use image_common::criu::inventory::SetKind;

use crate::failure::Failure;

/// A run, as the link knows it.
pub trait SetAnswers: Send + Sync {
    /// The cache has taken an image of the set.
    fn image_acknowledged(&self);
    /// The cache does not serve the set before its commit.
    fn gate_answered(&self);
    /// The cache has everything, and has seen what the set is.
    fn stored(&self, kind: SetKind);
    /// The cache holds the set, or why it does not.
    fn prepare_answered(&self, answer: Result<(), Failure>);
    /// A restore on the target reads the set, or is to; said again as long as that lasts.
    fn in_trial(&self);
    /// The set stands restored on the target, asleep.
    fn holding(&self);
    /// The restore has failed, or what it restored is gone.
    fn trial_failed(&self, reason: Failure);
    /// The link is lost, or the cache has refused the set.
    fn fail(&self, failure: Failure);
}
