//! Images on their way from one connection into the store.

use image_common::error_chain::chain;
use image_common::image::ImageName;
use image_common::link::codec::{Header, Message, SetNumber, StreamNumber};
use image_common::link::reader::ReadError;

use crate::receiver::connection::{unexpected, Receiver};
use crate::receiver::failure::LinkFailure;
use crate::receiver::reassembly::{Begun, Frame, Whole};
use crate::store::image::WriteError;
use crate::store::set::OpenError;

impl Receiver {
    pub async fn image_message(&mut self, message: Message) -> Result<(), LinkFailure> {
        match message {
            Message::ImageOpen {
                stream,
                set,
                path,
                mode,
                size,
            } => self.open_image(stream, set, path, mode, size).await,
            Message::ImageEnd {
                stream,
                total,
                digest,
            } => {
                let digest = self.reader.digest().map(|_| digest);
                match self.images.end(stream, total, digest)? {
                    Some(whole) => self.stored(stream, whole).await,
                    None => Ok(()), // it is forgotten, or its last bytes are on other connections
                }
            }
            Message::ImageAbort { stream, reason } if self.rounds.contains_key(&stream) => {
                tracing::warn!("the source broke the page server round off: {reason}");
                self.rounds.remove(&stream);
                Ok(())
            }
            Message::ImageAbort { stream, reason } => {
                let image = self.images.abort(stream)?;
                if let Some(image) = image {
                    tracing::warn!(%image, "the source aborted the image: {reason}");
                }
                Ok(())
            }
            other => Err(unexpected(&other)),
        }
    }

    async fn open_image(
        &mut self,
        stream: StreamNumber,
        set: SetNumber,
        path: ImageName,
        mode: u32,
        size: Option<u64>,
    ) -> Result<(), LinkFailure> {
        const O_APPEND: u32 = 0x400;
        if stream.0 == 0 || self.images.contains_key(&stream) {
            return Err(LinkFailure::Protocol(format!(
                "stream number {} is in use",
                stream.0
            )));
        }
        let most = self.store.limits.max_open_images;
        if self.images.len() >= most {
            return Err(LinkFailure::Protocol(format!(
                "more than {most} open images (--max-open-images)"
            )));
        }
        let set = self.session.set(set)?;
        tracing::debug!(snapshot = %set.snapshot, image = %path, "image begins");
        // The later write of a name is the one that counts, and an append needs what it continues.
        self.images.settled(set.number, Some(&path)).await?;
        if set.is_aborted() {
            self.images.open(stream, set, None);
            return Ok(());
        }
        let append = mode & O_APPEND != 0;
        let counted = self.session.count_image().map_err(WriteError::from);
        let opened = counted
            .map_err(OpenError::from)
            .and_then(|()| set.open_image(&path, size, append, &self.session.budget));
        match opened {
            Ok(writer) => {
                self.images.open(stream, set, Some(writer));
                Ok(())
            }
            Err(OpenError::Order(e)) => Err(LinkFailure::Protocol(e.to_string())),
            Err(OpenError::Write(e)) => {
                self.images.open(stream, set.clone(), None);
                self.refuse_image(stream, set.number, &path, &e).await
            }
        }
    }

    pub async fn data(&mut self, stream: StreamNumber, header: Header) -> Result<(), LinkFailure> {
        let length = header.length as usize;
        if self.rounds.contains_key(&stream) {
            self.images.count(length);
            return match header.sequence {
                0 => self.pages(stream, length).await,
                _ => Err(LinkFailure::Protocol(
                    "numbered pages of a round".to_owned(),
                )),
            };
        }
        let begun = self
            .images
            .begin(stream, self.connection.into(), header.sequence, length);
        let (frame, left, error) = match begun.await? {
            Begun::Forget => return self.discard(length).await,
            Begun::Refused(e) => (None, length, e),
            Begun::Receive(mut frame) => match self.receive_frame(&mut frame, length).await? {
                (_, Ok(())) => {
                    frame.digest = self.reader.digest();
                    return self.done(stream, frame).await;
                }
                (left, Err(e)) => (Some(frame), left, e),
            },
        };
        self.discard(left).await?;
        // Another connection may have given it up meanwhile.
        if let Some((set, name)) = self.images.about(stream) {
            self.refuse_image(stream, set, &name, &error).await?;
        }
        match frame {
            Some(frame) => self.done(stream, frame).await, // to be forgotten
            None => Ok(()),
        }
    }

    /// Receives one data frame. The inner error is about our memory: then so many bytes of the
    /// frame are still to be read.
    async fn receive_frame(
        &mut self,
        frame: &mut Frame,
        length: usize,
    ) -> Result<(usize, Result<(), WriteError>), ReadError> {
        if frame.is_small() {
            let mut small = vec![0; length];
            let mut done = 0;
            while done < length {
                done += self.reader.data(&mut small[done..]).await?;
            }
            self.images.count(length);
            return Ok((0, frame.put_small(&small)));
        }
        let mut left = length;
        while left > 0 {
            let spare = match frame.spare(left) {
                Ok(spare) => spare,
                Err(e) => return Ok((left, Err(e))),
            };
            let n = self.reader.data(spare).await?;
            self.images.count(n);
            frame.filled(n);
            left -= n;
        }
        Ok((0, Ok(())))
    }

    async fn done(&mut self, stream: StreamNumber, frame: Frame) -> Result<(), LinkFailure> {
        match self.images.done(frame)? {
            Some(whole) => self.stored(stream, whole).await,
            None => Ok(()),
        }
    }

    async fn stored(&mut self, stream: StreamNumber, whole: Whole) -> Result<(), LinkFailure> {
        let Whole { set, name, total } = whole;
        tracing::debug!(snapshot = %set.snapshot, image = %name, bytes = total, "image stored");
        self.answer(Message::ImageAck { stream, total }).await
    }

    /// An image that cannot be held takes its set with it: a set with a hole is of no use.
    async fn refuse_image(
        &mut self,
        stream: StreamNumber,
        set: SetNumber,
        name: &ImageName,
        error: &WriteError,
    ) -> Result<(), LinkFailure> {
        let reason = format!("image {name}: {}", chain(error));
        self.answer(Message::ImageRefused {
            stream,
            reason: reason.clone(),
        })
        .await?;
        self.abort(set, &reason).await
    }
}
