//! Sets of recorded images, for the tests beside this.

use std::path::Path;
use std::sync::Arc;

use image_common::criu::dialect::Dialect;

use super::*;

pub fn set() -> Set {
    of_dialect(Dialect::Stream)
}

pub fn of_dialect(dialect: Dialect) -> Set {
    let snapshot = SnapshotId::new("dump").unwrap();
    let budget = Budget::new(1 << 30);
    Set::new(
        SetNumber(1),
        snapshot,
        None,
        true,
        dialect,
        Arc::default(),
        &budget,
    )
    .unwrap()
}

/// An image of the set; it takes the place of one of its name.
pub fn put(set: &Set, name: &str, bytes: &[u8]) {
    let name = ImageName::new(name).unwrap();
    let budget = Budget::new(1 << 30);
    let mut writer = set.open_image(&name, None, false, &budget).unwrap();
    writer.put(bytes).unwrap();
    set.finish_image(writer, bytes.len() as u64).unwrap();
}

/// All images of a directory of `tests/fixtures`.
pub fn recorded(set: &Set, dir: &str) {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    for file in std::fs::read_dir(fixtures.join(dir)).unwrap() {
        let path = file.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        put(set, name, &std::fs::read(&path).unwrap());
    }
}

pub fn remove(set: &Set, name: &str) {
    let name = ImageName::new(name).unwrap();
    assert!(set.images.remove(&name), "{name}");
}
