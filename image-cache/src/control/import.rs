//! `image-cache import DIR`: images that are files on this host become a set to restore from.
//!
//! For dumps whose pages went straight to this cache's page server, without image-proxy: the
//! few other images come over by any means (they are small), and here both parts meet. A dump
//! that is all files is taken as well; what it has in `parent` becomes its own ([`chain`]).

mod chain;
mod load;

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use image_common::criu::dialect::Dialect;
use image_common::criu_io::images_dir;
use image_common::criu_io::left_over::PagesAre;
use image_common::image::{SessionName, SnapshotId};
use image_common::link::codec::SetNumber;
use image_common::link::session_id::SessionId;
use image_common::tasks::OWN_ERROR;

use crate::control::import::load::{load, LoadError};
use crate::frontend::{Frontends, ServeError};
use crate::store::session::{Session, SessionError};
use crate::store::set::restorable::{Flaw, Pages};
use crate::store::set::SetError;
use crate::store::{GatherError, NoSession, Store};

#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("reading the directory")]
    Directory(#[from] io::Error),
    #[error(transparent)]
    Set(#[from] SetError),
    #[error(transparent)]
    Gather(#[from] GatherError),
    #[error("it is a pre-dump: only a dump can be restored")]
    PreDump,
    #[error(transparent)]
    Name(#[from] NoSession),
    #[error("{OWN_ERROR}")]
    Own,
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    Parent(#[from] chain::ParentError),
    #[error(transparent)]
    Unrestorable(#[from] Flaw),
    #[error(
        "in doubt: {flaw}. The pages that came through the page server may be the only copy, so session {session} keeps them: \
         `image-cache release {id}` lets a restore try, `image-cache drop {id}` forgets them"
    )]
    Doubt {
        session: SessionName,
        id: SessionId,
        flaw: Flaw,
    },
}

/// Reads the images of `dir` into a session of their own; gives its name. Blocking.
pub fn import(
    store: &Arc<Store>,
    frontends: &Arc<Frontends>,
    dir: &OwnedFd,
    snapshot: SnapshotId,
    name: Option<SessionName>,
) -> Result<SessionName, ImportError> {
    let name = name.unwrap_or_else(SessionName::unique);
    // A number of no proxy: an import never takes the place of another one of its name.
    let mut random = [0; 8];
    let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
    let proxy = u64::from_ne_bytes(random);
    let session = store.open_session(name.clone(), proxy, "import".to_owned())?;
    // Also after a panic: the session would be connected for ever, with its name taken.
    let filled = catch_unwind(AssertUnwindSafe(|| {
        fill(store, frontends, &session, dir, snapshot)
    }));
    let outcome = filled.unwrap_or(Err(ImportError::Own));
    let reason = match &outcome {
        Ok(()) => "imported".to_owned(),
        Err(e) => image_common::error_chain::chain(e),
    };
    store.disconnect(&session, &reason);
    frontends.reconcile(store);
    outcome.map(|()| name)
}

fn fill(
    store: &Arc<Store>,
    frontends: &Arc<Frontends>,
    session: &Arc<Session>,
    dir: &OwnedFd,
    snapshot: SnapshotId,
) -> Result<(), ImportError> {
    frontends.serve_session(store, &session.name)?;
    // Gated: nothing of it is served before its pages are with it.
    let set = session.open_set(SetNumber(1), snapshot, None, true, Dialect::PageServer)?;
    let listing = images_dir::of_dump(dir, PagesAre::Here)?;
    if let Some(names) = listing.left_over_names() {
        tracing::warn!(session = %session.name, left_over = listing.left_over.len(), "not imported, as an earlier dump left them there: {names}");
    }
    for name in &listing.images {
        load(store, &set, dir, name)?;
    }
    if !set.expected_kind().is_dump() {
        return Err(ImportError::PreDump);
    }
    chain::squash(store, session, &set, dir, &listing.images)?;
    set.check(&[], store.allowed, Pages::MayCome)?;
    let (images, bytes) = set.received();
    set.complete(images, bytes)?;
    let claims = !set.tasks_without_pages().is_empty();
    // Last of all that may fail: the pages may be the only copy of a process.
    store.gather_pages(session, &set, None)?;
    if let Err(flaw) = set.judge(&[], store.allowed) {
        if !claims {
            return Err(flaw.into());
        }
        set.doubt()?;
        let (session, id) = (session.name.clone(), session.id);
        return Err(ImportError::Doubt { session, id, flaw });
    }
    set.prepare(images, bytes)?;
    set.commit()?;
    Ok(())
}
