//! A recorded set that CRIU restored, and one fault in it at a time.

use std::sync::Arc;
use std::time::Instant;

use image_common::criu::dialect::Dialect;
use image_common::image::ImageName;
use proptest::prelude::*;

use crate::store::set::Set;

use super::super::testing::{of_dialect, put, recorded, remove, set};
use super::*;

const COMMON: u32 = 0x5456_4319;
const MM: u32 = 0x5749_2820;
const PSTREE_MAGIC: u32 = 0x5027_3030;
const CORE: u32 = 0x5505_3847;
const PAGEMAP: u32 = 0x5608_4025;

const PRESENT: u64 = 4;
const LAZY: u64 = 2;
const PARENT: u64 = 1;

const ANON_PRIVATE: u64 = 1 | 1 << 9;
const ANON_SHARED: u64 = 1 | 1 << 8;
const HUGETLB: u64 = 0x4_0000;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn numbers(fields: &[(u64, u64)]) -> Vec<u8> {
    let mut out = Vec::new();
    for &(field, value) in fields {
        varint(&mut out, field << 3);
        varint(&mut out, value);
    }
    out
}

fn nested(field: u64, message: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    varint(&mut out, field << 3 | 2);
    varint(&mut out, message.len() as u64);
    out.extend(message);
    out
}

fn image(magic: u32, messages: &[Vec<u8>]) -> Vec<u8> {
    let mut out = COMMON.to_le_bytes().to_vec();
    out.extend(magic.to_le_bytes());
    for message in messages {
        out.extend(u32::try_from(message.len()).unwrap().to_le_bytes());
        out.extend(message);
    }
    out
}

fn vma(start: u64, end: u64, shmid: u64, flags: u64, status: u64) -> Vec<u8> {
    let fields = [(1, start), (2, end), (4, shmid), (6, flags), (7, status)];
    nested(14, &numbers(&fields))
}

fn entry(vaddr: u64, pages: u64, flags: u64) -> Vec<u8> {
    numbers(&[(1, vaddr), (2, pages), (4, flags), (5, pages)])
}

fn put_pages(set: &Set, name: &str, id: u64, entries: &[(u64, u64, u64)]) {
    let mut messages = vec![numbers(&[(1, id)])];
    messages.extend(
        entries
            .iter()
            .map(|&(at, pages, flags)| entry(at, pages, flags)),
    );
    put(set, name, &image(PAGEMAP, &messages));
    let present = entries.iter().filter(|e| e.2 & PRESENT != 0).map(|e| e.1);
    let bytes = usize::try_from(present.sum::<u64>() * 4096).unwrap();
    put(set, &format!("pages-{id}.img"), &vec![1; bytes]);
}

/// The task of [`whole`], with mappings of its own.
fn put_task(set: &Set, pid: u64, state: u64, vmas: &[Vec<u8>]) {
    let core = nested(3, &numbers(&[(1, state), (2, 0)]));
    put(set, &format!("core-{pid}.img"), &image(CORE, &[core]));
    put(set, &format!("mm-{pid}.img"), &image(MM, &[vmas.concat()]));
}

fn put_tree(set: &Set, tasks: &[(u64, &[u64])]) {
    let entry = |&(pid, threads): &(u64, &[u64])| {
        let threads = threads.iter().map(|&t| (5, t));
        numbers(&[(1, pid)].into_iter().chain(threads).collect::<Vec<_>>())
    };
    let entries: Vec<_> = tasks.iter().map(entry).collect();
    put(set, PSTREE, &image(PSTREE_MAGIC, &entries));
}

/// One task with 3 pages in two mappings.
fn small() -> Set {
    small_of(Dialect::Stream)
}

fn small_of(dialect: Dialect) -> Set {
    let set = of_dialect(dialect);
    put_tree(&set, &[(7, &[7])]);
    let vmas = [
        vma(0x1000, 0x3000, 0, 0, ANON_PRIVATE),
        vma(0x5000, 0x9000, 0, 0, ANON_PRIVATE),
    ];
    put_task(&set, 7, 1, &vmas);
    put_pages(
        &set,
        "pagemap-7.img",
        1,
        &[(0x2000, 1, PRESENT), (0x5000, 2, PRESENT)],
    );
    put(&set, "files.img", b"");
    set
}

fn judged(set: &Set) -> Result<(), Flaw> {
    set.check(&[], Allowed::default(), Pages::Here)
}

fn said(set: &Set) -> String {
    judged(set).unwrap_err().to_string()
}

fn name_of(set: &Set, prefix: &str) -> String {
    let names = set.images.named(|_| true).into_iter();
    let mut names = names.map(|image| image.name.to_string());
    let name = names.find(|n| n.starts_with(prefix) && !n.contains("shmem"));
    name.unwrap()
}

fn bytes_of(set: &Set, name: &str) -> Vec<u8> {
    set.image(name).unwrap().head(usize::MAX)
}

// --- what passes ---------------------------------------------------------------------------

#[test]
fn recorded_sets_that_criu_restored_pass() {
    for (dir, dialect) in [
        ("stream-plain/images", Dialect::Stream),
        ("page-server-incremental/squashed", Dialect::PageServer),
        ("remote-2020-plain/images/dump", Dialect::RemotePipe),
    ] {
        let set = of_dialect(dialect);
        recorded(&set, dir);
        assert_eq!(judged(&set), Ok(()), "{dir}");
    }
    assert_eq!(judged(&small()), Ok(()));
}

#[test]
fn a_recorded_chain_passes_with_its_parents_and_not_without() {
    let chain = ["dump", "pre2", "pre1"].map(|snapshot| {
        let set = of_dialect(Dialect::RemoteSocket);
        recorded(&set, &format!("remote-2018-incremental/images/{snapshot}"));
        Arc::new(set)
    });
    let [dump, parents @ ..] = &chain;
    let judged = |parents| dump.check(parents, Allowed::default(), Pages::Here);
    assert_eq!(judged(parents), Ok(()));
    for cut in [0, 1] {
        let flaw = judged(&parents[..cut]).unwrap_err();
        assert!(matches!(flaw, Flaw::Nowhere { .. }), "{cut}: {flaw}");
    }
}

/// A later CRIU may write what none here knows.
#[test]
fn images_of_no_known_criu_pass() {
    let set = small();
    for name in ["core-7.img", "mm-7.img", "pagemap-7.img", PSTREE, INVENTORY] {
        put(&set, name, b"another format");
        assert_eq!(judged(&set), Ok(()), "{name}");
    }
    let set = small();
    let mut long = MM.to_le_bytes().to_vec();
    long.extend((65u32 << 20).to_le_bytes());
    put(&set, "mm-7.img", &long);
    assert_eq!(judged(&set), Ok(()), "too long to be looked at");
    let set = small();
    let head = numbers(&[(1, 1)]);
    let unknown = image(PAGEMAP, &[head, entry(0x2000, 1, 64)]);
    put(&set, "pagemap-7.img", &unknown);
    assert_eq!(judged(&set), Ok(()), "a flag");
}

#[test]
fn a_zombie_has_its_core_alone() {
    let set = small();
    put_tree(&set, &[(7, &[7]), (8, &[8])]);
    put_task(&set, 8, 2, &[]);
    remove(&set, "mm-8.img");
    assert_eq!(judged(&set), Ok(()));
    remove(&set, "core-8.img");
    assert!(
        said(&set).contains("core-8.img is missing"),
        "{}",
        said(&set)
    );
}

/// Case 02: nothing of them is read.
#[test]
fn what_an_earlier_dump_left_is_not_judged() {
    let set = small();
    put(&set, "core-4.img", b"");
    put(&set, "mm-4.img", b"");
    put_pages(&set, "pagemap-4.img", 9, &[(0, 9, PARENT)]);
    put_pages(&set, "pagemap-shmem-4.img", 8, &[(0, 9, PRESENT)]);
    put(&set, "pages-8.img", b"of another dump");
    assert_eq!(judged(&set), Ok(()));
}

#[test]
fn huge_pages_that_were_never_touched_pass_and_so_do_shared_ones() {
    let set = small();
    let huge = vma(0x20_0000, 0x40_0000, 0, HUGETLB, ANON_PRIVATE);
    let shared = vma(0x60_0000, 0x80_0000, 5, HUGETLB, ANON_SHARED);
    let plain = vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE);
    put_task(&set, 7, 1, &[plain, huge, shared]);
    put_pages(&set, "pagemap-shmem-5.img", 5, &[(0, 512, PRESENT)]);
    assert_eq!(judged(&set), Ok(()));
}

// --- what does not -------------------------------------------------------------------------

/// Case 03.
#[test]
fn private_huge_pages_are_refused() {
    let set = small();
    let plain = vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE);
    let huge = vma(0x20_0000, 0x40_0000, 0, HUGETLB, ANON_PRIVATE);
    put_task(&set, 7, 1, &[plain, huge]);
    let pages = [(0x2000, 1, PRESENT), (0x20_0000, 512, PRESENT)];
    put_pages(&set, "pagemap-7.img", 1, &pages);
    let said = said(&set);
    assert!(
        said.contains("private huge pages: criu restore --stream cannot"),
        "{said}"
    );
    assert!(said.contains("mm-7.img, the mapping at 0x200000"), "{said}");
}

#[test]
fn pages_in_a_mapping_of_a_plugin_are_refused() {
    let set = small();
    put_task(
        &set,
        7,
        1,
        &[vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE | 1 << 27)],
    );
    assert!(said(&set).contains("a plugin makes"), "{}", said(&set));
}

/// Case 04.
#[test]
fn pages_that_stay_on_the_source_are_refused() {
    let set = small();
    put_pages(
        &set,
        "pagemap-7.img",
        1,
        &[(0x2000, 1, PRESENT), (0x5000, 2, LAZY)],
    );
    let said = said(&set);
    assert!(
        said.contains("the pages at 0x5000 were left on the source"),
        "{said}"
    );
    assert!(said.contains("post-copy is not supported yet"), "{said}");
    // Present, and lazy if a restore wants that.
    put_pages(&set, "pagemap-7.img", 1, &[(0x5000, 2, LAZY | PRESENT)]);
    assert_eq!(judged(&set), Ok(()));
}

/// Case 07.
#[test]
fn pages_that_are_in_a_parent_elsewhere_are_refused() {
    let set = small();
    put_pages(
        &set,
        "pagemap-7.img",
        1,
        &[(0x2000, 1, PRESENT), (0x5000, 2, PARENT)],
    );
    let said = said(&set);
    assert!(
        said.contains("the pages at 0x5000 are in a parent"),
        "{said}"
    );
}

#[test]
fn each_image_of_a_task_is_missed() {
    for name in [
        "core-7.img",
        "mm-7.img",
        "pagemap-7.img",
        "pages-1.img",
        "files.img",
    ] {
        let set = small();
        remove(&set, name);
        assert!(
            said(&set).contains(&format!("{name} is missing")),
            "{}",
            said(&set)
        );
    }
    let set = small();
    remove(&set, PSTREE);
    assert!(
        said(&set).contains("pstree.img is missing"),
        "{}",
        said(&set)
    );
    put(&set, "core-7.img", b"another format");
    assert_eq!(judged(&set), Ok(()), "no known CRIU's");
    put_task(&set, 7, 1, &[vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE)]);
    put_tree(&set, &[]);
    assert_eq!(judged(&set), Err(Flaw::NoTask));
    put_tree(&set, &[(7, &[7, 8])]);
    assert!(said(&set).contains("core-8.img is missing"), "a thread");
}

#[test]
fn shared_memory_is_missed() {
    let set = small();
    let plain = vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE);
    let shared = vma(0x60_0000, 0x80_0000, 5, 0, ANON_SHARED);
    put_task(&set, 7, 1, &[plain, shared]);
    let said = said(&set);
    assert!(
        said.contains("pagemap-shmem-5.img is missing: mm-7.img names it"),
        "{said}"
    );
    put_pages(&set, "pagemap-shmem-5.img", 5, &[(0, 2, PRESENT)]);
    assert_eq!(judged(&set), Ok(()));
    put(&set, "pages-5.img", &[0; 4096]);
    assert!(
        matches!(judged(&set), Err(Flaw::Size { .. })),
        "a restore would say nothing"
    );
}

#[test]
fn memory_files_of_the_wrong_size_are_refused() {
    let set = small();
    let memfd = numbers(&[(4, 8192), (5, 5)]);
    put(&set, "memfd.img", &image(0x4845_3499, &[memfd]));
    assert_eq!(judged(&set), Ok(()), "it may be inherited");
    put_pages(&set, "pagemap-shmem-5.img", 5, &[(0, 2, PRESENT)]);
    assert_eq!(judged(&set), Ok(()));
    put(&set, "pages-5.img", &[0; 4096]);
    assert!(matches!(judged(&set), Err(Flaw::Size { .. })));
}

#[test]
fn sizes_that_do_not_fit_the_pagemap_are_refused() {
    for bytes in [0, 4096, 3 * 4096 - 1, 3 * 4096 + 1, 4 * 4096] {
        let set = small();
        put(&set, "pages-1.img", &vec![1; bytes]);
        let said = said(&set);
        let expected = format!(
            "pages-1.img has {bytes} bytes, which are not the 3 pages that pagemap-7.img names"
        );
        assert_eq!(said, expected);
    }
    let set = small();
    put(&set, "pages-1.img", &[1; 3 * (64 << 10)]);
    put_task(&set, 7, 1, &[vma(0, 1 << 30, 0, 0, ANON_PRIVATE)]);
    assert_eq!(judged(&set), Ok(()), "a host of other pages");
}

#[test]
fn pages_outside_of_the_mappings_are_refused() {
    for pages in [
        [(0x3000, 1, PRESENT), (0x5000, 2, PRESENT)],
        [(0x2000, 2, PRESENT), (0x5000, 1, PRESENT)],
        [(0x5000, 2, PRESENT), (0x2000, 1, PRESENT)],
        [(0x5000, 2, PRESENT), (0x8000, 2, PRESENT)],
    ] {
        let set = small();
        put_pages(&set, "pagemap-7.img", 1, &pages);
        assert!(
            matches!(judged(&set), Err(Flaw::Outside { .. })),
            "{pages:x?}"
        );
    }
    let set = small();
    put_task(
        &set,
        7,
        1,
        &[
            vma(0x1000, 0x9000, 0, 0, ANON_PRIVATE),
            vma(0x9000, 0xa000, 0, 0, ANON_PRIVATE),
        ],
    );
    put_pages(&set, "pagemap-7.img", 1, &[(0x8000, 2, PRESENT)]);
    assert_eq!(judged(&set), Ok(()), "over the border of two");
}

#[test]
fn images_that_are_cut_off_are_refused() {
    let set = set();
    recorded(&set, "stream-plain/images");
    for prefix in ["core-", "mm-", "pagemap-", PSTREE] {
        let name = name_of(&set, prefix);
        let whole = bytes_of(&set, &name);
        for cut in [0, 6, 9, whole.len() - 1] {
            put(&set, &name, &whole[..cut]);
            let said = said(&set);
            assert_eq!(said, format!("{name}: it is cut off"), "cut at {cut}");
        }
        put(&set, &name, &whole);
    }
    assert_eq!(judged(&set), Ok(()));
    put(&set, INVENTORY, b"\x16\x31\x31\x58\x02\0\0\0\x08\xff");
    assert_eq!(said(&set), "inventory.img: it cannot be decoded");
}

/// CRIU's own tests netns-nf, netns-nft and netns-nft-ipt fail so, without an error.
#[test]
fn rules_of_a_network_namespace_are_refused_unless_allowed() {
    let set = small();
    put(&set, "nftables-9.img", b"");
    assert_eq!(judged(&set), Ok(()));
    put(
        &set,
        "nftables-9.img",
        b"table inet CRIU-1 {\n\tchain output {\n\t}\n}\n",
    );
    assert_eq!(judged(&set), Ok(()), "CRIU's lock");
    put(&set, "nftables-9.img", b"table inet own {\n}\n");
    let said = said(&set);
    assert!(
        said.contains("nftables-9.img") && said.contains("--allow nftables"),
        "{said}"
    );
    let allowed = Allowed { nftables: true };
    assert_eq!(set.check(&[], allowed, Pages::Here), Ok(()));
}

#[test]
fn pages_may_come_apart_from_an_import() {
    let set = small_of(Dialect::PageServer);
    remove(&set, "pagemap-7.img");
    remove(&set, "pages-1.img");
    let judged = |pages| set.check(&[], Allowed::default(), pages);
    assert_eq!(judged(Pages::MayCome), Ok(()));
    assert!(matches!(judged(Pages::Here), Err(Flaw::Missing { .. })));
}

#[test]
fn a_parent_may_split_a_hole() {
    let level = |id, entries: &[(u64, u64, u64)]| {
        let set = of_dialect(Dialect::RemoteSocket);
        put_pages(&set, "pagemap-7.img", id, entries);
        Arc::new(set)
    };
    let set = small_of(Dialect::RemoteSocket);
    put_pages(
        &set,
        "pagemap-7.img",
        1,
        &[(0x1000, 2, PARENT), (0x5000, 4, PARENT)],
    );
    let near = level(
        1,
        &[
            (0, 2, PRESENT),
            (0x2000, 1, PARENT),
            (0x5000, 1, PRESENT),
            (0x6000, 9, PARENT),
        ],
    );
    let far = level(
        1,
        &[
            (0x2000, 1, PRESENT),
            (0x6000, 2, PRESENT),
            (0x8000, 1, PRESENT),
        ],
    );
    let judged = |parents: &[Arc<Set>]| set.check(parents, Allowed::default(), Pages::Here);
    let nowhere = |vaddr| {
        let pagemap = "pagemap-7.img".to_owned();
        Err(Flaw::Nowhere { pagemap, vaddr })
    };
    assert_eq!(judged(&[near.clone(), far.clone()]), Ok(()));
    assert_eq!(judged(std::slice::from_ref(&near)), nowhere(0x2000));
    assert_eq!(judged(&[far]), nowhere(0x1000));
    let short = level(1, &[(0x2000, 1, PRESENT), (0x6000, 2, PRESENT)]);
    assert_eq!(judged(&[near, short]), nowhere(0x8000));
}

// --- what becomes of the set ---------------------------------------------------------------

fn counted(set: &Set) -> (u32, u64) {
    set.received()
}

#[test]
fn a_set_with_a_flaw_is_not_committed() {
    let set = small();
    put(
        &set,
        INVENTORY,
        b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01",
    );
    remove(&set, "core-7.img");
    assert!(set.judge(&[], Allowed::default()).is_err());
    let (images, bytes) = counted(&set);
    set.complete(images, bytes).unwrap();
    let refused = set.prepare(images, bytes).unwrap_err();
    assert!(
        matches!(refused, super::super::SetError::Unrestorable(_)),
        "{refused}"
    );
    assert!(!set.is_depended_on() && !set.is_in_doubt());
}

/// Its CRIU kills all the same: the set may be the only copy.
#[test]
fn a_set_with_a_flaw_and_without_a_gate_is_in_doubt() {
    let set = small();
    set.state().gated = false;
    put(
        &set,
        INVENTORY,
        b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01",
    );
    put(&set, "nftables-9.img", b"table inet own {\n}\n");
    assert!(set.judge(&[], Allowed::default()).is_err());
    let (images, bytes) = counted(&set);
    set.complete(images, bytes).unwrap();
    let inventory = ImageName::new(INVENTORY).unwrap();
    let gone = || matches!(set.lookup(&inventory, None), super::super::Lookup::Gone(_));
    assert!(set.is_in_doubt() && gone());
    set.close().unwrap();
    assert!(set.is_in_doubt() && gone());
    set.release(true).unwrap();
    assert!(!gone());
}

/// A gate that comes behind the inventory is of an image-proxy whose CRIU kills without asking.
#[test]
fn a_whole_set_that_was_gated_late_outlives_its_link() {
    for late in [false, true] {
        let set = small();
        set.state().gated = false;
        if !late {
            set.gate().unwrap();
        }
        put(
            &set,
            INVENTORY,
            b"\x16\x31\x31\x58\x04\0\0\0\x08\x02\x10\x01",
        );
        if late {
            set.gate().unwrap();
        }
        let (images, bytes) = counted(&set);
        set.complete(images, bytes).unwrap();
        let outcome = set.link_lost("the link is lost");
        let expected = match late {
            true => super::super::LinkLoss::InDoubt,
            false => super::super::LinkLoss::Aborted,
        };
        assert_eq!(outcome, expected);
        assert_eq!(set.release(false).is_ok(), late);
    }
}

// --- cost ----------------------------------------------------------------------------------

/// The tasks are frozen meanwhile. No limit of time here, as a busy machine has none: the number
/// is for who runs it with `--nocapture`.
#[test]
fn ten_thousand_mappings_and_a_thousand_tasks() {
    let many = set();
    put(&many, "files.img", b"");
    put_tree(&many, &[(7, &[7])]);
    let vmas: Vec<_> = (1..=10_000u64)
        .map(|n| vma(n << 16, (n << 16) + 0x2000, 0, 0, ANON_PRIVATE))
        .collect();
    put_task(&many, 7, 1, &vmas);
    let pages: Vec<_> = (1..=10_000u64).map(|n| (n << 16, 1, PRESENT)).collect();
    put_pages(&many, "pagemap-7.img", 1, &pages);
    let began = Instant::now();
    assert_eq!(judged(&many), Ok(()));
    println!("10,000 mappings: {:?}", began.elapsed());

    let tasks = set();
    put(&tasks, "files.img", b"");
    let pids: Vec<u64> = (100..1100).collect();
    let entries: Vec<(u64, &[u64])> = pids.iter().map(|&pid| (pid, &[][..])).collect();
    put_tree(&tasks, &entries);
    for &pid in &pids {
        put_task(&tasks, pid, 1, &vmas[..20]);
        put_pages(&tasks, &format!("pagemap-{pid}.img"), pid, &pages[..20]);
    }
    let began = Instant::now();
    assert_eq!(judged(&tasks), Ok(()));
    println!("1,000 tasks of 20 mappings: {:?}", began.elapsed());
}

proptest! {
    /// A peer may send anything.
    #[test]
    fn no_images_panic(
        which in 0usize..4,
        at in any::<prop::sample::Index>(),
        with in prop::collection::vec(any::<u8>(), 0..20),
    ) {
        let set = set();
        recorded(&set, "stream-plain/images");
        let name = name_of(&set, ["core-", "mm-", "pagemap-", PSTREE][which]);
        let mut bytes = bytes_of(&set, &name);
        let at = at.index(bytes.len());
        let end = (at + with.len()).min(bytes.len());
        bytes.splice(at..end, with);
        put(&set, &name, &bytes);
        let _ = (judged(&set), set.needed());
    }

    #[test]
    fn no_entries_panic(
        entries in prop::collection::vec((any::<u64>(), any::<u64>(), 0u64..8), 0..12),
        vmas in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 0..12),
    ) {
        let set = small();
        let mut messages = vec![numbers(&[(1, 1)])];
        messages.extend(entries.iter().map(|&(at, pages, flags)| entry(at, pages >> 20, flags)));
        put(&set, "pagemap-7.img", &image(PAGEMAP, &messages));
        let vmas: Vec<_> = vmas.iter().map(|&(a, b, status)| vma(a, b, 0, a, status)).collect();
        put_task(&set, 7, 1, &vmas);
        let _ = judged(&set);
    }
}
