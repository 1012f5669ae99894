//! The order of the rooms of a crate, from a file with one room per line, the upper first.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context};

/// The rooms of one crate. A file's room is the longest one that its path begins with.
#[derive(Debug)]
pub struct Rooms(Vec<PathBuf>);

impl Rooms {
    /// Reads `list`: `link` is the folder `src/link` with `src/link.rs`, `store/set` a folder in another room. What follows a
    /// `#` is a comment. `None` if there is no such file.
    pub fn read(list: &Path, src: &Path) -> anyhow::Result<Option<Self>> {
        if !list.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(list).with_context(|| list.display().to_string())?;
        let mut rooms = Vec::new();
        let mut seen = HashSet::new();
        for (line, room) in (1..).zip(text.lines()) {
            let room = room.split('#').next().unwrap_or_default().trim();
            if room.is_empty() {
                continue;
            }
            let place = format!("{}:{line}", list.display());
            if !src.join(room).is_dir() && !src.join(format!("{room}.rs")).is_file() {
                bail!(
                    "{place}: {} has neither {room}/ nor {room}.rs; correct the line or remove it",
                    src.display()
                );
            }
            if !seen.insert(room.to_owned()) {
                bail!("{place}: {room} is listed twice; remove one line");
            }
            rooms.push(PathBuf::from(room));
        }
        Ok(Some(Self(rooms)))
    }

    /// The room of a file below `src`, and its place in the list. `lib.rs` and `main.rs` lie above all rooms without being listed.
    pub fn of(&self, file: &Path) -> Option<(usize, &Path)> {
        let module = file.with_extension("");
        let module = match module.file_name().is_some_and(|name| name == "mod") {
            true => module.parent().unwrap_or(&module),
            false => &module,
        };
        let listed = self.0.iter().enumerate();
        let own = listed.filter(|(_, room)| module.starts_with(room));
        own.max_by_key(|(_, room)| room.components().count())
            .map(|(n, room)| (n + 1, room.as_path()))
            .or_else(|| {
                ["lib", "main"]
                    .map(Path::new)
                    .into_iter()
                    .find(|root| *root == module)
                    .map(|root| (0, root))
            })
    }
}
