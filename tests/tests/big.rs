//! One image of more than 4 GiB (defect 8 of the original daemons: sizes cut to 32 bits). Its bytes are generated at
//! one end and compared at the other; only the cache holds them. About 5 GiB of memory, so this test stands alone.

use e2e_tests::daemons::{until, Pair};
use e2e_tests::fake::run::{check_one, Snapshot};
use e2e_tests::fake::{Content, Dialect, DumpJob, ImageSet, Protocol, Remote, Spelling};

const ID: &str = "/img/dump";

/// Rather more than 4 GiB, and no multiple of anything.
const LEN: u64 = (4 << 30) + 200_000_001;

#[test]
fn an_image_of_more_than_4_gib() {
    let pair = Pair::new();
    let protocol = Protocol::remote(Dialect::Pipe, Spelling::Empty);
    let set = ImageSet::new(vec![
        ("pagemap-7.img", Content::pattern(1, 100)),
        ("pages-1.img", Content::pattern(2, LEN)),
        ("pstree.img", Content::pattern(3, 26)),
        ("inventory.img", Content::dump_inventory(4)),
    ]);
    let begin = std::time::Instant::now();
    DumpJob::new(&protocol, &pair.source, 0)
        .gated()
        .run_with(&set, &mut |_| {})
        .expect("the dump");
    eprintln!("dumped in {:?}", begin.elapsed());
    let client = Remote::restore(&pair.target, Dialect::Pipe, Spelling::Empty);
    for image in &set.images {
        check_one(&Snapshot(&client, ID), &image.name, &image.content).expect("every byte");
    }
    client.restore_finish().expect("FINISH");
    eprintln!("dumped and restored in {:?}", begin.elapsed());
    eprintln!("proxy: VmHWM {} KiB", pair.proxy.status_kib("VmHWM"));
    assert!(pair.proxy.status_kib("VmHWM") < 64 * 1024);
    until("the memory is back", || {
        pair.cache.status_kib("VmRSS") < 128 * 1024
    });
}
