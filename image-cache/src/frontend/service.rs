//! What a connection of a restore is served with.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use image_common::daemon::shutdown::Shutdown;
use image_common::image::ImageName;

use crate::cli::RemoteDialect;
use crate::frontend::verdict::{Restore, Restores};
use crate::store::{Scope, Store};

/// Everything a frontend's connection needs.
#[derive(Clone)]
pub struct Service {
    pub store: Arc<Store>,
    pub scope: Scope,
    pub dialect: RemoteDialect,
    pub shutdown: Shutdown,
    pub restores: Arc<Restores>,
    /// `--remote` restores have no connection that holds them.
    pub remote_restores: Arc<Mutex<Vec<Arc<Restore>>>>,
}

impl Service {
    pub fn remote_restores(&self) -> MutexGuard<'_, Vec<Arc<Restore>>> {
        self.remote_restores
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a restore that asks for this image has its set. That is a matter of the inventory: CRIU reads it first.
    pub fn is_given(&self, restore: &Arc<Restore>, name: &ImageName) -> bool {
        let several = self.store.keeps() && !restore.set.is_tried();
        if several || !name.is_inventory() {
            return true;
        }
        let given = restore.set.give(restore.id);
        if given && restore.set.was_tried_by(restore.id) {
            restore.follow_trial();
        }
        given
    }
}
