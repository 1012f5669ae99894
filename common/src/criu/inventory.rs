//! What we need from `inventory.img`: does it belong to a dump or to a pre-dump, and how did the
//! pre-dump get at the pages?
//!
//! Layout: `u32` magic, `u32` length, one `inventory_entry`. A pre-dump's has no
//! `fdinfo_per_id`, and restore refuses such a one ("Too old image", `image.c`).

use prost::Message;

const INVENTORY_MAGIC: u32 = 0x5831_3116;

#[derive(Clone, PartialEq, Message)]
struct InventoryEntry {
    #[prost(uint32, optional, tag = "1")]
    img_version: Option<u32>,
    #[prost(bool, optional, tag = "2")]
    fdinfo_per_id: Option<bool>,
    /// Of pre-dumps since 3.14.
    #[prost(uint32, optional, tag = "9")]
    pre_dump_mode: Option<u32>,
}

/// `--pre-dump-mode read`, as CRIU writes it.
const READ_MODE: u32 = 2;

/// What kind of CRIU run wrote a set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetKind {
    /// Can be restored.
    Dump,
    /// Memory only: a parent at best, never restored by itself.
    PreDump,
    /// The inventory cannot be read. Treated as the only copy that it may be, unless what
    /// follows shows that it was a pre-dump.
    Unclear,
}

impl SetKind {
    const ALL: [Self; 3] = [Self::Dump, Self::PreDump, Self::Unclear];

    /// On the link, and in image-cache's journal: a number never gets another meaning.
    pub fn number(self) -> u8 {
        match self {
            Self::Dump => 1,
            Self::PreDump => 2,
            Self::Unclear => 3,
        }
    }

    pub fn of_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// A dump, as far as is known.
    pub fn is_dump(self) -> bool {
        self != Self::PreDump
    }
}

fn entry(image: &[u8]) -> Option<InventoryEntry> {
    let magic = u32::from_le_bytes(image.get(..4)?.try_into().ok()?);
    let length = u32::from_le_bytes(image.get(4..8)?.try_into().ok()?) as usize;
    let body = image.get(8..8usize.checked_add(length)?)?;
    (magic == INVENTORY_MAGIC).then(|| InventoryEntry::decode(body).ok())?
}

/// Classifies an inventory image.
pub fn kind_of(image: &[u8]) -> SetKind {
    match entry(image) {
        Some(e) if e.fdinfo_per_id == Some(true) => SetKind::Dump,
        Some(e) if e.img_version.is_some() => SetKind::PreDump,
        _ => SetKind::Unclear,
    }
}

/// Whether a CRIU that is known wrote it.
pub fn has_magic(image: &[u8]) -> bool {
    image.starts_with(&INVENTORY_MAGIC.to_le_bytes())
}

/// Whether it is of a `pre-dump --pre-dump-mode read`.
pub fn is_of_read_mode(image: &[u8]) -> bool {
    entry(image).is_some_and(|e| e.pre_dump_mode == Some(READ_MODE))
}

/// Whether an inventory image ends before its entry does: its writer was cut off.
pub fn is_cut(image: &[u8]) -> bool {
    let Some((magic, rest)) = image.split_first_chunk() else {
        return true;
    };
    if u32::from_le_bytes(*magic) != INVENTORY_MAGIC {
        return false;
    }
    match rest.split_first_chunk() {
        Some((length, body)) => body.len() < u32::from_le_bytes(*length) as usize,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both from `remote-2018-incremental`.
    #[test]
    fn recorded_inventories() {
        let pre = b"\x16\x31\x31\x58\x07\0\0\0\x08\x02\x40\xe0\xaa\xed\x0b";
        assert_eq!(kind_of(pre), SetKind::PreDump);
        let dump = b"\x16\x31\x31\x58\x24\0\0\0\x08\x02\x10\x01\x1a\x18\x08\x01\x10\x01\x18\x01\x20\x01\x28\x01\x30\x03\x38\x04\x40\x05\x48\x06\x50\x02\x58\x07\x60\x01\x20\x01\x28\x01\x30\x00";
        assert_eq!(kind_of(dump), SetKind::Dump);
    }

    /// The first one from `page-server-incremental` (CRIU 4.1.1), the other one with the mode changed.
    #[test]
    fn the_mode_of_a_pre_dump() {
        let splice = b"\x16\x31\x31\x58\x0b\0\0\0\x08\0\x40\xc0\xd4\xb4\x08\x48\x01\x62\0";
        let read = b"\x16\x31\x31\x58\x0b\0\0\0\x08\0\x40\xc0\xd4\xb4\x08\x48\x02\x62\0";
        assert!(!is_of_read_mode(&splice[..]) && is_of_read_mode(&read[..]));
        for cut in 0..read.len() {
            assert!(!is_of_read_mode(&read[..cut]));
        }
    }

    #[test]
    fn a_cut_inventory_is_noticed() {
        let pre = b"\x16\x31\x31\x58\x07\0\0\0\x08\x02\x40\xe0\xaa\xed\x0b";
        for cut in 0..pre.len() {
            assert!(is_cut(&pre[..cut]), "cut at {cut}");
        }
        assert!(!is_cut(pre));
        assert!(!is_cut(b"another format"));
    }

    #[test]
    fn what_cannot_be_read_is_treated_as_a_dump() {
        for odd in [
            &b""[..],
            b"inventory",
            b"\x16\x31\x31\x58\xff\xff\xff\xff\x08\x02",
        ] {
            assert_eq!(kind_of(odd), SetKind::Unclear);
            assert!(kind_of(odd).is_dump());
        }
    }
}
