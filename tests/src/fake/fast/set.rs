//! The image sets that are dumped: real framing and magics, so that the daemons may look inside.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

use super::{expect_end, read_exactly, Dump, Restore};
use crate::fake::wire::{framed, varint};
use crate::memory::{compare, Body, PAGE};

const COMMON: u32 = 0x5456_4319;
const INVENTORY: u32 = 0x5831_3116;
const PSTREE: u32 = 0x5027_3030;
const CORE: u32 = 0x5505_3847;
const MM: u32 = 0x5749_2820;
const PAGEMAP: u32 = 0x5608_4025;
/// PE_PRESENT
const PRESENT: u64 = 4;

fn image(magics: &[u32], entries: &[Vec<u8>]) -> Vec<u8> {
    let mut out: Vec<u8> = magics
        .iter()
        .flat_map(|magic| magic.to_le_bytes())
        .collect();
    out.extend(entries.iter().flat_map(|entry| framed(entry)));
    out
}

fn numbers(fields: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for &(field, value) in fields {
        varint(field << 3, &mut out);
        varint(value, &mut out);
    }
    out
}

fn inventory() -> Vec<u8> {
    image(&[INVENTORY], &[numbers(&[(1, 2), (2, 1)])])
}

fn pstree() -> Vec<u8> {
    image(
        &[COMMON, PSTREE],
        &[numbers(&[(1, 100), (2, 0), (3, 100), (4, 100), (5, 100)])],
    )
}

/// A pagemap with one entry, its count in both fields (CRIU reads one or the other by version).
fn pagemap(pages: u64) -> Vec<u8> {
    let entry = numbers(&[(1, 0x1000_0000), (2, pages), (4, PRESENT), (5, pages)]);
    image(&[COMMON, PAGEMAP], &[numbers(&[(1, 1)]), entry])
}

/// An entry of `len` opaque bytes (field 15): what is inside is of no concern to the daemons.
fn opaque(magic: u32, len: usize) -> Vec<u8> {
    let mut entry = Vec::new();
    varint(15 << 3 | 2, &mut entry);
    varint(len as u64, &mut entry);
    entry.resize(entry.len() + len, 0x5a);
    image(&[COMMON, magic], &[entry])
}

/// One process whose memory is `body`.
pub struct OneTask<'a> {
    pub body: Body<'a>,
}

impl OneTask<'_> {
    fn pagemap(&self) -> Vec<u8> {
        pagemap(self.body.len / PAGE as u64)
    }

    /// Writes the set in CRIU's order: pagemap and pages open together, inventory last.
    pub fn dump(&self, criu: &mut Dump) -> Result<()> {
        self.dump_with(criu, || Ok(()))
    }

    /// The same; `half` is called when half of the pages are written.
    pub fn dump_with(&self, criu: &mut Dump, half: impl FnOnce() -> Result<()>) -> Result<()> {
        let pagemap = criu.create("pagemap-100.img")?;
        let pages = criu.create("pages-1.img")?;
        let (middle, end) = (self.body.len / 2, self.body.len);
        criu.pages(&pages, self.body, 0, middle)
            .context("writing pages-1.img")?;
        half()?;
        criu.pages(&pages, self.body, middle, end)
            .context("writing pages-1.img")?;
        rustix::io::write(&pagemap, &self.pagemap()).context("writing pagemap-100.img")?;
        drop((pages, pagemap));
        criu.small("core-100.img", &opaque(CORE, 1800))?;
        criu.small("mm-100.img", &opaque(MM, 500))?;
        criu.small("pstree.img", &pstree())?;
        criu.small("inventory.img", &inventory())
    }

    /// Reads the set; the pages go to `into`, over and over if they are more. Each turn that is
    /// followed by another one is checked at once, the last one is left in `into` for
    /// [`OneTask::check_last`], so that the time of an image that fits has no comparison in it.
    pub fn restore(&self, criu: &mut Restore, into: &mut [u8]) -> Result<()> {
        compare("inventory.img", &criu.small("inventory.img")?, &inventory())?;
        criu.missing("cpuinfo.img")?;
        compare("pstree.img", &criu.small("pstree.img")?, &pstree())?;
        compare(
            "core-100.img",
            &criu.small("core-100.img")?,
            &opaque(CORE, 1800),
        )?;
        compare("mm-100.img", &criu.small("mm-100.img")?, &opaque(MM, 500))?;
        let mut pages = open_memory(criu, &self.pagemap())?;
        let mut offset = 0;
        while offset < self.body.len {
            let want = self.body.at(offset);
            read_exactly(&mut pages, &mut into[..want.len()]).context("pages-1.img")?;
            offset += want.len() as u64;
            if offset < self.body.len {
                compare("pages-1.img", &into[..want.len()], want)?;
            }
        }
        expect_end(&mut pages).context("pages-1.img")
    }

    /// Reads a set whose pages, all in `into`, have the mark of whoever dumped it; gives the mark.
    pub fn restore_marked(criu: &mut Restore, into: &mut [u8]) -> Result<u64> {
        // All of them: a restore that did not ask for each has not succeeded.
        check_files(criu)?;
        let mut pages = open_memory(criu, &pagemap((into.len() / PAGE) as u64))?;
        read_exactly(&mut pages, into).context("pages-1.img")?;
        expect_end(&mut pages).context("pages-1.img")?;
        let mark = into.first_chunk().context("no pages")?;
        Ok(u64::from_ne_bytes(*mark))
    }

    /// Checks the bytes that [`OneTask::restore`] left in `into`.
    pub fn check_last(&self, into: &[u8]) -> Result<()> {
        let mut last = 0;
        while last + (self.body.at(last).len() as u64) < self.body.len {
            last += self.body.at(last).len() as u64;
        }
        let want = self.body.at(last);
        compare("pages-1.img", &into[..want.len()], want)
    }
}

/// Opens pagemap and pages together, and reads the pagemap.
fn open_memory(criu: &mut Restore, want: &[u8]) -> Result<File> {
    let mut map = File::from(criu.open("pagemap-100.img")?);
    let pages = File::from(criu.open("pages-1.img")?);
    let mut got = vec![0; want.len()];
    read_exactly(&mut map, &mut got).context("pagemap-100.img")?;
    expect_end(&mut map).context("pagemap-100.img")?;
    compare("pagemap-100.img", &got, want)?;
    Ok(pages)
}

/// The images of one task but its pagemap and pages.
fn files() -> [(&'static str, Vec<u8>); 4] {
    [
        ("inventory.img", inventory()),
        ("pstree.img", pstree()),
        ("core-100.img", opaque(CORE, 1800)),
        ("mm-100.img", opaque(MM, 500)),
    ]
}

/// Writes them as files, as a dump does whose pages go to a page server.
pub fn write_files(dir: &Path) -> Result<()> {
    for (name, bytes) in files() {
        std::fs::write(dir.join(name), bytes).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

/// Reads them, the inventory first as restore does.
pub fn check_files(criu: &mut Restore) -> Result<()> {
    for (name, bytes) in files() {
        compare(name, &criu.small(name)?, &bytes)?;
    }
    Ok(())
}

/// Many images of one page each.
pub struct ManySmall<'a> {
    pub count: usize,
    pub memory: &'a [u8],
}

impl ManySmall<'_> {
    fn nth(&self, n: usize) -> &[u8] {
        &self.memory[n * PAGE..(n + 1) * PAGE]
    }

    pub fn dump(&self, criu: &mut Dump) -> Result<()> {
        for n in 0..self.count {
            criu.small(&format!("core-{n}.img"), self.nth(n))?;
        }
        criu.small("pstree.img", &pstree())?;
        criu.small("inventory.img", &inventory())
    }

    pub fn restore(&self, criu: &mut Restore) -> Result<()> {
        criu.small("inventory.img")?;
        criu.small("pstree.img")?;
        for n in 0..self.count {
            let name = format!("core-{n}.img");
            compare(&name, &criu.small(&name)?, self.nth(n))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_have_criu_framing() {
        assert_eq!(inventory(), b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01");
        // images.md, section 2, with the count in both fields
        let map = pagemap(2);
        assert_eq!(
            map[..14],
            *b"\x19\x43\x56\x54\x25\x40\x08\x56\x02\0\0\0\x08\x01"
        );
        assert_eq!(
            map[14..],
            *b"\x0c\0\0\0\x08\x80\x80\x80\x80\x01\x10\x02\x20\x04\x28\x02"
        );
        assert_eq!(opaque(CORE, 1800).len(), 8 + 4 + 1 + 2 + 1800);
    }
}
