//! Names of images, snapshots and sessions: any text. What is accepted leads nowhere but to an entry
//! of the directory it is looked up in, and is one line of a log.

use std::path::{Component, Path};

use image_common::image::{ImageName, SessionName, SnapshotId};

pub fn run(bytes: &[u8]) {
    let text = bytes.utf8_chunks().next().map_or("", |text| text.valid());
    if let Ok(name) = ImageName::new(text) {
        one_entry(name.as_str(), ImageName::MAX_BYTES);
        assert_eq!(name.as_str(), text);
    }
    if let Ok(name) = SessionName::new(text) {
        one_entry(name.as_str(), SessionName::MAX_BYTES);
        assert!(!text.starts_with(['.']) && text.is_ascii());
    }
    if let Ok(id) = SnapshotId::new(text) {
        one_line(id.as_str(), SnapshotId::MAX_BYTES);
    }
}

fn one_entry(name: &str, max: usize) {
    one_line(name, max);
    let mut components = Path::new(name).components();
    assert_eq!(components.next(), Some(Component::Normal(name.as_ref())));
    assert_eq!(components.next(), None);
}

fn one_line(name: &str, max: usize) {
    assert!(!name.is_empty() && name.len() <= max);
    assert!(!name.chars().any(char::is_control), "{name:?}");
}
