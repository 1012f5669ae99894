//! Images that CRIU wrote as files: with `--page-server`, all but the pages are in its images
//! directory. At post-dump the action script hands us the directory, and every image file in
//! it is sent like one that came through a socket.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use image_common::images_dir;

use crate::run::Run;
use crate::sender::send_image;
use crate::session::Session;
use crate::source::Source;

const O_WRONLY: u32 = 1;

/// Sends every image file of `dir`; gives their number.
pub async fn ship(session: &Arc<Session>, run: &Arc<Run>, dir: &OwnedFd) -> io::Result<u32> {
    let mut shipped = 0;
    for name in images_dir::images(dir)? {
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
