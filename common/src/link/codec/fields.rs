//! The fields of a payload.

use bytes::{Buf, BufMut, BytesMut};

use crate::image::NameError;
use crate::link::codec::error::LinkError;
use crate::link::MAX_REASON_BYTES;
use crate::text::is_unseen;

/// What is left of a payload.
pub struct Fields<'a> {
    pub kind: u8,
    pub rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], LinkError> {
        let (head, tail) = self
            .rest
            .split_at_checked(n)
            .ok_or(LinkError::Short(self.kind))?;
        self.rest = tail;
        Ok(head)
    }
    pub fn u8(&mut self) -> Result<u8, LinkError> {
        Ok(self.take(1)?.get_u8())
    }
    pub fn u16(&mut self) -> Result<u16, LinkError> {
        Ok(self.take(2)?.get_u16_le())
    }
    pub fn u32(&mut self) -> Result<u32, LinkError> {
        Ok(self.take(4)?.get_u32_le())
    }
    pub fn u64(&mut self) -> Result<u64, LinkError> {
        Ok(self.take(8)?.get_u64_le())
    }
    fn str(&mut self) -> Result<&'a str, LinkError> {
        let length = usize::from(self.u16()?);
        std::str::from_utf8(self.take(length)?).map_err(|_| LinkError::Utf8(self.kind))
    }
    /// A reason: a peer's words, made harmless for a log line.
    pub fn reason(&mut self) -> Result<String, LinkError> {
        let clean = |c: char| if is_unseen(c) { '?' } else { c };
        Ok(cut(self.str()?).chars().map(clean).collect())
    }
    pub fn name<T>(&mut self, new: impl Fn(&str) -> Result<T, NameError>) -> Result<T, LinkError> {
        let kind = self.kind;
        new(self.str()?).map_err(|source| LinkError::Name { kind, source })
    }
}

pub fn put_text(out: &mut BytesMut, text: &str) {
    // Names have at most 4095 bytes and reasons MAX_REASON_BYTES.
    out.put_u16_le(u16::try_from(text.len()).unwrap_or(u16::MAX));
    out.put_slice(text.as_bytes());
}

pub fn put_reason(out: &mut BytesMut, reason: &str) {
    put_text(out, cut(reason));
}

fn cut(reason: &str) -> &str {
    let mut end = reason.len().min(MAX_REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}
