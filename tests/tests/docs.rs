//! The documentation holds together: each link leads to a file and a heading that are there, the sources name no page that
//! is gone, and the README stays a front page.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

const README_LINES: usize = 150;

fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the repository").to_owned()
}

/// All files below `dir` with one of the extensions; none of `target` or of hidden directories.
fn files(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    for entry in entries.map(|entry| entry.expect("an entry")) {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if entry.file_type().expect("its type").is_dir() {
            if name != "target" && !name.starts_with('.') {
                files(&path, extensions, found);
            }
        } else if extensions.iter().any(|ending| name.ends_with(ending)) {
            found.push(path);
        }
    }
}

fn pages() -> Vec<PathBuf> {
    let mut pages = Vec::new();
    files(&root().join("docs"), &[".md"], &mut pages);
    for name in [
        "README.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ] {
        pages.push(root().join(name));
    }
    pages
}

/// The lines that are neither in a fenced block nor indented as code.
fn prose(text: &str) -> impl Iterator<Item = &str> {
    let mut fenced = false;
    text.lines().filter(move |line| {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        !fenced && !line.starts_with("    ")
    })
}

/// What GitHub makes of a heading: lower case, words joined by hyphens, no punctuation.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        '-' | '_' => Some(c),
        c if c.is_alphanumeric() => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}

fn anchors(text: &str) -> HashSet<String> {
    let mut seen = HashMap::new();
    let headings = prose(text).filter(|line| line.starts_with('#'));
    let numbered = headings.map(|line| {
        let anchor = anchor(line.trim_start_matches('#'));
        let times = seen.entry(anchor.clone()).or_insert(0);
        *times += 1;
        match *times {
            1 => anchor,
            n => format!("{anchor}-{}", n - 1),
        }
    });
    numbered.collect()
}

/// The targets of `[text](target)`; a text may go over the end of a line.
fn links(text: &str) -> Vec<String> {
    let text = prose(text).collect::<Vec<_>>().join("\n");
    let targets = text.split("](").skip(1);
    let targets = targets.filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    targets.map(str::to_owned).collect()
}

/// `a/b/../c` as `a/c`: the file may be missing, which is what is looked for.
fn tidy(path: &Path) -> PathBuf {
    let mut tidy = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(tidy.pop()),
            part => tidy.push(part),
        }
    }
    tidy
}

#[test]
fn every_link_leads_somewhere() {
    let mut broken = Vec::new();
    let mut looked_at = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        for link in links(&text) {
            if link.contains("://") {
                continue;
            }
            looked_at += 1;
            let (path, heading) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => page.clone(),
                path => tidy(&page.parent().expect("its directory").join(path)),
            };
            let there = match heading {
                "" => target.exists(),
                heading => {
                    fs::read_to_string(&target).is_ok_and(|text| anchors(&text).contains(heading))
                }
            };
            if !there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
    assert!(looked_at > 100, "only {looked_at} links were found");
}

/// Source files that a page names in code spans, from the root of the repository.
#[test]
fn pages_name_sources_that_are_there() {
    let folders = [
        "common/",
        "image-proxy/",
        "image-cache/",
        "tests/",
        "bench/",
        "fuzz/",
    ];
    let mut broken = Vec::new();
    let mut looked_at = 0;
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        for span in prose(&text).flat_map(|line| line.split('`').skip(1).step_by(2)) {
            let is_source = span.ends_with(".rs") && folders.iter().any(|f| span.starts_with(f));
            if is_source && !span.contains(' ') {
                looked_at += 1;
                if !root().join(span).exists() {
                    broken.push(format!("{}: {span}", page.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "no such source:\n{}", broken.join("\n"));
    assert!(looked_at > 20, "only {looked_at} sources were found");
}

#[test]
fn sources_name_pages_that_are_there() {
    let mut sources = Vec::new();
    files(&root(), &[".rs", ".service", ".toml"], &mut sources);
    files(&root().join("scripts"), &[""], &mut sources);
    let mut broken = Vec::new();
    for source in sources {
        let Ok(text) = fs::read_to_string(&source) else {
            continue;
        };
        for rest in text.split("docs/").skip(1) {
            let name: String = rest
                .chars()
                .take_while(|c| c.is_ascii_alphanumeric() || "-._".contains(*c))
                .collect();
            let Some((name, _)) = name.split_once(".md") else {
                continue;
            };
            if !root().join("docs").join(format!("{name}.md")).exists() {
                broken.push(format!("{}: docs/{name}.md", source.display()));
            }
        }
    }
    assert!(broken.is_empty(), "no such page:\n{}", broken.join("\n"));
}

#[test]
fn the_readme_is_a_front_page() {
    let readme = fs::read_to_string(root().join("README.md")).expect("the README");
    let lines = readme.lines().count();
    assert!(
        lines <= README_LINES,
        "README.md has {lines} lines, the limit is {README_LINES}: move a section to docs/"
    );
    for page in pages() {
        let name = page.file_name().expect("a name").to_string_lossy();
        assert!(
            name == "README.md" || readme.contains(&format!("{name})")),
            "README.md has no link to {name}"
        );
    }
}
