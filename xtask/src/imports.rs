//! `cargo xtask imports`: no two files of a crate may need each other, and no room may need a room above it.
//!
//! For each crate the `use` lines and the paths of its files are followed to the files that define what they name. Code
//! for tests alone (`#[cfg(test)]`) does not count. Two things are errors:
//!
//! - A cycle: files of which each imports the next, and the last the first. `super::X` is an import of the parent by its
//!   child, and `child::X` one of the child by its parent. `mod child;` is no import, and neither is `pub use child::X`
//!   where the parent only hands X on: who imports X from the parent imports it from the child's file.
//! - An import upwards. `CRATE/rooms` lists the rooms, the upper first, one per line: a folder or a file of `src`. A file
//!   imports from its own room and from those below. Without that file only cycles are looked for.
//!
//! What the compiler finds without a path, such as a method of a type, is no import here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;

use graph::{cycles, imports, Import};
use modules::Crate;
use rooms::Rooms;

mod graph;
mod modules;
mod rooms;
mod tokens;

/// What was found in some crates.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// For people, line by line.
    pub lines: Vec<String>,
    pub files: usize,
    pub files_on_cycles: usize,
    pub upward: usize,
}

impl Findings {
    pub fn is_clean(&self) -> bool {
        self.files_on_cycles == 0 && self.upward == 0
    }
}

/// Every import of these crates from one file into another, a line each.
pub fn list(root: &Path, crates: &[PathBuf]) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    for dir in crates {
        let read = Crate::read(&root.join(dir))?;
        let src = dir.join("src");
        lines.extend(imports(&read).iter().map(|import| shown(&src, import)));
    }
    Ok(lines)
}

fn shown(src: &Path, import: &Import) -> String {
    let (from, to) = (src.join(&import.from), import.to.display());
    format!(
        "{}:{}: {} -> {to}",
        from.display(),
        import.line,
        import.path
    )
}

/// Looks at the crates in these directories of `root`.
pub fn check(root: &Path, crates: &[PathBuf]) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    for dir in crates {
        let failed = || format!("cannot read the crate {}", dir.display());
        check_crate(root, dir, &mut findings).with_context(failed)?;
    }
    Ok(findings)
}

fn check_crate(root: &Path, dir: &Path, findings: &mut Findings) -> anyhow::Result<()> {
    let read = Crate::read(&root.join(dir))?;
    let src = dir.join("src");
    let imports = imports(&read);
    findings.files += read.files().len();
    for cycle in cycles(&imports) {
        findings.files_on_cycles += cycle.len();
        findings.lines.push(format!(
            "{}: a cycle of {} files",
            src.display(),
            cycle.len()
        ));
        let names = cycle.iter().map(|file| file.display().to_string());
        findings
            .lines
            .push(format!("  {}", names.collect::<Vec<_>>().join(" ")));
        let cycle: BTreeSet<&PathBuf> = cycle.iter().collect();
        let inside = imports
            .iter()
            .filter(|i| cycle.contains(&i.from) && cycle.contains(&i.to));
        findings
            .lines
            .extend(inside.map(|import| format!("  {}", shown(&src, import))));
    }
    let list = root.join(dir).join("rooms");
    let Some(rooms) = Rooms::read(&list, &root.join(&src))? else {
        return Ok(());
    };
    for file in read.files() {
        if rooms.of(file).is_none() {
            let (file, list) = (src.join(file), dir.join("rooms"));
            let text = format!(
                "{}: in no room of {}; add its line there",
                file.display(),
                list.display()
            );
            findings.lines.push(text);
            findings.upward += 1;
        }
    }
    let mut upward: BTreeMap<(&Path, &Path), Vec<&Import>> = BTreeMap::new();
    for import in &imports {
        if let (Some((from, above)), Some((to, below))) =
            (rooms.of(&import.from), rooms.of(&import.to))
        {
            if from > to {
                upward.entry((above, below)).or_default().push(import);
            }
        }
    }
    for ((from, to), imports) in upward {
        findings.upward += imports.len();
        let text = format!(
            "{}: {} imports from {}, which lies above it",
            src.display(),
            from.display(),
            to.display()
        );
        findings.lines.push(text);
        findings.lines.extend(
            imports
                .into_iter()
                .map(|import| format!("  {}", shown(&src, import))),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests;
