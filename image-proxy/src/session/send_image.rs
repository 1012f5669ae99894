//! One image from CRIU to the link.
//!
//! The way of a byte: CRIU's pipe -> (splice) -> TCP send queue. CRIU puts memory pages into
//! the pipe by reference (vmsplice), so the kernel's copy into the receiver is the first one.
//! Small images, and the small last part of large ones, are copied through this process, so that several
//! share a packet. Pagemaps are copied too, because a dump may read them back.

use image_common::error_chain::chain;
use image_common::image::ImageName;
use image_common::link::codec::{Message, StreamNumber};
use image_common::link::digest::Digest;
use image_common::tasks;
use std::collections::VecDeque;
use std::sync::Arc;
use tokio::sync::oneshot;

use crate::failure::Failure;
use crate::link::image_data::ReadOutcome;
use crate::link::writer::SendError;
use crate::link::Link;
use crate::session::parent_images::{is_remembered, MAX_PAGEMAP_BYTES};
use crate::session::run::{Run, Turn};
use crate::session::Session;
use crate::transfer::source::{Available, Source};

/// Sends the image and accounts for it in the run. On failure the run fails, and what CRIU
/// still writes is refused, or drained where a refusal would kill CRIU.
pub async fn send_image(
    session: Arc<Session>,
    run: Arc<Run>,
    name: ImageName,
    mode: u32,
    source: Source,
    turn: Turn,
) {
    let sending = send_in_turn(&session, &run, &name, mode, source, turn);
    if let Err(e) = tasks::caught("sending an image", sending).await {
        run.fail(Failure::bug(e.to_string()).of(format!("image {name}")));
        run.image_dropped();
    }
}

async fn send_in_turn(
    session: &Session,
    run: &Arc<Run>,
    name: &ImageName,
    mode: u32,
    mut source: Source,
    turn: Turn,
) {
    // A second write of a name must not overtake the first.
    tokio::select! {
        () = turn.comes() => {}
        () = run.stopped() => {}
    }
    let sent = send(session, run, name, mode, &mut source).await;
    match sent {
        Ok((bytes, digest)) => {
            tracing::debug!(snapshot = %run.snapshot, image = %name, bytes, "image sent");
            run.image_ended(name, bytes, digest);
        }
        Err(reason) => {
            if let Some(reason) = reason {
                tracing::error!(snapshot = %run.snapshot, image = %name, "{}", reason.text());
                run.fail(reason.of(format!("image {name}")));
            }
            run.may_drain().await;
            source.drain().await;
            run.image_dropped();
        }
    }
}

/// Returns the image's size, and its digest if there are checksums. `Err(None)`: the run has failed already, and has the
/// reason.
async fn send(
    session: &Session,
    run: &Arc<Run>,
    name: &ImageName,
    mode: u32,
    source: &mut Source,
) -> Result<(u64, Option<u32>), Option<Failure>> {
    let link = tokio::select! {
        link = session.link() => link.map_err(Some)?,
        () = run.stopped() => return Err(None),
    };
    // The set comes before its images.
    run.wait_for(|s| (s.opened && s.may_send_more()) || s.failure().is_some())
        .await;
    let stream = link.add_stream(run.set);
    let open = Message::ImageOpen {
        stream,
        set: run.set,
        path: name.clone(),
        mode,
        size: source.size(),
    };
    link.writer().await.put(&open);
    let mut keep = (is_remembered(name) && session.keeps_pagemaps()).then(Vec::new);
    let result = copy(&link, run, stream, source, keep.as_mut()).await;
    match result {
        Ok((total, digest)) => {
            // Before the end is sent: a client that hears of the end may read the image back.
            session.remember(run, name, total, keep);
            let end = Message::ImageEnd {
                stream,
                total,
                digest: digest.unwrap_or(0),
            };
            link.writer().await.put(&end);
            link.notify();
            Ok((total, digest))
        }
        Err(Broken::Stopped) => Err(None),
        Err(Broken::Link(reason)) => Err(Some(reason)),
        Err(Broken::Send(e)) => {
            // The text of the cause is enough: that itself goes to the link.
            let reason = chain(&e);
            match e {
                SendError::Link(_) => {
                    link.lost(e);
                    Err(Some(Failure::link(reason)))
                }
                SendError::Down => Err(Some(link.why())),
                SendError::Source(_) | SendError::Stolen => {
                    let failure = Failure::criu(reason.clone());
                    link.send(&Message::ImageAbort { stream, reason }).await;
                    Err(Some(failure))
                }
            }
        }
    }
}

/// Why an image is not sent to its end.
enum Broken {
    /// The run has failed already, for a known reason.
    Stopped,
    Link(Failure),
    Send(SendError),
}

impl From<SendError> for Broken {
    fn from(e: SendError) -> Self {
        Self::Send(e)
    }
}

async fn copy(
    link: &Link,
    run: &Run,
    stream: StreamNumber,
    source: &mut Source,
    mut keep: Option<&mut Vec<u8>>,
) -> Result<(u64, Option<u32>), Broken> {
    let mut digest = Digests::default();
    let mut total = 0;
    let mut sequence = 0u32;
    loop {
        // Between frames only: a frame that has begun must be finished.
        let available = tokio::select! {
            available = source.available() => available.map_err(SendError::Source)?,
            () = run.stopped() => return Err(Broken::Stopped),
            () = link.failed() => return Err(Broken::Link(link.why())),
        };
        // The small rest of a large image too: connection 0 may be the slow one.
        let large = total > 0 || matches!(available, Available::Splice(_));
        let outcome = match link.striping() {
            Some(striping) if large && keep.is_none() => {
                match source.peek().map_err(SendError::Source)? {
                    ReadOutcome::Bytes(_) => {
                        let connection = tokio::select! {
                            connection = striping.free() => connection,
                            () = run.stopped() => return Err(Broken::Stopped),
                            () = link.failed() => return Err(Broken::Link(link.why())),
                        };
                        let (outcome, told) =
                            connection.take(stream, sequence, source, link.frame_format())?;
                        digest.later(told);
                        outcome
                    }
                    nothing_or_end => nothing_or_end,
                }
            }
            _ => {
                let frame = send_frame(link, stream, sequence, source, available, &mut keep);
                // A link that hangs within a frame is given up as a whole.
                tokio::select! {
                    sent = frame => {
                        let (outcome, frame) = sent?;
                        digest.now(frame).await.ok_or_else(|| Broken::Link(link.why()))?;
                        outcome
                    }
                    () = link.failed() => return Err(Broken::Link(link.why())),
                }
            }
        };
        // Too large to be kept: only that fact is remembered (`ParentImages::pagemap`).
        if let Some(kept) = keep.as_deref_mut() {
            kept.truncate(MAX_PAGEMAP_BYTES + 1);
        }
        match outcome {
            ReadOutcome::Bytes(n) => {
                total += n as u64;
                sequence = sequence.wrapping_add(1);
            }
            ReadOutcome::WouldBlock => {}
            ReadOutcome::End => {
                let digest = match link.frame_format().is_checked() {
                    true => Some(
                        digest
                            .whole()
                            .await
                            .ok_or_else(|| Broken::Link(link.why()))?,
                    ),
                    false => None,
                };
                return Ok((total, digest));
            }
        }
        if matches!(available, Available::Few) {
            link.notify();
        }
    }
}

/// The digest of an image, out of those of its frames. `None`: the link is down, and with it a
/// connection that had one of them.
#[derive(Default)]
struct Digests {
    whole: Digest,
    /// Frames after that, which other connections send.
    later: VecDeque<oneshot::Receiver<Digest>>,
}

impl Digests {
    async fn now(&mut self, frame: Option<Digest>) -> Option<()> {
        if let Some(frame) = frame {
            self.whole().await?;
            self.whole.then(frame);
        }
        Some(())
    }

    fn later(&mut self, told: Option<oneshot::Receiver<Digest>>) {
        self.later.extend(told);
        while let Some(frame) = self.later.front_mut().and_then(|f| f.try_recv().ok()) {
            self.whole.then(frame);
            self.later.pop_front();
        }
    }

    async fn whole(&mut self) -> Option<u32> {
        for frame in self.later.drain(..) {
            self.whole.then(frame.await.ok()?);
        }
        Some(self.whole.crc())
    }
}

/// Sends, or gathers, a frame on the first connection.
async fn send_frame(
    link: &Link,
    stream: StreamNumber,
    sequence: u32,
    source: &Source,
    available: Available,
    keep: &mut Option<&mut Vec<u8>>,
) -> Result<(ReadOutcome, Option<Digest>), SendError> {
    let mut writer = link.writer().await;
    match available {
        Available::Splice(n) if keep.is_none() => writer
            .splice_frame(stream, sequence, source.pipe(), n)
            .await
            .map(|sent| (ReadOutcome::Bytes(sent.bytes), sent.digest)),
        _ => {
            if writer.is_full() {
                writer.flush().await.map_err(SendError::Link)?;
            }
            writer.gather_image(stream, sequence, source, keep.as_deref_mut())
        }
    }
}
