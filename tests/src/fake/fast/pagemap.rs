//! Reading pagemap images: those that image-cache serves, and those that `criu page-server` wrote.

use anyhow::{bail, ensure, Context, Result};

use crate::memory::PAGE;

/// Two magics, `IMG_COMMON` and the pagemap's own.
const HEAD: [u8; 8] = *b"\x19\x43\x56\x54\x25\x40\x08\x56";
pub const PE_PARENT: u64 = 1;
pub const PE_PRESENT: u64 = 4;

/// An entry of a pagemap image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    pub vaddr: u64,
    pub pages: u64,
    pub flags: u64,
}

impl Mapped {
    pub fn end(&self) -> u64 {
        self.vaddr + self.pages * PAGE as u64
    }
}

/// The number of its pages image, and its entries.
pub fn parse(image: &[u8]) -> Result<(u64, Vec<Mapped>)> {
    let mut rest = image
        .strip_prefix(&HEAD[..])
        .context("not a pagemap image")?;
    let mut pages_id = None;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (len, after) = rest.split_first_chunk().context("a cut length")?;
        let len = u32::from_le_bytes(*len) as usize;
        ensure!(len <= after.len(), "a cut entry");
        let (entry, after) = after.split_at(len);
        rest = after;
        let mut mapped = Mapped::default();
        for (field, value) in numbers(entry)? {
            match (field, pages_id) {
                (1, None) => pages_id = Some(value),
                (1, _) => mapped.vaddr = value,
                // The count is field 2, since 4.2 field 5.
                (2 | 5, _) => mapped.pages = value,
                (4, _) => mapped.flags = value,
                _ => bail!("an entry with field {field}"),
            }
        }
        if mapped != Mapped::default() {
            entries.push(mapped);
        }
    }
    Ok((pages_id.context("no head")?, entries))
}

/// The fields of a message that has only numbers.
fn numbers(mut body: &[u8]) -> Result<Vec<(u64, u64)>> {
    let mut fields = Vec::new();
    while !body.is_empty() {
        let key = varint(&mut body)?;
        ensure!(key & 7 == 0, "a field that is no number");
        fields.push((key >> 3, varint(&mut body)?));
    }
    Ok(fields)
}

fn varint(from: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = from.split_first().context("a cut number")?;
        *from = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            return Ok(value);
        }
    }
    bail!("a number without an end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_count_are_understood() {
        let image = [
            &HEAD[..],
            b"\x04\0\0\0\x08\x81\x80\x04",
            b"\x08\0\0\0\x08\x80\x80\x01\x10\x02\x20\x06",
            b"\x0a\0\0\0\x08\x80\x80\x02\x10\x03\x20\x01\x28\x03",
        ]
        .concat();
        let entry = |vaddr, pages, flags| Mapped {
            vaddr,
            pages,
            flags,
        };
        let want = vec![entry(0x4000, 2, 6), entry(0x8000, 3, 1)];
        assert_eq!(parse(&image).unwrap(), (0x10001, want));
        for cut in 1..image.len() {
            // At the ends of messages a shorter image remains.
            let short = parse(&image[..cut]);
            assert!(short.is_err() || short.unwrap().1.len() < 2, "cut at {cut}");
        }
    }
}
