//! Images that CRIU wrote as files: with `--page-server`, all but the pages are in its images
//! directory. At post-dump the action script hands us the directory, and every image file of the
//! dump in it is sent like one that came through a socket. What an earlier dump left there is not.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::criu_io::images_dir;
use image_common::criu_io::left_over::PagesAre;

use crate::session::run::Run;
use crate::session::send_image::send_image;
use crate::session::Session;
use crate::transfer::source::Source;

const O_WRONLY: u32 = 1;

/// Sends every image file of the dump in `dir`; gives their number.
pub async fn ship(session: &Arc<Session>, run: &Arc<Run>, dir: &OwnedFd) -> io::Result<u32> {
    // A CRIU with a page server writes no pages to its directory.
    let pages = match run.state().has_rounds() {
        true => PagesAre::Elsewhere,
        false => PagesAre::Here,
    };
    let listing = images_dir::of_dump(dir, pages)?;
    if let Some(names) = listing.left_over_names() {
        tracing::warn!(
            session = %session.name, snapshot = %run.snapshot, left_over = listing.left_over.len(),
            "not sent, as an earlier dump left them in CRIU's images directory: {names}"
        );
    }
    let mut shipped = 0;
    for name in listing.images {
        let Some(file) = images_dir::open(dir, &name)? else {
            continue;
        };
        let source = Source::from_file(file)?;
        let turn = run.image_begins(&name);
        send_image(session.clone(), run.clone(), name, O_WRONLY, source, turn).await;
        shipped += 1;
    }
    Ok(shipped)
}
